"""Objectives against a reference that weigh chosen and rejected differently: d_w ≠ d_l."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from simgrad.objectives.base import Objective, Terms


@dataclass(frozen=True)
class DPOP(Objective):
    """DPO-Positive: DPO with a penalty on a chosen response that fell below its reference.

    d_w = β s (1 + λ I(Δ_w < 0)) and d_l = β s, s the loss's own sigmoid: d_w jumps at Δ_w = 0.
    Defaults: β = 0.1 as for DPO; λ = 50 is our choice.
    """

    name: ClassVar[str] = "dpop"
    formula: ClassVar[str] = "-logσ(β·(m - λ·max(0, -Δ_w)))"
    ratio: ClassVar[str] = "1 + λ·I(Δ_w < 0)"
    source: ClassVar[str] = "arXiv 2402.13228"
    beta: float = 0.1
    penalty: float = 50.0

    ranges: ClassVar[dict[str, str]] = {"penalty": "non-negative"}

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(
            self.beta * (x.margin - self.penalty * jax.nn.relu(-x.delta_chosen))
        )


@dataclass(frozen=True)
class DPOShift(Objective):
    """DPO with the rejected reward scaled by λ: λ < 1 shifts mass towards the chosen response.

    d_w = β s, d_l = λ β s. Defaults: β = 0.1 as for DPO; λ = 0.75 is our choice.
    """

    name: ClassVar[str] = "dpo_shift"
    formula: ClassVar[str] = "-logσ(β·(Δ_w - λ·Δ_l))"
    ratio: ClassVar[str] = "1/λ"
    source: ClassVar[str] = "arXiv 2502.07599"
    beta: float = 0.1
    rejected_weight: float = 0.75

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(
            self.beta * (x.delta_chosen - self.rejected_weight * x.delta_rejected)
        )


@dataclass(frozen=True)
class CalDPO(Objective):
    """Cal-DPO: DPO without β plus squares that tie Δ_w to 1/(2β) and Δ_l to -1/(2β).

    d_w = σ(-m) + 1/(2β) - Δ_w and d_l = σ(-m) + 1/(2β) + Δ_l: d_w is negative once the chosen
    response is past its target. Default β = 0.1 and the factor ½ of the squares are our choice.
    """

    name: ClassVar[str] = "cal_dpo"
    formula: ClassVar[str] = "-logσ(m) + ((Δ_w - 1/(2·β))² + (Δ_l + 1/(2·β))²)/2"
    ratio: ClassVar[str] = "(σ(-m) + 1/(2·β) - Δ_w)/(σ(-m) + 1/(2·β) + Δ_l)"
    pushes_chosen_down: ClassVar[str] = "Δ_w > σ(-m) + 1/(2·β)"
    source: ClassVar[str] = "arXiv 2412.14516"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        target = 1 / (2 * self.beta)
        squares = jnp.square(x.delta_chosen - target) + jnp.square(x.delta_rejected + target)
        return squares / 2 - jax.nn.log_sigmoid(x.margin)


@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimisation of chosen and rejected responses around a reference point z_0.

    d_w = λ_D β σ'(β(Δ_w - z_0)), d_l = λ_U β σ'(β(z_0 - Δ_l)): both vanish far from z_0 on either
    side. z_0 (``kl``) is the KL divergence from the reference, a constant of the gradient; 0 is its
    value where training starts, and ``kto_pair`` estimates it from the batch. Defaults: β and both
    weights are TRL's.
    """

    name: ClassVar[str] = "kto"
    formula: ClassVar[str] = "λ_D·(1 - σ(β·(Δ_w - z_0))) + λ_U·(1 - σ(β·(z_0 - Δ_l)))"
    ratio: ClassVar[str] = "λ_D·σ'(β·(Δ_w - z_0))/(λ_U·σ'(β·(z_0 - Δ_l)))"
    source: ClassVar[str] = "arXiv 2402.01306, eq. 7"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float = 0.0

    ranges: ClassVar[dict[str, str]] = {
        "desirable_weight": "non-negative",
        "undesirable_weight": "non-negative",
        "kl": "non-negative",
    }

    def per_pair(self, x: Terms):  # noqa: D102
        # 1 - σ(z) is written σ(-z), which keeps its digits for large z
        chosen = jax.nn.sigmoid(-self.beta * (x.delta_chosen - self.kl))
        rejected = jax.nn.sigmoid(-self.beta * (self.kl - x.delta_rejected))
        return self.desirable_weight * chosen + self.undesirable_weight * rejected


