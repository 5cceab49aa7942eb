"""``simgrad report``: what a score table says, as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Report:
    """Write a page about a `simgrad score` table.

    It shows regimes, the worst pairs token by token, confounds and mitigations.

    One self-contained HTML file, and its figures as PNG in a folder beside it. Model and data are
    looked for where the table says they were; without them the page has no token colours.
    """

    scores: tyro.conf.Positional[Path]
    """Parquet file of `simgrad score`."""
    out: Path | None = None
    """Page to write (default: scores.report.html beside the table)."""
    model: str | None = None
    """The model that scored, if it is no longer where the table says."""
    data: str | None = None
    """The data that were scored, likewise."""
    revision: str | None = None
    """Hub revision of the model."""
    worst: int = 5
    """How many of the worst pairs are shown token by token."""
    tokens: bool = True
    """Load the model for token colours."""

    def run(self) -> int:
        """Write, and say where."""
        from rich.console import Console
        from rich.text import Text

        from simgrad.cli.display import loading
        from simgrad.cli.runtime import prepare

        console = Console(stderr=True)
        import matplotlib as mpl

        mpl.use("agg")
        from simgrad.report.numbers import read_score_table
        from simgrad.report.page import write_report

        table = read_score_table(self.scores)
        prepare(table.metadata["run"]["dtype"])
        out = self.scores.with_suffix(".report.html") if self.out is None else self.out
        with loading(console, f"Reporting on {self.scores}"):
            written = write_report(
                table,
                out,
                self.model,
                self.data,
                worst=self.worst,
                tokens=self.tokens,
                revision=self.revision,
            )
        for problem in written.problems:
            console.print(Text(problem, style="yellow"))
        for path in (written.page, *written.images):
            print(path)
        return 0
