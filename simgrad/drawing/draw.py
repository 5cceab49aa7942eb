"""What several figures, the notebooks and the report draw: functions of an axis and arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED, size
from simgrad.experiments.findings import interval
from simgrad.typing import Bool, Float, Int

__all__ = [
    "band",
    "direct_labels",
    "dots",
    "labelled_bands",
    "mass_bars",
    "note",
    "number",
    "panel_letters",
    "panels",
    "regime_plane",
    "shade_regimes",
    "ticks",
    "token_heatmap",
    "zero_line",
]


def number(x: float | int, digits: int = 3) -> str:
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


def panels(rows: int, columns: int, height_to_width: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of the full text width, and its axes as an array (rows, columns) or (columns,)."""
    figsize = size(rows, columns, height_to_width)
    return plt.subplots(rows, columns, figsize=figsize, layout="constrained", **grid)


def panel_letters(axes: Sequence[Axes] | np.ndarray) -> None:
    """A bold a, b, c … before each panel's title."""
    for letter, axis in zip("abcdefghij", axes, strict=False):
        axis.set_title(rf"$\mathbf{{{letter}}}$  {axis.get_title(loc='left')}", loc="left")


def note(
    axis: Axes,
    text: str,
    place: tuple[float | int, float | int],
    shift: tuple[float | int, float | int] = (0, 0),
    system: str | tuple[str, str] = "axes fraction",
    **style: Any,
) -> None:
    """Small text at a place of a coordinate system of matplotlib's, moved by ``shift`` points."""
    style = {"fontsize": 7, **style}
    axis.annotate(text, place, shift, xycoords=system, textcoords="offset points", **style)


def ticks(axis: Axes, side: str, places: Sequence[float | int] | np.ndarray) -> None:
    """Ticks of the x or y axis at these places only, with numbers for people."""
    getattr(axis, f"set_{side}ticks")(places, [number(place) for place in places])
    axis.minorticks_off()


def zero_line(axis: Axes) -> None:
    """A thin grey line at height 0."""
    axis.axhline(0, color=GUIDE, lw=0.6)


