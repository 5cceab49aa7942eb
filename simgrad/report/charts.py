"""Figures of a score table's report: distributions, plane of regimes, pull on the chosen."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simgrad.drawing.draw import RATIOS, note, number, panels, shade_regimes, ticks
from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED
from simgrad.report.mitigations import Strength
from simgrad.report.numbers import RegimeMap, Score

_INK, _IDEAL = "#333333", "#4d4d4d"
_COLUMNS = 3
MOST_TICKS = 2000
"""Pairs up to which each has a tick of its own below a histogram."""
_MARKS = {
    "ideal": ("o", _IDEAL),
    "both_fall": ("v", CHOSEN),
    "both_rise": ("^", REJECTED),
    "reversed": ("X", "#000000"),
}
"""Marker and colour of each regime."""


def distributions(scores: tuple[Score, ...]) -> Figure:
    """A histogram per score over the bulk of its range, with a tick below for every pair.

    Outliers are counted at the edge.
    """
    rows = -(-len(scores) // _COLUMNS)
    figure, axes = panels(rows, _COLUMNS, 0.63, squeeze=False)
    for axis, score in zip(axes.flat, scores, strict=False):
        _histogram(axis, score)
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    return figure


def _histogram(axis: Axes, score: Score) -> None:
    sides = {"predicted_dlogp_chosen": CHOSEN, "predicted_dlogp_rejected": REJECTED}
    axis.set_title(_maths(score.label), fontsize=7, pad=12)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(labelsize=6)
    values, texts = score.finite, ["no finite value"]
    if len(values):
        texts = _bars(axis, values, sides.get(score.name, GUIDE))
        axis.set_xlabel(score.unit, fontsize=5.5, labelpad=1)
    note(axis, " · ".join(texts), (0, 1.02), fontsize=5.5, color="#666666", va="bottom")


def _bars(axis: Axes, values: np.ndarray, colour: str) -> list[str]:
    """Draw the bulk of the values; returns what is said above: median, and counts of outliers."""
    low, high = _bulk(values)
    inside = values[(values >= low) & (values <= high)]
    bins = int(np.clip(2 * len(inside) ** (1 / 3), 5, 40))
    counts, _, _ = axis.hist(inside, bins=bins, range=(low, high), color=colour, alpha=0.75, lw=0)
    top, middle = max(float(np.max(counts)), 1.0), float(np.median(values))
    if len(values) <= MOST_TICKS:
        below = np.full(len(inside), -0.1 * top)
        axis.plot(inside, below, "|", color=_INK, ms=3, mew=0.4, alpha=0.5)
    axis.plot([middle], [1.05 * top], "v", color=_INK, ms=2.5, clip_on=False)
    margin = 0.02 * (high - low)
    axis.set(xlim=(low - margin, high + margin), ylim=(-0.2 * top, 1.1 * top))
    if low < 0 < high:
        axis.axvline(0, color=_INK, lw=0.6)
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    beyond = {"below": (values < low).sum(), "above": (values > high).sum()}
    return [
        f"median {number(middle)} ▾",
        *(f"{count} {where}" for where, count in beyond.items() if count),
    ]


def _short(x: float) -> str:
    """A tick label: k for thousands, M for millions."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if unit <= abs(x) < 1000 * unit:
            return f"{number(x / unit)}{letter}"
    return number(x)


def _maths(text: str) -> str:
    """Subscripts and brackets as mathtext, where a label holds gradients."""
    return text.replace("⟨g_w,g_l⟩ − ‖g_w‖²", r"$\langle g_w, g_l\rangle - \|g_w\|^2$")


def _bulk(values: np.ndarray) -> tuple[float, float]:
    """All values, or where some lie beyond, the quartiles with thrice their distance each side."""
    lower, upper = np.quantile(values, [0.25, 0.75])
    reach = 3 * (upper - lower)
    low, high = max(values.min(), lower - reach), min(values.max(), upper + reach)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        half = max(abs(low) * 0.1, 1e-3)
        low, high = low - half, high + half
    return float(low), float(high)


def regime_plane(found: RegimeMap) -> Figure:
    """Every pair, and the two half-planes in which its chosen falls or its rejected rises."""
    figure, axis = panels(1, 1, 0.72)
    n, one = len(found.x), found.ratio is None
    r = 1.0 if found.ratio is None else found.ratio
    _scale(axis, "x", found.x, r)
    _scale(axis, "y", found.y, 1 / r)
    counts = {}
    for regime, (marker, colour) in _MARKS.items():
        mine = found.regime == regime
        counts[regime.replace("_", " ")] = f"{mine.sum()} of {n}"
        style = {"marker": marker, "c": colour, "s": float(np.clip(1500 / max(n, 1), 4, 22))}
        axis.scatter(found.x[mine], found.y[mine], alpha=0.8, lw=0.3, ec="white", **style)
    shade_regimes(axis, r, counts)
    for cosine in (0.5, 0.9):
        _equal_cosine(axis, cosine)
    axis.axvline(r, color=CHOSEN, lw=0.9, zorder=0.5)
    axis.axhline(1 / r, color=REJECTED, lw=0.9, zorder=0.5)
    of_each = (r"$\,\cdot\, d_l/d_w$  of each pair", r"$\,\cdot\, d_w/d_l$") if one else ("", "")
    axis.set(xlabel=RATIOS[0] + of_each[0], ylabel=RATIOS[1] + of_each[1])
    above, beside = ("1", "1") if one else (f"$r$ = {number(r)}", f"$1/r$ = {number(1 / r)}")
    note(axis, above, (r, 1), (0, 2), ("data", "axes fraction"), ha="center", color=CHOSEN)
    note(axis, beside, (1, 1 / r), (2, 0), ("axes fraction", "data"), va="center", color=REJECTED)
    return figure


