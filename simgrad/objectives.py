"""Preference objectives as plain functions of log-probs, and the two numbers theory sees of them.

Every pairwise objective L(log π_w, log π_l; references, lengths) reaches the parameters only through

    -∇L = d_w ∇log π_w - d_l ∇log π_l,    d_w = -∂L/∂log π_w,    d_l = ∂L/∂log π_l

(Yuan et al., arXiv 2410.13828, Sec. 3), so an objective here is its loss, and d_w, d_l come from
automatic differentiation, never from a formula typed in twice.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from simgrad.typing import Array, Float, Int

__all__ = ["DPO", "IPO", "Coefficients", "Objective", "SimPO", "get", "names"]

_REGISTRY: dict[str, type[Objective]] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coefficients:
    """d_w and d_l of each pair: pull on the chosen, push on the rejected log-prob (signed)."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]


@dataclass(frozen=True)
class Objective:
    """Base of all pairwise objectives. Subclasses set ``name`` and define :meth:`loss`."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Make the objective known to :func:`get`."""
        if cls.name in _REGISTRY:
            raise TypeError(f"objective name {cls.name!r} is taken by {_REGISTRY[cls.name].__name__}")
        _REGISTRY[cls.name] = cls

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
        raise TypeError(f"{type(self).__name__} has no loss: get an objective by name, objectives.get('dpo')")

    def coefficients(
        self,
        logp_chosen: Float[Array, "*pairs"],
        logp_rejected: Float[Array, "*pairs"],
        ref_chosen: Float[Array, "*pairs"],
        ref_rejected: Float[Array, "*pairs"],
        len_chosen: Int[Array, "*pairs"],
        len_rejected: Int[Array, "*pairs"],
    ) -> Coefficients:
        """d_w = -∂L/∂log π_w and d_l = ∂L/∂log π_l of each pair, by automatic differentiation."""

        def total(chosen: Array, rejected: Array) -> Array:
            return self.loss(chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected).sum()

        to_chosen, to_rejected = jax.grad(total, argnums=(0, 1))(logp_chosen, logp_rejected)
        return Coefficients(-to_chosen, to_rejected)


def _require_positive(objective: Objective, *fields: str) -> None:
    for field in fields:
        if not getattr(objective, field) > 0:
            raise ValueError(f"{objective.name}: {field} must be positive, got {getattr(objective, field)}")


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation: -log σ(β m), m = log(π_w/ref_w) - log(π_l/ref_l).

    d_w = d_l = β σ(-β m). Default β = 0.1 as in the paper's experiments (arXiv 2305.18290, eq. 7).
    """

    name: ClassVar[str] = "dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse β ≤ 0."""
        _require_positive(self, "beta")

    def loss(self, logp_chosen, logp_rejected, ref_chosen, ref_rejected, len_chosen, len_rejected):  # noqa: D102
        margin = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
        return -jax.nn.log_sigmoid(self.beta * margin)


@dataclass(frozen=True)
class IPO(Objective):
    """Identity preference optimisation: (m - 1/(2β))², m as in DPO, on summed log-probs.

    d_w = d_l = 2 (1/(2β) - m): negative once the margin exceeds its target 1/(2β). The textbook form
    (arXiv 2310.12036, eq. 17, β being its τ); TRL divides each log-ratio by its response's length.
    """

    name: ClassVar[str] = "ipo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse β ≤ 0."""
        _require_positive(self, "beta")

    def loss(self, logp_chosen, logp_rejected, ref_chosen, ref_rejected, len_chosen, len_rejected):  # noqa: D102
        margin = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
        return jnp.square(margin - 1 / (2 * self.beta))


@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimisation: -log σ(β (log π_w/|y_w| - log π_l/|y_l|) - γ), without reference.

    d_w = β σ(γ - β(w̄ - l̄)) / |y_w| and d_l the same over |y_l|. Defaults β = 2, γ = 1 lie in the
    ranges of the paper (arXiv 2405.14734, Table 7: β 2.0-2.5, γ/β 0.5).
    """

    name: ClassVar[str] = "simpo"
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        """Refuse β ≤ 0."""
        _require_positive(self, "beta")

    def loss(self, logp_chosen, logp_rejected, ref_chosen, ref_rejected, len_chosen, len_rejected):  # noqa: D102
        chosen = logp_chosen / len_chosen.astype(logp_chosen.dtype)
        rejected = logp_rejected / len_rejected.astype(logp_rejected.dtype)
        return -jax.nn.log_sigmoid(self.beta * (chosen - rejected) - self.gamma)


def names() -> list[str]:
    """Names that :func:`get` understands.

    >>> names()
    ['dpo', 'ipo', 'simpo']
    """
    return sorted(_REGISTRY)


def get(name: str, **hyperparameters: float) -> Objective:
    """An objective by name.

    >>> get("dpo", beta=0.05)
    DPO(beta=0.05)

    Raises:
        ValueError: unknown name, unknown hyperparameter, or one out of range.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, 1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown objective {name!r};{hint} there are: {', '.join(names())}")
    fields = [field.name for field in dataclasses.fields(_REGISTRY[name])]
    if unknown := sorted(set(hyperparameters) - set(fields)):
        raise ValueError(f"{name} has no hyperparameter {', '.join(unknown)}; it takes: {', '.join(fields)}")
    return _REGISTRY[name](**hyperparameters)
