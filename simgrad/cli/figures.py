"""``simgrad figures``: rebuild the paper figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simgrad.errors import InputError


@dataclass
class Figures:
    """Compute and draw the figures, with every plotted number as JSON and an index page.

    It needs no network and no accelerator. What was computed before with the same configuration and
    the same code is taken from the cache.
    """

    only: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    """Names of the figures to make (default: all)."""
    out: Path = Path("figures")
    """Folder to write to."""
    venue: Literal["neurips", "icml", "iclr"] = "neurips"
    """Whose text width the figures fill."""
    format: str = "pdf,png"
    """Any of pdf, png, svg and pgf, with commas between."""
    fresh: bool = False
    """Compute again what is in the cache, the worlds' pretrained policies included."""
    model: str | None = None
    """Folder or Hub id of a checkpoint, for the figures of real checkpoints."""
    data: str | None = None
    """Preference pairs for the same: a .jsonl, .json, .csv or .parquet file, or a Hub data set."""

    def run(self) -> int:
        """Render and list what was written."""
        import contextlib
        import dataclasses
        import difflib
        import time

        from rich.console import Console

        from simgrad.cli.runtime import HOST_DEVICES, prepare

        console = Console(stderr=True)
        prepare(host_devices=HOST_DEVICES)
        import matplotlib as mpl

        mpl.use("agg")
        from simgrad.figures.gallery import (
            FIGURES,
            NotDrawn,
            render,
            require_folder,
            require_formats,
            write_index,
        )
        from simgrad.worlds import pretrained_anew

        formats: tuple = tuple(part.strip() for part in self.format.split(",") if part.strip())
        require_formats(formats)
        require_folder(self.out)
        if unknown := [name for name in self.only if name not in FIGURES]:
            near = difflib.get_close_matches(unknown[0], FIGURES, 1)
            hint = f" did you mean {near[0]}?" if near else ""
            raise InputError(
                f"no figure {', '.join(unknown)};{hint} there are: {', '.join(FIGURES)}"
            )
        given = {
            key: value for key in ("model", "data") if (value := getattr(self, key)) is not None
        }
        # policies that several figures share are pretrained once, not once a figure
        with pretrained_anew() if self.fresh else contextlib.nullcontext():
            for name in self.only or FIGURES:
                config = FIGURES[name].config
                fields = {f.name for f in dataclasses.fields(config)}
                config = dataclasses.replace(
                    config, **{k: v for k, v in given.items() if k in fields}
                )
                begin = time.monotonic()
                try:
                    with console.status(f"Computing {name}"):
                        files = render(name, self.out, config, self.venue, formats, self.fresh)
                except NotDrawn as reason:
                    if self.only:
                        raise
                    console.print(f"{name} skipped: {reason}", highlight=False)
                    continue
                console.print(f"{name} ({time.monotonic() - begin:.0f} s)", highlight=False)
                for file in files:
                    print(file)
        print(write_index(self.out))
        return 0
