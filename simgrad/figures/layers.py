"""In which layers, and in which matrices, the entanglement of a pair sits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import note, panel_letters, panels, zero_line
from simgrad.drawing.style import CHOSEN, GUIDE
from simgrad.pairs import Batch, in_chunks, padded
from simgrad.theory.kernel import by_layer, by_matrix, pair_kernel_blocks
from simgrad.typing import Float
from simgrad.worlds.percentiles import Percentiles
from simgrad.worlds.suffix import Suffix

TITLE = "Which layers carry the entanglement"
CAPTION = (
    "Each block's share of ‖g_w‖² (blue) and of ⟨g_w,g_l⟩/‖g_w‖² (black; the total is the pair's x "
    "in the plane of regimes), medians over {pairs} pairs with quartiles, before training, in two "
    "worlds. Top: by layer; bottom: by kind of matrix. A score that reads the unembedding alone "
    "(the head gap, CHES) sees the last bar only."
)
BEARS_ON = (
    "Whether the head suffices: CHES (Razin et al., arXiv 2410.08847) is the head's part of the "
    "gap with all prediction errors set to 1."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        pairs: of each subject.
        suffix: shared tokens in the world ``suffix``.
        seed: of policies and pairs.
    """

    pairs: int = 24
    suffix: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Quartiles over pairs of each block's part of ‖g_w‖² and ⟨g_w,g_l⟩, over the pair's ‖g_w‖²."""

    subjects: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    matrices: tuple[tuple[str, ...], ...]
    by_layer: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]
    by_matrix: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]


def compute(config: Config) -> Result:
    """Block kernels of every subject's pairs."""
    found: dict[str, dict[str, Any]] = {}
    suffix, percentiles = Suffix(), Percentiles()
    for name, world, pairs in (
        (f"suffix, L = {config.suffix}", suffix, suffix.pairs(config.seed, config.suffix)),
        ("percentiles", percentiles, percentiles.pairs(config.seed)),
    ):
        ((apply, theta),) = world.each_policy([config.seed])
        found[name] = blocks_of(apply, theta, padded(pairs[: config.pairs]))
    return summary(found)


def summary(found: dict[str, dict[str, Any]]) -> Result:
    """Quartiles by layer and by matrix of every subject's block kernels."""
    layers = [_in_order(by_layer(blocks)) for blocks in found.values()]
    matrices = [by_matrix(blocks) for blocks in found.values()]
    return Result(
        subjects=tuple(found),
        layers=tuple(tuple(x) for x in layers),
        matrices=tuple(tuple(x) for x in matrices),
        by_layer=tuple(_quartiles(x) for x in layers),
        by_matrix=tuple(_quartiles(x) for x in matrices),
    )


def blocks_of(apply: Any, theta: Any, batch: Batch) -> dict[str, Any]:
    """Kernels of every block of parameters, a few pairs at a time."""
    return in_chunks(lambda some: pair_kernel_blocks(apply, theta, some), batch)


def _in_order(layers: dict[str, Any]) -> dict[str, Any]:
    """Embeddings, layers, last norm, unembedding."""
    last = {name: layers[name] for name in ("final_norm", "unembedding") if name in layers}
    return {name: block for name, block in layers.items() if name not in last} | last


def _quartiles(groups: dict[str, Any]) -> tuple:
    """Quartiles of each block's part of ‖g_w‖² and of ⟨g_w,g_l⟩, over the whole ‖g_w‖²."""
    whole = sum(np.asarray(block.sq_chosen, float) for block in groups.values())
    parts = (
        (np.asarray(b.sq_chosen, float) / whole, np.asarray(b.inner, float) / whole)
        for b in groups.values()
    )
    return tuple(
        tuple(tuple(np.quantile(x, [0.25, 0.5, 0.75]).tolist()) for x in pair) for pair in parts
    )


def plot(result: Result) -> Figure:
    """Layers above, matrices below; one column a subject."""
    columns = len(result.subjects)
    figure, axes = panels(2, columns, 0.42 * columns, squeeze=False)
    for i, subject in enumerate(result.subjects):
        _bars(axes[0, i], list(result.layers[i]), np.array(result.by_layer[i]))
        _bars(axes[1, i], list(result.matrices[i]), np.array(result.by_matrix[i]))
        axes[0, i].set_title(subject)
    for axis in axes[:, 0]:
        axis.set_ylabel(r"share of $\|g_w\|^2$")
    for height, text, colour in (
        (0.97, r"$\|g_w\|^2$", CHOSEN),
        (0.85, r"$\langle g_w, g_l\rangle$", "black"),
    ):
        note(axes[0, 0], text, (0.4, height), color=colour, va="top")
    panel_letters(axes[0])
    return figure


def _bars(axis: Axes, names: list[str], quartiles: Float[np.ndarray, "blocks 2 3"]) -> None:
    place, many = np.arange(len(names)), len(names) > 16
    for k, (colour, shift) in enumerate(((CHOSEN, -0.2), ("black", 0.2))):
        low, middle, high = quartiles[:, k].T
        reach = np.maximum([middle - low, high - middle], 0)
        line = {"lw": 0.3 if many else 0.6, "ecolor": GUIDE}
        axis.bar(place + shift, middle, 0.4, color=colour, yerr=reach, error_kw=line)
    zero_line(axis)
    short = [_brief(name) for name in names]
    shown = [
        i for i, s in enumerate(short) if not (many and s.isdigit()) or int(s) % 5 == 0 < int(s)
    ]
    slanted = {"rotation": 55, "ha": "right", "rotation_mode": "anchor", "fontsize": 6}
    axis.set_xticks(shown, [short[i] for i in shown], **slanted)


def _brief(name: str) -> str:
    for long, short in (("layer ", ""), ("attention/", "att. "), ("final_", ""), ("_", " ")):
        name = name.replace(long, short)
    return name
