"""Objectives that couple the pairs of a batch: the d_w, d_l of a pair depend on the other pairs.

In formulas a star marks what is taken from the batch. They reduce over all pairs they are given, so
they need the whole batch at once and no ``vmap`` over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from simgrad.objectives.base import Objective, Terms
from simgrad.typing import Array, Float


def of_same_rank(
    values: Float[Array, "*pairs"], others: Float[Array, "*pairs"]
) -> Float[Array, "*pairs"]:
    """For each value the one of the others that has the same rank.

    >>> of_same_rank(jnp.array([3.0, 1.0, 2.0]), jnp.array([10.0, 30.0, 20.0])).tolist()
    [30.0, 10.0, 20.0]
    """
    rank = jnp.argsort(jnp.argsort(values.reshape(-1)))
    return jnp.sort(others.reshape(-1))[rank].reshape(values.shape)


@dataclass(frozen=True)
class AOT(Objective):
    """Alignment via optimal transport, paired: DPO after sorting policy and reference log-ratios.

    A pair meets the reference log-ratio of its own rank in the batch, h* (not its own reference).
    d_w = d_l = β σ(β (h* - logπ_w + logπ_l)). Default β is TRL's.
    """

    name: ClassVar[str] = "aot"
    formula: ClassVar[str] = "-logσ(β·(logπ_w - logπ_l - h*))"
    ratio: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.05882"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        h = x.chosen - x.rejected
        return -jax.nn.log_sigmoid(
            self.beta * (h - of_same_rank(h, (x.reference[..., 0] - x.reference[..., 1])))
        )


@dataclass(frozen=True)
class AOTUnpaired(Objective):
    """Alignment via optimal transport, unpaired: DPO after sorting Δ_w and Δ_l of the batch apart.

    A chosen response meets the rejected one of its rank, Δ_l*, a rejected one the chosen of its
    rank, Δ_w*: d_w = β σ(β (Δ_l* - Δ_w)), d_l = β σ(β (Δ_l - Δ_w*)). Default β is TRL's.
    """

    name: ClassVar[str] = "aot_unpaired"
    formula: ClassVar[str] = "-logσ(β·(Δ_w - Δ_l*))"
    ratio: ClassVar[str] = "σ(β·(Δ_l* - Δ_w))/σ(β·(Δ_l - Δ_w*))"
    source: ClassVar[str] = "arXiv 2406.05882"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        return -jax.nn.log_sigmoid(
            self.beta * (x.delta_chosen - of_same_rank(x.delta_chosen, x.delta_rejected))
        )


@dataclass(frozen=True)
class KTOPair(Objective):
    """KTO on pairs as in earlier TRL: each reference point is the other side's mean log-ratio.

    The reference point is at least 0.

    z_w* = max(0, mean Δ_w) of the batch serves the rejected responses and z_l* the chosen ones,
    both constants of the gradient. d_w = β σ'(β(Δ_w - z_l*)), d_l = β σ'(β(z_w* - Δ_l)). Default β
    is TRL's.
    """

    name: ClassVar[str] = "kto_pair"
    formula: ClassVar[str] = "1 - σ(β·(Δ_w - z_l*)) + 1 - σ(β·(z_w* - Δ_l))"
    ratio: ClassVar[str] = "σ'(β·(Δ_w - z_l*))/σ'(β·(z_w* - Δ_l))"
    source: ClassVar[str] = "arXiv 2402.01306, eq. 7, as a TRL loss type of 2024"
    beta: float = 0.1

    def per_pair(self, x: Terms):  # noqa: D102
        point_w, point_l = (
            jax.lax.stop_gradient(jax.nn.relu(delta.mean()))
            for delta in (x.delta_chosen, x.delta_rejected)
        )
        rises = jax.nn.sigmoid(-self.beta * (x.delta_chosen - point_l))
        return rises + jax.nn.sigmoid(-self.beta * (point_w - x.delta_rejected))


@dataclass(frozen=True)
class BCO(Objective):
    """Binary classifier optimisation with reward shift δ*, a constant of the gradient.

    d_w = β σ(δ* - β Δ_w), d_l = β σ(β Δ_l - δ*). Without a given ``delta``, δ* is the mean reward β
    Δ of all the batch's responses (the paper keeps a running mean over batches). Default β = 0.1 as
    for ``bco_pair``.
    """

    name: ClassVar[str] = "bco"
    formula: ClassVar[str] = "-logσ(β·Δ_w - δ*) - logσ(δ* - β·Δ_l)"
    ratio: ClassVar[str] = "σ(δ* - β·Δ_w)/σ(β·Δ_l - δ*)"
    source: ClassVar[str] = "arXiv 2404.04656"
    beta: float = 0.1
    delta: float | None = None

    ranges: ClassVar[dict[str, str]] = {"delta": "finite"}

    def per_pair(self, x: Terms):  # noqa: D102
        mean = (x.delta_chosen + x.delta_rejected).mean() / 2
        shift = jax.lax.stop_gradient(self.beta * mean) if self.delta is None else self.delta
        return -jax.nn.log_sigmoid(self.beta * x.delta_chosen - shift) - jax.nn.log_sigmoid(
            shift - self.beta * x.delta_rejected
        )