def _scale(axis: Axes, side: str, values: np.ndarray, corner: float) -> None:
    """A logarithmic axis with the corner well inside, linear around 0 where values are below."""
    low, high = min([corner, *values]), max([corner, *values])
    if low > 0:
        scale = {"value": "log"}
        low, high = min(low / 1.3, corner / 3), max(high * 1.3, corner * 3)
        steps = (1, 2, 5) if high / low < 100 else (1,)
        places = [m * 10.0**e for e in range(-9, 10) for m in steps]
    else:
        scale = {"value": "symlog", "linthresh": 0.1, "linscale": 0.5}
        low, high = min(1.3 * low, -0.1), max(high * 1.3, corner * 3)
        places = [*(-(10.0**e) for e in range(9, -2, -1)), 0.0, *(10.0**e for e in range(-1, 10))]
    getattr(axis, f"set_{side}scale")(**scale)
    ticks(axis, side, [place for place in places if low <= place <= high])
    axis.set(**{f"{side}lim": (low, high)})


def _equal_cosine(axis: Axes, cosine: float) -> None:
    """A dotted line of pairs with equal cosine, named where there is room."""
    left, right = axis.get_xlim()
    x = np.geomspace(max(left, 1e-6), right, 400)
    line = np.stack([x, cosine**2 / x], 1)
    axis.plot(*line.T, color=GUIDE, lw=0.5, ls=":", zorder=0.5)
    across, up = axis.transAxes.inverted().transform(axis.transData.transform(line)).T
    inside = np.flatnonzero((across < 0.92) & (up < 0.92))
    if len(inside):
        at = line[inside[np.abs(up[inside] - 0.25).argmin()]]
        note(axis, f"cos {cosine}", (at[0], at[1]), (2, 1), "data", fontsize=5.5, color=GUIDE)


def strength_curve(found: Strength, pairs: int) -> Figure:
    """Shares of pairs against the factor on d_w/d_l."""
    figure, axis = panels(1, 1, 0.4)
    x, best = found.multiplier, found.best
    curves = (
        ("ideal", found.ideal, _IDEAL),
        ("chosen falls", found.chosen_falls, CHOSEN),
        ("rejected rises", found.rejected_rises, REJECTED),
    )
    heights = _apart([100 * share[-1] for _, share, _ in curves], 9.0)
    for (label, share, colour), y in zip(curves, heights, strict=True):
        axis.plot(x, 100 * share, color=colour, drawstyle="steps-mid" if pairs < 200 else "default")
        note(axis, label, (1, y), (4, 0), ("axes fraction", "data"), va="center", color=colour)
    axis.set(xscale="log", xlim=(x[0], x[-1]), ylim=(-3, 103))
    axis.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    guides = [(1.0, "as scored", _INK, best < 1)]
    if best != 1:
        guides.append((best, f"most ideal: ×{number(best)}", GUIDE, best > 1))
    for place, text, colour, to_the_right in guides:
        axis.axvline(place, color=colour, lw=0.6, ls="--")
        align, shift = ("left", (3, 2)) if to_the_right else ("right", (-3, 2))
        system = ("data", "axes fraction")
        note(axis, text, (place, 1), shift, system, fontsize=6, ha=align, color=_INK)
    factors = [f for f in 2.0 ** np.arange(-6, 7) if x[0] <= f * 1.0001 and f <= x[-1] * 1.0001]
    axis.set_xticks(
        factors, [f"×{number(f)}" if f >= 1 else f"×1/{number(1 / f)}" for f in factors]
    )
    axis.minorticks_off()
    axis.set(xlabel="factor on $d_w/d_l$", ylabel="share of pairs")
    return figure


def _apart(places: list[float], distance: float) -> list[float]:
    """Label places in the same order, moved up until neighbours are ``distance`` or more apart."""
    moved, last = dict.fromkeys(range(len(places)), 0.0), -math.inf
    for k in sorted(range(len(places)), key=lambda k: places[k]):
        moved[k] = last = max(places[k], last + distance)
    over = max(0.0, last - 100)
    return [moved[k] - over for k in range(len(places))]
