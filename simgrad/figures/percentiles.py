"""Which score predicts who falls: one pair alone against a real, joint run."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import dots, labelled_bands, panel_letters, zero_line
from simgrad.drawing.style import GUIDE, OTHERS, size
from simgrad.dynamics.agreement import percentile_means, spearman
from simgrad.experiments.percentiles import SCORES, compared
from simgrad.typing import Float
from simgrad.worlds.percentiles import Percentiles

TITLE = "Which score predicts displacement"
CAPTION = (
    "World “percentiles”: {n_pairs} pairs of varied kinds and lengths. (a) Rank correlation of "
    "each prediction with the measured Δ log π of the chosen responses (1: perfect), when each "
    "pair is trained alone by SGD and when all are trained together by SGD or Adam; means with 95 "
    "% over {count} seeds. (b), (c) Mean Δ log π of the eighth of the pairs around five "
    "percentiles of a score, those said to fall most on the right. In joint runs the exact gaps of "
    "a pair alone still rank fairly, CHES hardly; scores that see all pairs come near the rerun."
)
BEARS_ON = (
    "The percentile test of CHES (Razin et al., arXiv 2410.08847, Sec. 5), repeated with exact "
    "gradients and in joint training, where CHES does not order the pairs and the directional "
    "score does."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        seeds: of policies and pairs.
        n_pairs: preference pairs.
        predictors: names in :data:`simgrad.dynamics.PREDICTORS`.
        shown: those of the panels by percentile.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    n_pairs: int = 96
    predictors: tuple[str, ...] = (
        "chosen length",
        *SCORES,
        "two big steps",
        "kernel flow",
        "rerun, other order",
    )
    shown: tuple[str, ...] = ("CHES", "full gap", "directional")


@dataclass(frozen=True)
class Result:
    """Rank correlations (nan: a prediction means nothing), mean changes by percentile (nats)."""

    settings: tuple[str, ...]
    predictors: tuple[str, ...]
    shown: tuple[str, ...]
    correlation: Float[np.ndarray, "settings predictors seeds"]
    windows: Float[np.ndarray, "settings shown seeds 5"]


def compute(config: Config) -> Result:
    """Train, predict, compare, for every seed."""
    world = Percentiles(n_pairs=config.n_pairs)
    correlation: dict[str, list] = {}
    windows: dict[str, list] = {}
    for label, _, _, found in compared(world, config.seeds, config.predictors):
        guesses = found.predicted
        row = [
            spearman(guesses[p], found.measured) if p in guesses else np.nan
            for p in config.predictors
        ]
        correlation.setdefault(label, []).append(row)
        means = [percentile_means(guesses[p], found.measured) for p in config.shown]
        windows.setdefault(label, []).append(means)
    numbers = (np.array([*some.values()]).swapaxes(1, 2) for some in (correlation, windows))
    return Result(tuple(correlation), config.predictors, config.shown, *numbers)


_MARKS = (("o", "#000000"), ("s", OTHERS[0]), ("D", OTHERS[1]))
"""Marker and colour of each setting."""


def plot(result: Result) -> Figure:
    """Correlations on the left, two settings by percentile on the right."""
    figure, axes = plt.subplot_mosaic(
        "ab;ac", figsize=size(1, 1, 0.52), width_ratios=(1.25, 1), layout="constrained"
    )
    left, top, bottom = axes.values()
    _correlations(left, result)
    for axis, setting in ((top, 0), (bottom, len(result.settings) - 1)):
        _percentiles(axis, result, setting)
    bottom.set_xlabel("percentile (100: said to fall most)")
    panel_letters([left, top, bottom])
    return figure


def _correlations(axis: Axes, result: Result) -> None:
    names = list(result.predictors)
    for k, (setting, (marker, colour)) in enumerate(zip(result.settings, _MARKS, strict=False)):
        runs = result.correlation[k].T
        dots(axis, names, runs, colour, setting, shift=0.22 * (k - 1), marker=marker)
    axis.axvline(0, color=GUIDE, lw=0.7)
    axis.set(xlim=(-1.02, 1.04), xlabel="Spearman with measured Δ log π")
    axis.set_title("predictions")
    for height in range(len(names) - 1):
        axis.axhline(height + 0.5, color="#EEEEEE", lw=0.5, zorder=0)
    axis.legend(loc="lower left", handletextpad=0.1, fontsize=6.5, borderaxespad=0.2)


def _percentiles(axis: Axes, result: Result, setting: int) -> None:
    x = np.arange(5) * 25.0
    colours = (OTHERS[2], OTHERS[3], "black")
    lines = zip(result.shown, result.windows[setting], colours, strict=False)
    labelled_bands(axis, x, {name: (runs, colour) for name, runs, colour in lines}, gap=0.13)
    zero_line(axis)
    axis.set_xticks(x)
    axis.set(ylabel="mean Δ log π(chosen)\n(nats)", title=result.settings[setting])
