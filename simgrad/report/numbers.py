"""What a score table says, in numbers: distributions, regimes, confounds, mitigations.

Values that are not finite are left out of every number, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simgrad.bridge.engine.columns import PER_RATE, RISKS, SCORE_COLUMNS, score_columns
from simgrad.bridge.engine.table import ScoreTable
from simgrad.dynamics.agreement import partial_spearman, spearman
from simgrad.errors import InputError
from simgrad.report.mitigations import (
    Filtered,
    ObjectiveFate,
    Strength,
    filtered,
    objective_fates,
    strength,
)
from simgrad.report.summary import Summary, summarise
from simgrad.typing import Float

__all__ = [
    "Association",
    "RegimeMap",
    "ReportNumbers",
    "Score",
    "SourceShare",
    "associations",
    "by_source",
    "read_score_table",
    "regime_map",
    "report_numbers",
    "require_score_table",
    "scores",
]

SOURCES = tuple("source behavior subset category dataset domain task type topic split".split())
"""Fields of a row that may say where it comes from, the first that tells rows apart is taken."""
_PARTIAL = 8  # pairs: with fewer, three lengths explain nearly everything


@dataclass(frozen=True)
class Score:
    """One column, or what follows from two: a value a pair.

    Attributes:
        name: column of the table, or ``gap`` = ⟨g_w,g_l⟩ - ‖g_w‖².
        label: for people.
        unit: of the values; empty for pure numbers.
        values: one a pair, in the table's order.
        risk: 1 where a high value should mean that the chosen falls, -1 where a low one should.
    """

    name: str
    label: str
    unit: str
    values: Float[np.ndarray, " B"]
    risk: int

    @property
    def finite(self) -> Float[np.ndarray, " F"]:
        """The values that are numbers."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class RegimeMap:
    """Every pair in the plane of x = ⟨g_w,g_l⟩/‖g_w‖² and y = ⟨g_w,g_l⟩/‖g_l‖², where xy = cos².

    The chosen rises where x ≤ r, the rejected falls where y ≤ 1/r, r = d_w/d_l > 0.

    Attributes:
        x: x, or x/r where r varies from pair to pair.
        y: y, or y·r.
        regime: labels of the pairs that are drawn.
        ratio: r, or None where it varies.
        left_out: pairs with a coefficient that is not positive, a vanishing gradient, or a number
            that is not finite.
    """

    x: Float[np.ndarray, " P"]
    y: Float[np.ndarray, " P"]
    regime: np.ndarray
    ratio: float | None
    left_out: int


@dataclass(frozen=True)
class Association:
    """Spearman ρ of one score with token lengths and with the chosen's predicted Δlog π.

    It is nan where it is not defined.

    Attributes:
        score: its name.
        label: for people.
        prompt: ρ with the prompt's length.
        chosen: with the chosen response's.
        rejected: with the rejected response's.
        difference: with |y_w| - |y_l|.
        change: with the predicted Δlog π_w; nan without gradients.
        partial: the same with all three lengths partialled out.
        pairs: pairs where all of these are finite.
    """

    score: str
    label: str
    prompt: float
    chosen: float
    rejected: float
    difference: float
    change: float
    partial: float
    pairs: int


@dataclass(frozen=True)
class SourceShare:
    """How many pairs of one data source lose their chosen response."""

    source: str
    pairs: int
    falling: int


