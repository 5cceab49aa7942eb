"""Recipes in plain values, and grids of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax

from simgrad.dynamics.recipe import Recipe
from simgrad.objectives import Objective, catalog, get
from simgrad.objectives.base import number
from simgrad.theory.mitigation import (
    Calibrated,
    Mitigation,
    PairwiseNormalized,
    Projected,
    RunningCalibrated,
    SparseMask,
)

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": lambda rate, momentum, decay: optax.sgd(rate),
    "momentum": lambda rate, momentum, decay: optax.sgd(rate, momentum=momentum),
    "rmsprop": lambda rate, momentum, decay: optax.rmsprop(rate),
    "adam": lambda rate, momentum, decay: optax.adam(rate),
    "adamw": lambda rate, momentum, decay: optax.adamw(rate, weight_decay=decay),
}
MITIGATIONS: dict[str, Mitigation] = {
    "pairwise-normalised": PairwiseNormalized(),
    "calibrated": Calibrated(),
    "running": RunningCalibrated(),
    "projected": Projected(),
}
_OWN = {"momentum": ("momentum", 0.9), "weight_decay": ("adamw", 0.01)}
"""Fields that belong to one optimizer, and what they are there unless told otherwise."""


@dataclass(frozen=True)
class RunConfig:
    """A :class:`simgrad.dynamics.Recipe` in plain values, to be varied, compared and written down.

    Attributes:
        objective: a name of :func:`simgrad.objectives.get`, or an objective.
        hyperparameters: of a named objective, as a mapping or as (name, value) pairs.
        optimizer: sgd, momentum, rmsprop, adam or adamw, with optax's defaults.
        learning_rate: η; configurations that differ in nothing else share one compiled program.
        momentum: of ``momentum`` (None: 0.9).
        weight_decay: of ``adamw`` (None: 0.01).
        clip: largest norm of a step's gradient (None: any).
        steps: updates.
        batch_size: pairs a step (None: all).
        include: patterns of the parameters that are trained (None: all that the model does not
            freeze).
        accumulate: micro-batches a step.
        mitigation: pairwise-normalised, calibrated, running, projected, mask (learned token
            weights) or None.

    Raises:
        ValueError: a field that makes no recipe, by name.

    >>> RunConfig("ipo", {"beta": 0.2}, "sgd", learning_rate=0.1, steps=5).recipe(seed=3).objective
    IPO(beta=0.2)
    """

    objective: str | Objective = "dpo"
    hyperparameters: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    momentum: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    steps: int = 100
    batch_size: int | None = None
    include: Sequence[str] | None = None
    accumulate: int = 1
    mitigation: str | None = None

    def __post_init__(self) -> None:
        """Keep plain hashable values; refuse what makes no recipe."""
        object.__setattr__(
            self, "hyperparameters", tuple(sorted(dict(self.hyperparameters).items()))
        )
        if isinstance(self.include, str):
            raise ValueError(f"include takes a list of patterns: [{self.include!r}]")
        if self.include is not None:
            object.__setattr__(self, "include", tuple(self.include))
        if not isinstance(self.objective, str) and self.hyperparameters:
            raise ValueError(
                "hyperparameters go with a name, such as objective='dpo': leave them out here"
            )
        _require_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.mitigation is not None:
            _require_name("mitigation", self.mitigation, [*MITIGATIONS, "mask"])
        for name, (kind, _) in _OWN.items():
            if getattr(self, name) is not None and self.optimizer != kind:
                raise ValueError(
                    f"{name} belongs to optimizer={kind!r}, not to {self.optimizer!r}: leave it "
                    "out there"
                )
        for name in ("learning_rate", "momentum", "weight_decay", "clip"):
            if getattr(self, name) is not None:
                self._keep_float(name)
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) is not None:
                self._keep_count(name)
        self.recipe()

    def _keep_float(self, name: str) -> None:
        value = number(getattr(self, name), name)
        if not 0 <= value < math.inf or (value == 0 and name not in _OWN):
            raise ValueError(f"{name} must be positive and finite, got {value}")
        object.__setattr__(self, name, value)

    def _keep_count(self, name: str) -> None:
        value = getattr(self, name)
        try:
            count = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be a whole number, got {value!r}") from None
        if count < 1 or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        object.__setattr__(self, name, count)

    def recipe(self, seed: int = 0) -> Recipe:
        """The recipe, pairs drawn in ``seed`` order, learning rate in the optimizer's state."""
        objective = self.objective
        if isinstance(objective, str):
            objective = get(objective, **dict(self.hyperparameters))
        momentum, decay = (self.of_optimizer(name) for name in _OWN)
        return Recipe(
            objective=objective,
            optimizer=_optimizer(self.optimizer, self.learning_rate, momentum, decay, self.clip),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            accumulate=self.accumulate,
            mitigation=MITIGATIONS.get(self.mitigation or ""),
            mask=SparseMask() if self.mitigation == "mask" else None,
        )

    def of_optimizer(self, name: str) -> float | None:
        """The momentum or weight decay that is in force, None where the optimizer has none."""
        kind, usual = _OWN[name]
        given = getattr(self, name)
        return (usual if given is None else given) if self.optimizer == kind else None


def _require_name(field: str, value: Any, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {field} {value!r};{hint} there are: {', '.join(known)}")


@functools.lru_cache(maxsize=1024)
def _optimizer(
    kind: str, rate: float, momentum: float | None, decay: float | None, clip: float | None
) -> optax.GradientTransformation:
    """An optimizer whose learning rate is part of its state; one object for equal arguments."""
    inner = optax.inject_hyperparams(
        lambda learning_rate: OPTIMIZERS[kind](learning_rate, momentum, decay)
    )(rate)
    return inner if clip is None else optax.chain(optax.clip_by_global_norm(clip), inner)


def grid(**values: Any) -> list[RunConfig]:
    """Every combination of the lists in ``values``, the first name varying slowest, the rest fixed.

    Names are the fields of :class:`RunConfig`, or hyperparameters of objectives. ``include`` varies
    if it is a list of lists. Grids add up as lists do.

    >>> [(c.learning_rate, c.hyperparameters) for c in grid(learning_rate=[0.1, 0.2], beta=0.5)]
    [(0.1, (('beta', 0.5),)), (0.2, (('beta', 0.5),))]

    Raises:
        ValueError: an unknown name, an empty list, or values that make no recipe.
    """
    fields = [f.name for f in dataclasses.fields(RunConfig)]
    others = sorted({name for d in catalog() for name in d.hyperparameters})
    for name in values:
        _require_name("name in a grid", name, [*fields, *others])
    choices = {name: _choices(name, value) for name, value in values.items()}
    if empty := [name for name, x in choices.items() if not x]:
        raise ValueError(f"{empty[0]} is an empty list: give at least one value, or leave it out")
    configs = []
    for point in itertools.product(*choices.values()):
        given = dict(zip(values, point, strict=True))
        extra = {name: given.pop(name) for name in values if name not in fields}
        configs.append(
            RunConfig(
                **{**given, "hyperparameters": {**dict(given.get("hyperparameters", ())), **extra}}
            )
        )
    return configs


def _choices(name: str, value: Any) -> list[Any]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    patterns = (
        name == "include"
        and isinstance(value, list)
        and value
        and all(isinstance(x, str) for x in value)
    )
    return value if isinstance(value, list) and not patterns else [value]
