"""What an experiment found: tidy tables, one row a seed and setting, with intervals over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from simgrad.store import provenance, write_parquet
from simgrad.typing import Float
from simgrad.worlds.world import World


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with the 95 % interval of Student's t.

    Attributes:
        mean: over the seeds.
        low: lower bound; nan for a single seed.
        high: upper bound; nan for a single seed.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.mean:.2f}" if not np.isfinite(half) else f"{self.mean:.2f} ±{half:.2f}"


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean and 95 % interval t_{.975, n-1} s/√n of independent values; nan entries are left out.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    x = np.asarray(values, float)
    x = x[~np.isnan(x)]
    n = len(x)
    mean = float(x.mean()) if n else np.nan
    half = float(stdtrit(n - 1, 0.975) * x.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    return Interval(mean, mean - half, mean + half)


def listing(values: Sequence[float] | np.ndarray) -> str:
    """Numbers for a claim, two decimals each."""
    return " ".join(f"{v:.2f}" for v in values)


@dataclass(frozen=True)
class Table:
    """Rows of one experiment.

    Attributes:
        name: for files and look-up.
        caption: what to see.
        by: columns that tell settings apart; the others are measurements, one row a setting and
            seed.
        columns: arrays of one length; ``seed`` is among them.
    """

    name: str
    caption: str
    by: tuple[str, ...]
    columns: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, name: str, caption: str, by: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Table:
        """A table from one mapping a row."""
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        return cls(name, caption, tuple(by), columns)

    def __getitem__(self, column: str) -> np.ndarray:
        """One column."""
        return self.columns[column]

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values())))

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the measurements."""
        return tuple(c for c in self.columns if c not in (*self.by, "seed"))

    def where(self, **setting: Any) -> dict[str, np.ndarray]:
        """Columns of the rows with this setting, in order of their seeds."""
        keep = np.ones(len(self), bool)
        for key, value in setting.items():
            keep &= self.columns[key] == value
        return {name: column[keep] for name, column in self.columns.items()}

    def across(
        self, column: str, by: str, values: Iterable[Any], **setting: Any
    ) -> Float[np.ndarray, "seeds values"]:
        """A measurement at these values of the column ``by``, and at one value of all others."""
        found = [self.where(**setting, **{by: value})[column] for value in values]
        return np.stack(found, axis=1).astype(float)

    def settings(self) -> list[dict[str, Any]]:
        """The settings in order of appearance."""
        seen: dict[tuple, None] = {}
        for row in zip(*(self.columns[k] for k in self.by), strict=True):
            seen.setdefault(tuple(x.item() for x in row), None)
        return [dict(zip(self.by, row, strict=True)) for row in seen]

    def summary(self) -> list[dict[str, Any]]:
        """One entry a setting: the :class:`Interval` of numbers, the commonest value of texts."""
        found = ((setting, self.where(**setting)) for setting in self.settings())
        return [
            setting | {name: _summarised(rows[name]) for name in self.measured}
            for setting, rows in found
        ]


def _summarised(values: np.ndarray) -> Interval | str:
    if values.dtype.kind in "fiub":
        return interval(values)
    names, counts = np.unique(values, return_counts=True)
    best = int(counts.argmax())
    return f"{names[best]} ({counts[best]}/{len(values)})"


@dataclass(frozen=True)
class Claim:
    """A statement of the papers, or of a recipe, and whether these seeds bear it out.

    Attributes:
        text: the statement.
        holds: whether it does; None where these seeds cannot tell.
        numbers: those it was judged by.
    """

    text: str
    holds: bool | None
    numbers: str

    @classmethod
    def of(cls, text: str, holds: Any, numbers: str | np.ndarray) -> Claim:
        """A claim that holds where all of ``holds`` does; arrays of numbers are listed."""
        numbers = numbers if isinstance(numbers, str) else listing(numbers)
        return cls(text, None if holds is None else bool(np.all(holds)), numbers)


@dataclass(frozen=True)
class Findings:
    """All tables of a world's experiment, and what they say.

    Attributes:
        world: its name.
        knobs: their values.
        seeds: all that were run.
        tables: one row a seed and setting.
        claims: statements held against the tables.
    """

    world: str
    knobs: Mapping[str, Any]
    seeds: tuple[int, ...]
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...] = ()

    @classmethod
    def of(
        cls, world: World, seeds: Sequence[int], tables: Sequence[Table], claims: Sequence[Claim]
    ) -> Findings:
        """What was found on a world with its knobs."""
        return cls(world.name, vars(world), tuple(seeds), tuple(tables), tuple(claims))

    def __getitem__(self, name: str) -> Table:
        """A table by name."""
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"no table {name!r}; there are: {', '.join(t.name for t in self.tables)}")


def save_findings(found: Findings, folder: str | Path) -> list[Path]:
    """One parquet file a table, ``WORLD.TABLE.parquet``, with knobs, claims and versions."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in found.tables:
        metadata = {
            "world": found.world,
            "knobs": dict(found.knobs),
            "seeds": list(found.seeds),
            "caption": table.caption,
            "claims": [dataclasses.asdict(claim) for claim in found.claims],
            "provenance": provenance(),
        }
        written.append(folder / f"{found.world}.{table.name}.parquet")
        write_parquet(written[-1], table.columns, metadata)
    return written
