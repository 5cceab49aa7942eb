"""The 2 x 2 kernel of a pair, and inner products of rows."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.typing import Array, Float

Sides = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairKernel:
    """The 2 x 2 entanglement kernel of each pair: inner products of g = ∇_θ log π(y|x).

    Attributes:
        sq_chosen: ‖g_w‖².
        inner: ⟨g_w, g_l⟩.
        sq_rejected: ‖g_l‖².

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> kernel.cosine.item(), kernel.gap.item(), kernel.matrix.tolist()
    (0.75, 0.5, [[[1.0, 1.5], [1.5, 4.0]]])
    """

    sq_chosen: Float[Array, "*pairs"]
    inner: Float[Array, "*pairs"]
    sq_rejected: Float[Array, "*pairs"]

    def __add__(self, other: PairKernel) -> PairKernel:
        """Kernels of disjoint parameter blocks add up."""
        return jax.tree.map(jnp.add, self, other)

    @property
    def matrix(self) -> Float[Array, "*pairs 2 2"]:
        """K = [[‖g_w‖², ⟨g_w,g_l⟩], [⟨g_w,g_l⟩, ‖g_l‖²]]."""
        rows = (self.sq_chosen, self.inner), (self.inner, self.sq_rejected)
        return jnp.stack([jnp.stack(row, -1) for row in rows], -2)

    @property
    def cosine(self) -> Float[Array, "*pairs"]:
        """⟨g_w, g_l⟩ / (‖g_w‖ ‖g_l‖); 0 where a gradient vanishes."""
        norms = jnp.sqrt(self.sq_chosen) * jnp.sqrt(self.sq_rejected)
        return jnp.where(norms == 0, 0.0, self.inner / jnp.where(norms == 0, 1.0, norms))

    @property
    def gap(self) -> Float[Array, "*pairs"]:
        """⟨g_w, g_l⟩ - ‖g_w‖²: positive when equal forces up and down make the chosen fall."""
        return self.inner - self.sq_chosen


def sides(x: Array) -> Sides:
    """The chosen and the rejected half of an array whose second axis is (chosen, rejected)."""
    return x[:, 0], x[:, 1]


def chosen_and_rejected(product, *args: Sides) -> PairKernel:
    """Evaluate ``product(x_1, .., y_1, ..)`` on (w, w), (w, l) and (l, l)."""
    w, l = zip(*args, strict=True)  # noqa: E741
    return PairKernel(product(*w, *w), product(*w, *l), product(*l, *l))


def row_inner(
    rows: Float[Array, "*n R I"], others: Float[Array, "*n M I"]
) -> Float[Array, "*n R M"]:
    """⟨row, other row⟩ for all rows, in float32 or better, with exact products on every device.

    >>> import jax.numpy as jnp
    >>> row_inner(jnp.eye(2), jnp.array([[3.0, 4.0]])).tolist()
    [[3.0], [4.0]]
    """
    wide = tree.accumulator(rows.dtype)
    return jnp.einsum(
        "...ri,...mi->...rm", rows, others, precision="highest", preferred_element_type=wide
    )


def gradients(g: Float[Array, "B 2 ..."]) -> PairKernel:
    """Kernel of gradients that are there as arrays.

    >>> import jax.numpy as jnp
    >>> kernel = gradients(jnp.array([[[1.0, 0.0], [2.0, 1.0]]]))
    >>> kernel.sq_chosen.item(), kernel.inner.item(), kernel.sq_rejected.item()
    (1.0, 2.0, 5.0)
    """
    return chosen_and_rejected(jax.vmap(tree.dot), sides(g))
