"""What one backward pass collects: the outer products that every gradient is a sum of.

The cotangents of log-probs are sent back together, and each leaf's gradient is known from the
inputs of its operation and the signals δ at its outputs, without being formed:

=======  ===============  =========================  ====================
leaf     operation        gradient                   kept as
=======  ===============  =========================  ====================
kernel   y = x W + b      Σ_t x_t δ_tᵀ               inputs x, signals δ
table    y = table[id]    Σ_t 1[id_t] δ_tᵀ           ids, signals δ
table    z = table h      Σ_r e_r h_rᵀ               errors e, states h
scale    y = a * gain     Σ_t δ_t * a_t              itself
bias     y = … + b        Σ_t δ_t                    itself
=======  ===============  =========================  ====================

with e = e_y - π. A tied table is looked up and read out, so its gradient is the sum of two.
:mod:`simgrad.theory.kernel.rules` takes inner products of these for pairs and for tokens.

The chosen and the rejected response lie on sequences of their own (padded), or as two copies of one
sequence on which the prompt is read once (packed). Tokens are asked for one by one with ``tokens``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Responses, TappedApply, Use, prediction_error
from simgrad.models.likelihood import arranged, sequences
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Int, Theta


@dataclass(frozen=True)
class Outer:
    """Gradients Σ_t left_t ⊗ right_t of both sides of each pair, for K rows (tokens) of each.

    Attributes:
        left: features (B S 1|K T I), or ids (B S 1 T) of one-hot features; S = 1 where sides share.
        right: (B 2 K T O).
        size: I, the number of left features.
        width: ΣO of all maps that read the same left, which decides the cheaper route.
    """

    left: Array
    right: Float[Array, "B 2 K T O"]
    size: int
    width: int

    @property
    def is_lookup(self) -> bool:
        """Whether ``left`` holds ids."""
        return jnp.issubdtype(self.left.dtype, jnp.integer)


Gradient = tuple[Outer, ...] | Float[Array, "B 2 K O"]
"""A leaf's gradients: a sum of outer products, or vectors that are there as arrays."""


def collect(
    apply: TappedApply,
    theta: Theta,
    batch: Batch,
    reduce: Callable[[Gradient], Any],
    tokens: Int[Array, " K"] | None = None,
) -> tuple[dict[str, Any], Responses]:
    """``reduce`` of every trained leaf's gradients by path, and the responses.

    One forward and one backward pass. Signals of one layer are there at a time; results under
    ``layers/`` are stacked on a leading depth axis.

    Args:
        apply: a transformer.
        theta: its parameters.
        batch: B pairs; with ``tokens`` in the padded layout.
        reduce: what is made of a leaf's gradients, one row a side, or K with ``tokens``.
        tokens: indices of response tokens whose gradients are wanted (None: whole responses).
    """
    (b, s, _), inputs = batch.tokens.shape, sequences(batch)
    output = apply.record(theta, inputs)
    result = arranged(output, batch)
    error = prediction_error(result.logits, batch.targets, batch.valid)
    pull = jax.vjp(lambda h: apply.readout(theta, h), result.hidden)[1](error)[0]
    leaves = tree.by_name(theta)
    wanted = {n for n in leaves if tree.selected(n, apply.trainable)}
    (head,) = output.uses["readout"].sites
    states = _rows(result.hidden, tokens)
    readout = Outer(_rows(error, tokens), states, error.shape[-1], states.shape[-1])

    def visit(use: Use, signals: tuple[Array, ...]) -> dict[str, Any]:
        a = use.input.reshape(b, s, 1, *use.input.shape[1:])
        found: dict[str, Gradient] = {}
        width = sum(x.shape[-1] for x in signals)
        for site, signal in zip(use.sites, signals, strict=True):
            delta = _by_side(signal, s)
            if use.kind == "lookup":
                lookup = Outer(a, delta, leaves[f"{site}/table"].shape[0], width)
                found[f"{site}/table"] = (lookup, readout) if site == head else (lookup,)
            elif use.kind == "linear":
                found[f"{site}/kernel"] = (Outer(a, delta, a.shape[-1], width),)
                found[f"{site}/bias"] = tree.widen(delta).sum(-2)
            else:
                both = jnp.broadcast_to(tree.widen(a), delta.shape)
                found[f"{site}/scale"] = (tree.widen(delta) * both).sum(-2)
                found[f"{site}/bias"] = tree.widen(delta).sum(-2)
        return {path: reduce(gradient) for path, gradient in found.items() if path in wanted}

    cotangents = _cotangents(batch, pull, tokens)
    found = apply.backward(theta, inputs, output.uses, cotangents, visit)
    if (path := f"{head}/table") in wanted - set(found):
        found[path] = reduce((readout,))
    return {n: found[n] for n in leaves if n in found}, result


def _rows(x: Float[Array, "B 2 R O"], tokens: Int[Array, " K"] | None) -> Float[Array, "B 2 K T O"]:
    """Rows of a response as one sum over T = R rows, or each of the asked tokens by itself."""
    return x[:, :, None] if tokens is None else x[:, :, tokens, None]


def _cotangents(
    batch: Batch, pull: Float[Array, "B 2 R D"], tokens: Int[Array, " K"] | None
) -> Float[Array, "J N T D"]:
    """Gradients with respect to the hidden states, one copy of the sequences a cotangent."""
    b, s, t = batch.tokens.shape
    if tokens is None:
        pair, side = (
            x[:, :, None] for x in jnp.meshgrid(jnp.arange(b), jnp.arange(2), indexing="ij")
        )
        both = jnp.zeros((b, 2, t, pull.shape[-1]), pull.dtype)
        both = both.at[pair, side, batch.rows].add(pull)
        return jnp.moveaxis(both.reshape(b, s, 2 // s, t, -1), 2, 0).reshape(2 // s, b * s, t, -1)
    at = jnp.meshgrid(jnp.arange(tokens.size), jnp.arange(b), jnp.arange(2), indexing="ij")
    each = jnp.zeros((tokens.size, b, 2, t, pull.shape[-1]), pull.dtype)
    rows, pulls = (jnp.moveaxis(x[:, :, tokens], 2, 0) for x in (batch.rows, pull))
    return each.at[(*at, rows)].set(pulls).reshape(tokens.size, b * 2, t, -1)


def _by_side(signal: Float[Array, "J N T O"], s: int) -> Float[Array, "B 2 K T O"]:
    """Signals by pair and side: on sequences of their own (K = J), or two cotangents of one."""
    j, n, t, o = signal.shape
    x = signal.reshape(j, n // s, s, t, o)
    return jnp.moveaxis(x, (1, 2), (0, 1)) if s == 2 else jnp.moveaxis(x, 0, 1)
