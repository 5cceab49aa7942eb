"""The validation as one page for the web, with its figure."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import numpy as np

from simgrad.drawing.style import paper_style
from simgrad.validation import chart
from simgrad.validation.validate import Validation

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(found: Validation, folder: Path) -> list[Path]:
    """Write validation.html, self-contained, and validation.pdf and .png beside it."""
    images = [folder / "validation.pdf", folder / "validation.png"]
    with paper_style():
        figure = chart.plot(found)
        figure.savefig(
            images[0], metadata={"Title": "validation", "CreationDate": None, "ModDate": None}
        )
        figure.savefig(images[1], metadata={"Title": "validation"})
        plt.close(figure)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=_number, order=_order, share=_share)
    page = folder / "validation.html"
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        found=found,
        judged=[s for s in found.statements if s.holds is not None],
        limits=_limits(found),
        caption=chart.CAPTION,
        image=base64.b64encode(images[1].read_bytes()).decode(),
        provenance=json.dumps(found.provenance, indent=1, ensure_ascii=False),
        grid=json.dumps(found.grid.record(), indent=1, ensure_ascii=False),
    )
    page.write_text(text, encoding="utf-8")
    return [page, *images]


def _limits(found: Validation) -> list[dict[str, object]]:
    """Where theory stops by model, arithmetic, optimizer and step kind: medians over objectives."""
    groups: dict[tuple[str, ...], list] = {}
    for c in found.cells:
        groups.setdefault((c.model, c.arithmetic, c.kind, c.optimizer), []).append(c)
    names = (
        "trust_radius",
        "holds_to",
        "holds_to_nats",
        "r2_first",
        "r2_second",
        "error_second",
        "signs",
        "signs_own",
    )
    return [
        {
            **dict(zip(("model", "arithmetic", "kind", "optimizer"), key, strict=True)),
            **{name: _median([getattr(c, name) for c in cells]) for name in names},
        }
        for key, cells in groups.items()
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
