"""``simgrad predict``: what a whole run will do to every pair, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simgrad.cli.parsing import assignments, mesh_axes
from simgrad.errors import InputError


@dataclass
class Predict:
    """Predict Δlog π of every chosen and rejected response over a run on all pairs together.

    The directional score: one epoch of gradients at the start, then one forward derivative a
    response. Interrupted or killed, the same command continues where it stopped.
    """

    model: str
    """Folder or Hub id of a checkpoint, or world:NAME."""
    data: str
    """A .jsonl, .json, .csv or .parquet file, a Hub data set, or world:NAME."""
    out: Path
    """Parquet file to write: one row a pair, in input order."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    """Of the run (adam: no decay)."""
    learning_rate: Annotated[float, tyro.conf.arg(name="lr")] = 1e-6
    """Its learning rate."""
    epochs: int = 1
    """Passes over the pairs; a last batch that the pairs do not fill counts as a step."""
    batch_size: int = 8
    """Pairs a step."""
    objective: str = "dpo"
    """Preference objective; the policy is its own reference. See `simgrad objectives`."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Hyperparameters of the objective, as in --set beta=0.05."""
    sample: int | None = None
    """Pairs drawn at random for the direction, with the resulting error reported (default: all)."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train as well, and compare every predictor with what happened; this begins anew each time."""
    limit: int | None = None
    """Read only the first rows."""
    split: str = "train"
    """Split of a Hub data set."""
    max_length: int | None = None
    """Longest prompt + response in tokens; longer ones are cut (default: the model's limit)."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=D,model=M")] = None
    """Parameters over M devices, pairs over D groups of those; a CPU is split in D x M devices."""
    worst: int = 5
    """How many of the pairs predicted to fall most are shown."""

    def run(self) -> int:
        """Predict, save, show; with --check train and compare."""
        from rich.console import Console

        from simgrad.cli.display import loading, prediction, progress_bar, tidy_table
        from simgrad.cli.runtime import connect

        console = Console(stderr=True)
        mesh = connect("float32", None if self.mesh is None else mesh_axes(self.mesh))
        with loading(console, f"Loading {self.model}"):
            from simgrad.bridge import check, load, predict, read_rows
            from simgrad.dynamics import RunConfig

            recipe = RunConfig(
                self.objective,
                assignments(self.settings, "--set"),
                self.optimizer,
                self.learning_rate,
                batch_size=self.batch_size,
            )
            rows = read_rows(self.data, self.limit, self.split)
            if self.check and len(rows) < 2:
                raise InputError("--check compares pairs with each other: give at least two")
            policy = load(self.model, mesh=mesh)
        given = {"epochs": self.epochs, "max_length": self.max_length}
        with progress_bar(console, "Predicting") as progress:
            table = predict(
                policy, rows, recipe, sample=self.sample, out=self.out, progress=progress, **given
            )
        prediction(Console(), table, self.out, self.worst)
        if self.check:
            out = self.out.with_name(f"{self.out.stem}.check.parquet")
            from simgrad.experiments.comparison import CAPTION
            from simgrad.experiments.findings import Table

            with loading(console, "Training, and comparing every predictor with it"):
                found = check(policy, rows, recipe, out=out, **given)
            label = f"{self.optimizer}, {table.metadata['run']['steps']} steps"
            by = ("setting", "predictor")
            tidy_table(Console(), Table.of("predictors", CAPTION, by, found.rows(label)))
            print(f"Measured and predicted Δ log π(chosen) of every pair → {out}")
        return 0
