"""Docstrings of the library as Markdown: roles as links, formulas as code, tables as tables.

A griffe extension. Docstrings are parsed as Google style first and rewritten section by section, so
that names of arguments are never touched.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
DIRECTIVE = re.compile(r"^::: (\S+)((?:\n {4}.*)*)", re.MULTILINE)

_CODE = re.compile(r":[a-z]+:`~?(?P<role>[^`]+)`|``(?P<literal>.+?)``|`(?P<code>[^`]+)`", re.DOTALL)
_RULE = re.compile(r"=+(\s+=+)*\s*")
_PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{5})")
_NAME = re.compile(r"[A-Za-z]\w*(\.\w+)*")
_SPECIAL = str.maketrans(
    {"<": "&lt;", "*": "&#42;", "_": "&#95;", "[": "&#91;", "]": "&#93;", "|": "&#124;"}
)

Link = Callable[[str], str | None]


def documented() -> list[str]:
    """Paths of all objects that the reference pages show."""
    paths = []
    for page in sorted(REFERENCE.glob("*.md")):
        for path, options in DIRECTIVE.findall(page.read_text("utf-8")):
            named = re.search(r"members: \[(.+)\]", options)
            paths += [path, *(f"{path}.{name}" for name in (named[1].split(", ") if named else ()))]
    return paths


def inline(text: str, link: Link) -> str:
    """One paragraph or cell: code and roles as code, linked where documented; the rest literal."""
    pieces, end = [], 0
    for match in _CODE.finditer(text):
        pieces.append(_plain(text[end : match.start()]))
        pieces.append(_code(match, link))
        end = match.end()
    return "".join([*pieces, _plain(text[end:])])


def _plain(text: str) -> str:
    return _PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text.translate(_SPECIAL))


def _code(match: re.Match[str], link: Link) -> str:
    role = match["role"]
    words = " ".join((role or match["literal"] or match["code"]).split())
    path = link(words) if _NAME.fullmatch(words) else None
    shown = words.removeprefix("simgrad.") if role and path else words
    quoted = f"`` {shown} ``" if "`" in shown else f"`{shown}`"
    return f"[{quoted}][{path}]" if path else quoted


def markdown(text: str, link: Link) -> str:
    """A docstring's prose as Markdown."""
    lines, blocks = text.split("\n"), []
    while lines:
        if not lines[0].strip():
            lines.pop(0)
        elif lines[0].startswith(">>>"):
            code = _take(lines, lambda line: bool(line.strip()))
            blocks.append(_fence("pycon", [re.sub(r"\s*# doctest:.*", "", line) for line in code]))
        elif lines[0].startswith("    "):
            block = _take(lines, lambda line: line.startswith("    ") or not line.strip())
            blocks.append(_fence("text", [line[4:] for line in block]))
        elif _RULE.fullmatch(lines[0]):
            blocks.append(_table(_take_table(lines), link))
        else:
            blocks.append(_paragraph(_take(lines, lambda line: bool(line.strip())), link))
    return "\n\n".join(blocks)