@dataclass(frozen=True)
class SPPOHard(Objective):
    """Self-play preference optimisation with hard labels: each log-ratio is regressed on ±1/(2β).

    d_w = 2 (1/(2β) - Δ_w), d_l = 2 (Δ_l + 1/(2β)): either changes its sign at its target. Default β
    is TRL's.
    """

    name: ClassVar[str] = "sppo_hard"
    formula: ClassVar[str] = "(Δ_w - 1/(2·β))² + (Δ_l + 1/(2·β))²"
    ratio: ClassVar[str] = "(1/(2·β) - Δ_w)/(1/(2·β) + Δ_l)"
    pushes_chosen_down: ClassVar[str] = "Δ_w > 1/(2·β)"
    source: ClassVar[str] = "arXiv 2405.00675, eq. 4.7 with P = 1 and 0"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        target = 1 / (2 * self.beta)
        return jnp.square(x.delta_chosen - target) + jnp.square(x.delta_rejected + target)


@dataclass(frozen=True)
class BCOPair(Objective):
    """Binary classifier optimisation of each response by itself, with no reward shift (δ = 0).

    d_w = β σ(-β Δ_w), d_l = β σ(β Δ_l). Default β is TRL's. ``bco`` has the shift.
    """

    name: ClassVar[str] = "bco_pair"
    formula: ClassVar[str] = "-logσ(β·Δ_w) - logσ(-β·Δ_l)"
    ratio: ClassVar[str] = "σ(-β·Δ_w)/σ(β·Δ_l)"
    source: ClassVar[str] = "arXiv 2404.04656, with δ = 0 as in TRL"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(self.beta * x.delta_chosen) - jax.nn.log_sigmoid(
            -self.beta * x.delta_rejected
        )


@dataclass(frozen=True)
class NCAPair(Objective):
    """Noise contrastive alignment of pairs.

    d_w = β (1 - 3/2 σ(β Δ_w)): negative once the chosen is likely enough. d_l = ½ β σ(β Δ_l).
    Default β is TRL's.
    """

    name: ClassVar[str] = "nca_pair"
    formula: ClassVar[str] = "-logσ(β·Δ_w) - logσ(-β·Δ_w)/2 - logσ(-β·Δ_l)/2"
    ratio: ClassVar[str] = "(2 - 3·σ(β·Δ_w))/σ(β·Δ_l)"
    pushes_chosen_down: ClassVar[str] = "σ(β·Δ_w) > 2/3"
    source: ClassVar[str] = "arXiv 2402.05369"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        chosen, rejected = self.beta * x.delta_chosen, self.beta * x.delta_rejected
        pull = -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-chosen) / 2
        return pull - jax.nn.log_sigmoid(-rejected) / 2


@dataclass(frozen=True)
class APOZero(Objective):
    """Anchored preference optimisation, "zero": chosen up and rejected down, each by itself.

    d_w = β σ'(β Δ_w), d_l = β σ'(β Δ_l). It is KTO with z_0 = 0 and equal weights. Default β is
    TRL's.
    """

    name: ClassVar[str] = "apo_zero"
    formula: ClassVar[str] = "1 - σ(β·Δ_w) + σ(β·Δ_l)"
    ratio: ClassVar[str] = "σ'(β·Δ_w)/σ'(β·Δ_l)"
    source: ClassVar[str] = "arXiv 2408.06266, eq. 7"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return KTO(self.beta).per_pair(x)


@dataclass(frozen=True)
class APODown(Objective):
    """Anchored preference optimisation, "down": both responses down, the rejected one more.

    d_w = β (σ'(β m) - σ'(β Δ_w)), d_l = β σ'(β m): the chosen is pushed down by design. Default β
    is TRL's.
    """

    name: ClassVar[str] = "apo_down"
    formula: ClassVar[str] = "σ(β·Δ_w) + 1 - σ(β·m)"
    ratio: ClassVar[str] = "1 - σ'(β·Δ_w)/σ'(β·m)"
    pushes_chosen_down: ClassVar[str] = "Δ_w² < m²"
    source: ClassVar[str] = "arXiv 2408.06266, eq. 8"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return jax.nn.sigmoid(self.beta * x.delta_chosen) + jax.nn.sigmoid(-self.beta * x.margin)
