"""What a sweep found: its table, and the file that keeps finished runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simgrad.dynamics.configs import RunConfig
from simgrad.store import load_arrays, provenance, save_arrays
from simgrad.typing import Float

__all__ = ["Found", "SweepTable"]


@dataclass(frozen=True)
class SweepTable:
    """One row a configuration and seed; the seeds of a configuration stand together.

    Columns are the configuration's fields and hyperparameters (nan or "" where it has none),
    ``seed`` and

    ==============================  =======================================================================
    dlogp_chosen, dlogp_rejected    mean over the pairs of Δlog π in nats, end minus start
    margin                          their difference
    chosen_falls, both_fall         share of the pairs whose chosen response falls, whose both responses do
    largest                         largest absolute Δlog π
    first_loss, last_loss           of the first and the last step's pairs, before its update
    diverged                        step (from 0) whose loss was not finite; -1 if none
    ==============================  =======================================================================

    A run that diverged has nan in the columns of Δlog π and in ``last_loss``; ``diverged`` is the
    number of steps where all losses were finite, but not the end.

    Attributes:
        columns: one array a column.
        change: Δlog π of every pair, (chosen, rejected).
        config: fingerprints of what was run, and ``provenance``.
    """

    columns: dict[str, np.ndarray]
    change: Float[np.ndarray, "runs B 2"]
    config: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        """One column."""
        try:
            return self.columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are: {', '.join(self.columns)}") from None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.change)

    @classmethod
    def load(cls, path: str | Path) -> SweepTable:
        """The finished runs of a file that :func:`sweep` wrote.

        Raises:
            ValueError: another file.
        """
        arrays, header = _stored(Path(path))
        done, change = arrays.pop("done"), arrays.pop("change")
        return cls({name: column[done] for name, column in arrays.items()}, change[done], header)


class Found:
    """Results so far, in memory and in a file."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        seeds: Sequence[int],
        pairs: int,
        run: dict[str, Any],
        out: str | Path | None,
    ) -> None:
        count = len(configs) * len(seeds)
        self.labels = {**_labels(configs, len(seeds), pairs), "seed": np.tile(seeds, len(configs))}
        self.header = {"kind": "sweep", "run": run, "provenance": provenance()}
        self.path = None if out is None else Path(out)
        self.done = np.zeros(count, bool)
        self.results = {
            "change": np.full((count, pairs, 2), np.nan),
            "diverged": np.full(count, -1),
        }
        self.results |= {name: np.full(count, np.nan) for name in ("first_loss", "last_loss")}
        self.kept, self.cost = time.monotonic(), 0.0
        if self.path is not None and self.path.exists():
            arrays, header = _stored(self.path)
            if differ := sorted(k for k in run if header["run"].get(k) != run[k]):
                other = ", ".join(differ)
                raise ValueError(
                    f"{out} holds another sweep (other {other}): choose another out or delete it"
                )
            self.done = arrays["done"]
            self.results = {name: arrays[name] for name in self.results}

    def add(self, rows: np.ndarray, results: dict[str, np.ndarray]) -> None:
        """Note finished runs. Writing them takes at most a tenth of the time, so some may wait."""
        bad = results["diverged"] >= 0
        for name, values in results.items():
            self.results[name][rows] = values
        for name in ("change", "last_loss"):
            self.results[name][rows[bad]] = np.nan
        self.done[rows] = True
        if time.monotonic() - self.kept > 10 * self.cost:
            self.keep()

    def keep(self) -> None:
        """Write what there is."""
        if self.path is None:
            return
        begin = time.monotonic()
        table = self.table()
        save_arrays(
            self.path, {**table.columns, "change": table.change, "done": self.done}, self.header
        )
        self.kept = time.monotonic()
        self.cost = self.kept - begin

    def table(self) -> SweepTable:
        """All rows."""
        change = self.results["change"]
        falls = np.where(np.isnan(change), np.nan, change < 0)
        mean = change.mean(1)
        measured = {
            "dlogp_chosen": mean[:, 0],
            "dlogp_rejected": mean[:, 1],
            "margin": mean[:, 0] - mean[:, 1],
            "chosen_falls": falls[..., 0].mean(1),
            "both_fall": falls.min(2).mean(1),
            "largest": np.abs(change).max((1, 2)),
        }
        losses = {name: self.results[name] for name in ("first_loss", "last_loss", "diverged")}
        return SweepTable({**self.labels, **measured, **losses}, change, self.header)


def _labels(configs: Sequence[RunConfig], seeds: int, pairs: int) -> dict[str, np.ndarray]:
    """A column for each field, and for each hyperparameter of the objectives."""
    numbers = [_hyperparameters(config) for config in configs]
    names, rows = sorted({name for given in numbers for name in given}), []
    for config, given in zip(configs, numbers, strict=True):
        row: dict[str, Any] = {
            "objective": config.objective
            if isinstance(config.objective, str)
            else repr(config.objective)
        }
        row |= {name: given.get(name) for name in names}
        row |= {"optimizer": config.optimizer, "learning_rate": config.learning_rate}
        row |= {name: config.of_optimizer(name) for name in ("momentum", "weight_decay")}
        row |= {
            "clip": config.clip,
            "steps": config.steps,
            "batch_size": config.batch_size or pairs,
        }
        row |= {"include": " ".join(config.include or ()), "accumulate": config.accumulate}
        rows.append(row | {"mitigation": config.mitigation or ""})
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        text = any(isinstance(value, str) for value in values)
        kept = ["" if value is None else str(value) for value in values] if text else values
        columns[name] = np.repeat(
            np.array(kept, None if text or None not in kept else float), seeds
        )
    return columns


def _hyperparameters(config: RunConfig) -> dict[str, float | str]:
    if not isinstance(config.objective, str):
        return {}
    objective = config.recipe().objective
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {name: value for name, value in values.items() if isinstance(value, float | str)}


def _stored(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, header = load_arrays(path)
    if header.get("kind") != "sweep":
        raise ValueError(f"{path} holds no sweep: choose another file")
    return arrays, header
