"""The documentation names everything that is public, and nothing that is not there."""

import importlib
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PUBLIC = tuple(
    """
    simgrad simgrad.objectives simgrad.theory simgrad.theory.kernel
    simgrad.theory.kernel.preconditioning simgrad.theory.prediction simgrad.theory.conditions
    simgrad.theory.similarity simgrad.theory.mitigation simgrad.theory.groups
    simgrad.theory.closed_forms.linear_softmax simgrad.theory.closed_forms.unconstrained
    simgrad.theory.closed_forms.learning_dynamics simgrad.dynamics simgrad.worlds
    simgrad.experiments simgrad.bridge simgrad.report.page simgrad.report.numbers
    simgrad.report.mitigations simgrad.models simgrad.pairs simgrad.tree simgrad.store
    simgrad.figures.gallery simgrad.drawing.draw simgrad.drawing.style
    """.split()
)
GROUPS = (*PUBLIC, "simgrad.theory.closed_forms")
BUILT = importlib.util.find_spec("mkdocs") is not None


def shown() -> set[str]:
    """Paths on the reference pages, a module's listed members included."""
    paths = set()
    for page in (DOCS / "reference").glob("*.md"):
        for path, options in re.findall(
            r"^::: (\S+)((?:\n {4}.*)*)", page.read_text("utf-8"), re.MULTILINE
        ):
            members = re.search(r"members: \[(.+)\]", options)
            paths |= {
                path,
                *(f"{path}.{name}" for name in (members[1].split(", ") if members else ())),
            }
    return paths


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_reference_page(module):
    there, public = shown(), importlib.import_module(module)

    def homes(name):
        """Where it is exported, where it is written, and where else it is public."""
        value = getattr(public, name)
        twice = [
            m
            for m in PUBLIC
            if callable(value) and getattr(importlib.import_module(m), name, None) is value
        ]
        path = getattr(value, "__name__", "") if inspect.ismodule(value) else ""
        return {
            path,
            *(f"{h}.{name}" for h in (module, getattr(value, "__module__", module), *twice)),
        }

    def grouped(name):
        """A module of several names, which stand on the page themselves."""
        return inspect.ismodule(value := getattr(public, name)) and value.__name__ in GROUPS

    assert not [n for n in public.__all__ if not grouped(n) and not homes(n) & there]


def test_reference_pages_name_only_what_exists():
    def exists(path):
        module, _, name = path.rpartition(".")
        try:  # an exported name, or a module that nothing has imported yet
            return not module or hasattr(importlib.import_module(module), name) or importable(path)
        except ModuleNotFoundError:
            return False

    def importable(path):
        return importlib.util.find_spec(path) is not None

    assert shown()
    assert not [path for path in shown() if not exists(path)]


def test_navigation_names_files_that_exist():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("nav:")[1].split("theme:")[0]
    named = re.findall(r"\S+\.md", nav)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix()
)
def test_relative_links_point_to_something(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8"))
    # figures and notebooks stand beside docs/ and are brought in when the site is built
    assert not [
        link for link in links if not ((page.parent / link).exists() or (ROOT / link).exists())
    ]


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix()
)
def test_cross_references_are_documented_names(page):
    there = shown()
    named = re.findall(r"\]\[(simgrad[\w.]*)\]", page.read_text("utf-8"))
    assert not [name for name in named if name not in there]


TO_MARKDOWN = [
    ("sums over k, see :func:`ches`.", "sums over k, see [`ches`][simgrad.theory.ches]."),
    ("the :class:`Unknown` of it", "the `Unknown` of it"),
    ("r* and π_w, not [s = s']", "r&#42; and π&#95;w, not &#91;s = s'&#93;"),
    ("Like this:\n\n    a_w * b_l\n      + c", "Like this:\n\n```text\na_w * b_l\n  + c\n```"),
    (">>> 1 + 1  # doctest: +SKIP\n2", "```pycon\n>>> 1 + 1\n2\n```"),
    ("arXiv 2410.08847, Sec. 5", "[arXiv 2410.08847](https://arxiv.org/abs/2410.08847), Sec. 5"),
    (
        "=== ===\na   b\n    c\nd   e|f\n=== ===",
        "|  |  |\n| --- | --- |\n| a | b c |\n| d | e&#124;f |",
    ),
    ("=== ===\nh   i\n=== ===\na   b\n=== ===", "| h | i |\n| --- | --- |\n| a | b |"),
]


@pytest.mark.skipif(not BUILT, reason="needs the docs extra")
@pytest.mark.parametrize(("text", "expected"), TO_MARKDOWN)
def test_docstrings_become_markdown(text, expected):
    tool = runpy.run_path(str(DOCS / "tools" / "docstrings.py"))
    assert tool["markdown"](text, {"ches": "simgrad.theory.ches"}.get) == expected


@pytest.mark.skipif(not BUILT, reason="needs the docs extra")
def test_formulas_that_cannot_be_drawn_are_refused():
    mathml = runpy.run_path(str(DOCS / "tools" / "hooks.py"))["mathml"]
    assert "<mfrac>" in mathml(r"\frac{a}{b}", "block")
    for latex in (r"\nosuchthing x", r"\begin{aligned} a &= b \end{aligned}"):
        with pytest.raises(ValueError, match="no MathML"):
            mathml(latex, "block")


@pytest.mark.parametrize(("page", "kind"), [("score", "score"), ("predict", "prediction")])
def test_the_guide_shows_every_column_as_it_is_declared(page, kind):
    from simgrad.bridge.engine import columns as declared

    expected = {"score": declared.SCORE_COLUMNS, "prediction": declared.PREDICTION_COLUMNS}[kind]
    made = runpy.run_path(str(DOCS / "tools" / "hooks.py"))["MADE"]
    assert f"<!-- {kind} columns -->" in (DOCS / f"{page}.md").read_text("utf-8")
    head, _, *rows = made[f"{kind} columns"]().splitlines()
    cells = [re.split(r"(?<!\\)\|", row) for row in (head, *rows)]
    assert {len(row) for row in cells} == {7}  # five, and what stands outside the outer bars
    assert [row[1].strip(" `") for row in cells[1:]] == [c.name for c in expected]
    assert all(c.meaning.replace("|", "\\|") in r for c, r in zip(expected, rows, strict=True))


@pytest.mark.skipif(not BUILT, reason="needs the docs extra")
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [
        path.read_text("utf-8") for path in tmp_path.rglob("*.html") if "figures" not in path.parts
    ]
    sources = [
        source
        for page in pages
        for source in re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?([^\" >]+)", page)
    ]
    assert sources
    assert not [source for source in sources if source.startswith(("http", "//"))]
    prose = [re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL) for page in pages]
    assert not [
        role for page in prose for role in re.findall(r":(?:func|class|mod|meth|attr|data):`", page)
    ]
