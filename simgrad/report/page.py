"""The report of a score table as one page for the web, and its figures: ``write_report``."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from simgrad.bridge import Encoded, Policy, ScoreTable
from simgrad.drawing.draw import number
from simgrad.drawing.style import paper_style
from simgrad.errors import InputError
from simgrad.report import charts
from simgrad.report.numbers import (
    ReportNumbers,
    read_score_table,
    report_numbers,
    require_score_table,
)
from simgrad.report.scored import find_scored
from simgrad.report.tokens import PairView, ResponseView, pair_views
from simgrad.report.words import (
    associations_sentence,
    chance,
    correlation,
    headline,
    objectives_sentence,
    strength_sentence,
)
from simgrad.store import provenance, write

__all__ = ["WrittenReport", "write_report"]

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_LIFT, _LOWER = (90, 174, 97), (153, 112, 171)
"""Green and purple of ColorBrewer's PRGn: told apart under every common colour blindness."""


@dataclass(frozen=True)
class WrittenReport:
    """What was written; as the last expression of a notebook's cell it shows the page.

    Attributes:
        page: the page, self-contained; ``IPython.display.HTML(filename=report.page)`` shows it too.
        images: its figures, in a folder beside it.
        numbers: all that the page says.
        problems: what could not be shown, and why.
    """

    page: Path
    images: tuple[Path, ...]
    numbers: ReportNumbers
    problems: tuple[str, ...]

    def _repr_html_(self) -> str:
        page = html.escape(self.page.read_text(encoding="utf-8"))
        style = "width:100%;height:50rem;border:1px solid #ddd"
        return f'<iframe srcdoc="{page}" style="{style}" title="report"></iframe>'


def write_report(
    table: ScoreTable | str | Path,
    path: str | Path | None = None,
    policy: Policy | str | Path | None = None,
    rows: str | Path | Sequence[Any] | Encoded | None = None,
    *,
    worst: int = 5,
    tokens: bool = True,
    revision: str | None = None,
) -> WrittenReport:
    """Write a score table's findings as one self-contained page, with PNG figures in a folder.

    The folder lies beside the page.

    The page holds no script and fetches nothing. The same arguments give the same bytes.

    Args:
        table: of :func:`simgrad.score`, or its file.
        path: the page (None: ``scores.report.html`` beside ``scores.parquet``); its figures go to
            ``scores.report_files``.
        policy: the model for token colours, or its name (None: what the table says was scored).
        rows: the data, or their name (None: what the table says).
        worst: pairs shown token by token.
        tokens: whether to load the model for them.
        revision: Hub revision of the model.

    Model and data are used only if they are those scored; otherwise the page and ``problems`` say
    what differs.

    Raises:
        InputError: no score table; no ``path`` for a table that is not a file; ``worst`` below 0.
        FileNotFoundError: no such table.
    """
    if worst < 0:
        raise InputError(f"worst={worst}: a number of pairs, 0 or more")
    if not isinstance(table, ScoreTable):
        path = Path(table).with_suffix(".report.html") if path is None else path
        table = read_score_table(table)
    if path is None:
        raise InputError("path: where to write the page of a table that was not read from a file")
    path = Path(path)
    require_score_table(table)
    scored = find_scored(
        table, policy, rows, revision=revision, model=tokens and worst > 0 and len(table) > 0
    )
    numbers = report_numbers(table, scored.rows, worst)
    worst_pairs = numbers.summary.worst.tolist() if scored.pairs is not None else []
    views = pair_views(table, scored, worst_pairs) if worst_pairs else ()
    images = _images(numbers, path.with_name(f"{path.stem}_files"))
    template = _environment().from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        n=numbers,
        ticks=len(table) <= charts.MOST_TICKS,
        headline=headline(numbers),
        associations_text=associations_sentence(numbers),
        objectives_text=objectives_sentence(numbers),
        strength_text=strength_sentence(numbers),
        worst=[{name: table[name][i] for name in table} for i in numbers.summary.worst],
        views=views,
        asked=tokens and worst > 0,
        chance=chance,
        deviation=_deviation(views),
        problems=scored.problems,
        images={image.stem: base64.b64encode(image.read_bytes()).decode() for image in images},
        metadata=json.dumps(dict(table.metadata), indent=1, ensure_ascii=False, sort_keys=True),
        written=json.dumps(provenance(), indent=1, sort_keys=True),
    )
    write(path, text.encode(errors="replace"))
    return WrittenReport(path, images, numbers, scored.problems)


def _images(numbers: ReportNumbers, folder: Path) -> tuple[Path, ...]:
    if not numbers.summary.scored:
        return ()
    written = []
    with paper_style():
        figures: dict[str, Figure] = {"distributions": charts.distributions(numbers.scores)}
        if numbers.map is not None:
            figures["regime_plane"] = charts.regime_plane(numbers.map)
        if numbers.strength is not None:
            figures["strength"] = charts.strength_curve(numbers.strength, numbers.summary.scored)
        for name, figure in figures.items():
            memory = io.BytesIO()
            figure.savefig(memory, format="png", dpi=220, metadata={"Title": name})
            plt.close(figure)
            written.append(folder / f"{name}.png")
            write(written[-1], memory.getvalue())
    return tuple(written)


def _deviation(views: Sequence[PairView]) -> float | None:
    """Largest relative difference between the sums over tokens and the table's predictions."""
    found = [
        abs(response.change - expected) / max(abs(e) for e in view.expected)
        for view in views
        if view.expected and 0 < max(map(abs, view.expected)) < math.inf
        for response, expected in zip((view.chosen, view.rejected), view.expected, strict=True)
        if math.isfinite(response.change)
    ]
    return max(found, default=None)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number,
        percent=lambda part, whole: f"{100 * part / whole:.0f} %" if whole else "–",
        correlation=correlation,
        colour=_colour,
        visible=_visible,
        words=lambda label: label.replace("_", " "),
        maths=_maths,
        short=lambda name: Path(name).name,
    )
    environment.globals.update(extreme=_extreme, movers=_movers)
    return environment


def _maths(text: str) -> Markup:
    """Subscripts w, l and i of single letters, set as such."""
    return Markup(
        re.sub(
            r"(?<![A-Za-z_])([A-Za-z])_([wli])(?![A-Za-z_])", r"\1<sub>\2</sub>", str(escape(text))
        )
    )


def _visible(text: str) -> str:
    """Line breaks and tabs that can be seen; what no font shows as its code point."""
    text = text.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥\t")
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)


def _extreme(response: ResponseView) -> float:
    return max(
        (abs(piece.change) for piece in response.pieces if math.isfinite(piece.change)), default=0.0
    )


def _colour(change: float, most: float) -> str:
    """Tint of a contribution: its strength is √(|change| / most)."""
    strength = (abs(change) / most) ** 0.5 if most and math.isfinite(change) else 0.0
    tint = _LIFT if change > 0 else _LOWER
    return "#" + "".join(f"{round(255 - strength * (255 - c)):02x}" for c in tint)


def _movers(response: ResponseView, lifted: bool) -> list[Mapping[str, Any]]:
    """The three pieces that are lifted, or lowered, most."""
    sign = 1 if lifted else -1
    some = [piece for piece in response.pieces if sign * piece.change > 0]
    most = sorted(some, key=lambda piece: -sign * piece.change)[:3]
    return [{"text": piece.text.strip() or "␣", "change": piece.change} for piece in most]
