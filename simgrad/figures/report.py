"""Figures of a score table's report: distributions, the plane of regimes, and the strength of the pull on the chosen."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from simgrad.bridge.report import RegimeMap, Score
from simgrad.bridge.report_remedies import Strength
from simgrad.figures.style import CHOSEN, GUIDE, REJECTED, size

__all__ = ["distributions", "number", "regime_plane", "strength_curve"]

_INK, _IDEAL = "#333333", "#4d4d4d"
_COLUMNS = 3


def number(x: float, digits: int = 3) -> str:
    """A number for people: few digits, a true minus sign, no exponent below a million.

    >>> number(-1234.5), number(0.01234), number(float("nan")), number(2.5e8)
    ('−1234', '0.0123', '–', '2.5 × 10⁸')
    """
    if not math.isfinite(x):
        return "–" if math.isnan(x) else "∞" if x > 0 else "−∞"
    if x != 0 and not 1e-4 <= abs(x) < 1e6:
        mantissa, _, exponent = f"{x:.{digits - 1}e}".partition("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa} × 10{power}".replace("-", "−")
    text = f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"
    return ("0" if text == "-0" else text).replace("-", "−")


def distributions(scores: tuple[Score, ...]) -> Figure:
    """A histogram a score over the range of its bulk, every pair as a tick below, outliers counted at the edge."""
    rows = -(-len(scores) // _COLUMNS)
    width = size(1, 1)[0]
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(width, 1.15 * rows), layout="constrained", squeeze=False)
    for axis, score in zip(axes.flat, scores, strict=False):
        _histogram(axis, score)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    return figure


def _histogram(axis: Axes, score: Score) -> None:
    colour = {"predicted_dlogp_chosen": CHOSEN, "predicted_dlogp_rejected": REJECTED}.get(score.name, GUIDE)
    axis.set_title(score.label, fontsize=7)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(labelsize=6)
    values = score.finite
    if not len(values):
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", color=GUIDE, fontsize=6)
        return
    low, high = _bulk(values)
    inside = values[(values >= low) & (values <= high)]
    bins = int(np.clip(2 * len(inside) ** (1 / 3), 5, 40))
    counts, _, _ = axis.hist(inside, bins=bins, range=(low, high), color=colour, alpha=0.75, lw=0)
    top = max(float(np.max(counts)), 1.0)
    axis.plot(inside, np.full(len(inside), -0.1 * top), "|", color=_INK, ms=3, mew=0.4, alpha=0.5)
    axis.set_ylim(-0.2 * top, 1.3 * top)
    margin = 0.02 * (high - low)
    axis.set_xlim(low - margin, high + margin)
    if low < 0 < high:
        axis.axvline(0, color=_INK, lw=0.6)
    middle = float(np.median(values))
    axis.plot([middle], [1.05 * top], "v", color=_INK, ms=2.5, clip_on=False)
    right = middle > (low + high) / 2
    text = f"  median {number(middle)}  "
    axis.text(middle, 1.05 * top, text, ha="right" if right else "left", va="center", fontsize=5.5, color=_INK)
    for count, x, align, text in (
        (int((values < low).sum()), 0.0, "left", "← {} beyond"),
        (int((values > high).sum()), 1.0, "right", "{} beyond →"),
    ):
        if count:
            axis.text(x, 0.42, text.format(count), transform=axis.transAxes, ha=align, fontsize=5.5, color=_INK)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    axis.set_xlabel(score.unit, fontsize=5.5, labelpad=1)


def _bulk(values: np.ndarray) -> tuple[float, float]:
    """All values, or the quartiles with three times their distance on both sides where some lie beyond."""
    lower, upper = np.quantile(values, [0.25, 0.75])
    reach = 3 * (upper - lower)
    low, high = max(values.min(), lower - reach), min(values.max(), upper + reach)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        half = max(abs(low) * 0.1, 1e-3)
        return float(low - half), float(high + half)
    return float(low), float(high)


def regime_plane(found: RegimeMap) -> Figure:
    """Every pair, and the two half-planes in which its chosen falls or its rejected rises."""
    width = size(1, 1)[0]
    figure, axis = plt.subplots(figsize=(width, 0.72 * width), layout="constrained")
    r = 1.0 if found.ratio is None else found.ratio
    bounds = [_scaled(axis.set_xscale, found.x, r), _scaled(axis.set_yscale, found.y, 1 / r)]
    (left, right), (bottom, top) = bounds
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.axvspan(r, right, color=CHOSEN, alpha=0.10, lw=0)
    axis.axhspan(1 / r, top, color=REJECTED, alpha=0.10, lw=0)
    axis.axvline(r, color=CHOSEN, lw=0.9)
    axis.axhline(1 / r, color=REJECTED, lw=0.9)
    _impossible(axis, bounds)
    colours = {"ideal": _IDEAL, "both_fall": CHOSEN, "both_rise": REJECTED, "reversed": "#000000"}
    markers = {"ideal": "o", "both_fall": "v", "both_rise": "^", "reversed": "X"}
    dots = float(np.clip(1500 / max(len(found.x), 1), 4, 22))
    for label, colour in colours.items():
        here = found.regime == label
        axis.scatter(
            found.x[here], found.y[here], s=dots, c=colour, marker=markers[label], alpha=0.8, lw=0.3, ec="white", zorder=3
        )
    n = len(found.x)
    counts = {label: int((found.regime == label).sum()) for label in colours}
    note = {"fontsize": 7, "zorder": 4, "bbox": {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1.0}}
    axis.annotate(
        f"both fall: the chosen too\n{counts['both_fall']} of {n} pairs",
        (1, 0), (-4, 4), "axes fraction", "offset points", ha="right", va="bottom", color=CHOSEN, **note,
    )  # fmt: skip
    axis.annotate(
        f"both rise: the rejected too\n{counts['both_rise']} of {n} pairs",
        (0, 1), (4, -4), "axes fraction", "offset points", ha="left", va="top", color=REJECTED, **note,
    )  # fmt: skip
    axis.annotate(
        f"ideal: chosen rises, rejected falls\n{counts['ideal']} of {n} pairs",
        (0, 0), (4, 4), "axes fraction", "offset points", ha="left", va="bottom", color=_INK, **note,
    )  # fmt: skip
    axis.annotate(
        "impossible:\ncos² = xy ≤ 1", (1, 1), (-6, -6), "axes fraction", "offset points", ha="right", va="top",
        color=GUIDE, **note,
    )  # fmt: skip
    if found.ratio is None:
        axis.set_xlabel("x/r,   x = ⟨g_w,g_l⟩/‖g_w‖²,  r = d_w/d_l of each pair")
        axis.set_ylabel("y·r,   y = ⟨g_w,g_l⟩/‖g_l‖²")
    else:
        axis.set_xlabel("x = ⟨g_w,g_l⟩/‖g_w‖²")
        axis.set_ylabel("y = ⟨g_w,g_l⟩/‖g_l‖²")
    above = "1" if found.ratio is None else f"r = {number(r)}"
    side = "1" if found.ratio is None else f"1/r = {number(1 / r)}"
    axis.annotate(above, (r, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", color=CHOSEN, fontsize=7)
    axis.annotate(side, (1, 1 / r), (2, 0), ("axes fraction", "data"), "offset points", va="center", color=REJECTED, fontsize=7)
    return figure


def _scaled(set_scale, values: np.ndarray, corner: float) -> tuple[float, float]:
    """Logarithmic axis, linear around 0 where some values are not positive; its bounds, with the corner well inside."""
    low, high = (min(values.min(), corner), max(values.max(), corner)) if len(values) else (corner, corner)
    if low > 0:
        set_scale("log")
        low, high = min(low / 1.3, corner / 3), max(high * 1.3, corner * 3)
        ticks = [m * 10.0**e for e in range(-9, 10) for m in ((1, 2, 5) if high / low < 100 else (1,))]
    else:
        set_scale("symlog", linthresh=0.1, linscale=0.5)
        low, high = min(1.3 * low, -0.1), max(high * 1.3, corner * 3)
        ticks = [0.0, *(sign * 10.0**e for e in range(-1, 10) for sign in (-1, 1))]
    axis = set_scale.__self__.xaxis if set_scale.__name__ == "set_xscale" else set_scale.__self__.yaxis
    axis.set_major_locator(plt.FixedLocator(sorted(t for t in ticks if low <= t <= high)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    axis.set_minor_locator(NullLocator())
    return low, high


def _impossible(axis: Axes, bounds: list[tuple[float, float]]) -> None:
    """Grey where xy > 1 or x and y differ in sign; thin lines of equal cosine."""
    (left, right), (bottom, top) = bounds
    grey = {"color": "#eeeeee", "lw": 0, "zorder": 1}
    x = np.geomspace(max(left, 1e-6), right, 400)
    axis.fill_between(x, np.minimum(1 / x, top), top, **grey)
    if bottom < 0:
        axis.fill_between(x, bottom, 0, **grey)
    if left < 0:
        x = -np.geomspace(-left, 1e-6, 400)
        axis.fill_between(x, 0, top, **grey)
        if bottom < 0:
            axis.fill_between(x, bottom, np.maximum(1 / x, bottom), **grey)
    for cosine in (0.5, 0.9):
        x = np.geomspace(max(left, 1e-6), right, 400)
        y = cosine**2 / x
        axis.plot(x, y, color=GUIDE, lw=0.5, ls=":", zorder=2)
        at = np.flatnonzero((y < top * 0.8) & (y > 0) & (x < right))
        if len(at):
            axis.annotate(f"cos {cosine}", (x[at[0]], y[at[0]]), (2, 0), textcoords="offset points", fontsize=5.5, color=GUIDE, va="top")


def strength_curve(found: Strength, pairs: int) -> Figure:
    """Shares of pairs against the factor on d_w/d_l."""
    figure, axis = plt.subplots(figsize=(size(1, 1)[0], 2.3), layout="constrained")
    x = found.multiplier
    lines = (
        ("ideal", found.ideal, _IDEAL, "-"),
        ("chosen falls", found.chosen_falls, CHOSEN, "-"),
        ("rejected rises", found.rejected_rises, REJECTED, "-"),
    )
    for label, share, colour, style in lines:
        axis.plot(x, 100 * share, color=colour, ls=style, drawstyle="steps-mid" if pairs < 200 else "default")
    for (label, share, colour, _), k in zip(lines, _free(x, [line[1] for line in lines]), strict=True):
        axis.annotate(
            label, (x[k], 100 * share[k]), (0, 5), textcoords="offset points", ha="center", va="bottom", color=colour, fontsize=7,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(x[0], x[-1])
    axis.set_ylim(-3, 112)
    axis.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axis.axvline(1, color=_INK, lw=0.6, ls="--")
    axis.annotate("as scored", (1, 1), (2, -2), ("data", "axes fraction"), "offset points", fontsize=6, va="top", color=_INK)
    if abs(math.log(found.best)) > 0.05:
        axis.axvline(found.best, color=GUIDE, lw=0.6, ls="--")
        text = f"most ideal: ×{number(found.best, 2)}"
        axis.annotate(text, (found.best, 1), (2, -9), ("data", "axes fraction"), "offset points", fontsize=6, va="top", color=_INK)
    ticks = [t for t in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64) if x[0] <= t <= x[-1] * 1.0001]
    axis.set_xticks(ticks, [f"×{number(t)}" if t >= 1 else f"×1/{number(1 / t)}" for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("factor on d_w/d_l")
    axis.set_ylabel("share of pairs")
    return figure


def _free(x: np.ndarray, curves: list[np.ndarray]) -> list[int]:
    """For each curve the place where it is farthest from the others, away from the edges."""
    inner = np.arange(len(x))[int(0.08 * len(x)) : int(0.92 * len(x))]
    places = []
    for k, curve in enumerate(curves):
        gaps = np.min([np.abs(curve - other) for j, other in enumerate(curves) if j != k], axis=0)
        score = np.minimum(gaps, 0.25) - 0.05 * np.abs(np.log(x)) / np.log(x[-1])
        score = score - 0.3 * (np.abs(np.log(x)) < 0.12 * np.log(x[-1]))  # not on the line at 1
        for other in places:
            score = score - 0.2 * (np.abs(np.arange(len(x)) - other) < 0.12 * len(x))
        places.append(int(inner[score[inner].argmax()]))
    return places
