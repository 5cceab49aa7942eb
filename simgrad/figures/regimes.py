"""The plane of regimes with the worlds' pairs on it, and every objective's d_w/d_l."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad import objectives
from simgrad.drawing.draw import direct_labels, note, panel_letters, regime_plane
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS, REJECTED, size
from simgrad.pairs import Pair, padded
from simgrad.theory import pair_kernel
from simgrad.typing import Float, Int
from simgrad.worlds.percentiles import Percentiles
from simgrad.worlds.refusals import Refusals
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.verdicts import Verdicts
from simgrad.worlds.world import World

TITLE = "Regimes, pairs and objectives"
CAPTION = (
    "(a) Where pairs of four worlds stand before training (each its own first order): for d_w = "
    "d_l the chosen rises where x ≤ 1, the rejected falls where y ≤ 1; pairs with a negative inner "
    "product are ideal for all d_w, d_l > 0 and counted in the legend. An objective with another "
    "ratio r = d_w/d_l moves the corner along the hyperbola xy = 1 to (r, 1/r). (b) r of every "
    "objective that treats pairs one by one, at its defaults, as the margin m grows, half of it by "
    "a rising chosen and half by a falling rejected (responses of {tokens} tokens that start at "
    "−{start:g} nats); a line ends where d_w or d_l is no longer positive; the black line are "
    "those with r = 1 for as long as both are. (c) Share of each world's pairs that are ideal at a "
    "given r: between the two conditions of (a)."
)
BEARS_ON = (
    "The gradient condition of Yuan et al. (arXiv 2410.13828, Sec. 3) and the disentanglement band "
    "of Chen et al. (arXiv 2604.18239): which objective keeps which pair ideal is a question of "
    "one number, d_w/d_l."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        seed: of the worlds' policies and pairs.
        suffixes: lengths of the shared ending in the world ``suffix``.
        pairs: at most so many of each world.
        reach: largest margin, nats.
        start: -log π of both responses at margin 0, nats.
        tokens: response length.
    """

    seed: int = 0
    suffixes: tuple[int, ...] = (2, 8, 16)
    pairs: int = 96
    reach: float = 30.0
    start: float = 40.0
    tokens: int = 20


@dataclass(frozen=True)
class Result:
    """Ratios of the inner product, and d_w/d_l on a grid of margins (nan: not both positive)."""

    worlds: tuple[str, ...]
    owner: Int[np.ndarray, " P"]
    over_chosen: Float[np.ndarray, " P"]
    over_rejected: Float[np.ndarray, " P"]
    margins: Float[np.ndarray, " X"]
    objectives: tuple[str, ...]
    ratio: Float[np.ndarray, "O X"]


def _pairs(config: Config) -> dict[str, tuple[World, list[Pair]]]:
    suffix = Suffix()
    return {
        **{f"suffix, L = {n}": (suffix, suffix.pairs(config.seed, n)) for n in config.suffixes},
        **{w.name: (w, w.pairs(config.seed)) for w in (Verdicts(), Refusals(), Percentiles())},
    }


def compute(config: Config) -> Result:
    """Kernels of the worlds' pairs under their pretrained policies; objectives' coefficients."""
    sets, kernels = _pairs(config), []
    for world, pairs in sets.values():
        ((apply, theta),) = world.each_policy([config.seed])
        kernels.append(pair_kernel(apply, theta, padded(pairs[: config.pairs])))
    owner = np.repeat(np.arange(len(sets)), [len(kernel.inner) for kernel in kernels])
    x, y = (
        np.concatenate([np.asarray(kernel.inner / getattr(kernel, square)) for kernel in kernels])
        for square in ("sq_chosen", "sq_rejected")
    )
    names = [
        name for name in objectives.names() if not objectives.batch_coupled(objectives.get(name))
    ]
    margins = np.linspace(-config.reach, config.reach, 121)
    with jax.enable_x64(True):
        ratio = [_ratio(objectives.get(name), margins, config) for name in names]
    return Result(
        tuple(sets), owner, x.astype(float), y.astype(float), margins, tuple(names), np.stack(ratio)
    )


def _ratio(objective: objectives.Objective, margins: np.ndarray, config: Config) -> np.ndarray:
    half = jnp.asarray(margins) / 2
    reference = jnp.full((len(margins), 2), -config.start)
    lengths = jnp.full((len(margins), 2), config.tokens)
    logp = reference + jnp.stack([half, -half], -1)
    d_w, minus_d_l = np.asarray(objective.force(logp, reference, lengths)).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((d_w > 0) & (minus_d_l < 0), -d_w / minus_d_l, np.nan)


