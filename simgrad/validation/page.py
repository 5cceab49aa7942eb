"""The validation as one page for the web, with its figure."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.style import GUIDE, paper_style, size
from simgrad.store import write
from simgrad.validation.cells import Cell
from simgrad.validation.checks import Check, grouped, short
from simgrad.validation.validate import Validation

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_SETTING = ("model", "arithmetic", "kind", "optimizer")
_LIMITS = (
    "trust_radius", "holds_to", "holds_to_nats", "r2_first", "r2_second", "signs", "signs_own",
)  # fmt: skip
_CAPTION = (
    "Left: what the first-order (solid) and second-order (dashed) predictions of a step miss, "
    "relative to the change, against the learning rate in units of the trust radius η* = "
    "‖first‖/‖second‖; medians over all settings, bands quartiles. Grey: slopes 1 and 2, which a "
    "relative error must have. Low precision ends in a floor of rounding. Middle (float64, "
    "float32): share of responses that go where the first order says; dotted: half the trust "
    "radius. Right: error of every identity; grey ticks: what is allowed."
)
_COLOURS = {"float64": "#000000", "float32": "#009E73", "bfloat16": "#CC79A7", "float16": "#E69F00"}
_SHORT = {"float64": "64", "float32": "32", "bfloat16": "b16", "float16": "16"}
_LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
_SMALLEST = 1e-18


def write_page(found: Validation, folder: Path) -> list[Path]:
    """Write validation.html, self-contained, and validation.pdf and .png beside it."""
    page, pdf, png = (folder / f"validation.{ending}" for ending in ("html", "pdf", "png"))
    with paper_style():
        figure = _plot(found)
        dateless = {"CreationDate": None, "ModDate": None}
        figure.savefig(pdf, metadata={"Title": "validation", **dateless})
        figure.savefig(png, metadata={"Title": "validation"})
        plt.close(figure)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=_number, order=_order, share=_share)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        found=found,
        limits=_limits(found.cells),
        caption=_CAPTION,
        image=base64.b64encode(png.read_bytes()).decode(),
        provenance=json.dumps(found.provenance, indent=1, ensure_ascii=False),
        grid=json.dumps(found.grid.record(), indent=1, ensure_ascii=False),
    )
    write(page, text)
    return [page, pdf, png]


def _limits(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Where theory stops by model, arithmetic, optimizer and step kind: medians over objectives."""
    return [
        dict(zip(_SETTING, setting, strict=True))
        | {name: _median([getattr(c, name) for c in some]) for name in _LIMITS}
        for setting, some in grouped(cells, *_SETTING).items()
    ]


def _median(values: list[float]) -> float:
    known = [x for x in values if np.isfinite(x)]
    return float(np.median(known)) if known else float("nan")


def _number(x: float | None) -> str:
    return "–" if x is None or not np.isfinite(x) else f"{x:.3g}"


def _share(x: float) -> str:
    return "–" if not np.isfinite(x) else f"{x:.1%}"


def _order(fit: tuple[float, float, float] | None) -> str:
    return "–" if fit is None else f"{fit[0]:.3f} ± {(fit[2] - fit[1]) / 2:.3f}"


def _plot(found: Validation) -> Figure:
    """Three panels."""
    figure, (remainders, signs, identities) = plt.subplots(
        1, 3, figsize=(size(1, 1)[0], 2.3), layout="constrained", width_ratios=[1, 1, 0.9]
    )
    cells = [c for c in found.cells if c.finite and 0 < c.trust_radius < np.inf]
    if cells:
        _remainders(remainders, cells)
        _signs(signs, cells)
    _identities(identities, found.checks)
    return figure


