"""What is validated: models, objectives, optimizers, arithmetic and learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from simgrad import objectives
from simgrad.dynamics.configs import OPTIMIZERS

DTYPES = ("float64", "float32", "bfloat16", "float16")
TABLES = ("linear-softmax", "unconstrained-features")
MODELS = (*TABLES, "transformer", "transformer-tied", "transformer-deep")
STEPS = (*OPTIMIZERS, "clipped")
PRECISIONS = ("default", "highest")


@dataclass(frozen=True)
class Arithmetic:
    """Dtype of parameters and activations, and the precision of matrix products in the model.

    ``default`` is float32 on CPUs, but TensorFloat-32 on Hopper GPUs and bfloat16 passes on TPUs;
    ``highest`` is full float32 everywhere. They differ only for float32.
    """

    dtype: str
    precision: str = "highest"

    def __str__(self) -> str:
        return (
            self.dtype
            if self.precision == "highest" or self.dtype != "float32"
            else f"float32 ({self.precision})"
        )

    @property
    def rounding(self) -> float:
        """Unit roundoff of the parameters' dtype."""
        return float(jax.numpy.finfo(self.dtype).eps) / 2


@dataclass(frozen=True)
class Grid:
    """A grid of settings; every combination is a cell.

    Attributes:
        models: of :data:`MODELS`; none leaves the checkpoint alone.
        objectives: names of :func:`simgrad.objectives.get` (empty: all).
        optimizers: sgd, momentum, rmsprop, adam, adamw, clipped (SGD behind gradient clipping).
        dtypes: of parameters and activations.
        precisions: of float32 matrix products (empty: ``highest``, and ``default`` too where the
            device tells them apart).
        rates: learning rates as multiples of the trust radius.
        learning_rates: the same in their own unit (given: ``rates`` are not used).
        thorough: all that is left out otherwise: steps on all pairs together with every objective
            and optimizer (not only the first objective with every optimizer, and objectives that
            couple pairs with the first optimizer), every route to a kernel in every dtype, and for
            context tables whole runs and low precision too.
        pairs: trained on together.
        probes: pairs that are followed but not trained on.
        seed: of parameters and pairs.
        model: a checkpoint besides: folder, Hub id or ``world:NAME``.
        data: its preference pairs.
        max_length: longest pair of the checkpoint's data in tokens; longer responses are cut.

    Raises:
        ValueError: an unknown name, or nothing to validate.
    """

    models: Sequence[str] = ("linear-softmax", "unconstrained-features", "transformer")
    objectives: Sequence[str] = ()
    optimizers: Sequence[str] = ("sgd", "momentum", "rmsprop", "adam", "adamw", "clipped")
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16")
    precisions: Sequence[str] = ()
    rates: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    learning_rates: Sequence[float] = ()
    thorough: bool = False
    pairs: int = 5
    probes: int = 1
    seed: int = 0
    model: str | None = None
    data: str | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        """Keep sorted tuples; refuse what cannot be validated, before anything is compiled."""
        known = {
            "models": MODELS,
            "objectives": objectives.names(),
            "optimizers": STEPS,
            "dtypes": DTYPES,
            "precisions": PRECISIONS,
        }
        for name, choices in known.items():
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name} takes a list of names: [{given!r}] instead of {given!r}")
            if unknown := [x for x in given if x not in choices]:
                there = ", ".join(choices)
                raise ValueError(f"{name}: {unknown[0]!r} is unknown; there are {there}")
            object.__setattr__(self, name, tuple(given))
        for name in ("rates", "learning_rates"):
            values = [float(x) for x in getattr(self, name)]
            if not all(0 < x < np.inf for x in values):
                raise ValueError(f"{name} must be positive and finite, got {values}")
            object.__setattr__(self, name, tuple(sorted(values)))
        few = f"and probes at least 1, got {self.pairs} and {self.probes}"
        data, model = self.data is not None, self.model is not None
        for there, problem in (
            (data or not model, "a checkpoint needs preference pairs: give data (--data) too"),
            (model or not data, "data belongs to a checkpoint: give model (--model) too"),
            (self.subjects, "no models: name some, or a checkpoint"),
            (self.dtypes, "no dtypes: name at least one"),
            (self.optimizers, "no optimizers: name at least one"),
            (self.rates or self.learning_rates, "no learning rates: give rates or learning_rates"),
            (self.pairs > 1 and self.probes > 0, f"pairs must be at least 2 {few}"),
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
        ):
            if not there:
                raise ValueError(problem)

    @property
    def objective_names(self) -> tuple[str, ...]:
        """The objectives by name."""
        return tuple(self.objectives) or ("dpo", *(n for n in objectives.names() if n != "dpo"))

    @property
    def subjects(self) -> tuple[str, ...]:
        """All models, the checkpoint by its name."""
        return (*self.models, *([self.model] if self.model else []))

    def joint_cells(self) -> list[tuple[str, str]]:
        """(objective, optimizer) of the steps on all pairs together."""
        names = self.objective_names
        if self.thorough:
            return [(objective, optimizer) for objective in names for optimizer in self.optimizers]
        first = [(names[0], optimizer) for optimizer in self.optimizers]
        coupled = [name for name in names[1:] if objectives.batch_coupled(objectives.get(name))]
        return first + [(objective, self.optimizers[0]) for objective in coupled]

    def arithmetics(self, platform: str, model: str) -> list[Arithmetic]:
        """Dtypes and precisions in which a model is run on a platform."""
        others = any(name not in TABLES for name in self.subjects)
        precise = [dtype for dtype in self.dtypes if dtype in ("float64", "float32")]
        spared = model in TABLES and others and precise and not self.thorough
        both = self.precisions or (("highest",) if platform == "cpu" else PRECISIONS)
        return [
            Arithmetic(dtype, precision)
            for dtype in (precise if spared else self.dtypes)
            for precision in (both if dtype == "float32" else ("highest",))
        ]

    def record(self) -> dict[str, Any]:
        """The grid in plain values."""
        return {**dataclasses.asdict(self), "objectives": self.objective_names}


QUICK = Grid()
FULL = Grid(
    models=MODELS,
    dtypes=DTYPES,
    thorough=True,
    pairs=6,
    rates=(
        *(1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.02),
        *(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    ),
)


def optimizer(name: str, learning_rate: float = 1.0) -> optax.GradientTransformation:
    """An optimizer with updates proportional to its learning rate; clipping acts above .001.

    >>> import jax.numpy as jnp
    >>> sgd = optimizer("clipped", 2.0)
    >>> sgd.update(jnp.array([5.0]), sgd.init(jnp.zeros(1)))[0].round(4).tolist()
    [-0.002]
    """
    if name == "clipped":
        return optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(learning_rate))
    return OPTIMIZERS[name](learning_rate, 0.9, 0.01)
