"""Objectives: a loss per pair, its force by automatic differentiation, and sums."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from simgrad.typing import Array, Float, Int

REGISTRY: dict[str, type[Objective]] = {}
"""Every objective that has a name."""


@dataclass(frozen=True)
class Terms:
    """All that an objective sees of the pairs; the last axis of length 2 is (chosen, rejected).

    Attributes:
        logp: summed log-probs of the policy in nats, or what a modifier has made of them.
        reference: the reference's.
        lengths: response tokens, as numbers of the log-probs' dtype.
        policy_mean: log π/|y| of the policy, whatever modifiers have made of the other entries.
    """

    logp: Float[Array, "*pairs 2"]
    reference: Float[Array, "*pairs 2"]
    lengths: Float[Array, "*pairs 2"]
    policy_mean: Float[Array, "*pairs 2"]

    @property
    def chosen(self) -> Float[Array, "*pairs"]:
        """Log π_w."""
        return self.logp[..., 0]

    @property
    def rejected(self) -> Float[Array, "*pairs"]:
        """Log π_l."""
        return self.logp[..., 1]

    @property
    def delta_chosen(self) -> Float[Array, "*pairs"]:
        """Δ_w = log π_w - log ref_w."""
        return (self.logp - self.reference)[..., 0]

    @property
    def delta_rejected(self) -> Float[Array, "*pairs"]:
        """Δ_l = log π_l - log ref_l."""
        return (self.logp - self.reference)[..., 1]

    @property
    def margin(self) -> Float[Array, "*pairs"]:
        """The margin m = Δ_w - Δ_l."""
        return self.delta_chosen - self.delta_rejected

    @property
    def mean_chosen(self) -> Float[Array, "*pairs"]:
        """μ_w = log π_w / |y_w|."""
        return (self.logp / self.lengths)[..., 0]

    @property
    def mean_rejected(self) -> Float[Array, "*pairs"]:
        """μ_l = log π_l / |y_l|."""
        return (self.logp / self.lengths)[..., 1]


@dataclass(frozen=True)
class Objective:
    """Base of all pairwise objectives, whose subclasses define :meth:`per_pair`.

    Those with a ``name`` can be obtained by that name.

    Objectives add up: ``DPO() + 0.5 * SFT()``. The texts ``formula``, ``ratio`` and
    ``pushes_chosen_down`` are written in the notation of :data:`simgrad.objectives.NOTATION` and
    proven by evaluating them.
    """

    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """Loss of a pair."""
    ratio: ClassVar[str] = ""
    """d_w/d_l."""
    pushes_chosen_down: ClassVar[str] = ""
    """When d_w < 0; empty: never."""
    source: ClassVar[str] = ""
    usual: ClassVar[str] = "positive"
    """What its numbers must be: positive, non-negative or finite."""
    ranges: ClassVar[dict[str, str]] = {}
    """The same for single fields."""

    def __post_init__(self) -> None:
        """Make numbers plain floats; refuse what is out of range (NaN always is), by name."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), self.ranges.get(field.name, self.usual)
            if field.type not in ("float", "float | None") or (
                value is None and "None" in field.type
            ):
                continue
            name = self.name or type(self).__name__
            value = number(value, f"{name}: {field.name}")
            if not _RANGES[kind](value):
                raise ValueError(f"{name}: {field.name} must be {kind}, got {value}")
            object.__setattr__(self, field.name, value)

    def __init_subclass__(cls) -> None:
        """Make a named objective known, and complete its docstring."""
        name = cls.__dict__.get("name")
        if not name:
            return
        if name in REGISTRY:
            raise TypeError(f"objective name {name!r} is taken by {REGISTRY[name].__name__}")
        REGISTRY[name] = cls
        down = cls.pushes_chosen_down or "never"
        cls.__doc__ = (
            f"{(cls.__doc__ or '').rstrip()}\n\n    Loss: {cls.formula}\n    d_w/d_l: {cls.ratio}\n"
            f"    d_w < 0: {down}\n    Source: {cls.source}\n    "
        )

    def per_pair(self, x: Terms) -> Float[Array, "*pairs"]:
        """Loss of each pair: what a subclass defines."""
        raise TypeError(
            f"{type(self).__name__} has no loss: get an objective by name, objectives.get('dpo')"
        )

    def loss(
        self,
        logp: Float[Array, "*pairs 2"],
        reference: Float[Array, "*pairs 2"],
        lengths: Int[Array, "*pairs 2"],
    ) -> Float[Array, "*pairs"]:
        """Loss of each pair; log-probs are sums over response tokens in nats."""
        n = lengths.astype(logp.dtype)
        return self.per_pair(Terms(logp, reference, n, logp / n))

    def force(
        self,
        logp: Float[Array, "*pairs 2"],
        reference: Float[Array, "*pairs 2"],
        lengths: Int[Array, "*pairs 2"],
    ) -> Float[Array, "*pairs 2"]:
        """The force c = (d_w, -d_l) = -∂ΣL/∂log π on each log-prob; positive is up.

        By automatic differentiation of the sum over all pairs given, so that objectives which
        couple pairs are differentiated whole.

        >>> import jax.numpy as jnp
        >>> from simgrad.objectives import DPO
        >>> start, lengths = jnp.zeros((1, 2)), jnp.ones((1, 2), int)
        >>> DPO(beta=1.0).force(start, start, lengths).tolist()
        [[0.5, -0.5]]
        """
        return -jax.grad(lambda u: self.loss(u, reference, lengths).sum())(logp)

    def __mul__(self, weight: float | int) -> Combined:
        if isinstance(weight, Objective):
            return NotImplemented
        return Combined((self,), (number(weight, "a weight"),))

    __rmul__ = __mul__

    def __add__(self, other: Objective) -> Combined:
        if not isinstance(other, Objective):
            return NotImplemented
        left, right = (x if isinstance(x, Combined) else 1.0 * x for x in (self, other))
        return Combined(left.objectives + right.objectives, left.weights + right.weights)


