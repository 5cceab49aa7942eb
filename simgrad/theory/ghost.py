"""Pair kernels from one backward pass, without weight gradients.

On a padded batch chosen and rejected lie on sequences of their own, so the backward pass of
Σ log π carries g_w's signal on one and g_l's on the other. A tap (a zero added to an operation's
output) catches that signal δ; with the operation's input a it determines every gradient:

=======  ==================  ===================================================
leaf     gradient            inner product
=======  ==================  ===================================================
kernel   Σ_t a_t δ_t^T       :func:`simgrad.theory.gram.outer_products`
scale    Σ_t δ_t * a_t       of vectors
bias     Σ_t δ_t             of vectors
table    lookup: rows of δ   Σ_{t,t'} [a_t = a'_t'] (δ_t · δ'_t')
table    readout: δ_t a_t^T  as a kernel
=======  ==================  ===================================================

A tied table is looked up and read out, so its gradient is a sum and the inner product has the cross
term Σ_{t,t'} (δ_t · a'_t') δ'_t'[a_t].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Output, TappedApply, Use
from simgrad.pairs import Batch
from simgrad.theory.gram import (
    PairKernel,
    chosen_and_rejected,
    ghost_is_cheaper,
    gradients,
    outer_products,
    row_inner,
    sides,
)
from simgrad.theory.likelihood import Responses, flat_rows, read
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["ghost_blocks"]

Blocks = dict[str, PairKernel]


def ghost_blocks(
    apply: TappedApply, theta: Theta, batch: Batch, include: tuple[str, ...] | None = None, route: bool | None = None
) -> tuple[Blocks, Responses]:
    """Kernel of every selected parameter leaf, and the responses, from one forward and one backward.

    Leaves under ``layers/`` give arrays of shape (B, depth), others (B,). ``route`` forces ghost
    contractions (True) or explicit per-leaf gradients (False) where both exist.

    Raises:
        ValueError: the batch is packed (its prompt rows would mix both responses' signals).
    """
    if batch.is_packed:
        raise ValueError("ghost kernels need a padded batch: use pairs.padded instead of pairs.packed")
    b, s, t = batch.tokens.shape
    tokens, positions, streams = (x.reshape(b * s, t) for x in (batch.tokens, batch.positions, batch.streams))
    rows = flat_rows(batch)

    def total(taps: dict[str, Array]) -> tuple[Array, tuple[Responses, dict[str, Use]]]:
        output = apply(theta, tokens, positions, streams, rows, taps=taps)
        result = read(Output(output.logits, output.hidden), batch)
        return result.logp.sum(), (result, output.uses)

    signal, (result, uses) = jax.grad(total, has_aux=True)(apply.taps(theta, tokens, rows))
    wanted = [n for n in tree.names(theta) if tree.selected(n, include, apply.frozen)]
    blocks: Blocks = {}
    for use in uses.values():
        if use.kind in ("linear", "affine"):
            for site in use.sites:
                for leaf in ("kernel", "scale", "bias"):
                    if f"{site}/{leaf}" in wanted:
                        layered = tree.is_layered(site)
                        blocks[f"{site}/{leaf}"] = _leaf(leaf, use.input, signal[site], layered, route)
    blocks |= _tables(uses, signal, theta, wanted, route)
    return {name: blocks[name] for name in wanted}, result


def _by_side(x: Array) -> Array:
    return x.reshape(-1, 2, *x.shape[1:])


def _leaf(leaf: str, a: Array, delta: Array, layered: bool, route: bool | None) -> PairKernel:
    def one(pair: tuple[Array, Array]) -> PairKernel:
        a, delta = map(_by_side, pair)
        if leaf == "kernel":
            return outer_products(a, delta, route)
        delta = tree.widen(delta)
        return gradients((delta * tree.widen(a) if leaf == "scale" else delta).sum(2))

    if not layered:
        return one((a, delta))
    return jax.tree.map(lambda x: x.T, jax.lax.map(one, (a, delta)))


def _tables(
    uses: dict[str, Use], signal: dict[str, Array], theta: Theta, wanted: list[str], route: bool | None
) -> Blocks:
    """Embedding, positions and unembedding; the first and the last may be one tied table."""
    blocks: Blocks = {}
    tied = "unembedding" not in theta
    readout = (_by_side(uses["unembedding"].input), _by_side(signal["unembedding"]))
    for site in ("embedding", "positions"):
        if f"{site}/table" in wanted:
            lookup = (_by_side(uses[site].input), _by_side(signal[site]))
            shared = readout if tied and site == "embedding" else None
            blocks[f"{site}/table"] = _table(theta[site]["table"].shape[0], lookup, shared, route)
    if "unembedding/table" in wanted:
        blocks["unembedding/table"] = outer_products(*readout, route)
    return blocks


def _table(
    size: int,
    lookup: tuple[Int[Array, "B 2 T"], Float[Array, "B 2 T D"]],
    readout: tuple[Array, Array] | None,
    route: bool | None,
) -> PairKernel:
    ids, delta = lookup
    delta = tree.widen(delta)
    tokens, width = ids.shape[-1], delta.shape[-1]
    ghost = ghost_is_cheaper(tokens, size, width) if route is None else route
    if not ghost:
        return gradients(_dense_table(size, ids, delta, readout))

    def product(i: Array, d: Array, i2: Array, d2: Array) -> Array:
        same = (i[:, :, None] == i2[:, None, :]).astype(d.dtype)
        return (row_inner(d, d2) * same).sum(-1).sum(-1)

    kernel = chosen_and_rejected(product, sides(ids), sides(delta))
    if readout is None:
        return kernel
    hidden, error = map(tree.widen, readout)

    def cross(i: Array, d: Array, h: Array, e: Array, i2: Array, d2: Array, h2: Array, e2: Array) -> Array:
        def one_way(i: Array, d: Array, h: Array, e: Array) -> Array:
            picked = jnp.take_along_axis(e, i[:, None, :], axis=2)  # δ'_r[a_t]: B R T
            return (jnp.einsum("btd,brd->brt", d, h, precision="highest") * picked).sum(-1).sum(-1)

        return one_way(i, d, h2, e2) + one_way(i2, d2, h, e)

    return (
        kernel
        + outer_products(hidden, error, route)
        + chosen_and_rejected(cross, sides(ids), sides(delta), sides(hidden), sides(error))
    )


def _dense_table(size: int, ids: Array, delta: Array, readout: tuple[Array, Array] | None) -> Float[Array, "B 2 V D"]:
    def scatter(ids: Array, delta: Array) -> Array:
        return jnp.zeros((size, delta.shape[-1]), delta.dtype).at[ids].add(delta)

    table = jax.vmap(jax.vmap(scatter))(ids, delta)
    if readout is None:
        return table
    hidden, error = map(tree.widen, readout)
    return table + jnp.einsum("bxrv,bxrd->bxvd", error, hidden, precision="highest")
