"""Inner products of sums of outer products, by the cheaper of two exact routes.

The gradient of a linear map is a sum of outer products over tokens, G_w = A_w^T E_w with one row a
token. Its inner product with G_l is available without forming either ("ghost" route):

    <A_w^T E_w, A_l^T E_l> = Σ_{t,t'} (a_t · a'_t') (e_t · e'_t')

which costs T² (I + O) a product instead of T I O for each gradient. Where both sides have the same
inputs (a packed pair) the products A A^T are taken once. :mod:`simgrad.theory.kernel.cost` says which
route is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.theory.kernel.cost import ghost_is_cheaper
from simgrad.typing import Array, Float

__all__ = [
    "PairKernel",
    "chosen_and_rejected",
    "gradients",
    "met_by",
    "outer_products",
    "row_inner",
    "sides",
]

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


def row_inner(
    rows: Float[Array, "*n R I"], others: Float[Array, "*n M I"]
) -> Float[Array, "*n R M"]:
    """⟨row, other row⟩ for all rows, accumulated in float32 or better, with exact products on every device.

    >>> import jax.numpy as jnp
    >>> row_inner(jnp.eye(2), jnp.array([[3.0, 4.0]])).tolist()
    [[3.0], [4.0]]
    """
    wide = tree.accumulator(rows.dtype)
    return jnp.einsum(
        "...ri,...mi->...rm", rows, others, precision="highest", preferred_element_type=wide
    )


def outer_products(
    a: Float[Array, "B S T I"], *e: Float[Array, "B 2 T _"], ghost: bool | None = None
) -> tuple[PairKernel, ...]:
    """Kernels of G = Σ_t a_t e_t^T for each e: maps that read the same inputs a.

    The inputs are those of either side (S = 2), or both sides' (S = 1). ``ghost`` forces a route
    (None: the cheaper one for all of the maps).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 2, 3, 4))
    >>> outer_products(ones, ones)[0].inner.item()
    144.0
    """
    shared = a.shape[1] == 1
    if ghost is None:
        ghost = ghost_is_cheaper(a.shape[2], a.shape[3], sum(x.shape[3] for x in e), shared)
    if not ghost:
        a = jnp.broadcast_to(a, (a.shape[0], 2, *a.shape[2:]))
        return tuple(gradients(_gradient(a, x)) for x in e)
    if shared:
        once = row_inner(a, a)
        if e[0].dtype.itemsize >= 4:
            return tuple(met_by(once, x) for x in e)
        met = PairKernel(
            *(once[:, 0],) * 3
        )  # products of low-precision rows are exact and fast, others are not
    else:
        met = chosen_and_rejected(row_inner, sides(a))

    def product(x: Array) -> PairKernel:
        return jax.tree.map(
            lambda m, n: (m * n).sum(-1).sum(-1), met, chosen_and_rejected(row_inner, sides(x))
        )

    return tuple(product(x) for x in e)


def _gradient(a: Float[Array, "B 2 T I"], e: Float[Array, "B 2 T O"]) -> Float[Array, "B 2 I O"]:
    wide = tree.accumulator(e.dtype)
    if a.dtype != e.dtype:
        a, e = tree.widen(a), tree.widen(e)
    return jnp.einsum("bxti,bxto->bxio", a, e, precision="highest", preferred_element_type=wide)


def met_by(met: Float[Array, "B 1 T T"], e: Float[Array, "B 2 T O"]) -> PairKernel:
    """Σ_{t,t'} met[t,t'] (e_t · e'_t') for a symmetric array that both sides share.

    >>> import jax.numpy as jnp
    >>> met_by(jnp.ones((1, 1, 2, 2)), jnp.ones((1, 2, 2, 3))).inner.item()
    12.0
    """
    w, l = sides(jnp.einsum("btu,bxuo->bxto", met[:, 0], e, precision="highest"))  # noqa: E741
    first, second = sides(e)

    def inner(x: Array, y: Array) -> Array:
        return (x * y).sum(-1).sum(-1)

    return PairKernel(inner(first, w), inner(second, w), inner(second, l))


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