_COLOURS = ("#9ECAE1", "#4292C6", "#084594", OTHERS[0], OTHERS[1], OTHERS[2])
_MORE_COLOURS = (
    *("#8C6D31", "#7F7F7F", "#17BECF", "#9467BD"),
    *("#BCBD22", "#E377C2", "#637939", "#843C39"),
)
_MARKERS = "osD^vP"


def plot(result: Result) -> Figure:
    """The plane beside the objectives, above the share of ideal pairs."""
    figure, axes = plt.subplot_mosaic(
        "ab;ac", figsize=size(1, 1, 0.72), height_ratios=(1, 0.75), layout="constrained"
    )
    plane, ratios, share = axes.values()
    _plane(plane, result)
    _ratios(ratios, result)
    _share(share, result)
    panel_letters([plane, ratios, share])
    return figure


def _plane(axis: Axes, result: Result) -> None:
    regime_plane(axis, least=1e-2, most=10.0)
    for i, world in enumerate(result.worlds):
        mine = result.owner == i
        seen = mine & (result.over_chosen > 0)
        hidden = 1 - seen.sum() / mine.sum()
        x, y = (v[seen].clip(1.1e-2, 9) for v in (result.over_chosen, result.over_rejected))
        label = f"{world}  ({hidden:.0%} not shown)" if hidden else world
        style = {"s": 9, "marker": _MARKERS[i], "color": _COLOURS[i]}
        axis.scatter(x, y, alpha=0.75, linewidths=0, label=label, **style)
    axis.plot([1], [1], marker="x", color="black", ms=5)
    note(axis, "$d_w = d_l$", (1, 1), (5, 5), "data")
    axis.set_title("pairs before training")
    tight = {"ncols": 2, "fontsize": 6, "handletextpad": 0.2, "columnspacing": 0.8}
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), **tight)


def _ratios(axis: Axes, result: Result) -> None:
    axis.set(yscale="log", ylim=(0.04, 40))
    colours = iter([*OTHERS[:4], *_MORE_COLOURS] * 3)
    constant, labels = 0, {}
    for members, curve in _groups(result):
        known = np.flatnonzero(np.isfinite(curve))
        if np.allclose(curve[known], 1, atol=1e-6):
            constant += len(members) if len(known) else 0
            continue
        colour, last = next(colours), known[-1]
        axis.plot(result.margins, curve, color=colour, lw=1)
        if last == len(curve) - 1:
            labels["/".join(members)] = (float(np.clip(curve[last], 0.045, 38)), colour)
        else:
            end = (float(result.margins[last]), float(np.clip(curve[last], 0.05, 24)))
            note(axis, members[0], end, (0, 3), "data", fontsize=6, color=colour, ha="center")
    axis.axhline(1, color="black", lw=1.4)
    labels[f"{constant} others"] = (1.0, "black")
    direct_labels(axis, float(result.margins[-1]), labels, gap=0.075)
    axis.set(xlabel="margin m (nats)", ylabel=r"$r = d_w/d_l$", title="r of the objectives")
    axis.set_xlim(result.margins[0], result.margins[-1])


def _groups(result: Result) -> list[tuple[list[str], np.ndarray]]:
    """Names of objectives whose curves coincide, with their curve."""
    groups: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for name, curve in zip(result.objectives, result.ratio, strict=True):
        key = np.round(np.log(np.nan_to_num(curve, nan=1e9)), 4).tobytes()
        groups.setdefault(key, ([], curve))[0].append(name)
    return list(groups.values())


def _share(axis: Axes, result: Result) -> None:
    r = np.geomspace(0.05, 20, 200)
    labels = {}
    for i, world in enumerate(result.worlds):
        x, y = result.over_chosen[result.owner == i], result.over_rejected[result.owner == i]
        ideal = ((x[:, None] <= r) & (y[:, None] <= 1 / r)).mean(0)
        axis.plot(r, ideal, color=_COLOURS[i], lw=1.1)
        labels[world] = (float(ideal[-1]), _COLOURS[i])
    axis.set(xscale="log", xlim=(r[0], r[-1]), ylim=(0, 1.04))
    axis.set(xlabel=r"$r = d_w/d_l$", ylabel="share of ideal pairs", title="who stays ideal")
    axis.axvline(1, color=GUIDE, lw=0.7)
    note(axis, "chosen falls", (0.055, 0.04), system="data", color=CHOSEN)
    note(axis, "rejected rises", (18, 0.04), system="data", color=REJECTED, ha="right")
    direct_labels(axis, float(r[-1]), labels, gap=0.11)
