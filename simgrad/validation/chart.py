"""Theory against measurement at a glance: remainders, signs, and how exact identities are."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.style import GUIDE, size
from simgrad.validation.cells import Cell
from simgrad.validation.checks import Check
from simgrad.validation.validate import Validation

CAPTION = (
    "Left: what the first-order (solid) and second-order (dashed) predictions of a step miss, "
    "relative to the change, against the learning rate in units of the trust radius η* = "
    "‖first‖/‖second‖; medians over all settings, bands quartiles. Grey: slopes 1 and 2, which a "
    "relative error must have. Low precision ends in a floor of rounding. Middle (float64, "
    "float32): share of responses that go where the first order says; dotted: half the trust "
    "radius. Right: error of every identity; grey ticks: what is allowed."
)
_COLOURS = {"float64": "#000000", "float32": "#009E73", "bfloat16": "#CC79A7", "float16": "#E69F00"}
_WIDTHS = {
    "float64": 2.0,
    "float32": 1.0,
    "bfloat16": 1.0,
    "float16": 1.0,
}  # the first lies under the second
_LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
_SMALLEST = 1e-18


def _colour(arithmetic: str) -> str:
    return _COLOURS[arithmetic.split()[0]]


def plot(found: Validation) -> Figure:
    """Three panels."""
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(size(1, 1)[0], 2.3),
        layout="constrained",
        gridspec_kw={"width_ratios": [1, 1, 0.9]},
    )
    cells = [c for c in found.cells if c.finite and 0 < c.trust_radius < np.inf]
    if cells:
        _remainders(axes[0], cells)
        _signs(axes[1], cells)
    _identities(axes[2], found.checks)
    return figure


def _resampled(cells: Sequence[Cell], name: str, at: np.ndarray) -> np.ndarray:
    """Curves of all cells at common multiples, interpolated in logarithms."""
    rows = []
    for cell in cells:
        x, y = np.array(cell.multiples), np.maximum(np.array(getattr(cell, name), float), _SMALLEST)
        inside = (at >= x.min() * 0.999) & (at <= x.max() * 1.001)
        if name == "curve_signs":
            values = np.interp(np.log(at), np.log(x), getattr(cell, name))
        else:
            values = np.exp(np.interp(np.log(at), np.log(x), np.log(y)))
        rows.append(np.where(inside, values, np.nan))
    return np.array(rows)


def _quantiles(rows: np.ndarray) -> np.ndarray:
    """Quartiles of each column that holds a number."""
    result = np.full((3, rows.shape[1]), np.nan)
    seen = np.isfinite(rows).any(0)
    result[:, seen] = np.nanquantile(rows[:, seen], [0.25, 0.5, 0.75], axis=0)
    return result


def _remainders(axis: Axes, cells: Sequence[Cell]) -> None:
    every = np.concatenate([c.multiples for c in cells])
    at = np.geomspace(every.min(), every.max(), 41)
    names = [a for a in dict.fromkeys(c.arithmetic for c in cells) if "default" not in a]
    for arithmetic in names:
        some = [c for c in cells if c.arithmetic == arithmetic]
        for curve, style in (("curve_first", "-"), ("curve_second", "--")):
            rows = _resampled(some, curve, at)
            low, middle, high = _quantiles(rows)
            axis.fill_between(at, low, high, color=_colour(arithmetic), alpha=0.15, lw=0)
            axis.plot(
                at, middle, style, color=_colour(arithmetic), lw=_WIDTHS[arithmetic.split()[0]]
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    bottom = 1e-12
    for order, start in ((1, 1e-4), (2, 3e-3)):
        line = at[(at >= start / 30) & (at <= start)]
        if not len(line):
            continue
        axis.plot(line, 0.12 * line**order, color=GUIDE, lw=0.8)
        axis.text(
            line[-1] * 1.3,
            0.12 * line[-1] ** order,
            str(order),
            color=GUIDE,
            fontsize=7,
            va="center",
        )
    axis.set_ylim(bottom, 30)
    axis.set_xlabel("learning rate / η*")
    axis.set_ylabel("relative error of the prediction")
    for i, arithmetic in enumerate(names):
        axis.text(
            0.04,
            0.97 - 0.09 * i,
            arithmetic,
            color=_colour(arithmetic),
            transform=axis.transAxes,
            va="top",
            fontsize=7,
        )


def _signs(axis: Axes, cells: Sequence[Cell]) -> None:
    judged = [c for c in cells if c.arithmetic in ("float64", "float32")] or list(cells)
    every = np.concatenate([c.multiples for c in judged])
    at = np.geomspace(every.min(), every.max(), 41)
    for model, style in zip(dict.fromkeys(c.model for c in judged), _LINES * 9, strict=False):
        rows = _resampled([c for c in judged if c.model == model], "curve_signs", at)
        seen = np.isfinite(rows).any(0)
        axis.plot(
            at[seen],
            np.nanmean(rows[:, seen], 0),
            color="black",
            ls=style,
            lw=1,
            label=model.rstrip("/").split("/")[-1][:22],
        )
    axis.plot([0.5, 0.5], [0.62, 1.02], color=GUIDE, lw=0.8, ls=":")
    axis.set_xscale("log")
    axis.set_ylim(0.4, 1.02)
    axis.set_xlabel("learning rate / η*")
    axis.set_ylabel("share of right signs")
    axis.legend(loc="lower left", handlelength=2.0, fontsize=6, borderaxespad=0)


def _identities(axis: Axes, checks: Sequence[Check]) -> None:
    rows = list(
        dict.fromkeys(
            (c.group, c.arithmetic) for c in checks if c.group not in ("determinism", "d_w, d_l")
        )
    )
    for height, (group, arithmetic) in enumerate(reversed(rows)):
        some = [c for c in checks if (c.group, c.arithmetic) == (group, arithmetic)]
        errors = np.maximum([c.error for c in some], _SMALLEST)
        axis.plot(
            errors,
            np.full(len(errors), height),
            "o",
            ms=2.5,
            color=_colour(arithmetic),
            alpha=0.5,
            mew=0,
        )
        limits = {c.limit for c in some if c.limit}
        axis.plot(sorted(limits), [height] * len(limits), "|", ms=9, color=GUIDE, mew=1.2)
    short = {"float64": "64", "float32": "32", "bfloat16": "b16", "float16": "16"}
    labels = [
        f"{g}, {short[a.split()[0]]}{' d.' if 'default' in a else ''}" for g, a in reversed(rows)
    ]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_xscale("log")
    axis.set_xlim(_SMALLEST / 3, 1)
    axis.set_xticks([1e-18, 1e-12, 1e-6, 1], ["0", "$10^{-12}$", "$10^{-6}$", "1"])
    axis.minorticks_off()
    axis.set_xlabel("error (grey: limit)")