def _take(lines: list[str], belongs: Callable[[str], bool]) -> list[str]:
    taken = []
    while lines and belongs(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _fence(language: str, lines: list[str]) -> str:
    code = "\n".join(lines).strip("\n")
    return f"```{language}\n{code}\n```"


def _paragraph(lines: list[str], link: Link) -> str:
    """Prose, or a list: bullets keep their marks."""
    items: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("* ") or not items:
            mark = "* " if line.startswith("* ") else ""
            items.append((mark, [line.removeprefix(mark)]))
        else:
            items[-1][1].append(line.strip())
    return "\n".join(
        mark + inline("\n".join(words), link).replace("\n", "\n" + " " * len(mark))
        for mark, words in items
    )


def _take_table(lines: list[str]) -> list[str]:
    """From the first rule to the last before a blank line."""
    return _take(lines, lambda line: bool(line.strip()))


def _table(lines: list[str], link: Link) -> str:
    starts = [m.start() for m in re.finditer("=+", lines[0])]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    rules = [i for i, line in enumerate(lines) if _RULE.fullmatch(line)]
    cells = [[line[a:b].strip() for a, b in spans] for line in lines]
    head = cells[1 : rules[1]] if len(rules) > 2 else [[""] * len(spans)]
    body: list[list[str]] = []
    for row in cells[rules[-2] + 1 : rules[-1]]:
        if row[0] or not body:
            body.append(row)
        else:
            body[-1] = [f"{old} {new}".strip() for old, new in zip(body[-1], row, strict=True)]
    rows = [head[0], ["---"] * len(spans), *([inline(cell, link) for cell in row] for row in body)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


FACTS = {
    "name": "name",
    "formula": "loss",
    "ratio": "d_w/d_l",
    "pushes_chosen_down": "d_w < 0",
    "source": "source",
}


def _objective(cls: griffe.Class) -> str:
    """What an objective says of itself in class attributes, as a table; nothing for the base."""
    rows = []
    for attribute, title in FACTS.items():
        member = cls.members.get(attribute)
        text = ast.literal_eval(str(member.value)) if member is not None else ""
        if text:
            shown = _plain(text) if attribute == "source" else "`" + text.replace("|", "\\|") + "`"
            rows.append(f"| {_plain(title)} | {shown} |")
    return "\n".join(["|  |  |", "| --- | --- |", *rows]) if rows else ""


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Know what is documented, then rewrite."""
        self.pkg = pkg
        self.pages = {self._at(path).canonical_path: path for path in documented()}
        self._walk(pkg)

    def _at(self, path: str) -> griffe.Object | griffe.Alias:
        below = path.removeprefix(self.pkg.path).removeprefix(".")
        return self.pkg[below] if below else self.pkg

    def _meant(self, found: griffe.Object | griffe.Alias) -> griffe.Object | griffe.Alias:
        """Where a package exports a function under the name of its module, the function."""
        own = (
            found.members.get(found.name)
            if found.is_module and found.canonical_path not in self.pages
            else None
        )
        return found if own is None or own.is_alias else own

    def _walk(self, obj: griffe.Object) -> None:
        if obj.docstring:
            self._rewrite(obj.docstring, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member)

    def _rewrite(self, docstring: griffe.Docstring, obj: griffe.Object) -> None:
        def link(name: str) -> str | None:
            path = self._find(name, obj)
            return None if path == self.pages.get(obj.canonical_path) else path

        sections = docstring.parse("google", warnings=False)
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.text:
                section.value = markdown(section.value, link)
            elif isinstance(section.value, list):  # arguments, attributes, exceptions
                for item in section.value:
                    item.description = markdown(item.description, link)
            else:
                raise ValueError(
                    f"{obj.path}: a docstring section that the pages cannot show: "
                    f"{section.kind.value}"
                )
        if obj.is_class and "formula" in obj.members:
            sections.append(griffe.DocstringSectionText(_objective(obj)))
        docstring.__dict__["parsed"] = sections

    def _find(self, name: str, obj: griffe.Object) -> str | None:
        """Path under which the pages show what ``name`` means in the scope of ``obj``."""
        scope: griffe.Object | None = obj
        while scope is not None:
            try:
                found = self._at(name) if name.startswith(f"{self.pkg.path}.") else scope[name]
            except (KeyError, griffe.AliasResolutionError):
                scope = scope.parent
                continue
            try:
                return self._page(self._meant(found))
            except griffe.AliasResolutionError:  # from another library
                return None
        known = [path for path in self.pages.values() if path.rpartition(".")[2] == name]
        return known[0] if len(known) == 1 and name[0].isupper() else None

    def _page(self, found: griffe.Object | griffe.Alias) -> str | None:
        """Its own path there, or that of a member behind the path of the class that shows it."""
        canonical, public, member = found.canonical_path, found.is_public, ""
        if canonical not in self.pages and found.parent is not None and found.parent.is_class:
            if found.docstring is None or not public:
                return None
            canonical, _, name = canonical.rpartition(".")
            member = f".{name}"
        path = self.pages.get(canonical)
        return path + member if path else None
