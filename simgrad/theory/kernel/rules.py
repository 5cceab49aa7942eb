"""Inner products of gradients that are sums of outer products, for pairs and for tokens.

    ⟨Σ_t a_t ⊗ δ_t, Σ_t' a'_t' ⊗ δ'_t'⟩ = Σ_{t,t'} (a_t · a'_t') (δ_t · δ'_t')

costs T² (I + O) a product instead of T I O for each gradient (the "ghost" route; the other one is
"explicit"). One-hot features meet in [id_t = id'_t'], one-hot and plain ones in a'_t'[id_t]. Where
both sides have the same inputs (a packed pair) the products a · a' are taken once.
:mod:`simgrad.theory.kernel.cost` says which route is cheaper.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.theory.kernel.cost import ghost_is_cheaper
from simgrad.theory.kernel.gram import PairKernel, chosen_and_rejected, gradients, row_inner, sides
from simgrad.theory.kernel.signals import Gradient, Outer
from simgrad.typing import Array, Float


def between_sides(gradient: Gradient, ghost: bool | None = None) -> PairKernel:
    """‖G_w‖², ⟨G_w,G_l⟩ and ‖G_l‖² of each pair (K = 1); ``ghost`` forces a route."""
    if not isinstance(gradient, tuple):
        return gradients(gradient[:, :, 0])
    first = gradient[0]
    tokens, shared = first.right.shape[-2], first.left.shape[1] == 1
    cheaper = ghost_is_cheaper(tokens, first.size, first.width, shared)
    if not (cheaper if ghost is None else ghost):
        return gradients(jnp.stack([_formed(x) for x in gradient]).sum(0))
    kernel = _met(first, first)
    for x in gradient[1:]:  # each by its own cheaper route, and its cross terms with those before
        kernel = kernel + between_sides((x,), ghost)
    for x, y in itertools.permutations(gradient, 2):
        kernel = kernel + _met(x, y)
    return kernel


def _formed(x: Outer) -> Float[Array, "B 2 I O"]:
    """The gradients themselves."""
    left, right = x.left[:, :, 0], x.right[:, :, 0]
    left = jnp.broadcast_to(left, (*right.shape[:2], *left.shape[2:]))
    if x.is_lookup:
        return jax.vmap(jax.vmap(lambda i, d: _scattered(x.size, i, d)))(left, tree.widen(right))
    if left.dtype != right.dtype:
        left, right = tree.widen(left), tree.widen(right)
    wide = tree.accumulator(right.dtype)
    return jnp.einsum(
        "bxti,bxto->bxio", left, right, precision="highest", preferred_element_type=wide
    )


def _scattered(size: int, ids: Array, delta: Array) -> Array:
    return jnp.zeros((size, delta.shape[-1]), delta.dtype).at[ids].add(delta)


def _met(x: Outer, y: Outer) -> PairKernel:
    """Σ_{t,t'} (a_t · a'_t') (δ_t · δ'_t') between the sides of x and those of y."""
    (a, d), (b, e) = ((z.left[:, :, 0], z.right[:, :, 0]) for z in (x, y))
    if x is y and a.shape[1] == 1:
        met = _meet(a[:, 0], a[:, 0])
        if d.dtype.itemsize >= 4:
            return _met_by(met, d)
        met = PairKernel(met, met, met)  # products of low-precision rows are exact and fast
    else:
        a, b = (jnp.broadcast_to(z, (z.shape[0], 2, *z.shape[2:])) for z in (a, b))
        met = _sided(_meet, a, b)
    if x.is_lookup or y.is_lookup:
        d, e = tree.widen(d), tree.widen(e)
    rights = _sided(row_inner, d, e)
    return jax.tree.map(lambda m, n: (m.astype(n.dtype) * n).sum(-1).sum(-1), met, rights)


def _sided(product, x: Array, y: Array) -> PairKernel:
    """``product`` of the sides (w, w), (w, l), (l, l), the first of x and the second of y."""
    return chosen_and_rejected(lambda x, _, __, y: product(x, y), sides(x), sides(y))


def _meet(a: Array, b: Array) -> Float[Array, "*n T _"]:
    """a_t · b_t' for features or ids."""
    is_id = [jnp.issubdtype(x.dtype, jnp.integer) for x in (a, b)]
    if all(is_id):
        return (a[..., :, None] == b[..., None, :]).astype(jnp.float32)
    if is_id[0]:  # the features of b at the ids of a
        return jnp.swapaxes(jnp.take_along_axis(tree.widen(b), a[..., None, :], axis=-1), -1, -2)
    return jnp.swapaxes(_meet(b, a), -1, -2) if is_id[1] else row_inner(a, b)


def _met_by(met: Float[Array, "B T T"], e: Float[Array, "B 2 T O"]) -> PairKernel:
    """Σ_{t,t'} met[t,t'] (e_t · e'_t') for a symmetric array that both sides share."""
    moved = jnp.einsum("btu,bxuo->bxto", met.astype(e.dtype), e, precision="highest")
    (w, l), (first, second) = sides(moved), sides(e)  # noqa: E741

    def inner(x: Array, y: Array) -> Array:
        return (x * y).sum(-1).sum(-1)

    return PairKernel(inner(first, w), inner(second, w), inner(second, l))


def outer_products(
    a: Float[Array, "B S T I"], *e: Float[Array, "B 2 T _"], ghost: bool | None = None
) -> tuple[PairKernel, ...]:
    """Kernels of G = Σ_t a_t e_tᵀ for each e: maps that read the same inputs a.

    The inputs are those of either side (S = 2), or both sides' (S = 1). ``ghost`` forces a route
    (None: the cheaper one for all of the maps).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 2, 3, 4))
    >>> outer_products(ones, ones)[0].inner.item()
    144.0
    """
    width = sum(x.shape[-1] for x in e)
    terms = (Outer(a[:, :, None], x[:, :, None], a.shape[-1], width) for x in e)
    return tuple(between_sides((x,), ghost) for x in terms)


def between_tokens(gradient: Gradient) -> Float[Array, "2 K 2 K"]:
    """⟨G_{s,i}, G_{u,j}⟩ of K tokens of both responses of one pair (B = 1)."""
    if not isinstance(gradient, tuple):
        return jnp.einsum("sio,ujo->siuj", gradient[0], gradient[0], precision="highest")
    return jnp.stack([_tokens_met(x, y) for x, y in itertools.product(gradient, repeat=2)]).sum(0)


def _tokens_met(x: Outer, y: Outer) -> Float[Array, "2 K 2 K"]:
    (a, d), (b, e) = ((z.left[0], tree.widen(z.right[0])) for z in (x, y))
    if x.is_lookup and not y.is_lookup:  # a readout's features: one row a token
        picked = jnp.take(b[:, :, 0], a[:, 0], axis=-1)  # e_{u,j} at the ids of side s
        return jnp.einsum("sktd,ujd,ujst->skuj", d, e[:, :, 0], picked, precision="highest")
    if y.is_lookup and not x.is_lookup:
        return jnp.moveaxis(_tokens_met(y, x), (0, 1), (2, 3))
    if not x.is_lookup and d.shape[2] == 1:
        rows = [z.reshape(-1, z.shape[-1]) for z in (tree.widen(a), d)]
        return (row_inner(rows[0], rows[0]) * row_inner(rows[1], rows[1])).reshape(d.shape[:2] * 2)
    return _shared_inputs(a[:, 0], d)


def _shared_inputs(a: Array, delta: Float[Array, "2 K T O"]) -> Float[Array, "2 K 2 K"]:
    """(δ^i) · ((a aᵀ) δ^j): the products of inputs are shared by all pairs of tokens."""
    k = delta.shape[1]
    wide = a if jnp.issubdtype(a.dtype, jnp.integer) else tree.widen(a)

    def block(s: int, u: int) -> Float[Array, "K K"]:
        inputs = _meet(wide[s], wide[u]).astype(delta.dtype)
        each = jnp.broadcast_to(inputs[None], (k, *inputs.shape))  # a batch axis: no transposes
        met = jnp.einsum("jtw,jwo->jto", each, delta[u], precision="highest")
        return row_inner(delta[s].reshape(k, -1), met.reshape(k, -1))

    both = block(0, 1)
    return jnp.stack([jnp.stack([block(0, 0), both], 1), jnp.stack([both.T, block(1, 1)], 1)])
