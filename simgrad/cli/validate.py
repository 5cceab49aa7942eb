"""``simgrad validate``: theory held against measured training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from simgrad.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from simgrad.validation.grid import Grid
    from simgrad.validation.validate import Validation

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]


@dataclass
class Validate:
    """Hold every prediction against measured training steps, on whatever devices JAX sees.

    Both orders of a step, signs, regimes, closed forms, kernels, whole runs: for small models of
    every kind and, with --model and --data, for a checkpoint. Prints what is claimed and whether it
    holds; exit status 1 when a statement fails.
    """

    out: Path = Path("validation")
    """Folder for validation.json, the figure (.pdf, .png) and validation.html."""
    quick: bool = False
    """The default grid: all objectives, three small models, under a minute on two cores."""
    full: bool = False
    """Every model, objective x optimizer, float16 and all routes to a kernel too."""
    model: str | None = None
    """A checkpoint besides: folder, Hub id or world:NAME."""
    data: str | None = None
    """Its preference pairs: a file, a Hub data set or world:NAME."""
    models: Names = ()
    """Only these models, given by name.

    The names are linear-softmax, unconstrained-features, transformer, transformer-tied,
    transformer-deep, or none.
    """
    objectives: Names = ()
    """Only these; `simgrad objectives` lists them."""
    optimizers: Names = ()
    """Only these: sgd, momentum, rmsprop, adam, adamw, clipped."""
    dtypes: Names = ()
    """Only these: float64, float32, bfloat16, float16."""
    precisions: Names = ()
    """Of float32 matrix products: default or highest (default: both where they differ)."""
    learning_rates: Annotated[tuple[float, ...], tyro.conf.arg(name="lr", metavar="RATE ...")] = ()
    """Learning rates (default: from 1e-6 to 10 times each setting's own trust radius)."""
    pairs: int | None = None
    """Pairs that are trained on together."""
    max_length: int | None = None
    """Longest pair of the checkpoint's data in tokens."""
    seed: int = 0
    """Of parameters and pairs."""

    def run(self) -> int:
        """Measure, print, write."""
        if self.quick and self.full:
            raise InputError("--quick or --full, not both")
        from rich.console import Console

        from simgrad.cli.display import progress_bar
        from simgrad.cli.runtime import HOST_DEVICES, prepare

        prepare("float64", host_devices=HOST_DEVICES if self.full else None)
        from simgrad.validation.page import write_page
        from simgrad.validation.validate import validate

        grid, record = self._grid(), self.out / "validation.json"
        self.out.mkdir(parents=True, exist_ok=True)
        with progress_bar(Console(stderr=True), "Validating", unit="pieces") as progress:
            found = validate(grid, lambda what, done, of: progress(done, of))
        found.save(record)
        _show(found, Console(highlight=False), [record, *write_page(found, self.out)])
        return 1 if found.failed else 0

    def _grid(self) -> Grid:
        from simgrad.validation.grid import FULL, QUICK

        names = {f.name for f in dataclasses.fields(QUICK)} & set(vars(self))
        given = {name: x for name in names if (x := getattr(self, name)) not in (None, ())}
        if self.models == ("none",):
            given["models"] = ()
        return dataclasses.replace(FULL if self.full else QUICK, **given)


def _show(found: Validation, console: Console, files: Sequence[Path]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True, min_width=5)
    table.add_column("statement", no_wrap=True)
    table.add_column("goal", no_wrap=True, min_width=8, justify="right")
    table.add_column("worst", no_wrap=True, justify="right")
    room = max(12, console.width - 64)
    table.add_column("where", no_wrap=True, overflow="ellipsis", max_width=room)
    marks = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "[dim]shown[/]"}
    for s in found.statements:
        table.add_row(marks[s.holds], *map(escape, (s.name, s.goal, s.worst, s.where)))
    console.print(table)
    devices, good = found.provenance["devices"], len(found.judged) - len(found.failed)
    settings = f"{len(found.cells)} settings, {len(found.checks)} identities"
    holding = f"{good} of {len(found.judged)} statements hold"
    failed = f"; [bold red]failed: {', '.join(s.name for s in found.failed)}[/]"
    where = f"{settings} on {len(devices)} x {devices[0]}"
    console.print(f"{where}: {holding}{failed if found.failed else ''}")
    console.print("→ " + ", ".join(map(str, files)), soft_wrap=True)
