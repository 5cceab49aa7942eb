"""From cells and checks to statements that hold or do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simgrad.validation.cells import Cell
from simgrad.validation.checks import Check, grouped, short

AGREEMENT = 0.99
"""Least share of right signs and regimes inside the safe radius."""
REFERENCE = {"float64": 1e-9, "float32": 1e-5}
"""Largest distance of a prediction from float64 on the CPU, relative to a cell's largest."""


@dataclass(frozen=True)
class Statement:
    """A claim about all cells or checks of one kind.

    Attributes:
        name: ``kind/arithmetic``.
        text: what is claimed.
        holds: whether all bear it out (None: reported, not judged).
        goal: the bound.
        worst: the number farthest from the goal.
        where: the cell or check that gave it.
        count: cells or checks.
    """

    name: str
    text: str
    holds: bool | None
    goal: str
    worst: str
    where: str
    count: int


_ORDERS = {"first order": ("order_first", 2, 0.05), "second order": ("order_second", 3, 0.1)}
"""Field of a cell, the order of what a prediction leaves out, and how far a fit may be from it."""
_SHARES = {
    "signs": "inside the safe radius every response goes where the first order says",
    "regimes": "inside the safe radius every pair is in the predicted regime",
}
_GROUPS = {
    "closed forms": "every closed form is what automatic differentiation gives on this device",
    "d_w, d_l": "an objective's coefficients are those of float64 on the CPU",
    "kernels": "kernels and log-probs agree with float64 on the CPU by every route",
    "routes": "different functions for one quantity agree, and training takes the predicted steps",
    "devices": "many devices give what one gives",
    "determinism": "the same again, bit for bit",
}
_ORDER = ["finite", *_ORDERS, *_SHARES, "float64", *_GROUPS]


def statements(cells: Iterable[Cell], checks: Iterable[Check]) -> list[Statement]:
    """Everything that is claimed, in the order of a reader's questions."""
    found = []
    for (arithmetic,), some in grouped(cells, "arithmetic").items():
        found.append(_finite(some, arithmetic))
        found += [_order(some, arithmetic, name) for name in _ORDERS]
        found += [_share(some, arithmetic, name) for name in _SHARES]
        found.append(_float64(some, arithmetic))
    for (group, arithmetic), some in grouped(checks, "group", "arithmetic").items():
        found.append(_identity(some, arithmetic, group))
    there = (statement for statement in found if statement is not None)
    return sorted(there, key=lambda s: _ORDER.index(s.name.split("/")[0]))


def _judged(arithmetic: str, holds: Any) -> bool | None:
    """A verdict where rounding does not decide: float32 or better, full-precision products."""
    return bool(holds) if arithmetic in ("float64", "float32") else None


def _finite(cells: Sequence[Cell], arithmetic: str) -> Statement:
    bad = [c for c in cells if not c.finite]
    return Statement(
        f"finite/{arithmetic}",
        "every prediction and every measurement is a finite number",
        _judged(arithmetic, not bad),
        "all",
        f"{len(cells) - len(bad)} of {len(cells)}",
        _place(bad[0]) if bad else "",
        len(cells),
    )


def _order(cells: Sequence[Cell], arithmetic: str, name: str) -> Statement | None:
    field, order, slack = _ORDERS[name]
    exact, goal = arithmetic == "float64", f"{order} ± {slack:g}"
    known = [(c, fit) for c in cells if (fit := getattr(c, field)) is not None]
    if not known:
        reason = "no three rates that are small enough"
        return _untold(f"{name}/{arithmetic}", goal, reason) if exact else None
    cell, (fit, low, high) = max(known, key=lambda item: _or_inf(abs(item[1][0] - order)))
    return Statement(
        f"{name}/{arithmetic}",
        f"what the {name} leaves out is of order {order} in the learning rate",
        _or_inf(abs(fit - order)) <= slack if exact else None,
        goal,
        f"{fit:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""),
        f"{_place(cell)}; {len(known)} of {len(cells)} fitted",
        len(known),
    )


def _share(cells: Sequence[Cell], arithmetic: str, name: str) -> Statement:
    """The share of what goes right, counted over all cells of a model: the worst model's."""
    goal, pooled = f"≥ {AGREEMENT:.0%}", []
    counted = [c for c in cells if getattr(c, f"{name}_count")]
    for some in grouped(counted, "model").values():
        shares, counts = np.array([(getattr(c, name), getattr(c, f"{name}_count")) for c in some]).T
        right, count = float(np.average(shares, weights=counts)), int(counts.sum())
        pooled.append((right, count, some[int(shares.argmin())]))
    if not pooled:
        return _untold(f"{name}/{arithmetic}", goal, "no rate inside the safe radius")
    share, count, least = min(pooled, key=lambda item: item[0])
    return Statement(
        f"{name}/{arithmetic}",
        _SHARES[name],
        _judged(arithmetic, share >= AGREEMENT),
        goal,
        f"{share:.2%} of {count}",
        f"worst setting {getattr(least, name):.1%}: {_place(least)}",
        sum(count for _, count, _ in pooled),
    )


def _untold(name: str, goal: str, reason: str) -> Statement:
    """Nothing to judge by: said, not passed over."""
    return Statement(name, reason, None, goal, "–", "choose other learning rates", 0)


def _float64(cells: Sequence[Cell], arithmetic: str) -> Statement | None:
    errors = [(e, c) for c in cells if (e := c.reference_error) is not None]
    if not errors:
        return None
    worst, cell = max(errors, key=lambda item: _or_inf(item[0]))
    limit = REFERENCE.get(arithmetic)
    return Statement(
        f"float64/{arithmetic}",
        "first-order predictions are those of float64 with the same d_w, d_l",
        None if limit is None else _or_inf(worst) <= limit,
        "not judged" if limit is None else f"≤ {limit:g}",
        f"{worst:.1e}",
        _place(cell),
        len(errors),
    )


def _identity(checks: Sequence[Check], arithmetic: str, group: str) -> Statement:
    worst = max(checks, key=lambda c: _or_inf(c.error / c.limit if c.limit else c.error))
    judged = [c.holds for c in checks if c.holds is not None]
    return Statement(
        f"{group}/{arithmetic}",
        _GROUPS[group],
        all(judged) if judged else None,
        "not judged" if worst.limit is None else f"≤ {worst.limit:.2g}",
        f"{worst.error:.1e}",
        f"{worst.name}; {short(worst.model)}, {worst.device}",
        len(checks),
    )


def _or_inf(x: float) -> float:
    return x if np.isfinite(x) else np.inf


def _place(cell: Cell) -> str:
    run = f"{short(cell.model)}, {cell.objective}, {cell.optimizer}"
    return f"{run}, pairs {cell.kind}; {cell.device}"