def _resampled(
    cells: Sequence[Cell], name: str, at: np.ndarray, logarithmic: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Curves of all cells at common multiples (those where some cell was measured), else NaN."""
    rows = []
    for cell in cells:
        x, y = np.array(cell.multiples), np.array(getattr(cell, name), float)
        y = np.log(np.maximum(y, _SMALLEST)) if logarithmic else y
        inside = (at >= x.min() * 0.999) & (at <= x.max() * 1.001)
        rows.append(np.where(inside, np.interp(np.log(at), np.log(x), y), np.nan))
    seen = np.isfinite(rows).any(0)
    found = np.array(rows)[:, seen]
    return at[seen], np.exp(found) if logarithmic else found


def _multiples(cells: Sequence[Cell]) -> np.ndarray:
    """Learning rates over the range of all cells, as multiples of the trust radius."""
    every = np.concatenate([c.multiples for c in cells])
    return np.geomspace(every.min(), every.max(), 41)


def _remainders(axis: Axes, cells: Sequence[Cell]) -> None:
    at = _multiples(cells)
    full = [c for c in cells if "default" not in c.arithmetic]
    for i, ((dtype,), some) in enumerate(grouped(full, "arithmetic").items()):
        colour = _COLOURS[dtype]
        width = 2.0 if dtype == "float64" else 1.0  # float32 lies on top of it
        for curve, style in (("curve_first", "-"), ("curve_second", "--")):
            x, rows = _resampled(some, curve, at, logarithmic=True)
            low, middle, high = np.nanquantile(rows, [0.25, 0.5, 0.75], axis=0)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(x, middle, style, color=colour, lw=width)
        y = 0.97 - 0.09 * i
        axis.text(0.04, y, dtype, color=colour, transform=axis.transAxes, va="top", fontsize=7)
    for order, end in ((1, 1e-4), (2, 3e-3)):
        line = at[(at >= end / 30) & (at <= end)]
        if len(line):
            x, y = line, 0.12 * line**order
            axis.plot(x, y, color=GUIDE, lw=0.8)
            axis.text(x[-1] * 1.3, y[-1], str(order), color=GUIDE, fontsize=7, va="center")
    axis.set(xscale="log", xlabel="learning rate / η*")
    axis.set(yscale="log", ylim=(1e-12, 30), ylabel="relative error of the prediction")


def _signs(axis: Axes, cells: Sequence[Cell]) -> None:
    judged = [c for c in cells if c.arithmetic in ("float64", "float32")] or cells
    at = _multiples(judged)
    models = grouped(judged, "model").items()
    for ((model,), some), style in zip(models, itertools.cycle(_LINES), strict=False):
        x, rows = _resampled(some, "curve_signs", at, logarithmic=False)
        axis.plot(x, np.nanmean(rows, 0), color="black", ls=style, lw=1, label=short(model)[:22])
    axis.plot([0.5, 0.5], [0.62, 1.02], color=GUIDE, lw=0.8, ls=":")
    axis.set(xscale="log", xlabel="learning rate / η*")
    axis.set(ylim=(0.4, 1.02), ylabel="share of right signs")
    axis.legend(loc="lower left", handlelength=2.0, fontsize=6, borderaxespad=0)


def _identities(axis: Axes, checks: Sequence[Check]) -> None:
    drawn = [c for c in checks if c.group not in ("determinism", "d_w, d_l")]
    labels = []
    rows = reversed(grouped(drawn, "group", "arithmetic").items())
    for height, ((group, arithmetic), some) in enumerate(rows):
        dtype = arithmetic.split()[0]
        errors = np.maximum([c.error for c in some], _SMALLEST)
        dots = {"ms": 2.5, "color": _COLOURS[dtype], "alpha": 0.5, "mew": 0}
        axis.plot(errors, np.full(len(errors), height), "o", **dots)
        limits = sorted({c.limit for c in some if c.limit})
        axis.plot(limits, [height] * len(limits), "|", ms=9, color=GUIDE, mew=1.2)
        labels.append(f"{group}, {_SHORT[dtype]}{' d.' if 'default' in arithmetic else ''}")
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xscale="log", xlim=(_SMALLEST / 3, 1), ylim=(-0.7, len(labels) - 0.3))
    axis.set_xticks([_SMALLEST, 1e-12, 1e-6, 1], ["0", "$10^{-12}$", "$10^{-6}$", "1"])
    axis.minorticks_off()
    axis.set_xlabel("error (grey: limit)")
