"""All figures by name; how they are computed, drawn and saved; the index page."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgrad.drawing.style import paper_style
from simgrad.figures.stored import NotDrawn, computed, plain, to_json
from simgrad.store import provenance

__all__ = [
    "FIGURES",
    "FORMATS",
    "Entry",
    "Format",
    "NotDrawn",
    "render",
    "require_folder",
    "require_formats",
    "write_index",
]

Format = Literal["pdf", "png", "svg", "pgf"]
FORMATS: tuple[Format, ...] = get_args(Format)


class Entry(NamedTuple):
    """A figure: what it computes, how it is drawn, what to see and what it bears on."""

    config: Any
    compute: Callable[[Any], Any]
    plot: Callable[[Any], Figure]
    result: type
    title: str
    caption: str
    bears_on: str
    inputs: Callable[[Any], tuple[Any, ...]]


def _entry(module: ModuleType) -> Entry:
    nothing: Callable[[Any], tuple[Any, ...]] = lambda config: ()  # noqa: E731
    parts = ("compute", "plot", "Result", "TITLE", "CAPTION", "BEARS_ON")
    inputs = getattr(module, "inputs", nothing)
    return Entry(module.Config(), *(getattr(module, part) for part in parts), inputs=inputs)


_NAMES = """
    overview predicted_vs_measured regimes dynamics token_kernel suffix verdicts refusals
    percentiles squeezing layers optimizers trust_radius features checkpoint checkpoint_layers
"""
FIGURES: Mapping[str, Entry] = {
    name: _entry(importlib.import_module(f"simgrad.figures.{name}")) for name in _NAMES.split()
}
"""In the order of the gallery."""


def require_formats(formats: Sequence[str]) -> None:
    """Refuse formats that cannot be written here.

    Raises:
        ValueError: unknown format, or pgf without a TeX program.
    """
    if not formats:
        raise ValueError(f"no format given; there are: {', '.join(FORMATS)}")
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise ValueError(f"no format {unknown[0]!r}; there are: {', '.join(FORMATS)}")
    if "pgf" in formats and shutil.which(tex := str(mpl.rcParams["pgf.texsystem"])) is None:
        raise ValueError(
            f"pgf measures its texts with {tex}, which is not installed: install TeX Live, or use "
            "pdf"
        )


def render(
    name: str,
    folder: Path,
    config: Any = None,
    venue: str = "neurips",
    formats: Sequence[Format] = ("pdf", "png"),
    fresh: bool = False,
) -> list[Path]:
    """Compute (or take from the cache) and save one figure; returns its files, the numbers first.

    Raises:
        ValueError: no such figure, or a format that cannot be written.
        NotDrawn: the figure needs something that its configuration does not name.
    """
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(FIGURES)}")
    require_formats(formats)
    entry = FIGURES[name]
    config = entry.config if config is None else config
    require_folder(folder)
    result = computed(entry.compute, config, entry.result, fresh, *entry.inputs(config))
    settings, where = dataclasses.asdict(config), provenance()
    record = {
        "figure": name,
        "title": entry.title,
        "caption": entry.caption.format(**settings, count=len(settings.get("seeds", ()))),
        "bears_on": entry.bears_on,
        "config": settings,
        "provenance": where,
        "data": result,
    }
    numbers = folder / f"{name}.json"
    numbers.write_text(to_json(record), encoding="utf-8")
    source = f"simgrad {where['simgrad']} {where['git_revision'] or ''}".strip()
    about = json.dumps(
        {"config": plain(settings), "provenance": where}, sort_keys=True, ensure_ascii=False
    )
    metadata: dict[Format, dict[str, Any] | None] = {
        "pdf": {
            "Title": name,
            "Creator": source,
            "Keywords": about,
            "CreationDate": None,
            "ModDate": None,
        },
        "png": {"Title": name, "Software": source, "Description": about},
        "svg": {"Title": name, "Creator": source, "Description": about, "Date": None},
        "pgf": None,
    }
    written = [numbers]
    with paper_style(venue):
        figure = entry.plot(result)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # one layout for all formats
        for kind in formats:
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], metadata=metadata[kind])
        plt.close(figure)
    return written


def require_folder(folder: Path) -> None:
    """Make a folder for figures, and refuse one whose README.md is something else.

    Raises:
        ValueError: a file, or a folder that already has a README.md of its own.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --out takes a folder")
    index = folder / "README.md"
    if index.exists() and not index.read_text(encoding="utf-8").startswith(_HEADING):
        raise ValueError(
            f"{index} is not an index of figures and would be overwritten: give another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)


_HEADING = "# Gallery\n"


def write_index(folder: Path) -> Path:
    """README.md of a folder of figures: what to see in each, what it bears on, its command."""
    parts = [
        _HEADING,
        "Every figure with the numbers in it (JSON), its configuration and versions. All of them: "
        "`simgrad figures`. For a paper: `simgrad figures NAME --venue icml --format pdf`.\n",
    ]
    for name, entry in FIGURES.items():
        numbers = folder / f"{name}.json"
        if not numbers.exists():
            continue
        record = json.loads(numbers.read_text(encoding="utf-8"))
        there = [kind for kind in FORMATS if (folder / f"{name}.{kind}").exists()]
        shown = next((kind for kind in ("png", "svg") if kind in there), None)
        picture = f"![{entry.title}]({name}.{shown})\n\n" if shown else ""
        links = ", ".join(f"[{kind}]({name}.{kind})" for kind in ("json", *there))
        parts.append(
            f"## {entry.title}\n\n{picture}**What to see.** {record['caption']}\n\n**What it bears "
            f"on.** {record['bears_on']}\n\n`{command(name, record['config'])}`: {links}\n"
        )
    if (folder / "validation" / "validation.html").exists():
        parts.append(
            "Theory held against measured training steps: "
            "[validation](validation/validation.html).\n"
        )
    index = folder / "README.md"
    index.write_text("\n".join(parts), encoding="utf-8")
    return index


def command(name: str, config: Mapping[str, Any]) -> str:
    """The command that makes a figure."""
    files = [
        part for key in ("model", "data") if config.get(key) for part in (f"--{key}", config[key])
    ]
    return shlex.join(["simgrad", "figures", name, *files])
