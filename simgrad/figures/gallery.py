"""All figures by name, and how they are saved: PDF, PNG and every plotted number as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from simgrad.figures import predicted_vs_measured
from simgrad.figures.style import paper_style
from simgrad.provenance import provenance

__all__ = ["FIGURES", "Entry", "render"]


class Entry(NamedTuple):
    """A figure: its configuration, what computes it, what draws it, what to see."""

    config: Any
    compute: Callable[[Any], Any]
    plot: Callable[[Any], Figure]
    caption: str


FIGURES: Mapping[str, Entry] = {
    "predicted_vs_measured": Entry(
        predicted_vs_measured.Config(),
        predicted_vs_measured.compute,
        predicted_vs_measured.plot,
        predicted_vs_measured.CAPTION,
    ),
}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def render(name: str, folder: Path, config: Any = None) -> list[Path]:
    """Compute and save one figure; returns the files written.

    Raises:
        ValueError: no such figure.
    """
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(FIGURES)}")
    entry = FIGURES[name]
    config = entry.config if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    result = entry.compute(config)
    where = provenance()
    record = {
        "figure": name,
        "caption": entry.caption.format(**dataclasses.asdict(config)),
        "config": dataclasses.asdict(config),
        "provenance": where,
        "data": dataclasses.asdict(result),
    }
    numbers = folder / f"{name}.json"
    numbers.write_text(json.dumps(record, default=_plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    source = f"simgrad {where['simgrad']} {where['git_revision'] or ''}".strip()
    written = [numbers]
    with paper_style():
        figure = entry.plot(result)
        for kind, about in (
            ("pdf", {"Title": name, "Creator": source, "CreationDate": None, "ModDate": None}),
            ("png", {"Title": name, "Software": source}),
        ):
            path = folder / f"{name}.{kind}"
            figure.savefig(path, metadata=about)
            written.append(path)
        plt.close(figure)
    return written
