"""From cells and checks to statements that hold or do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from simgrad.validation.cells import Cell
from simgrad.validation.checks import Check

AGREEMENT = 0.99
"""Least share of right signs and regimes inside the safe radius."""
FLOAT32 = 1e-5
"""Largest distance of a float32 prediction from float64, relative to a cell's largest."""


FLOAT64 = 1e-9
"""The same for double precision on another device than the CPU."""


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


def statements(cells: Sequence[Cell], checks: Sequence[Check]) -> list[Statement]:
    """Everything that is claimed, in the order of a reader's questions."""
    found = []
    for arithmetic in dict.fromkeys(c.arithmetic for c in cells):
        some = [c for c in cells if c.arithmetic == arithmetic]
        found.append(_finite(some, arithmetic))
        found += _orders(some, arithmetic)
        found += _agreement(some, arithmetic)
        if compared := [c for c in some if c.reference_error is not None]:
            found.append(_float64(compared, arithmetic))
    for group, text in _GROUPS.items():
        for arithmetic in dict.fromkeys(c.arithmetic for c in checks if c.group == group):
            found.append(
                _identity(group, text, arithmetic, [c for c in checks if _is(c, group, arithmetic)])
            )
    return sorted(found, key=lambda s: _ORDER.index(s.name.split("/")[0]))


_GROUPS = {
    "closed forms": "every closed form is what automatic differentiation gives on this device",
    "d_w, d_l": "an objective's coefficients are those of float64 on the CPU",
    "kernels": "kernels and log-probs agree with float64 on the CPU by every route",
    "routes": "different functions for one quantity agree, and training takes the predicted steps",
    "devices": "many devices give what one gives",
    "determinism": "the same again, bit for bit",
}
_ORDER = ["finite", "first order", "second order", "signs", "regimes", "float64", *_GROUPS]


def _is(check: Check, group: str, arithmetic: str) -> bool:
    return check.group == group and check.arithmetic == arithmetic


def _judged(arithmetic: str) -> bool:
    """float32 or better with full-precision products."""
    return arithmetic in ("float64", "float32")


def _finite(cells: Sequence[Cell], arithmetic: str) -> Statement:
    bad = [c for c in cells if not c.finite]
    return Statement(
        f"finite/{arithmetic}",
        "every prediction and every measurement is a finite number",
        not bad if _judged(arithmetic) else None,
        "all",
        f"{len(cells) - len(bad)} of {len(cells)}",
        _place(bad[0]) if bad else "",
        len(cells),
    )


def _orders(cells: Sequence[Cell], arithmetic: str) -> Iterable[Statement]:
    rows: list[tuple[str, int, float, Callable[[Cell], tuple[float, float, float] | None]]] = [
        ("first order", 2, 0.05, lambda c: c.order_first),
        ("second order", 3, 0.1, lambda c: c.order_second),
    ]
    for name, order, slack, of in rows:
        known = [(c, fit) for c in cells if (fit := of(c)) is not None]
        if not known and arithmetic == "float64":
            yield _untold(
                f"{name}/{arithmetic}",
                f"{order} ± {slack:g}",
                "no three rates that are small enough",
            )
        if known:
            cell, fit = max(known, key=lambda item: _or_inf(abs(item[1][0] - order)))
            holds = bool(_or_inf(abs(fit[0] - order)) <= slack) if arithmetic == "float64" else None
            yield Statement(
                f"{name}/{arithmetic}",
                f"what the {name} leaves out is of order {order} in the learning rate",
                holds,
                f"{order} ± {slack:g}",
                f"{fit[0]:.3f}" + (f" [{fit[1]:.3f}, {fit[2]:.3f}]" if np.isfinite(fit[1]) else ""),
                f"{_place(cell)}; {len(known)} of {len(cells)} fitted",
                len(known),
            )


def _untold(name: str, goal: str, reason: str) -> Statement:
    """Nothing to judge by: said, not passed over."""
    return Statement(name, reason, None, goal, "–", "choose other learning rates", 0)


def _or_inf(x: float) -> float:
    return x if np.isfinite(x) else np.inf


def _agreement(cells: Sequence[Cell], arithmetic: str) -> Iterable[Statement]:
    texts = {
        "signs": "inside the safe radius every response goes where the first order says",
        "regimes": "inside the safe radius every pair is in the predicted regime",
    }
    for name, text in texts.items():
        pooled = []
        for model in dict.fromkeys(c.model for c in cells):
            some = [c for c in cells if c.model == model]
            counts = np.array([getattr(c, f"{name}_count") for c in some])
            if counts.sum():
                right = sum(getattr(c, name) * n for c, n in zip(some, counts, strict=True) if n)
                least = min(
                    (c for c, n in zip(some, counts, strict=True) if n),
                    key=lambda c: getattr(c, name),
                )
                pooled.append((float(right / counts.sum()), int(counts.sum()), model, least))
        if not pooled:
            yield _untold(
                f"{name}/{arithmetic}", f"≥ {AGREEMENT:.0%}", "no rate inside the safe radius"
            )
        if pooled:
            share, count, _, least = min(pooled, key=lambda item: item[0])
            yield Statement(
                f"{name}/{arithmetic}",
                text,
                bool(share >= AGREEMENT) if _judged(arithmetic) else None,
                f"≥ {AGREEMENT:.0%}",
                f"{share:.2%} of {count}",
                f"worst setting {getattr(least, name):.1%}: {_place(least)}",
                sum(n for _, n, _, _ in pooled),
            )


def _float64(cells: Sequence[Cell], arithmetic: str) -> Statement:
    worst = max(cells, key=lambda c: _or_inf(c.reference_error or 0.0))
    limit = {"float64": FLOAT64, "float32": FLOAT32}.get(arithmetic)
    return Statement(
        f"float64/{arithmetic}",
        "first-order predictions are those of float64 with the same d_w, d_l",
        None if limit is None else bool(_or_inf(worst.reference_error or 0.0) <= limit),
        "not judged" if limit is None else f"≤ {limit:g}",
        f"{worst.reference_error:.1e}",
        _place(worst),
        len(cells),
    )


def _identity(group: str, text: str, arithmetic: str, checks: Sequence[Check]) -> Statement:
    worst = max(checks, key=lambda c: _or_inf(c.error / c.limit) if c.limit else _or_inf(c.error))
    judged = [c for c in checks if c.holds is not None]
    limit = "not judged" if worst.limit is None else f"≤ {worst.limit:.2g}"
    return Statement(
        f"{group}/{arithmetic}",
        text,
        all(c.holds for c in judged) if judged else None,
        limit,
        f"{worst.error:.1e}",
        f"{worst.name}; {_short(worst.model)}, {worst.device}",
        len(checks),
    )


def _place(cell: Cell) -> str:
    run = f"{_short(cell.model)}, {cell.objective}, {cell.optimizer}"
    return f"{run}, pairs {cell.kind}; {cell.device}"


def _short(model: str) -> str:
    """A checkpoint's folder without the way to it."""
    return model.rstrip("/").split("/")[-1]
