"""``simgrad validate``: theory held against measured training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from simgrad.errors import InputError

if TYPE_CHECKING:
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

        grid = self._grid()
        self.out.mkdir(parents=True, exist_ok=True)
        with progress_bar(Console(stderr=True), "Validating", unit="pieces") as progress:
            found = validate(grid, lambda what, done, of: progress(done, of))
        found.save(self.out / "validation.json")
        written = write_page(found, self.out)
        _show(found, Console(), [self.out / "validation.json", *written])
        return 1 if found.failed else 0

    def _grid(self) -> Any:
        from simgrad.validation.grid import FULL, QUICK

        given: dict[str, Any] = {"seed": self.seed}
        for name in (
            "objectives",
            "optimizers",
            "dtypes",
            "precisions",
            "learning_rates",
            "model",
            "data",
            "pairs",
        ):
            value = getattr(self, name)
            if value is not None and value != ():
                given[name] = value
        if self.models:
            given["models"] = () if self.models == ("none",) else self.models
        if self.max_length is not None:
            given["max_length"] = self.max_length
        return dataclasses.replace(FULL if self.full else QUICK, **given)


def _show(found: Validation, console: Any, files: Sequence[Path]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "statement", "goal", "worst"):
        right, least = title in ("goal", "worst"), {"": 5, "goal": 8}.get(title)
        table.add_column(title, no_wrap=True, min_width=least, justify="right" if right else "left")
    table.add_column(
        "where", no_wrap=True, overflow="ellipsis", max_width=max(12, console.width - 64)
    )
    marks = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "[dim]shown[/]"}
    for s in found.statements:
        table.add_row(marks[s.holds], *map(escape, (s.name, s.goal, s.worst, s.where)))
    console.print(table)
    console.print(_summary(found), highlight=False)
    console.print("→ " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


def _summary(found: Validation) -> str:
    devices = found.provenance["devices"]
    judged = [s for s in found.statements if s.holds is not None]
    line = (
        f"{len(found.cells)} settings, {len(found.checks)} identities on {len(devices)} x "
        f"{devices[0]}: "
        f"{sum(bool(s.holds) for s in judged)} of {len(judged)} statements hold"
    )
    if found.failed:
        line += f"; [bold red]failed: {', '.join(s.name for s in found.failed)}[/]"
    return line
