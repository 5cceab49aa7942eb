"""What one gradient step does to the log-probs of both responses."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from simgrad.objectives import Coefficients
from simgrad.theory.gram import PairKernel
from simgrad.typing import Array, Float

__all__ = ["Change", "first_order"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Change:
    """Δlog π_w and Δlog π_l of each pair, in nats."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]


def first_order(
    kernel: PairKernel, coefficients: Coefficients, learning_rate: float | Float[Array, ""] = 1.0
) -> Change:
    """First-order change after one SGD step on the pair alone.

        Δlog π_w = η (d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩) + O(η²)
        Δlog π_l = η (d_w ⟨g_w,g_l⟩ - d_l ‖g_l‖²) + O(η²)

    With η = 1 (the default) the result is per unit learning rate. In a batch of n pairs whose loss is
    a mean, a pair's own contribution is 1/n of this and the other pairs add theirs.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> change = first_order(kernel, Coefficients(jnp.array([0.5]), jnp.array([0.5])), learning_rate=0.1)
    >>> round(change.chosen.item(), 6), round(change.rejected.item(), 6)
    (-0.025, -0.125)
    """
    d_w, d_l = coefficients.chosen, coefficients.rejected
    return Change(
        learning_rate * (d_w * kernel.sq_chosen - d_l * kernel.inner),
        learning_rate * (d_w * kernel.inner - d_l * kernel.sq_rejected),
    )