@dataclass(frozen=True, repr=False)
class Combined(Objective):
    """Weighted sum Σ_k weight_k L_k, written ``DPO() + 0.5 * SFT()``; d_w and d_l add up likewise.

    Lists of loss types with weights in TRL, such as MPO (arXiv 2411.10442), are of this kind.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse weights that are missing or not finite; keep hashable tuples of plain numbers."""
        object.__setattr__(self, "objectives", tuple(self.objectives))
        object.__setattr__(self, "weights", tuple(number(w, "a weight") for w in self.weights))
        if len(self.objectives) != len(self.weights) or not self.objectives:
            raise ValueError(
                f"a weight for each objective, got {len(self.objectives)} and {len(self.weights)}"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be finite, got {self.weights}")

    def __repr__(self) -> str:
        pairs = zip(self.weights, self.objectives, strict=True)
        return " + ".join(repr(o) if w == 1 else f"{w!r} * {o!r}" for w, o in pairs)

    def __mul__(self, weight: float | int) -> Combined:
        if isinstance(weight, Objective):
            return NotImplemented
        return Combined(
            self.objectives, tuple(number(weight, "a weight") * w for w in self.weights)
        )

    __rmul__ = __mul__

    def per_pair(self, x: Terms) -> Float[Array, "*pairs"]:
        """Σ_k weight_k L_k."""
        return sum(
            (w * o.per_pair(x) for w, o in zip(self.weights, self.objectives, strict=True)),
            jnp.zeros_like(x.chosen),
        )


@dataclass(frozen=True)
class Composed(Objective):
    """An objective that is built from others."""

    usual: ClassVar[str] = "finite"

    def __post_init__(self) -> None:
        """Make numbers plain floats, and let the parts refuse what is out of range."""
        super().__post_init__()
        self.build()

    def build(self) -> Objective:
        """The same objective, spelled out: what a subclass defines."""
        raise TypeError(f"{type(self).__name__} does not say what it is composed of")

    def per_pair(self, x: Terms) -> Float[Array, "*pairs"]:
        """Loss of what :meth:`build` spells out."""
        return self.build().per_pair(x)


_RANGES = {
    "positive": lambda value: 0 < value < math.inf,
    "non-negative": lambda value: 0 <= value < math.inf,
    "finite": math.isfinite,
}


def number(value: Any, what: str) -> float:
    """``value`` as a plain, hashable float."""
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except TypeError:
        raise ValueError(f"{what} must be a number, got {value!r}") from None
