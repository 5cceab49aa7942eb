"""``simgrad figures``: rebuild the paper figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Figures"]


@dataclass
class Figures:
    """Compute and draw the figures: PDF, PNG and the numbers as JSON. No download, no accelerator."""

    only: tuple[str, ...] = ()
    """Names of the figures to make (default: all)."""
    out: Path = Path("figures")
    """Folder to write to."""

    def run(self) -> int:
        """Render and list what was written."""
        import time

        from rich.console import Console

        from simgrad.cli.runtime import prepare

        console = Console(stderr=True)
        prepare()
        import matplotlib as mpl

        mpl.use("agg")
        from simgrad.figures.gallery import FIGURES, render

        if unknown := [name for name in self.only if name not in FIGURES]:
            raise ValueError(f"no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
        for name in self.only or FIGURES:
            begin = time.monotonic()
            with console.status(f"Computing {name}"):
                files = render(name, self.out)
            console.print(f"{name} ({time.monotonic() - begin:.0f} s)", highlight=False)
            for file in files:
                print(file)
        return 0
