"""Objectives of the margin m = Δ_w - Δ_l against a reference, all with equal pull d_w = d_l."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from simgrad.objectives.base import Objective, Terms


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation: the logistic loss of the margin.

    d_w = d_l = β σ(-β m). Default β = 0.1 as in the paper's experiments.
    """

    name: ClassVar[str] = "dpo"
    formula: ClassVar[str] = "-logσ(β·m)"
    ratio: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2305.18290, eq. 7"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(self.beta * x.margin)


@dataclass(frozen=True)
class IPO(Objective):
    """Identity preference optimisation: regress the margin on 1/(2β), β being the paper's τ.

    d_w = d_l = 2 (1/(2β) - m): negative once the margin exceeds its target. The textbook form, on
    summed log-probs; TRL divides each log-ratio by its response's length (``trl:ipo``). Default β =
    0.1 is TRL's.
    """

    name: ClassVar[str] = "ipo"
    formula: ClassVar[str] = "(m - 1/(2·β))²"
    ratio: ClassVar[str] = "1"
    pushes_chosen_down: ClassVar[str] = "m > 1/(2·β)"
    source: ClassVar[str] = "arXiv 2310.12036, eq. 17"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return jnp.square(x.margin - 1 / (2 * self.beta))


@dataclass(frozen=True)
class Hinge(Objective):
    """Hinge loss of the margin, as in SLiC and RSO, on log-ratios against a reference.

    d_w = d_l = β where β m < 1, else 0. Default β = 0.1 is TRL's.
    """

    name: ClassVar[str] = "hinge"
    formula: ClassVar[str] = "max(0, 1 - β·m)"
    ratio: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2309.06657 (RSO), after 2305.10425 (SLiC-HF)"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return jax.nn.relu(1 - self.beta * x.margin)


@dataclass(frozen=True)
class RDPO(Objective):
    """DPO with a length term in the logit, z = β m + α (|y_w| - |y_l|), against length bias.

    d_w = d_l = β σ(-z). Defaults: β = 0.1 as for DPO, α = 0.01 is our choice.
    """

    name: ClassVar[str] = "r_dpo"
    formula: ClassVar[str] = "-logσ(β·m + α·(|y_w| - |y_l|))"
    ratio: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2403.19159"
    beta: float = 0.1
    alpha: float = 0.01

    ranges: ClassVar[dict[str, str]] = {"alpha": "finite"}

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(
            self.beta * x.margin + self.alpha * (x.lengths[..., 0] - x.lengths[..., 1])
        )


@dataclass(frozen=True)
class EXO(Objective):
    """EXO on pairs: KL(q ‖ p) from q = (σ(βm), σ(-βm)) to smoothed labels p = (1-ε, ε).

    d_w = d_l = β σ'(β m) (log((1-ε)/ε) - β m): negative once the margin is past that of the labels,
    and vanishing for very negative margins too. Defaults: TRL's β = 0.1; ε = 0.001 is what TRL's
    documentation reports as the paper's.
    """

    name: ClassVar[str] = "exo_pair"
    formula: ClassVar[str] = "σ(β·m)·(logσ(β·m) - log(1 - ε)) + σ(-β·m)·(logσ(-β·m) - log(ε))"
    ratio: ClassVar[str] = "1"
    pushes_chosen_down: ClassVar[str] = "β·m > log((1 - ε)/ε)"
    source: ClassVar[str] = "arXiv 2402.00856, eq. 16"
    beta: float = 0.1
    epsilon: float = 1e-3
    ranges: ClassVar[dict[str, str]] = {"epsilon": "finite"}

    def __post_init__(self) -> None:
        """Refuse β ≤ 0 and ε outside (0, 1)."""
        super().__post_init__()
        if not 0 < self.epsilon < 1:
            raise ValueError(f"{self.name}: epsilon must lie in (0, 1), got {self.epsilon}")

    def per_pair(self, x: Terms):  # noqa: D102
        z = self.beta * x.margin
        agree = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-self.epsilon))
        return agree + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(self.epsilon))


@dataclass(frozen=True)
class DiscoPOP(Objective):
    """The discovered log-ratio modulated loss: logistic for z < 0, exponential for z > 0, z = β m.

    d_w = d_l = β ((1-s) σ(-z) + s e⁻ᶻ - σ'(z/τ)/τ (e⁻ᶻ + logσ(z))), s = σ(z/τ). The loss has a
    valley and a hill: with the default τ it pushes the chosen down around z = 0, where training
    starts. The exponent logσ(z/τ) - z is held at 80. Defaults: β = 0.1 is TRL's, τ = 0.05 the
    paper's.
    """

    name: ClassVar[str] = "discopop"
    formula: ClassVar[str] = "(1 - σ(β·m/τ))·(-logσ(β·m)) + σ(β·m/τ)·exp(-β·m)"
    ratio: ClassVar[str] = "1"
    pushes_chosen_down: ClassVar[str] = (
        "σ'(β·m/τ)/τ·(exp(-β·m) + logσ(β·m)) > (1 - σ(β·m/τ))·σ(-β·m) + σ(β·m/τ)·exp(-β·m)"
    )
    source: ClassVar[str] = "arXiv 2406.08414, eq. 5"
    beta: float = 0.1
    tau: float = 0.05

    def per_pair(self, x: Terms):  # noqa: D102
        z = self.beta * x.margin
        logistic = -jax.nn.log_sigmoid(z) * jax.nn.sigmoid(-z / self.tau)
        return logistic + jnp.exp(jnp.minimum(jax.nn.log_sigmoid(z / self.tau) - z, 80.0))
