"""What the site takes from elsewhere when it is built: help texts, columns, gallery, notebooks.

Pages ask for it with comments (``<!-- help -->`` and the other :data:`MADE`), so that nothing on
them can go stale. Formulas between dollar signs on pages with ``math: true`` become
MathML, which browsers draw without scripts, fonts or network.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
BROUGHT = {"figures": (".png", ".pdf", ".json", ".html", ".svg"), "notebooks": (".ipynb",)}
COLUMNS = "100"

_FORMULA = re.compile(
    r"```.*?```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL
)
_HOLDER = "formula{}place"


_SPACING = (  # what TeX knows and MathML has to be told
    (re.compile(r"<mi>(log)</mi>"), r'<mi>\1</mi><mspace width="0.17em" />'),
    (re.compile(r"<mi>(&#x0039[34];)</mi>"), r'<mi mathvariant="normal">\1</mi>'),
    (re.compile(r"<mo>(&#x0002F;)</mo>"), r'<mo lspace="0" rspace="0">\1</mo>'),
    (
        re.compile(
            r"(<mo[^>]*>(?:&#x00028;|&#x0003D;|&#x02264;|&#x0002C;)</mo>)<mo>&#x02212;</mo>"
        ),
        r'\1<mo form="prefix">&#x02212;</mo>',
    ),
)


def on_files(files: Any, config: Any) -> Any:
    """Add figures and notebooks, which live beside the documentation."""
    from mkdocs.structure.files import File

    for folder, kinds in BROUGHT.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in kinds:
                files.append(
                    File.generated(
                        config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)
                    )
                )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what the page asks for, and set formulas aside."""
    for comment, make in MADE.items():
        mark = f"<!-- {comment} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    if page.meta.get("math"):
        page.formulas = []
        markdown = _FORMULA.sub(lambda match: _set_aside(match, page.formulas), markdown)
    return markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put the formulas where they belong."""
    for number, formula in enumerate(getattr(page, "formulas", [])):
        html = html.replace(_HOLDER.format(number), formula)
    return html


def _set_aside(match: re.Match[str], formulas: list[str]) -> str:
    latex = match["block"] or match["inline"]
    if latex is None:
        return match[0]
    formulas.append(mathml(latex.strip(), "block" if match["block"] else "inline"))
    return _HOLDER.format(len(formulas) - 1)


def mathml(latex: str, display: str) -> str:
    """A formula as MathML.

    Raises:
        ValueError: LaTeX that would not be drawn as meant.
    """
    from latex2mathml.converter import convert

    tree = convert(latex, display=display)
    if unknown := re.search(r">\\[A-Za-z]+|>&<", tree):
        raise ValueError(f"no MathML for {unknown[0]} in {latex}")
    for pattern, spaced in _SPACING:
        tree = pattern.sub(spaced, tree)
    return tree


def help_texts() -> str:
    """What ``simgrad --help`` and ``--help`` of every command print."""
    whole = _printed("--help")
    listed = re.search(r"\{([a-z,\s]+)\}", whole)
    if listed is None:
        raise ValueError("`simgrad --help` names no commands")
    parts = ["```text", whole, "```", ""]
    for command in listed[1].split(","):
        parts += [
            f"## simgrad {command.strip()}",
            "",
            "```text",
            _printed(command.strip(), "--help"),
            "```",
            "",
        ]
    return "\n".join(parts)


def _printed(*arguments: str) -> str:
    from simgrad.cli import main

    out = io.StringIO()
    plain = mock.patch.dict(os.environ, {"COLUMNS": COLUMNS, "NO_COLOR": "1", "TERM": "dumb"})
    called = mock.patch.object(sys, "argv", ["simgrad", *arguments])
    with plain, called, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip()


def gallery() -> str:
    """The index of the rendered figures, with its links seen from the site's root."""
    index = ROOT / "figures" / "README.md"
    if not index.is_file():
        return "_No index yet: `simgrad figures` writes one._"
    text = re.sub(r"\A# .*\n", "", index.read_text("utf-8"))
    return re.sub(r"\]\((?!https?:|#)(?:\./)?([^)]+)\)", _from_root, text)


def _from_root(match: re.Match[str]) -> str:
    target = os.path.normpath(f"figures/{match[1]}")
    return f"]({target})"


def notebooks() -> str:
    """Links to the notebooks, each with its title and first sentence."""
    return (
        _list(sorted((ROOT / "notebooks").glob("*.ipynb")), _introduced)
        or "_There are none in this copy._"
    )


def columns(kind: str) -> str:
    """The columns of a table, as :mod:`simgrad.bridge.engine.columns` declares them."""
    from simgrad.bridge.engine.columns import PREDICTION_COLUMNS, SCORE_COLUMNS

    ends = {1: "high", -1: "low", 0: ""}
    declared = {"score": SCORE_COLUMNS, "prediction": PREDICTION_COLUMNS}[kind]
    cells = [(f"`{c.name}`", c.label, c.meaning, c.unit, ends[c.risk]) for c in declared]
    head = [("column", "", "meaning", "unit", "risky end"), ("---",) * 5]
    # a bar would begin another cell
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (*head, *cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(paths: list[Path], line: Callable[[Path], str]) -> str:
    return "\n".join(f"- {line(path)}" for path in paths)


def _introduced(path: Path) -> str:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    prose = next(
        ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), path.stem
    )
    title, _, rest = prose.strip().partition("\n")
    first = rest.strip().split("\n\n")[0].replace("\n", " ")
    return f"[{title.lstrip('# ')}](notebooks/{path.name}){{: download }}" + (
        f": {first}" if first else ""
    )


MADE: dict[str, Callable[[], str]] = {
    "help": help_texts,
    "gallery": gallery,
    "notebooks": notebooks,
    "score columns": lambda: columns("score"),
    "prediction columns": lambda: columns("prediction"),
}
"""What takes the place of a comment."""
