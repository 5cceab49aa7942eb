"""A real checkpoint on real pairs: scores before training, and what real steps then did."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import note, panel_letters, regime_plane, zero_line
from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED, size
from simgrad.dynamics import Recipe, directional_score, train
from simgrad.dynamics.agreement import spearman
from simgrad.dynamics.recipe import steps_of
from simgrad.figures.stored import NotDrawn
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.typing import Float

if TYPE_CHECKING:
    from simgrad.bridge import Policy

TITLE = "A real checkpoint"
CAPTION = (
    "{model} on at most {limit} pairs of {data}, those of at most {max_length} tokens. (a) Cosines "
    "of the pairs' gradients. (b) The pairs in the plane of regimes for d_w = d_l, each by itself "
    "(without those of negative inner product). Then DPO with Adam, learning rate "
    "{learning_rate:g}, batches of {batch_size}, for {epochs} pass(es): measured Δ log π of the "
    "chosen responses (c) against CHES and (d) against the directional score, both computed before "
    "training, with rank correlations (if CHES predicted falls, (c)'s would be negative). (e) "
    "The pairs of lowest directional score: beginnings of chosen (blue) and rejected (vermilion)."
)
BEARS_ON = (
    "Whether what the papers say of one pair predicts a run on many: CHES (Razin et al., arXiv "
    "2410.08847) looks at a pair alone, the directional score at the whole run."
)


@dataclass(frozen=True)
class Source:
    """The checkpoint and the pairs of a figure.

    Attributes:
        model: a checkpoint, folder or Hub id (None: the figure is skipped).
        data: preference pairs.
        limit: pairs, those that can be used counted only.
        max_length: longest prompt and response in tokens; longer pairs are left out.
    """

    model: str | None = None
    data: str | None = None
    limit: int = 24
    max_length: int = 128


@dataclass(frozen=True)
class Config(Source):
    """What is computed, besides.

    Attributes:
        learning_rate: of Adam.
        epochs: of training.
        batch_size: pairs a step.
        worst: pairs shown in words.
    """

    learning_rate: float = 2e-6
    epochs: int = 1
    batch_size: int = 8
    worst: int = 3


@dataclass(frozen=True)
class Result:
    """Scores and changes of every pair, in nats; words of the worst."""

    cosine: Float[np.ndarray, " B"]
    over_chosen: Float[np.ndarray, " B"]
    over_rejected: Float[np.ndarray, " B"]
    ches: Float[np.ndarray, " B"]
    predicted: Float[np.ndarray, " B"]
    measured: Float[np.ndarray, " B"]
    correlations: Float[np.ndarray, " 2"]
    rows: tuple[int, ...]
    worst: tuple[int, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def inputs(config: Source) -> tuple[Any, ...]:
    """What the files are: names, sizes and times of change, for the cache.

    Raises:
        NotDrawn: no model or no data was given.
    """
    if config.model is None or config.data is None:
        raise NotDrawn("it needs a checkpoint and pairs: --model FOLDER_OR_ID --data PAIRS")
    named = [Path(name) for name in (config.model, config.data)]
    files = [file for path in named for file in (path, *sorted(path.glob("*"))) if file.is_file()]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def loaded(config: Source) -> tuple[Policy, list[Any], list[Pair], list[int]]:
    """The policy, the rows, the pairs of at most ``max_length`` tokens and their rows' numbers.

    Raises:
        ValueError: no pair is short enough.
    """
    from simgrad.bridge import encode, load, read_rows

    assert config.model is not None
    assert config.data is not None
    policy = load(config.model)
    rows = read_rows(config.data, 40 * config.limit)
    encoded = encode(rows, policy.tokenizer, policy.config.max_length)
    if not encoded.pairs:
        raise ValueError(
            f"{config.data}: no row can be used; the first: {encoded.skipped[0].reason}"
        )
    long = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in encoded.pairs]
    fits = [k for k, n in enumerate(long) if n <= config.max_length][: config.limit]
    if not fits:
        raise ValueError(
            f"{config.data}: no pair of at most {config.max_length} tokens; the shortest has "
            f"{min(long)}"
        )
    return policy, rows, [encoded.pairs[k] for k in fits], [encoded.indices[k] for k in fits]


def compute(config: Config) -> Result:
    """Score, predict, train, compare."""
    from simgrad.bridge import score

    policy, rows, pairs, index = loaded(config)
    at_once = min(config.batch_size, len(pairs))
    table = score(policy, pairs)
    batch = padded(pairs)
    steps = steps_of(config.epochs, len(pairs), at_once)
    recipe = Recipe(DPO(), optax.adam(config.learning_rate), steps, at_once)
    run = (policy.apply, policy.theta, batch, recipe)
    predicted = np.asarray(directional_score(*run).change[:, 0], float)
    measured = np.asarray(train(*run).trajectory.change[-1, :, 0], float)
    cosine, inner, sq_chosen, sq_rejected, ches = (
        np.asarray(table[name], float)
        for name in ("grad_cosine", "grad_inner", "grad_sq_chosen", "grad_sq_rejected", "ches")
    )
    worst = np.argsort(predicted, kind="stable")[: config.worst]
    return Result(
        cosine,
        inner / sq_chosen,
        inner / sq_rejected,
        ches,
        predicted,
        measured,
        np.array([spearman(ches, measured), spearman(predicted, measured)]),
        tuple(int(i) for i in index),
        tuple(int(k) for k in worst),
        *(tuple(_words(rows[index[k]], side) for k in worst) for side in ("chosen", "rejected")),
    )


def _words(row: Mapping[str, Any], side: str) -> str:
    """The beginning of a response, as one line."""
    response = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        response = response.removeprefix(prompt)
    return textwrap.shorten(response, 92, placeholder=" …")


def plot(result: Result) -> Figure:
    """Scores, regimes, predictions against measurement, the worst pairs."""
    figure, axes = plt.subplot_mosaic(
        "ab;cd;ee", figsize=size(1, 1, 0.95), height_ratios=(1, 1, 0.62), layout="constrained"
    )
    cosines, plane, left, right, words = axes.values()
    cosines.hist(result.cosine, bins=np.linspace(-1, 1, 41).tolist(), color="#444444")
    cosines.axvline(0, color=GUIDE, lw=0.7)
    cosines.set(xlabel=r"$\cos(g_w, g_l)$", ylabel="pairs", title="entanglement")
    regime_plane(plane, least=1e-2, most=10.0)
    seen = result.over_chosen > 0
    x, y = (v[seen].clip(1.1e-2, 9) for v in (result.over_chosen, result.over_rejected))
    plane.scatter(x, y, s=8, color="#444444", linewidths=0)
    plane.set_title("regimes")
    says = result.predicted
    _against(left, result.ches, result.measured, "CHES", result.correlations[0])
    _against(right, says, result.measured, "directional score (nats)", result.correlations[1])
    left.set_ylabel("measured Δ log π(chosen)\n(nats)")
    _pairs_in_words(words, result)
    panel_letters([*axes.values()])
    return figure


def _against(
    axis: Axes, x: np.ndarray, measured: np.ndarray, name: str, correlation: float
) -> None:
    axis.scatter(x, measured, s=10, color=CHOSEN, alpha=0.8, linewidths=0)
    zero_line(axis)
    if "nats" in name:
        ends = [min(x.min(), measured.min()), max(x.max(), measured.max())]
        axis.plot(ends, ends, color=GUIDE, lw=0.7, ls=":")
    axis.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=True)
    axis.locator_params(axis="x", nbins=5)
    axis.set(xlabel=name, title=f"Spearman {correlation:.2f}".replace("-", "−"))


def _pairs_in_words(axis: Axes, result: Result) -> None:
    axis.set_axis_off()
    axis.set_title("lowest predictions: predicted → measured Δ log π(chosen), nats")
    step = 1 / max(1, len(result.worst))
    for i, k in enumerate(result.worst):
        says, does = result.predicted[k], result.measured[k]
        change = f"row {result.rows[k]}: {says:+.2f} → {does:+.2f}".replace("-", "−")
        top = 1 - i * step
        for text, x, y, colour, letters in (
            (change, 0, top, "black", 6.5),
            (result.chosen[i].replace("$", r"\$"), 0.23, top, CHOSEN, 6),
            (result.rejected[i].replace("$", r"\$"), 0.23, top - 0.42 * step, REJECTED, 6),
        ):
            note(axis, text, (x, y), color=colour, va="top", fontsize=letters, in_layout=False)
