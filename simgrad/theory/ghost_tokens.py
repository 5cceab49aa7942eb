"""Token kernels from one backward pass a token, without weight gradients.

Token i of a response sends the signal δ^i_t back to position t of every operation. With the operation's
inputs a, the gradients of two tokens meet in

    ⟨∂W^i, ∂W'^j⟩ = Σ_{t,t'} (a_t · a'_t') (δ^i_t · δ'^j_t')

which is contracted as (δ^i) · ((a a'ᵀ) δ'^j): the products of inputs are shared by all pairs of tokens.
Tables and gains follow :mod:`simgrad.theory.ghost`; the readout's signal of token i is e_{y_i} - π_i on its own
row only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Output, TappedApply, Use
from simgrad.pairs import Batch
from simgrad.theory.gram import row_inner
from simgrad.theory.likelihood import Responses, flat_rows, prediction_error, read
from simgrad.typing import Array, Float, Theta

__all__ = ["ghost_tokens"]


def ghost_tokens(
    apply: TappedApply, theta: Theta, pair: Batch, include: tuple[str, ...] | None = None
) -> Float[Array, "2 R 2 R"]:
    """Token kernel of one pair in the padded layout (a batch of size one)."""
    tokens, positions, streams = (x[0] for x in (pair.tokens, pair.positions, pair.streams))
    rows = flat_rows(pair)
    zeros = apply.taps(theta, tokens, rows)
    readout = zeros.pop("unembedding")

    def states(taps: dict[str, Array]) -> tuple[Array, tuple[Responses, dict[str, Use]]]:
        output = apply(theta, tokens, positions, streams, rows, taps={**taps, "unembedding": readout})
        result = read(Output(output.logits, output.hidden), pair)
        return result.hidden[0], (result, output.uses)

    hidden, pullback, (result, uses) = jax.vjp(states, zeros, has_aux=True)
    error = prediction_error(result.logits[0], pair.targets[0], pair.valid[0])
    table = theta["unembedding" if "unembedding" in theta else "embedding"]["table"]
    pull = jnp.einsum("srv,vd->srd", error, table.astype(error.dtype), precision="highest").astype(hidden.dtype)
    # token r of both responses at once: they lie on sequences of their own
    one_token = jnp.eye(pull.shape[1], dtype=pull.dtype)[:, None, :, None] * pull[None]
    signal = tree.pulled_back(pullback, one_token)

    wanted = [n for n in tree.names(theta) if tree.selected(n, include, apply.frozen)]
    parts = [
        _operation(leaf, site, use.input, signal[site])
        for use in uses.values()
        if use.kind in ("linear", "affine")
        for site in use.sites
        for leaf in ("kernel", "scale", "bias")
        if f"{site}/{leaf}" in wanted
    ]
    states_, error = tree.widen(hidden), tree.widen(error)
    tied = "unembedding" not in theta
    if f"{'embedding' if tied else 'unembedding'}/table" in wanted:
        flat_h, flat_e = (x.reshape(-1, x.shape[-1]) for x in (states_, error))
        products = row_inner(flat_h, flat_h) * row_inner(flat_e, flat_e)
        parts.append(products.reshape(2, pull.shape[1], 2, pull.shape[1]))
    for site in ("embedding", "positions"):
        if f"{site}/table" in wanted:
            ids, delta = uses[site].input, tree.widen(signal[site])
            same = (ids[:, :, None, None] == ids[None, None]).astype(delta.dtype)
            parts.append(_contract(same, delta))
            if tied and site == "embedding":
                picked = jnp.take(error, ids, axis=-1)  # e_j at the ids that sequence s reads: (side, j, s, t)
                cross = jnp.einsum("istd,ujd,ujst->siuj", delta, states_, picked, precision="highest")
                parts.append(cross + jnp.moveaxis(cross, (0, 1), (2, 3)))
    return jnp.stack(parts).sum(0)


def _contract(inputs: Float[Array, "2 T 2 T"], delta: Float[Array, "R 2 T O"]) -> Float[Array, "2 R 2 R"]:
    """Σ_{t,t'} inputs[s,t,u,t'] (δ^i_{s,t} · δ^j_{u,t'})."""
    met = jnp.einsum("stuw,juwo->sujto", inputs, delta, precision="highest")
    return jnp.einsum("isto,sujto->siuj", delta, met, precision="highest")


def _operation(leaf: str, site: str, a: Array, delta: Array) -> Float[Array, "2 R 2 R"]:
    def one(item: tuple[Float[Array, "2 T I"], Float[Array, "R 2 T O"]]) -> Float[Array, "2 R 2 R"]:
        a, delta = map(tree.widen, item)
        if leaf == "kernel":
            return _contract(jnp.einsum("sti,uwi->stuw", a, a, precision="highest"), delta)
        vector = (delta * a[None] if leaf == "scale" else delta).sum(2)
        return jnp.einsum("iso,juo->siuj", vector, vector, precision="highest")

    if tree.is_layered(site):
        return jax.lax.map(one, (a, jnp.moveaxis(delta, 1, 0))).sum(0)
    return one((a, delta))