@dataclass(frozen=True)
class ReportNumbers:
    """All numbers of the report.

    Attributes:
        summary: counts, worst pairs, advice.
        unit: of predicted changes.
        gradients: whether the table holds regimes; without, ``map``, ``strength`` are None and
            ``objectives``, ``filters`` and ``sources`` are empty.
        scores: in the order of the page.
        not_finite: column to number of values that are no numbers; only columns that have some.
        falling: pairs whose chosen falls, and their share's 95 % interval (Wilson).
        finite: pairs whose predicted change is a number, of which ``falling`` are counted.
        map: the plane of regimes.
        associations: rank correlations.
        source_field: the rows' field that names data sources, if there is one.
        sources: by data source.
        objectives: what the library's objectives would do at the start.
        strength: shares against the relative strength of the pull on the chosen.
        filters: what is left by keeping the pairs with least of each score.
        metadata: the table's own.
    """

    summary: Summary
    unit: str
    gradients: bool
    scores: tuple[Score, ...]
    not_finite: Mapping[str, int]
    falling: tuple[int, float, float]
    finite: int
    map: RegimeMap | None
    associations: tuple[Association, ...]
    source_field: str | None
    sources: tuple[SourceShare, ...]
    objectives: tuple[ObjectiveFate, ...]
    strength: Strength | None
    filters: tuple[Filtered, ...]
    metadata: Mapping[str, Any]

    @property
    def equal_forces(self) -> bool:
        """Whether d_w = d_l for all pairs."""
        ratio = None if self.map is None else self.map.ratio
        return ratio is not None and math.isclose(ratio, 1.0, rel_tol=1e-4)

    @property
    def by_construction(self) -> tuple[str, ...]:
        """Scores whose sign is what falling is defined by."""
        return ("gap", "predicted_dlogp_chosen")[0 if self.equal_forces else 1 :]


def report_numbers(
    table: ScoreTable, rows: Sequence[Mapping[str, Any]] | None = None, worst: int = 5
) -> ReportNumbers:
    """Everything the report says of a table of :func:`simgrad.score`.

    For data sources it also needs the rows that the table was made from.

    Raises:
        InputError: a table of another kind, or fewer rows than the table speaks of.
    """
    require_score_table(table)
    gradients, found = "regime" in table, scores(table)
    change = table["predicted_dlogp_chosen"] if gradients else np.full(len(table), np.nan)
    known = change[np.isfinite(change)]
    falling, usable = int((known < 0).sum()), gradients and len(known) > 0
    source_field, sources = by_source(table, rows) if usable and rows is not None else (None, ())
    return ReportNumbers(
        summary=summarise(table, worst),
        unit=unit_of(table),
        gradients=gradients,
        scores=found,
        not_finite={s.name: n for s in found if (n := len(s.values) - len(s.finite))},
        falling=(falling, *_wilson(falling, len(known))),
        finite=len(known),
        map=regime_map(table) if usable else None,
        associations=associations(table, found) if len(table) > 2 else (),
        source_field=source_field,
        sources=sources,
        objectives=objective_fates(table) if usable else (),
        strength=strength(table) if usable else None,
        filters=filtered(_risks(table, found), change) if usable else (),
        metadata=table.metadata,
    )


