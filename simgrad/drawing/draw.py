"""What several figures, the notebooks and the report draw: functions of an axis and arrays."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm, TwoSlopeNorm
from matplotlib.ticker import FuncFormatter

from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED
from simgrad.experiments.findings import interval
from simgrad.typing import Bool, Float, Int

__all__ = [
    "band",
    "direct_labels",
    "dots",
    "mass_bars",
    "panel_letters",
    "regime_plane",
    "token_heatmap",
]


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
    found = [interval(column) for column in np.asarray(runs, float).T]
    mean, low, high = (
        np.array([getattr(i, part) for i in found]) for part in ("mean", "low", "high")
    )
    axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axis.plot(x, mean, style, color=colour, marker=marker)
    if label is not None:
        axis.annotate(
            label,
            (float(x[-1]), float(mean[-1])),
            (3, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )


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
        axis.annotate(
            name,
            (x, float(height)),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=labels[name][1],
            va="center",
            fontsize=7,
            annotation_clip=False,
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
    found = [interval(column) for column in np.asarray(runs, float).T]
    mean = np.array([i.mean for i in found])
    reach = np.nan_to_num(np.array([[i.mean - i.low, i.high - i.mean] for i in found]).T)
    place = np.arange(len(names))
    inside = colour if filled else "white"
    line = {"color": colour, "label": label, "elinewidth": 0.9}
    axis.errorbar(mean, place + shift, xerr=reach, fmt=marker, mfc=inside, mec=colour, **line)
    if show_seeds:
        for values in np.asarray(runs, float):
            axis.plot(values, place + shift, ".", ms=2, color=colour, alpha=0.5)
    axis.set_yticks(place, names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def panel_letters(axes: Sequence[Axes]) -> None:
    """A bold a, b, c … before each panel's title."""
    for letter, axis in zip("abcdefghij", axes, strict=False):
        axis.set_title(rf"$\mathbf{{{letter}}}$  {axis.get_title(loc='left')}", loc="left")


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
        found = [interval(column) for column in np.asarray(runs, float).T]
        mean = np.array([i.mean for i in found])
        reach = np.nan_to_num(np.array([[i.mean - i.low, i.high - i.mean] for i in found]).T)
        axis.bar(
            place + offset,
            mean,
            width,
            color=colour,
            yerr=reach,
            error_kw={"lw": 0.7, "ecolor": "#333333"},
        )
    axis.set_xticks(place, names, rotation=55, ha="right", rotation_mode="anchor")
    for tick, colour in zip(axis.get_xticklabels(), colours, strict=True):
        tick.set_color(colour if colour in (CHOSEN, REJECTED) else "black")
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.set_ylim(0, None)
    axis.set_ylabel("probability")


def regime_plane(axis: Axes, ratio: float = 1.0, least: float = 1e-2, most: float = 1e2) -> None:
    """The plane x = ⟨g_w,g_l⟩/‖g_w‖², y = ⟨g_w,g_l⟩/‖g_l‖², both positive, with its regimes.

    The chosen rises where x ≤ r and the rejected falls where y ≤ 1/r, r = d_w/d_l; Cauchy-Schwarz
    forbids xy = cos² > 1 (grey). Blue: the chosen's condition fails, vermilion: the rejected's.
    Pairs with ⟨g_w,g_l⟩ ≤ 0 are ideal for every r > 0 and not on this plane.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3.
    """
    corner = float(np.clip(ratio, least, most))
    across = np.geomspace(least, most, 200)
    right = across[across >= corner]
    axis.fill_between(
        right, least, np.minimum(1 / right, 1 / corner), color=CHOSEN, alpha=0.12, lw=0
    )
    left = np.append(across[across < corner], corner)
    axis.fill_between(
        left, 1 / corner, np.maximum(1 / left, 1 / corner), color=REJECTED, alpha=0.12, lw=0
    )
    axis.fill_between(across, 1 / across, most, color="#EEEEEE", lw=0)
    axis.plot(across, 1 / across, color=GUIDE, lw=0.9)
    axis.set(xscale="log", yscale="log", xlim=(least, most), ylim=(least, most))
    for x, y, text, colour in (
        (np.sqrt(least * corner), least * 1.6, "ideal", "black"),
        (np.sqrt(corner * most), least * 1.6, "both fall", CHOSEN),
        (least * 1.25, np.sqrt(most / corner), "both rise", REJECTED),
        (most / 1.2, most / 1.5, "impossible", GUIDE),
    ):
        align = {"both rise": "left", "impossible": "right"}.get(text, "center")
        axis.text(x, y, text, color=colour, ha=align, va="center")
    axis.set_xlabel(r"$\langle g_w, g_l\rangle / \|g_w\|^2$")
    axis.set_ylabel(r"$\langle g_w, g_l\rangle / \|g_l\|^2$")


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
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
