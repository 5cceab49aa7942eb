"""Objectives without a reference. μ = log π/|y| is the mean log-prob of a token, p = exp μ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from simgrad.objectives.base import Composed, Objective, Terms
from simgrad.typing import Array, Float


@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimisation: logistic loss of the mean log-prob difference, less margin γ.

    d_w = β σ(γ - β(μ_w - μ_l)) / |y_w| and d_l the same over |y_l|. Defaults β = 2, γ = 1 lie in
    the ranges of the paper (its Table 7: β 2.0-2.5, γ/β 0.5).
    """

    name: ClassVar[str] = "simpo"
    formula: ClassVar[str] = "-logσ(β·(μ_w - μ_l) - γ)"
    ratio: ClassVar[str] = "|y_l|/|y_w|"
    source: ClassVar[str] = "arXiv 2405.14734, eq. 6"
    beta: float = 2.0
    gamma: float = 1.0

    ranges: ClassVar[dict[str, str]] = {"gamma": "finite"}

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(self.beta * (x.mean_chosen - x.mean_rejected) - self.gamma)


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning on the chosen response, to add to others: ``DPO() + 0.5 * SFT()``.

    d_l = 0, and d_w = 1, 1/|y_w| or n/Σ|y_w| for normalization "sum" (the formula below), "length"
    or "batch". The last is the mean over all chosen tokens of the batch, which TRL takes. Default:
    the plain negative log-likelihood.
    """

    name: ClassVar[str] = "sft"
    formula: ClassVar[str] = "-logπ_w"
    ratio: ClassVar[str] = "∞"
    source: ClassVar[str] = "maximum likelihood"
    normalization: Literal["sum", "length", "batch"] = "sum"

    def __post_init__(self) -> None:
        """Refuse an unknown normalization."""
        if self.normalization not in ("sum", "length", "batch"):
            raise ValueError(
                f"{self.name}: normalization must be sum, length or batch, got "
                f"{self.normalization!r}"
            )

    def per_pair(self, x: Terms):  # noqa: D102
        if self.normalization == "sum":
            return -x.chosen
        return -x.chosen / (
            x.lengths[..., 0].mean() if self.normalization == "batch" else x.lengths[..., 0]
        )


@dataclass(frozen=True)
class RRHF(Objective):
    """Rank responses to align: a hinge on mean log-probs plus λ times SFT on the chosen.

    d_w = I(μ_l > μ_w)/|y_w| + λ, d_l = I(μ_l > μ_w)/|y_l|. Default λ = 1: the paper adds the two
    unweighted.
    """

    name: ClassVar[str] = "rrhf"
    formula: ClassVar[str] = "max(0, μ_l - μ_w) - λ·logπ_w"
    ratio: ClassVar[str] = "|y_l|/|y_w| + λ·|y_l|/I(μ_l > μ_w)"
    source: ClassVar[str] = "arXiv 2304.05302"
    sft_weight: float = 1.0

    usual: ClassVar[str] = "non-negative"

    def per_pair(self, x: Terms):  # noqa: D102
        return jax.nn.relu(x.mean_rejected - x.mean_chosen) - self.sft_weight * x.chosen


@dataclass(frozen=True)
class SLiC(Objective):
    """Sequence likelihood calibration: a hinge on log-probs plus λ times SFT on the chosen.

    d_w = I + λ, d_l = I, where I = 1 while log π_w - log π_l < δ. Defaults δ = 1, λ = 1 are our
    choice.
    """

    name: ClassVar[str] = "slic_hf"
    formula: ClassVar[str] = "max(0, δ - (logπ_w - logπ_l)) - λ·logπ_w"
    ratio: ClassVar[str] = "1 + λ/I(logπ_w - logπ_l < δ)"
    source: ClassVar[str] = "arXiv 2305.10425"
    delta: float = 1.0
    sft_weight: float = 1.0

    usual: ClassVar[str] = "non-negative"

    def per_pair(self, x: Terms):  # noqa: D102
        return jax.nn.relu(self.delta - (x.chosen - x.rejected)) - self.sft_weight * x.chosen


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive preference optimisation: DPO without reference plus λ times SFT on the chosen.

    d_w = β s + λ, d_l = β s with s = σ(-β(log π_w - log π_l)). Defaults: β = 0.1, λ = 1 as in TRL,
    whose SFT term is however a mean over tokens (``trl:cpo/sigmoid``).
    """

    name: ClassVar[str] = "cpo"
    formula: ClassVar[str] = "-logσ(β·(logπ_w - logπ_l)) - λ·logπ_w"
    ratio: ClassVar[str] = "1 + λ/(β·σ(β·(logπ_l - logπ_w)))"
    source: ClassVar[str] = "arXiv 2401.08417"
    beta: float = 0.1
    sft_weight: float = 1.0

    ranges: ClassVar[dict[str, str]] = {"sft_weight": "non-negative"}

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(self.beta * (x.chosen - x.rejected)) - self.sft_weight * x.chosen


def log_odds(mean: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """Log p/(1-p) of p = exp(mean), mean ≤ 0; 1 - p is not taken below the dtype's resolution.

    >>> log_odds(jnp.log(jnp.array([0.5, 0.9]))).round(3).tolist()
    [0.0, 2.197...]
    """
    below = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    far, near = jnp.minimum(below, -0.5), jnp.maximum(below, -1.0)
    return mean - jnp.where(below < -0.6931, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))


@dataclass(frozen=True)
class OddsRatio(Objective):
    """The preference part of ORPO: -logσ(o_w - o_l), o = log p/(1-p).

    d_w = s/((1-p_w)|y_w|), s = σ(o_l - o_w).
    """

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(log_odds(x.mean_chosen) - log_odds(x.mean_rejected))


@dataclass(frozen=True)
class ORPO(Composed):
    """Odds-ratio preference optimisation: mean chosen NLL plus λ times the logistic log-odds loss.

    d_w = (1 + λ s/(1-p_w))/|y_w|, d_l = λ s/((1-p_l)|y_l|), s = σ(o_l - o_w), o = log p/(1-p). 1 -
    p is held at the dtype's resolution, which bounds d_l as p_l → 1. Default λ = 0.1 is TRL's (its
    ``beta``).
    """

    name: ClassVar[str] = "orpo"
    formula: ClassVar[str] = "-μ_w - λ·logσ(o_w - o_l)"
    ratio: ClassVar[str] = "(1/(1 - p_w) + 1/(λ·σ(o_l - o_w)))·(1 - p_l)·|y_l|/|y_w|"
    source: ClassVar[str] = "arXiv 2403.07691, eqs. 6 and 7"
    odds_weight: float = 0.1

    usual: ClassVar[str] = "non-negative"

    def build(self) -> Objective:  # noqa: D102
        return SFT("length") + self.odds_weight * OddsRatio()
