"""Token kernels from one backward pass for all tokens, without weight gradients.

Token i of a response sends the signal δ^i_t back to position t of every operation. With the
operation's inputs a, the gradients of two tokens meet in

    ⟨∂W^i, ∂W'^j⟩ = Σ_{t,t'} (a_t · a'_t') (δ^i_t · δ'^j_t')

which is contracted as (δ^i) · ((a a'ᵀ) δ'^j): the products of inputs are shared by all pairs of
tokens, and by all maps that read them. Signals of one layer are there at a time. Tables and gains
follow
:mod:`simgrad.theory.kernel.ghost`; the readout's signal of token i is e_{y_i} - π_i on its own row only.
"""

from __future__ import annotations

import jax.numpy as jnp

from simgrad import tree
from simgrad.models import TappedApply, Use
from simgrad.models.likelihood import flat_rows, read
from simgrad.pairs import Batch
from simgrad.theory.kernel.ghost import hidden_pull
from simgrad.theory.kernel.gram import row_inner
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["ghost_tokens"]


def ghost_tokens(
    apply: TappedApply,
    theta: Theta,
    pair: Batch,
    index: Int[Array, "K"],
    include: tuple[str, ...] | None = None,
) -> Float[Array, "2 K 2 K"]:
    """Token kernel of one pair in the padded layout (a batch of size one), between the tokens at ``index``."""
    tokens, positions, streams = (x[0] for x in (pair.tokens, pair.positions, pair.streams))
    output = apply.record(theta, tokens, positions, streams, flat_rows(pair))
    result = read(output, pair)
    error, pull = (x[0, :, index] for x in hidden_pull(theta, result, pair))  # tokens lead
    error, hidden, r = jnp.swapaxes(error, 0, 1), tree.widen(result.hidden[0, :, index]), index.size
    hidden = jnp.swapaxes(hidden, 0, 1)
    # token r of both responses at once: they lie on sequences of their own
    token, side = jnp.meshgrid(jnp.arange(r), jnp.arange(2), indexing="ij")
    cotangents = jnp.zeros((r, *tokens.shape, pull.shape[-1]), pull.dtype)
    cotangents = cotangents.at[token, side, pair.rows[0, :, index]].set(pull)
    wanted = [n for n in tree.names(theta) if tree.selected(n, include, apply.frozen)]
    tied = "unembedding" not in theta

    def visit(use: Use, signals: tuple[Array, ...]) -> dict[str, Array]:
        signals = tuple(map(tree.widen, signals))
        if use.kind == "lookup":
            parts = {}
            for site, delta in zip(use.sites, signals, strict=True):
                if f"{site}/table" in wanted:
                    same = (use.input[:, :, None, None] == use.input[None, None]).astype(
                        delta.dtype
                    )
                    parts[f"{site}/table"] = _contract(same, delta)
                    if tied and site == "embedding":
                        picked = jnp.take(
                            error, use.input, axis=-1
                        )  # e_j at the ids of sequence s: (side, j, s, t)
                        cross = jnp.einsum(
                            "istd,ujd,ujst->siuj", delta, hidden, picked, precision="highest"
                        )
                        parts[f"{site}/table"] += cross + jnp.moveaxis(cross, (0, 1), (2, 3))
            return parts
        return _operation(use, signals, wanted)

    parts = apply.backward(theta, positions, streams, output.uses, cotangents, visit)
    if f"{'embedding' if tied else 'unembedding'}/table" in wanted:
        flat_h, flat_e = (x.reshape(-1, x.shape[-1]) for x in (hidden, error))
        parts["readout"] = (row_inner(flat_h, flat_h) * row_inner(flat_e, flat_e)).reshape(
            2, r, 2, r
        )
    return jnp.stack(
        [part.sum(0) if tree.is_layered(name) else part for name, part in parts.items()]
    ).sum(0)


def _contract(
    inputs: Float[Array, "2 T 2 T"], delta: Float[Array, "R 2 T O"]
) -> Float[Array, "2 R 2 R"]:
    """Σ_{t,t'} inputs[s,t,u,t'] (δ^i_{s,t} · δ^j_{u,t'})."""
    r = delta.shape[0]
    flat = delta.reshape(r, 2, -1)

    def block(s: int, u: int) -> Float[Array, "R R"]:
        each = jnp.broadcast_to(
            inputs[s, :, u][None], (r, *inputs.shape[1::2])
        )  # a batch axis: nothing to transpose
        met = jnp.einsum("jtw,jwo->jto", each, delta[:, u], precision="highest")
        return row_inner(flat[:, s], met.reshape(r, -1))

    both = block(0, 1)
    return jnp.stack([jnp.stack([block(0, 0), both], 1), jnp.stack([both.T, block(1, 1)], 1)])


def _operation(
    use: Use, signals: tuple[Array, ...], wanted: list[str]
) -> dict[str, Float[Array, "2 R 2 R"]]:
    a, parts = tree.widen(use.input), {}
    inputs = jnp.einsum("sti,uwi->stuw", a, a, precision="highest")
    for site, delta in zip(use.sites, signals, strict=True):
        if f"{site}/kernel" in wanted:
            parts[f"{site}/kernel"] = _contract(inputs, delta)
        for leaf, vectors in (
            (("scale", delta * a[None]), ("bias", delta))
            if use.kind == "affine"
            else (("bias", delta),)
        ):
            if f"{site}/{leaf}" in wanted:
                v = vectors.sum(2)
                parts[f"{site}/{leaf}"] = jnp.einsum("iso,juo->siuj", v, v, precision="highest")
    return parts
