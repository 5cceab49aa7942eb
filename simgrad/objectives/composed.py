"""Named objectives that are others, modified or added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from simgrad.objectives.base import Composed, Objective
from simgrad.objectives.margin import DPO
from simgrad.objectives.reference_free import SFT, SimPO
from simgrad.objectives.wrappers import (
    Divergence,
    FDivergence,
    Gated,
    LabelSmoothed,
    LengthNormalized,
    ReferenceFree,
    Robust,
)


@dataclass(frozen=True)
class CDPO(Composed):
    """Conservative DPO: DPO with smoothed labels.

    d_w = d_l = β (σ(-β m) - ε): negative once the margin is past that of the labels. Defaults: β =
    0.1 as for DPO, ε = 0.1 is our choice.
    """

    name: ClassVar[str] = "cdpo"
    formula: ClassVar[str] = "-(1 - ε)·logσ(β·m) - ε·logσ(-β·m)"
    ratio: ClassVar[str] = "1"
    pushes_chosen_down: ClassVar[str] = "σ(-β·m) < ε"
    source: ClassVar[str] = "E. Mitchell, A note on DPO with noisy preferences (2023)"
    beta: float = 0.1
    epsilon: float = 0.1

    def build(self) -> Objective:  # noqa: D102
        return LabelSmoothed(DPO(self.beta), self.epsilon)


@dataclass(frozen=True)
class RobustDPO(Composed):
    """Provably robust DPO: unbiased for the clean loss when labels are flipped with probability ε.

    d_w = d_l = β ((1-ε) σ(-β m) + ε σ(β m))/(1-2ε). Defaults: β = 0.1 as for DPO; ε = 0.1 is what
    TRL's documentation reports as the paper's recommendation.
    """

    name: ClassVar[str] = "robust_dpo"
    formula: ClassVar[str] = "(-(1 - ε)·logσ(β·m) + ε·logσ(-β·m))/(1 - 2·ε)"
    ratio: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2403.00409"
    beta: float = 0.1
    epsilon: float = 0.1

    def build(self) -> Objective:  # noqa: D102
        return Robust(DPO(self.beta), self.epsilon)


@dataclass(frozen=True)
class SigmoidNorm(Composed):
    """Length-normalised DPO: every log-ratio divided by its response's length.

    d_w = β s/|y_w|, d_l = β s/|y_l|, s the loss's own sigmoid. Default β is that of DPO and TRL.
    """

    name: ClassVar[str] = "sigmoid_norm"
    formula: ClassVar[str] = "-logσ(β·(Δ_w/|y_w| - Δ_l/|y_l|))"
    ratio: ClassVar[str] = "|y_l|/|y_w|"
    source: ClassVar[str] = "arXiv 2411.15124 (Tülu 3)"
    beta: float = 0.1

    def build(self) -> Objective:  # noqa: D102
        return LengthNormalized(DPO(self.beta))


@dataclass(frozen=True)
class DPOSFT(Composed):
    """DPO plus λ times SFT on the chosen response, known as RPO.

    d_w = β σ(-β m) + λ/|y_w|, d_l = β σ(-β m). With ``normalization="sum"`` the SFT term is the
    summed log-prob and loses its 1/|y_w|. Defaults: β = 0.1 as for DPO, λ = 1 is our choice.
    """

    name: ClassVar[str] = "dpo_sft"
    formula: ClassVar[str] = "-logσ(β·m) - λ·μ_w"
    ratio: ClassVar[str] = "1 + λ/(|y_w|·β·σ(-β·m))"
    source: ClassVar[str] = "arXiv 2404.19733, eq. 1"
    beta: float = 0.1
    sft_weight: float = 1.0
    normalization: Literal["sum", "length", "batch"] = "length"
    ranges: ClassVar[dict[str, str]] = {"sft_weight": "non-negative"}

    def build(self) -> Objective:
        """The sum."""
        return DPO(self.beta) + self.sft_weight * SFT(self.normalization)


@dataclass(frozen=True)
class FDPO(Composed):
    """DPO with another divergence than the reverse KL; see :class:`FDivergence` for the choices.

    d_w = β s u_w f''(u_w), d_l = β s u_l f''(u_l), u = π/ref. The formula and ratio shown are those
    of the default, the Jensen-Shannon divergence (our choice); β = 0.1 as for DPO, α = 0.5 as in
    TRL.
    """

    name: ClassVar[str] = "f_dpo"
    formula: ClassVar[str] = "-logσ(β·(logσ(Δ_w) - logσ(Δ_l)))"
    ratio: ClassVar[str] = "σ(-Δ_w)/σ(-Δ_l)"
    source: ClassVar[str] = "arXiv 2309.16240"
    beta: float = 0.1
    divergence: Divergence = "js"
    alpha: float = 0.5

    def build(self) -> Objective:  # noqa: D102
        return FDivergence(DPO(self.beta), self.divergence, self.alpha)


@dataclass(frozen=True)
class AlphaPO(Composed):
    """SimPO with reward (1 - p^(-α))/α in place of log p, p = exp μ.

    d_w = β s exp(-α μ_w)/|y_w| and d_l likewise: α > 0 pulls harder on improbable responses; α → 0
    is SimPO. Exponents are cut at 80. Defaults: β, γ as for SimPO; α = 0.25 is our choice.
    """

    name: ClassVar[str] = "alphapo"
    formula: ClassVar[str] = "-logσ(β·(exp(-α·μ_l) - exp(-α·μ_w))/α - γ)"
    ratio: ClassVar[str] = "exp(α·(μ_l - μ_w))·|y_l|/|y_w|"
    source: ClassVar[str] = "arXiv 2501.03884"
    beta: float = 2.0
    gamma: float = 1.0
    alpha: float = 0.25

    def build(self) -> Objective:
        """The reward is f' of the alpha-divergence without reference, on mean log-probs."""
        return ReferenceFree(
            LengthNormalized(FDivergence(SimPO(self.beta, self.gamma), "alpha", 1 - self.alpha))
        )


@dataclass(frozen=True)
class GateDPO(Composed):
    """DPO with a gate on the rejected response's gradient; the gate's form and defaults are ours.

    See :class:`Gated`. d_w = β σ(-β m), d_l = g d_w with g = σ((μ_l - τ)/T).
    """

    name: ClassVar[str] = "gate_dpo"
    formula: ClassVar[str] = "-logσ(β·m)"
    ratio: ClassVar[str] = "1/σ((μ_l - τ)/T)"
    source: ClassVar[str] = "after arXiv 2605.02626; the gate's form is ours"
    beta: float = 0.1
    threshold: float = -5.0
    temperature: float = 1.0

    def build(self) -> Objective:  # noqa: D102
        return Gated(DPO(self.beta), self.threshold, self.temperature)
