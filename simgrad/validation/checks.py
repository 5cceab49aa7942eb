"""An identity, and how far from it a device's arithmetic is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True)
class Check:
    """Two routes to one quantity.

    Attributes:
        group: the statement that it counts for.
        name: what is compared.
        model: on which model.
        arithmetic: dtype and precision.
        device: where.
        error: largest difference, relative to the largest entry.
        limit: what is allowed (None: only reported).
    """

    group: str
    name: str
    model: str
    arithmetic: str
    device: str
    error: float
    limit: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the error is within its limit (None: not judged)."""
        return None if self.limit is None else bool(self.error <= self.limit)


def gap(a: Any, b: Any) -> float:
    """Largest difference of two trees, relative to the largest entry of the second, leaf by leaf.

    >>> gap([1.0, 2.0], [1.0, 4.0])
    0.5
    """
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        difference = np.abs(x - y).max(initial=0.0)
        if not np.isfinite(difference):
            return float("inf")
        if difference:
            worst = max(worst, float(difference / max(np.abs(y).max(), 1e-300)))
    return worst


def grouped(items: Iterable[Item], *names: str) -> dict[tuple[Any, ...], list[Item]]:
    """Items by the values of some of their attributes, in the order of first appearance.

    >>> grouped([1 + 2j, 3 + 2j, 1 + 4j], "real")
    {(1.0,): [(1+2j), (1+4j)], (3.0,): [(3+2j)]}
    """
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(tuple(getattr(item, name) for name in names), []).append(item)
    return groups


def short(model: str) -> str:
    """A checkpoint's folder without the way to it.

    >>> short("runs/llama/")
    'llama'
    """
    return model.rstrip("/").split("/")[-1]