def read_score_table(path: str | Path) -> ScoreTable:
    """A table that :func:`simgrad.score` wrote.

    Raises:
        FileNotFoundError: no such file, or a run that is not finished.
        InputError: a file of another kind.
    """
    path = Path(path)
    begun = path.with_name(f"{path.name}.partial.npz")
    if not path.exists() and begun.exists():
        raise FileNotFoundError(
            f"{path} is not finished ({begun} is there): run the same simgrad score to its end"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    table = ScoreTable.load(path)
    try:
        require_score_table(table)
    except InputError as error:
        raise InputError(f"{path} is {error}") from None
    return table


def require_score_table(table: ScoreTable) -> None:
    """Refuse tables that :func:`simgrad.score` did not make.

    Raises:
        InputError: names what is missing.
    """
    gradients = any(c.name in table for c in SCORE_COLUMNS if c.needs == "gradients")
    missing = [c.name for c in score_columns(gradients) if c.name not in table]
    missing += [name for name in ("run", "identity", "counts") if name not in table.metadata]
    if missing:
        raise InputError(f"not a table of simgrad score: it has no {', '.join(missing)}")


def _risks(table: ScoreTable, found: Sequence[Score]) -> list[tuple[str, str, np.ndarray]]:
    """What pairs are filtered by: length alone, and every score but the rejected's change."""
    longer = (table["n_rejected"] - table["n_chosen"]).astype(float)
    kept = [
        (s.label, s.name, s.risk * s.values) for s in found if s.name != "predicted_dlogp_rejected"
    ]
    return [("length alone, |y_l| − |y_w|", "length", longer), *kept]


def unit_of(table: ScoreTable) -> str:
    """Unit of predicted changes: nats at the run's learning rate, or per unit learning rate."""
    rate = table.metadata["run"]["learning_rate"]
    return "nats per unit learning rate" if rate is None else f"nats for learning rate {rate:g}"


def scores(table: ScoreTable) -> tuple[Score, ...]:
    """What may tell whether the chosen falls: columns of the table, and what follows from two."""
    found = []
    for c in RISKS:
        if c.needs == "table" and c.of is not None and "grad_inner" in table:
            values = c.of(table)
        elif c.name in table:
            values = table[c.name]
        else:
            continue
        unit = unit_of(table) if c.unit == PER_RATE else c.unit
        found.append(Score(c.name, c.label, unit, np.asarray(values, float), c.risk))
    return tuple(found)


def regime_map(table: ScoreTable) -> RegimeMap:
    """Coordinates of every pair under the scored objective; needs gradients."""
    inner, d_w, d_l = table["grad_inner"], table["d_chosen"], table["d_rejected"]
    squares = table["grad_sq_chosen"], table["grad_sq_rejected"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        every = np.stack([d_w / d_l, inner / squares[0], inner / squares[1], inner, *squares])
    there = np.isfinite(every).all(0) & (d_w > 0) & (d_l > 0)
    r, x, y = every[:3, there]
    same = len(r) > 0 and float(np.ptp(r)) <= 1e-5 * float(r[0])
    x, y, ratio = (x, y, float(np.median(r))) if same else (x / r, y * r, None)
    return RegimeMap(x, y, table["regime"][there], ratio, int((~there).sum()))


def associations(table: ScoreTable, found: Sequence[Score]) -> tuple[Association, ...]:
    """Rank correlations of every score with lengths and with the predicted change."""
    every = []
    parts = ("prompt", "chosen", "rejected")
    lengths = np.stack([table[f"n_{part}"] for part in parts], 1).astype(float)
    beside = np.column_stack([lengths, lengths[:, 1] - lengths[:, 2]])
    change = table.columns.get("predicted_dlogp_chosen")
    for score in found:
        use = np.isfinite(score.values) & (change is None or np.isfinite(change))
        x, moved, partial = score.values[use], np.nan, np.nan
        if len(x) < 3:
            continue
        if change is not None:
            moved = spearman(x, change[use])
            partial = (
                partial_spearman(x, change[use], lengths[use]) if len(x) >= _PARTIAL else np.nan
            )
        ranks = (spearman(x, column) for column in beside[use].T)
        every.append(
            Association(
                score.name, score.label, *ranks, change=moved, partial=partial, pairs=len(x)
            )
        )
    return tuple(every)


def by_source(
    table: ScoreTable, rows: Sequence[Mapping[str, Any]]
) -> tuple[str | None, tuple[SourceShare, ...]]:
    """Share of falling pairs by value of the first :data:`SOURCES` field that tells rows apart.

    Raises:
        InputError: fewer rows than the table speaks of.
    """
    if len(table) and table["index"].max() >= len(rows):
        raise InputError(
            f"the table speaks of row {table['index'].max()}, but there are {len(rows)} rows"
        )
    change = table["predicted_dlogp_chosen"]
    mine = [rows[i] for i in table["index"]]
    for name in SOURCES:
        values = [row.get(name) for row in mine]
        named = all(isinstance(v, str | int) for v in values)
        if not named or not 2 <= len(set(values)) <= max(len(values) // 2, 2):
            continue
        names = np.array([str(v) for v in values], object)
        groups = {source: change[names == source] for source in sorted(set(names))}
        shares = [
            SourceShare(source, int(np.isfinite(x).sum()), int((x < 0).sum()))
            for source, x in groups.items()
        ]
        return name, tuple(sorted(shares, key=lambda s: -s.pairs))
    return None, ()


def _wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if not total:
        return np.nan, np.nan
    z, p = 1.959964, count / total
    centre = p + z * z / (2 * total)
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    low, high = ((centre + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    return max(0.0, float(low)), min(1.0, float(high))