def _mean_and_reach(runs: Float[np.ndarray, "seeds X"]) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds, and how far their 95 % intervals reach down and up (0 for one seed)."""
    found = [interval(column) for column in np.asarray(runs, float).T]
    reach = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
    return np.array([i.mean for i in found]), np.nan_to_num(np.array(reach))


def band(
    axis: Axes,
    x: Float[np.ndarray, " X"] | Int[np.ndarray, " X"],
    runs: Float[np.ndarray, "seeds X"],
    colour: str,
    label: str | None = None,
    style: str = "-",
    marker: str = "",
) -> None:
    """Mean over seeds with its 95 % interval of Student's t; the label stands at the line's end."""
    mean, (down, up) = _mean_and_reach(runs)
    axis.fill_between(x, mean - down, mean + up, color=colour, alpha=0.18, lw=0)
    axis.plot(x, mean, style, color=colour, marker=marker)
    if label is not None:
        end = (float(x[-1]), float(mean[-1]))
        note(axis, label, end, (3, 0), "data", color=colour, va="center", fontsize=None)


def labelled_bands(
    axis: Axes,
    x: Float[np.ndarray, " X"] | Int[np.ndarray, " X"],
    lines: Mapping[str, tuple[Float[np.ndarray, "seeds X"], str]],
    gap: float,
    styles: Sequence[str] = ("-", "-", "-"),
) -> None:
    """A :func:`band` for each name → (runs, colour), with :func:`direct_labels` at their ends."""
    for (runs, colour), style in zip(lines.values(), styles, strict=False):
        band(axis, x, runs, colour, style=style, marker="o")
    ends = {name: (float(runs[:, -1].mean()), colour) for name, (runs, colour) in lines.items()}
    direct_labels(axis, float(x[-1]), ends, gap)


def direct_labels(
    axis: Axes, x: float, labels: dict[str, tuple[float, str]], gap: float = 0.055
) -> None:
    """Texts beside line ends at ``x``: name → (y, colour), moved apart until none overlaps.

    ``gap`` is the least distance between two of them as a share of the axis' height. Set scales and
    limits before.
    """
    axis.get_ylim()  # settles limits that follow the data
    inside = axis.transAxes.inverted()
    names = sorted(labels, key=lambda name: labels[name][0])
    heights = np.array(
        [inside.transform(axis.transData.transform((x, labels[name][0])))[1] for name in names]
    )
    heights = heights.clip(0, 1)
    for _ in range(200):
        close = np.diff(heights) < gap - 1e-9
        if not close.any():
            break
        for i in np.flatnonzero(close):
            middle = (heights[i] + heights[i + 1]) / 2
            heights[i], heights[i + 1] = middle - gap / 2, middle + gap / 2
    for name, height in zip(names, heights, strict=True):
        style: dict[str, Any] = {"color": labels[name][1], "annotation_clip": False}
        note(
            axis, name, (x, float(height)), (4, 0), ("data", "axes fraction"), va="center", **style
        )


def dots(
    axis: Axes,
    names: Sequence[str],
    runs: Float[np.ndarray, "seeds names"],
    colour: str,
    label: str | None = None,
    shift: float = 0.0,
    marker: str = "o",
    filled: bool = True,
    show_seeds: bool = False,
) -> None:
    """One row a name, the first on top: mean over seeds with its 95 % interval of Student's t.

    ``shift`` moves the dots down, in rows, where several sets share the rows; ``show_seeds`` adds
    a small dot for every seed.
    """
    mean, reach = _mean_and_reach(runs)
    place = np.arange(len(names))
    inside = colour if filled else "white"
    line = {"color": colour, "label": label, "elinewidth": 0.9}
    axis.errorbar(mean, place + shift, xerr=reach, fmt=marker, mfc=inside, mec=colour, **line)
    if show_seeds:
        for values in np.asarray(runs, float):
            axis.plot(values, place + shift, ".", ms=2, color=colour, alpha=0.5)
    axis.set_yticks(place, names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def mass_bars(
    axis: Axes,
    names: Sequence[str],
    before: Float[np.ndarray, "seeds answers"],
    after: Float[np.ndarray, "seeds answers"],
    chosen: str | None = None,
    rejected: str | None = None,
) -> None:
    """Probability of each answer before (grey) and after training: means and 95 % intervals."""
    place, width = np.arange(len(names)), 0.4
    colours = [{chosen: CHOSEN, rejected: REJECTED}.get(name, "#009E73") for name in names]
    for runs, offset, colour in (
        (before, -width / 2, ["#BBBBBB"] * len(names)),
        (after, width / 2, colours),
    ):
        mean, reach = _mean_and_reach(runs)
        line = {"lw": 0.7, "ecolor": "#333333"}
        axis.bar(place + offset, mean, width, color=colour, yerr=reach, error_kw=line)
    axis.set_xticks(place, names, rotation=55, ha="right", rotation_mode="anchor")
    for tick, colour in zip(axis.get_xticklabels(), colours, strict=True):
        tick.set_color(colour if colour in (CHOSEN, REJECTED) else "black")
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.set_ylim(0, None)
    axis.set_ylabel("probability")


RATIOS = tuple(rf"$\langle g_w, g_l\rangle / \|g_{side}\|^2$" for side in "wl")
"""Names of the coordinates of the plane of regimes."""


def regime_plane(axis: Axes, ratio: float = 1.0, least: float = 1e-2, most: float = 1e2) -> None:
    """The plane x = ⟨g_w,g_l⟩/‖g_w‖², y = ⟨g_w,g_l⟩/‖g_l‖², both positive, with its regimes.

    Both axes are logarithmic, from ``least`` to ``most``, and shaded by :func:`shade_regimes`.
    Pairs with ⟨g_w,g_l⟩ ≤ 0 are ideal for every r > 0 and not on this plane.
    """
    axis.set(xscale="log", yscale="log", xlim=(least, most), ylim=(least, most))
    axis.set(xlabel=RATIOS[0], ylabel=RATIOS[1])
    shade_regimes(axis, ratio)


def shade_regimes(axis: Axes, ratio: float = 1.0, counts: Mapping[str, str] | None = None) -> None:
    """Regimes of pairs at (x, y) = ⟨g_w,g_l⟩/(‖g_w‖², ‖g_l‖²), beneath all that is drawn.

    The chosen rises where x ≤ r and the rejected falls where y ≤ 1/r, r = d_w/d_l. Blue: the
    chosen's condition fails, vermilion: the rejected's. Grey: xy = cos² would exceed 1, which
    Cauchy-Schwarz forbids, or be negative. Scales and limits of the axis are to be set before.
    ``counts`` adds a second line to the names ``both fall``, ``both rise`` and ``ideal``.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3.
    """
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    axis.axvspan(ratio, right, color=CHOSEN, alpha=0.12, lw=0, zorder=0.1)
    axis.axhspan(1 / ratio, top, color=REJECTED, alpha=0.12, lw=0, zorder=0.1)
    grey: dict[str, Any] = {"color": "#EEEEEE", "lw": 0, "zorder": 0.2}
    x = np.geomspace(max(left, 1e-6), right, 400)
    axis.fill_between(x, np.minimum(1 / x, top), top, **grey)
    axis.plot(x, 1 / x, color=GUIDE, lw=0.9, zorder=0.3)
    across = up = 0.0  # where 0 stands, as a share of the axis
    if left < 0:
        axis.fill_between(x, bottom, 0, **grey)
        x = -np.geomspace(-left, 1e-6, 400)
        axis.fill_between(x, 0, top, **grey)
        axis.fill_between(x, bottom, np.maximum(1 / x, bottom), **grey)
        across, up = axis.transAxes.inverted().transform(axis.transData.transform((0, 0)))
    box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
    for name, place, ha, va, colour in (
        ("both fall", (1, up), "right", "bottom", CHOSEN),
        ("both rise", (across, 1), "left", "top", REJECTED),
        ("ideal", (0, up), "left", "top" if up else "bottom", "black"),
        ("impossible", (0 if across else 1, 1), "left" if across else "right", "top", GUIDE),
    ):
        text = f"{name}\n{counts[name]}" if counts and name in counts else name
        shift = (4 if ha == "left" else -4, 4 if va == "bottom" else -4)
        note(axis, text, place, shift, color=colour, ha=ha, va=va, bbox=box, zorder=0.4)


def token_heatmap(
    axis: Axes,
    kernel: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    shared: tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " columns"]] | None = None,
    linear: float | None = None,
) -> None:
    """Inner products of token gradients: blue pulls together, vermilion pushes apart.

    Shared tokens are in grey letters.
    ``linear`` is the size below which the colour scale is linear and above which it is logarithmic
    (None: linear throughout).
    """
    reach = float(np.abs(kernel).max()) or 1.0
    norm = (
        TwoSlopeNorm(0, -reach, reach)
        if linear is None
        else SymLogNorm(linear, vmin=-reach, vmax=reach)
    )
    cmap = plt.get_cmap("RdBu")
    image = axis.imshow(kernel, cmap=cmap, norm=norm, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    if shared is not None:
        for labels, same, colour in (
            (axis.get_yticklabels(), shared[0], CHOSEN),
            (axis.get_xticklabels(), shared[1], REJECTED),
        ):
            for label, alike in zip(labels, same, strict=True):
                label.set_color("#777777" if alike else colour)
                label.set_fontweight("normal" if alike else "bold")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
