"""Objectives made from any other, nesting as in ``LengthNormalized(LabelSmoothed(DPO(), 0.1))``.

A modifier that changes the log-probs hands changed :class:`Terms` to the objective inside it, so
the outermost one acts first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from simgrad.objectives.base import Composed, Objective, Terms
from simgrad.typing import Array, Float

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 80.0
"""Where exponentials of log-ratios are cut in every dtype; float32 ends at 88.

Beyond it their gradients vanish.
"""


@dataclass(frozen=True)
class Swapped(Objective):
    """The objective with chosen and rejected exchanged: the loss of a wrong label."""

    objective: Objective

    def per_pair(self, x: Terms):  # noqa: D102
        every = (x.logp, x.reference, x.lengths, x.policy_mean)
        return self.objective.per_pair(Terms(*(jnp.flip(y, -1) for y in every)))


@dataclass(frozen=True)
class LabelSmoothed(Composed):
    """(1-ε) L + ε L_swapped: the loss expected if a share ε of the labels is wrong."""

    objective: Objective
    epsilon: float

    def build(self) -> Objective:
        """The weighted sum; refuses ε outside [0, 1)."""
        if not 0 <= self.epsilon < 1:
            raise ValueError(
                f"{type(self).__name__}: epsilon must lie in [0, 1), got {self.epsilon}"
            )
        return (1 - self.epsilon) * self.objective + self.epsilon * Swapped(self.objective)


@dataclass(frozen=True)
class Robust(Composed):
    """((1-ε) L - ε L_swapped)/(1-2ε): its mean is clean L if labels flip with probability ε."""

    objective: Objective
    epsilon: float

    def build(self) -> Objective:
        """The weighted difference; refuses ε outside [0, ½)."""
        if not 0 <= self.epsilon < 0.5:
            raise ValueError(
                f"{type(self).__name__}: epsilon must lie in [0, 0.5), got {self.epsilon}"
            )
        scale = 1 - 2 * self.epsilon
        return ((1 - self.epsilon) / scale) * self.objective + (-self.epsilon / scale) * Swapped(
            self.objective
        )


@dataclass(frozen=True)
class LengthNormalized(Objective):
    """The objective on mean log-probs of policy and reference; inside it every length is one."""

    objective: Objective

    def per_pair(self, x: Terms):  # noqa: D102
        logp, reference = x.logp / x.lengths, x.reference / x.lengths
        one = jnp.ones_like(x.lengths)
        return self.objective.per_pair(replace(x, logp=logp, reference=reference, lengths=one))


@dataclass(frozen=True)
class ReferenceFree(Objective):
    """The objective with a reference that gives all responses equal probability (log-prob 0)."""

    objective: Objective

    def per_pair(self, x: Terms):  # noqa: D102
        return self.objective.per_pair(replace(x, reference=jnp.zeros_like(x.reference)))


@dataclass(frozen=True)
class FDivergence(Objective):
    """The objective with another divergence from the reference: log u becomes f'(u), u = π/ref.

    ===========  ======================  ==========================================
    divergence   f'(u)                   factor on the coefficient, u f''(u)
    ===========  ======================  ==========================================
    reverse_kl   log u (+ 1)             1
    forward_kl   1 - 1/u                 1/u
    js           log(2u/(1+u))           1/(1+u)
    alpha        (u^(α-1) - 1)/(α-1)     u^(α-1); α → 1 is reverse_kl, 0 forward_kl
    ===========  ======================  ==========================================

    f-DPO (arXiv 2309.16240) in the conventions of TRL, whose α is one minus the paper's. Exponents
    are cut at 80, where the gradient vanishes. Meant for objectives of a margin, in which the
    divergence's unknown normaliser cancels. Default α = 0.5 is TRL's.
    """

    objective: Objective
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    ranges: ClassVar[dict[str, str]] = {"alpha": "finite"}

    def __post_init__(self) -> None:
        """Refuse an unknown divergence and α that is not finite."""
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"unknown divergence {self.divergence!r}; there are: {', '.join(DIVERGENCES)}"
            )
        super().__post_init__()

    def score(self, delta: Float[Array, "*pairs 2"]) -> Float[Array, "*pairs 2"]:
        """f'(u) of log u."""
        if self.divergence == "js":
            return math.log(2) + jax.nn.log_sigmoid(delta)
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": self.alpha - 1}[self.divergence]
        if abs(power) < 1e-6:
            return delta
        return jnp.expm1(jnp.minimum(power * delta, LARGEST_EXPONENT)) / power

    def per_pair(self, x: Terms):  # noqa: D102
        zero = jnp.zeros_like(x.reference)
        scores = self.score(x.logp - x.reference)
        return self.objective.per_pair(replace(x, logp=scores, reference=zero))


@dataclass(frozen=True)
class Gated(Objective):
    """The objective with a gate on log π_l's gradient: d_l is multiplied by g = σ((μ_l - τ)/T).

    μ_l = log π_l/|y_l| of the policy, in whatever modifiers it is nested; g is a constant of the
    gradient, and the loss's value and d_w are unchanged, so that a response which is already very
    improbable is no longer pushed down. The idea is that of Gradient-Gated DPO (arXiv 2605.02626),
    which attenuates updates on extremely improbable rejected responses; the form of the gate and
    the defaults τ = -5 nats a token and T = 1 are ours.
    """

    objective: Objective
    threshold: float = -5.0
    temperature: float = 1.0

    ranges: ClassVar[dict[str, str]] = {"threshold": "finite"}

    def per_pair(self, x: Terms):  # noqa: D102
        gate = jax.nn.sigmoid((x.policy_mean[..., 1] - self.threshold) / self.temperature)
        fixed, gate = jax.lax.stop_gradient((x.rejected, gate))
        rejected = fixed + gate * (x.rejected - fixed)
        return self.objective.per_pair(replace(x, logp=jnp.stack([x.chosen, rejected], -1)))
