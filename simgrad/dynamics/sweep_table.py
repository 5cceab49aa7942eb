"""What a sweep found: its table, and the file that keeps finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simgrad.dynamics.configs import RunConfig
from simgrad.store import Columns, load_arrays
from simgrad.typing import Float


@dataclass(frozen=True)
class SweepTable(Columns):
    """One row a configuration and seed; the seeds of a configuration stand together.

    Columns are the configuration's fields and hyperparameters (nan or "" where it has none),
    ``seed`` and

    ==============================  =======================================================
    dlogp_chosen, dlogp_rejected    mean over the pairs of Δlog π in nats, end minus start
    margin                          their difference
    chosen_falls, both_fall         share of the pairs whose chosen response falls, whose
                                    both responses do
    largest                         largest absolute Δlog π
    first_loss, last_loss           of the first and the last step's pairs, before its update
    diverged                        step (from 0) whose loss was not finite; -1 if none
    ==============================  =======================================================

    A run that diverged has nan in the columns of Δlog π and in ``last_loss``; ``diverged`` is the
    number of steps where all losses were finite, but not the end.

    Attributes:
        columns: one array a column.
        change: Δlog π of every pair, (chosen, rejected).
        config: identity of what was run, and ``provenance``.
    """

    change: Float[np.ndarray, "runs B 2"]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> SweepTable:
        """The table of labels and results; what can be said of the changes is added."""
        change = columns["change"]
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
        last = ("first_loss", "last_loss", "diverged")
        named = {n: x for n, x in columns.items() if n not in (*last, "change")}
        return cls({**named, **measured, **{n: columns[n] for n in last}}, change, config)

    @classmethod
    def load(cls, path: str | Path) -> SweepTable:
        """The finished runs of a file that :func:`sweep` wrote.

        Raises:
            ValueError: another file.
        """
        arrays, header = load_arrays(path)
        done = arrays.pop("__done__", None)
        if done is None or "change" not in arrays:
            raise ValueError(f"{path} holds no sweep: choose another file")
        columns = {name: column[done] for name, column in arrays.items()}
        return cls.of(columns, {"run": header["identity"]})


def labels(configs: Sequence[RunConfig], seeds: Sequence[int], pairs: int) -> dict[str, np.ndarray]:
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
        column = np.array(kept, None if text or None not in kept else float)
        columns[name] = np.repeat(column, len(seeds))
    return columns | {"seed": np.tile(seeds, len(configs))}


def _hyperparameters(config: RunConfig) -> dict[str, float | str]:
    if not isinstance(config.objective, str):
        return {}
    objective = config.recipe().objective
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {name: value for name, value in values.items() if isinstance(value, float | str)}
