"""``simgrad predict``: what a whole run will do to every pair, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from simgrad.cli.parsing import assignments

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from simgrad.dynamics import Recipe, Setting

__all__ = ["Predict"]


@dataclass
class Predict:
    """Predict Δlog π of every chosen and rejected response over a run on all pairs together.

    The directional score: one epoch of gradients at the start, then one forward derivative a
    response.
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
    """Passes over the pairs."""
    batch_size: int = 8
    """Pairs a step."""
    objective: str = "dpo"
    """Preference objective; the policy is its own reference. See `simgrad objectives`."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Hyperparameters of the objective, as in --set beta=0.05."""
    sample: int | None = None
    """Pairs drawn at random for the direction, with the resulting error reported (default: all)."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train as well, and compare every predictor with what happened."""
    limit: int | None = None
    """Read only the first rows."""
    split: str = "train"
    """Split of a Hub data set."""
    max_length: int | None = None
    """Longest prompt + response in tokens; response ends are cut (default: the model's limit)."""
    worst: int = 5
    """How many of the pairs predicted to fall most are shown."""

    def run(self) -> int:
        """Predict, save, show; with --check train and compare."""
        import numpy as np
        from rich.console import Console

        from simgrad.cli.display import loading
        from simgrad.cli.runtime import prepare

        if self.out.suffix != ".parquet":
            raise ValueError(f"--out {self.out}: tables are written as .parquet")
        console = Console(stderr=True)
        prepare()
        from simgrad.bridge import encode, load, read_rows
        from simgrad.bridge.engine.table import write_parquet
        from simgrad.dynamics import Setting, directional_score
        from simgrad.pairs import in_chunks, padded
        from simgrad.store import provenance
        from simgrad.theory import responses

        with loading(console, f"Loading {self.model}"):
            policy = load(self.model)
            rows = read_rows(self.data, self.limit, self.split)
            longest = policy.config.max_length if self.max_length is None else self.max_length
            encoded = encode(rows, policy.tokenizer, longest)
            if not encoded.pairs:
                raise ValueError(
                    f"{self.data}: no row can be used; the first: {encoded.skipped[0].reason}"
                )
            batch = padded(encoded.pairs)
            recipe = self._recipe(batch.size)
            if self.check and batch.size < 2:
                raise ValueError("--check compares pairs with each other: at least two are needed")
        with loading(console, f"Predicting a run of {recipe.steps} steps on {batch.size} pairs"):
            score = directional_score(policy.apply, policy.theta, batch, recipe, sample=self.sample)
            start = in_chunks(lambda some: responses(policy.apply, policy.theta, some).logp, batch)
            change, error, logp = (np.asarray(x) for x in (score.change, score.error, start))
        columns = {"index": np.asarray(encoded.indices)}
        for k, side in enumerate(("chosen", "rejected")):
            columns |= {
                f"logp_{side}": logp[:, k],
                f"predicted_dlogp_{side}": change[:, k],
                f"error_{side}": error[:, k],
            }
        run = {
            "model": self.model,
            "data": self.data,
            "optimizer": self.optimizer,
            "lr": self.learning_rate,
        }
        run |= {
            "objective": repr(recipe.objective),
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
        }
        run |= {
            "epochs": self.epochs,
            "sample": self.sample,
            "limit": self.limit,
            "split": self.split,
        }
        run |= {"max_length": longest}
        skipped = [{"index": s.index, "reason": s.reason} for s in encoded.skipped]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(
            self.out, columns, {"run": run, "skipped": skipped, "provenance": provenance()}
        )
        self._show(Console(), columns, len(encoded.skipped), recipe.steps)
        if self.check:
            self._compare(console, Setting(policy.apply, policy.theta, batch, recipe), columns)
        return 0

    def _recipe(self, pairs: int) -> Recipe:
        import optax

        from simgrad import objectives
        from simgrad.dynamics import Recipe

        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError("--epochs and --batch-size must be at least 1, and --lr positive")
        objective = objectives.get(self.objective, **assignments(self.settings, "--set"))
        size = min(self.batch_size, pairs)
        optimizer = {"sgd": optax.sgd, "adam": optax.adam, "adamw": optax.adamw}[self.optimizer](
            self.learning_rate
        )
        return Recipe(objective, optimizer, max(1, self.epochs * pairs // size), size)

    def _show(
        self, console: Console, columns: dict[str, np.ndarray], skipped: int, steps: int
    ) -> None:
        import numpy as np
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        change = columns["predicted_dlogp_chosen"]
        fall, both = change < 0, (change < 0) & (columns["predicted_dlogp_rejected"] < 0)
        console.print(
            f"\n[bold]{len(change)} pairs[/], {skipped} skipped, {steps} steps → {self.out}",
            highlight=False,
        )
        console.print(
            f"  {fall.mean():.0%} of the chosen responses are predicted to fall, {both.mean():.0%} "
            "together with their "
            f"rejected one\n  Δ log π of the chosen: median {np.median(change):.3g}, from "
            f"{change.min():.3g} to "
            f"{change.max():.3g} nats",
            highlight=False,
        )
        if np.abs(change).max() > 12:
            console.print(
                "  [yellow]beyond about 12 nats sizes mean little, only the order[/]",
                highlight=False,
            )
        table = Table(
            title="\nPredicted to fall most",
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
        )
        names = ("row", "log π chosen", "Δ log π chosen", "± (sample)", "Δ log π rejected")
        for name in names if self.sample else (names[0], names[1], names[2], names[4]):
            table.add_column(name, justify="right")
        for i in np.argsort(change, kind="stable")[: self.worst]:
            cells = [
                str(columns["index"][i]),
                f"{columns['logp_chosen'][i]:.4g}",
                f"{change[i]:.3g}",
            ]
            cells += [f"{columns['error_chosen'][i]:.2g}"] if self.sample else []
            table.add_row(*cells, f"{columns['predicted_dlogp_rejected'][i]:.3g}")
        console.print(table)

    def _compare(self, console: Console, setting: Setting, columns: dict[str, np.ndarray]) -> None:
        from rich.console import Console as Printer

        from simgrad.bridge.engine.table import write_parquet
        from simgrad.cli.display import loading, tidy_table
        from simgrad.experiments.comparison import CAPTION, compare
        from simgrad.experiments.findings import Table
        from simgrad.store import provenance

        with loading(console, "Training, and comparing every predictor with it"):
            found = compare(setting)
        rows = found.rows(f"{self.optimizer}, {setting.recipe.steps} steps")
        out = self.out.with_name(f"{self.out.stem}.check.parquet")
        each = {
            "index": columns["index"],
            "measured_dlogp_chosen": found.measured,
            **found.predicted,
        }
        write_parquet(out, each, {"predictors": rows, "provenance": provenance()})
        tidy_table(Printer(), Table.of("predictors", CAPTION, ("setting", "predictor"), rows))
        print(f"Measured and predicted Δ log π(chosen) of every pair → {out}")
