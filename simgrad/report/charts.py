"""Figures of a score table's report: distributions, plane of regimes, pull on the chosen."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED, size
from simgrad.report.mitigations import Strength
from simgrad.report.numbers import RegimeMap, Score

_INK, _IDEAL = "#333333", "#4d4d4d"
_COLUMNS = 3
MOST_TICKS = 2000
"""Pairs up to which each has a tick of its own below a histogram."""
_X, _Y = (rf"$\langle g_w, g_l\rangle\,/\,\|g_{side}\|^2$" for side in "wl")


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
    """A histogram per score over the bulk of its range, with a tick below for every pair.

    Outliers are counted at the edge.
    """
    rows = -(-len(scores) // _COLUMNS)
    width = size(1, 1)[0]
    figure, axes = plt.subplots(
        rows, _COLUMNS, figsize=(width, 1.15 * rows), layout="constrained", squeeze=False
    )
    for axis, score in zip(axes.flat, scores, strict=False):
        _histogram(axis, score)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    return figure


def _histogram(axis: Axes, score: Score) -> None:
    colour = {"predicted_dlogp_chosen": CHOSEN, "predicted_dlogp_rejected": REJECTED}.get(
        score.name, GUIDE
    )
    axis.set_title(_maths(score.label), fontsize=7, pad=12)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(labelsize=6)
    values, note = score.finite, {"fontsize": 5.5, "color": "#666666", "va": "bottom"}
    if not len(values):
        axis.text(0, 1.02, "no finite value", transform=axis.transAxes, **note)
        return
    low, high = _bulk(values)
    inside = values[(values >= low) & (values <= high)]
    bins = int(np.clip(2 * len(inside) ** (1 / 3), 5, 40))
    counts, _, _ = axis.hist(inside, bins=bins, range=(low, high), color=colour, alpha=0.75, lw=0)
    top, middle = max(float(np.max(counts)), 1.0), float(np.median(values))
    if len(values) <= MOST_TICKS:
        axis.plot(
            inside, np.full(len(inside), -0.1 * top), "|", color=_INK, ms=3, mew=0.4, alpha=0.5
        )
    axis.plot([middle], [1.05 * top], "v", color=_INK, ms=2.5, clip_on=False)
    axis.set_ylim(-0.2 * top, 1.1 * top)
    margin = 0.02 * (high - low)
    axis.set_xlim(low - margin, high + margin)
    if low < 0 < high:
        axis.axvline(0, color=_INK, lw=0.6)
    beyond = [(int((values < low).sum()), "below"), (int((values > high).sum()), "above")]
    texts = [f"median {number(middle)} ▾"] + [
        f"{count} {where}" for count, where in beyond if count
    ]
    axis.text(0, 1.02, " · ".join(texts), transform=axis.transAxes, **note)
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axis.set_xlabel(score.unit, fontsize=5.5, labelpad=1)


def _short(x: float) -> str:
    """A tick label: k for thousands, M for millions."""
    for size_, letter in ((1e6, "M"), (1e3, "k")):
        if size_ <= abs(x) < 1000 * size_:
            return f"{number(x / size_)}{letter}"
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
        x, y = found.x[found.regime == label], found.y[found.regime == label]
        axis.scatter(
            x, y, s=dots, c=colour, marker=markers[label], alpha=0.8, lw=0.3, ec="white", zorder=3
        )
    n = len(found.x)
    counts = {label: int((found.regime == label).sum()) for label in colours}
    box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
    origin = (
        axis.transAxes.inverted().transform(axis.transData.transform((0, 0)))
        if min(left, bottom) < 0
        else (0, 0)
    )
    across, up = (
        float(c) if low < 0 else 0.0 for c, low in zip(origin, (left, bottom), strict=True)
    )
    for place, ha, va, colour, text in (
        ((1, up), "right", "bottom", CHOSEN, f"both fall\n{counts['both_fall']} of {n}"),
        ((across, 1), "left", "top", REJECTED, f"both rise\n{counts['both_rise']} of {n}"),
        ((0, up), "left", "top" if up else "bottom", _INK, f"ideal\n{counts['ideal']} of {n}"),
        ((0 if across else 1, 1), "left" if across else "right", "top", GUIDE, "impossible"),
    ):
        shift = (4 if ha == "left" else -4, 4 if va == "bottom" else -4)
        _note(axis, text, place, shift, color=colour, ha=ha, va=va, bbox=box, zorder=2.5)
    one = found.ratio is None
    axis.set_xlabel(_X + (r"$\,\cdot\, d_l/d_w$  of each pair" if one else ""))
    axis.set_ylabel(_Y + (r"$\,\cdot\, d_w/d_l$" if one else ""))
    above, beside = ("1", "1") if one else (f"$r$ = {number(r)}", f"$1/r$ = {number(1 / r)}")
    _note(axis, above, (r, 1), (0, 2), ("data", "axes fraction"), ha="center", color=CHOSEN)
    _note(axis, beside, (1, 1 / r), (2, 0), ("axes fraction", "data"), va="center", color=REJECTED)
    return figure


def _note(
    axis: Axes,
    text: str,
    place: tuple[float | int, float | int],
    shift: tuple[int, int],
    system: str | tuple[str, str] = "axes fraction",
    **style: Any,
) -> None:
    """Text at a place, moved by ``shift`` points."""
    style = {"fontsize": 7, **style}
    axis.annotate(text, place, xytext=shift, xycoords=system, textcoords="offset points", **style)


def _scaled(set_scale, values: np.ndarray, corner: float) -> tuple[float, float]:
    """Scale the axis logarithmically and return its bounds, with the corner well inside.

    It is linear around 0 where some values are not positive.
    """
    low, high = (
        (min(values.min(), corner), max(values.max(), corner)) if len(values) else (corner, corner)
    )
    if low > 0:
        set_scale("log")
        low, high = min(low / 1.3, corner / 3), max(high * 1.3, corner * 3)
        ticks = [
            m * 10.0**e for e in range(-9, 10) for m in ((1, 2, 5) if high / low < 100 else (1,))
        ]
    else:
        set_scale("symlog", linthresh=0.1, linscale=0.5)
        low, high = min(1.3 * low, -0.1), max(high * 1.3, corner * 3)
        ticks = [0.0, *(sign * 10.0**e for e in range(-1, 10) for sign in (-1, 1))]
    axis = (
        set_scale.__self__.xaxis if set_scale.__name__ == "set_xscale" else set_scale.__self__.yaxis
    )
    axis.set_major_locator(FixedLocator(sorted(t for t in ticks if low <= t <= high)))
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
        across, up = (
            axis.transAxes.inverted().transform(axis.transData.transform(np.stack([x, y], 1))).T
        )
        inside = np.flatnonzero((across < 0.92) & (up < 0.92))
        if len(inside):
            at = inside[np.abs(up[inside] - 0.25).argmin()]
            _note(
                axis,
                f"cos {cosine}",
                (float(x[at]), float(y[at])),
                (2, 1),
                "data",
                fontsize=5.5,
                color=GUIDE,
            )


def strength_curve(found: Strength, pairs: int) -> Figure:
    """Shares of pairs against the factor on d_w/d_l."""
    figure, axis = plt.subplots(figsize=(size(1, 1)[0], 2.2), layout="constrained")
    x = found.multiplier
    curves = (
        ("ideal", found.ideal, _IDEAL),
        ("chosen falls", found.chosen_falls, CHOSEN),
        ("rejected rises", found.rejected_rises, REJECTED),
    )
    for (label, share, colour), y in zip(
        curves, _apart([100 * c[1][-1] for c in curves], 9.0), strict=True
    ):
        axis.plot(x, 100 * share, color=colour, drawstyle="steps-mid" if pairs < 200 else "default")
        _note(axis, label, (1, y), (4, 0), ("axes fraction", "data"), va="center", color=colour)
    axis.set_xscale("log")
    axis.set_xlim(x[0], x[-1])
    axis.set_ylim(-3, 103)
    axis.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    guides = [(1.0, "as scored", _INK, "left" if found.best < 1 else "right")]
    if found.best != 1:
        guides.append(
            (
                found.best,
                f"most ideal: ×{number(found.best)}",
                GUIDE,
                "left" if found.best > 1 else "right",
            )
        )
    for place, text, colour, align in guides:
        axis.axvline(place, color=colour, lw=0.6, ls="--")
        shift = (-3 if align == "right" else 3, 2)
        _note(
            axis,
            text,
            (place, 1),
            shift,
            ("data", "axes fraction"),
            fontsize=6,
            ha=align,
            color=_INK,
        )
    ticks = [2.0**k for k in range(-6, 7) if x[0] <= 2.0**k * 1.0001 and 2.0**k <= x[-1] * 1.0001]
    axis.set_xticks(ticks, [f"×{number(t)}" if t >= 1 else f"×1/{number(1 / t)}" for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("factor on $d_w/d_l$")
    axis.set_ylabel("share of pairs")
    return figure


def _apart(places: list[float], distance: float) -> list[float]:
    """Label places in the same order, moved up until neighbours are ``distance`` or more apart."""
    moved, last = dict.fromkeys(range(len(places)), 0.0), -math.inf
    for k in sorted(range(len(places)), key=lambda k: places[k]):
        moved[k] = last = max(places[k], last + distance)
    over = max(0.0, last - 100)
    return [moved[k] - over for k in range(len(places))]
