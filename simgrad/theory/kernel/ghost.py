"""Pair kernels from one forward and one backward pass, without weight gradients.

The cotangent of log π_w and that of log π_l are sent back together: on sequences of their own
(padded), or as two copies of one sequence on which the prompt is read once (packed). Their signals
δ at an operation's output determine every gradient, together with the operation's inputs a:

=======  ==================  ===================================================
leaf     gradient            inner product
=======  ==================  ===================================================
kernel   Σ_t a_t δ_t^T       :func:`simgrad.theory.kernel.gram.outer_products`
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
from simgrad.models import TappedApply, Use
from simgrad.models.likelihood import Responses, flat_rows, prediction_error, read
from simgrad.pairs import Batch
from simgrad.theory.kernel.cost import ghost_is_cheaper
from simgrad.theory.kernel.gram import (
    PairKernel,
    chosen_and_rejected,
    gradients,
    met_by,
    outer_products,
    row_inner,
    sides,
)
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["ghost_blocks", "hidden_pull"]

Blocks = dict[str, PairKernel]


def ghost_blocks(
    apply: TappedApply,
    theta: Theta,
    batch: Batch,
    include: tuple[str, ...] | None = None,
    route: bool | None = None,
) -> tuple[Blocks, Responses]:
    """Kernel of every selected parameter leaf, and the responses, from one forward and one backward.

    Leaves under ``layers/`` give arrays of shape (B, depth), others (B,). ``route`` forces ghost
    contractions (True) or explicit per-leaf gradients (False) where both exist.
    """
    b, s, t = batch.tokens.shape
    tokens, positions, streams = (
        x.reshape(b * s, t) for x in (batch.tokens, batch.positions, batch.streams)
    )
    output = apply.record(theta, tokens, positions, streams, flat_rows(batch))
    result = read(output, batch)
    error, pull = hidden_pull(theta, result, batch)
    pair, side = (x[:, :, None] for x in jnp.meshgrid(jnp.arange(b), jnp.arange(2), indexing="ij"))
    cotangents = (
        jnp.zeros((b, 2, t, pull.shape[-1]), pull.dtype).at[pair, side, batch.rows].add(pull)
    )
    cotangents = jnp.moveaxis(cotangents.reshape(b, s, 2 // s, t, -1), 2, 0).reshape(
        2 // s, b * s, t, -1
    )
    wanted = [n for n in tree.names(theta) if tree.selected(n, include, apply.frozen)]
    tied = "unembedding" not in theta
    readout = (result.hidden, error)

    def visit(use: Use, signals: tuple[Array, ...]) -> Blocks:
        a = use.input.reshape(b, s, *use.input.shape[1:])
        deltas = {site: _by_side(x, s) for site, x in zip(use.sites, signals, strict=True)}
        if use.kind == "lookup":
            return {
                f"{site}/table": _table(
                    theta[site]["table"].shape[0],
                    a,
                    x,
                    readout if tied and site == "embedding" else None,
                    route,
                )
                for site, x in deltas.items()
                if f"{site}/table" in wanted
            }
        return _map_blocks(a, deltas, wanted, route)

    blocks = apply.backward(theta, positions, streams, output.uses, cotangents, visit)
    if "unembedding/table" in wanted:
        (blocks["unembedding/table"],) = outer_products(*readout, ghost=route)
    return {
        n: jax.tree.map(jnp.transpose, blocks[n]) if tree.is_layered(n) else blocks[n]
        for n in wanted
    }, result


def hidden_pull(
    theta: Theta, result: Responses, batch: Batch
) -> tuple[Float[Array, "B 2 R V"], Float[Array, "B 2 R D"]]:
    """Gradients of each response's log-probs with respect to logits (e_y - π) and hidden states."""
    error = prediction_error(result.logits, batch.targets, batch.valid)
    table = theta["unembedding" if "unembedding" in theta else "embedding"]["table"]
    pull = jnp.einsum(
        "bsrv,vd->bsrd", error.astype(table.dtype), table, preferred_element_type=error.dtype
    )
    return error, pull.astype(result.hidden.dtype)


def _by_side(signal: Float[Array, "J N T O"], s: int) -> Float[Array, "B 2 T O"]:
    """Signals of chosen and rejected: on sequences of their own, or as two cotangents of one."""
    copies, n, t, o = signal.shape
    return jnp.swapaxes(signal.reshape(copies, n // s, s, t, o), 0, 1).reshape(n // s, 2, t, o)


def _map_blocks(
    a: Array, deltas: dict[str, Array], wanted: list[str], route: bool | None
) -> Blocks:
    blocks: Blocks = {}
    kernels = [site for site in deltas if f"{site}/kernel" in wanted]
    if kernels:
        products = outer_products(a, *(deltas[site] for site in kernels), ghost=route)
        blocks |= {f"{site}/kernel": k for site, k in zip(kernels, products, strict=True)}
    for site, delta in deltas.items():
        wide = tree.widen(delta)
        if f"{site}/scale" in wanted:
            blocks[f"{site}/scale"] = gradients((wide * tree.widen(a)).sum(2))
        if f"{site}/bias" in wanted:
            blocks[f"{site}/bias"] = gradients(wide.sum(2))
    return blocks


def _table(
    size: int,
    ids: Int[Array, "B S T"],
    delta: Float[Array, "B 2 T D"],
    readout: tuple[Array, Array] | None,
    route: bool | None,
) -> PairKernel:
    """Kernel of a table that is looked up and, where ``readout`` is given, also read out."""
    delta = tree.widen(delta)
    shared, both = ids.shape[1] == 1, jnp.broadcast_to(ids, (ids.shape[0], 2, ids.shape[2]))
    ghost = (
        ghost_is_cheaper(ids.shape[-1], size, delta.shape[-1], shared) if route is None else route
    )
    if not ghost:
        return gradients(_dense_table(size, both, delta, readout))

    def same(i: Array, j: Array) -> Array:
        return (i[..., :, None] == j[..., None, :]).astype(delta.dtype)

    if shared:
        kernel = met_by(same(ids, ids), delta)
    else:
        met = chosen_and_rejected(same, sides(ids))
        kernel = jax.tree.map(
            lambda m, n: (m * n).sum(-1).sum(-1), met, chosen_and_rejected(row_inner, sides(delta))
        )
    if readout is None:
        return kernel
    hidden, error = map(tree.widen, readout)

    def cross(
        i: Array, d: Array, h: Array, e: Array, i2: Array, d2: Array, h2: Array, e2: Array
    ) -> Array:
        def one_way(i: Array, d: Array, h: Array, e: Array) -> Array:
            picked = jnp.take_along_axis(e, i[:, None, :], axis=2)  # δ'_r[a_t]: B R T
            return (jnp.einsum("btd,brd->brt", d, h, precision="highest") * picked).sum(-1).sum(-1)

        return one_way(i, d, h2, e2) + one_way(i2, d2, h, e)

    return (
        kernel
        + outer_products(hidden, error, ghost=route)[0]
        + chosen_and_rejected(cross, sides(both), sides(delta), sides(hidden), sides(error))
    )


def _dense_table(
    size: int, ids: Array, delta: Array, readout: tuple[Array, Array] | None
) -> Float[Array, "B 2 V D"]:
    def scatter(ids: Array, delta: Array) -> Array:
        return jnp.zeros((size, delta.shape[-1]), delta.dtype).at[ids].add(delta)

    table = jax.vmap(jax.vmap(scatter))(ids, delta)
    if readout is None:
        return table
    hidden, error = map(tree.widen, readout)
    return table + jnp.einsum("bxrv,bxrd->bxvd", error, hidden, precision="highest")
