"""Inner products of sums of outer products, by the cheaper of two exact routes.

The gradient of a linear map is a sum of outer products over tokens, G_w = A_w^T E_w with one row a
token. Its inner product with G_l is available without forming either ("ghost" route):

    <A_w^T E_w, A_l^T E_l> = Σ_{t,t'} (a_t · a'_t') (e_t · e'_t')

which costs T² (I + O) a product instead of T I O for each gradient; three products against two
gradients make the ghost route cheaper below T = (2/3) I O / (I + O) tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.typing import Array, Float

__all__ = ["PairKernel", "chosen_and_rejected", "ghost_is_cheaper", "gradients", "outer_products", "row_inner", "sides"]

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
    >>> kernel.cosine.item(), kernel.gap.item()
    (0.75, 0.5)
    """

    sq_chosen: Float[Array, "*pairs"]
    inner: Float[Array, "*pairs"]
    sq_rejected: Float[Array, "*pairs"]

    def __add__(self, other: PairKernel) -> PairKernel:
        """Kernels of disjoint parameter blocks add up."""
        return jax.tree.map(jnp.add, self, other)

    @property
    def cosine(self) -> Float[Array, "*pairs"]:
        """⟨g_w, g_l⟩ / (‖g_w‖ ‖g_l‖); 0 where a gradient vanishes."""
        norms = jnp.sqrt(self.sq_chosen) * jnp.sqrt(self.sq_rejected)
        return jnp.where(norms == 0, 0.0, self.inner / jnp.where(norms == 0, 1.0, norms))

    @property
    def gap(self) -> Float[Array, "*pairs"]:
        """⟨g_w, g_l⟩ - ‖g_w‖²: positive when an equal pull and push makes the chosen fall."""
        return self.inner - self.sq_chosen


def sides(x: Array) -> Sides:
    """The chosen and the rejected half of an array whose second axis is (chosen, rejected)."""
    return x[:, 0], x[:, 1]


def chosen_and_rejected(product, *args: Sides) -> PairKernel:
    """Evaluate ``product(x_1, .., y_1, ..)`` on (w, w), (w, l) and (l, l)."""
    w, l = zip(*args, strict=True)  # noqa: E741
    return PairKernel(product(*w, *w), product(*w, *l), product(*l, *l))


def ghost_is_cheaper(tokens: int, fan_in: int, out: int) -> bool:
    """3 T² (I + O) < 2 T I O.

    >>> ghost_is_cheaper(100, 768, 768), ghost_is_cheaper(1000, 768, 768)
    (True, False)
    """
    return 3 * tokens * (fan_in + out) < 2 * fan_in * out


def row_inner(rows: Float[Array, "*n R I"], others: Float[Array, "*n M I"]) -> Float[Array, "*n R M"]:
    """⟨row, other row⟩ for all rows, in float32 or better, with full-precision products on every device.

    >>> import jax.numpy as jnp
    >>> row_inner(jnp.eye(2), jnp.array([[3.0, 4.0]])).tolist()
    [[3.0], [4.0]]
    """
    return jnp.einsum("...ri,...mi->...rm", tree.widen(rows), tree.widen(others), precision="highest")


def outer_products(a: Float[Array, "B 2 T I"], e: Float[Array, "B 2 T O"], ghost: bool | None = None) -> PairKernel:
    """Kernel of G = Σ_t a_t e_t^T for each side; ``ghost`` forces a route (None: the cheaper one).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 2, 3, 4))
    >>> outer_products(ones, ones).inner.item()
    144.0
    """
    a, e = tree.widen(a), tree.widen(e)
    if ghost is None:
        ghost = ghost_is_cheaper(a.shape[2], a.shape[3], e.shape[3])
    if ghost:

        def product(a: Array, e: Array, a2: Array, e2: Array) -> Array:
            return (row_inner(a, a2) * row_inner(e, e2)).sum(-1).sum(-1)

        return chosen_and_rejected(product, sides(a), sides(e))
    return gradients(jnp.einsum("bxti,bxto->bxio", a, e, precision="highest"))


def gradients(g: Float[Array, "B 2 ..."]) -> PairKernel:
    """Kernel of gradients that are there as arrays.

    >>> import jax.numpy as jnp
    >>> kernel = gradients(jnp.array([[[1.0, 0.0], [2.0, 1.0]]]))
    >>> kernel.sq_chosen.item(), kernel.inner.item(), kernel.sq_rejected.item()
    (1.0, 2.0, 5.0)
    """

    def product(x: Array, y: Array) -> Array:
        return jax.vmap(tree.dot)(x, y)

    return chosen_and_rejected(product, sides(g))
