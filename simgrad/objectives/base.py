"""What an objective is: a loss per pair, its two coefficients by automatic differentiation, sums of objectives."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from simgrad.typing import Array, Float, Int

__all__ = [
    "REGISTRY",
    "Coefficients",
    "Combined",
    "Composed",
    "Objective",
    "Terms",
    "number",
    "require",
]

REGISTRY: dict[str, type[Objective]] = {}
"""Every objective that has a name."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coefficients:
    """d_w and d_l of each pair: pull on the chosen, push on the rejected log-prob (signed)."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]


@dataclass(frozen=True)
class Terms:
    """All that an objective sees of the pairs: log-probs (nats), the reference's, and numbers of tokens."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    ref_chosen: Float[Array, "*pairs"]
    ref_rejected: Float[Array, "*pairs"]
    len_chosen: Float[Array, "*pairs"]
    len_rejected: Float[Array, "*pairs"]
    policy_chosen: Float[Array, "*pairs"]
    policy_rejected: Float[Array, "*pairs"]
    """log π/|y| of the policy, whatever modifiers have made of the other entries."""

    @property
    def delta_chosen(self) -> Float[Array, "*pairs"]:
        """Δ_w = log π_w - log ref_w."""
        return self.chosen - self.ref_chosen

    @property
    def delta_rejected(self) -> Float[Array, "*pairs"]:
        """Δ_l = log π_l - log ref_l."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Float[Array, "*pairs"]:
        """The margin m = Δ_w - Δ_l."""
        return self.delta_chosen - self.delta_rejected

    @property
    def mean_chosen(self) -> Float[Array, "*pairs"]:
        """μ_w = log π_w / |y_w|."""
        return self.chosen / self.len_chosen

    @property
    def mean_rejected(self) -> Float[Array, "*pairs"]:
        """μ_l = log π_l / |y_l|."""
        return self.rejected / self.len_rejected


@dataclass(frozen=True)
class Objective:
    """Base of all pairwise objectives. Subclasses define :meth:`per_pair`; those with a ``name`` can be got by it.

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
        logp_chosen: Float[Array, "*pairs"],
        logp_rejected: Float[Array, "*pairs"],
        ref_chosen: Float[Array, "*pairs"],
        ref_rejected: Float[Array, "*pairs"],
        len_chosen: Int[Array, "*pairs"],
        len_rejected: Int[Array, "*pairs"],
    ) -> Float[Array, "*pairs"]:
        """Loss of each pair. Log-probs are sums over response tokens in nats; lengths count tokens."""
        n, m = len_chosen.astype(logp_chosen.dtype), len_rejected.astype(logp_chosen.dtype)
        terms = Terms(
            logp_chosen,
            logp_rejected,
            ref_chosen,
            ref_rejected,
            n,
            m,
            logp_chosen / n,
            logp_rejected / m,
        )
        return self.per_pair(terms)

    def coefficients(
        self,
        logp_chosen: Float[Array, "*pairs"],
        logp_rejected: Float[Array, "*pairs"],
        ref_chosen: Float[Array, "*pairs"],
        ref_rejected: Float[Array, "*pairs"],
        len_chosen: Int[Array, "*pairs"],
        len_rejected: Int[Array, "*pairs"],
    ) -> Coefficients:
        """d_w = -∂ΣL/∂log π_w and d_l = ∂ΣL/∂log π_l of each pair, by automatic differentiation.

        ΣL is the sum over all pairs given, so that objectives which couple pairs are differentiated
        whole.
        """

        def total(chosen: Array, rejected: Array) -> Array:
            return self.loss(
                chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected
            ).sum()

        to_chosen, to_rejected = jax.grad(total, argnums=(0, 1))(logp_chosen, logp_rejected)
        return Coefficients(-to_chosen, to_rejected)

    def signed_coefficients(
        self,
        logp: Float[Array, "*pairs 2"],
        reference: Float[Array, "*pairs 2"],
        lengths: Int[Array, "*pairs 2"],
    ) -> Float[Array, "*pairs 2"]:
        """(d_w, -d_l) = -∂ΣL/∂log π of each pair: the force on each log-prob; last axis (chosen, rejected)."""
        d = self.coefficients(
            *(x[..., side] for x in (logp, reference, lengths) for side in (0, 1))
        )
        return jnp.stack([d.chosen, -d.rejected], axis=-1)

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
    """Weighted sum Σ_k weight_k L_k, written ``DPO() + 0.5 * SFT()``; d_w and d_l add up in the same way.

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

    def __post_init__(self) -> None:
        """Make numbers plain floats, and let the parts refuse what is out of range."""
        if numbers := [f.name for f in dataclasses.fields(self) if f.type == "float"]:
            require(self, "finite", *numbers)
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


def require(objective: Objective, kind: str = "positive", *fields: str) -> None:
    """Make fields (default: all) plain floats; refuse what is not positive, non-negative or finite (NaN is none)."""
    name = objective.name or type(objective).__name__
    for field in fields or [f.name for f in dataclasses.fields(objective)]:
        value = number(getattr(objective, field), f"{name}: {field}")
        if not _RANGES[kind](value):
            raise ValueError(f"{name}: {field} must be {kind}, got {value}")
        object.__setattr__(objective, field, value)
