"""Models with one feature vector per context: linear-softmax and unconstrained features.

Both compute ``logits = W h(context)``, where a context is the sequence of tokens read so far. In
:func:`linear_softmax` the features are frozen and only W learns; in :func:`unconstrained_features`
(Razin et al., arXiv 2410.08847, Sec. 4) every h is a free parameter trained together with W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.models.layers import unembedded, visible
from simgrad.models.output import Apply, Inputs, Output
from simgrad.pairs import Pair
from simgrad.tree import accumulator
from simgrad.typing import Array, Float, Int, Theta


def contexts_of(pairs: Sequence[Pair]) -> tuple[tuple[int, ...], ...]:
    """Every distinct context of the pairs' sequences, from shortest prompt prefix to full response.

    >>> contexts_of([Pair([1], [7], [8])])
    ((1,), (1, 7), (1, 8))
    """
    found: dict[tuple[int, ...], None] = {}
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            sequence = (*pair.prompt, *response)
            found.update((sequence[: k + 1], None) for k in range(len(sequence)))
    return tuple(found)


@dataclass(frozen=True)
class ContextApply(Apply):
    """``apply`` of a context table; theta = {"features": {"table"}, "unembedding": {"table"}}.

    A context that the table does not hold has features NaN, so that it cannot pass unnoticed.
    """

    contexts: tuple[tuple[int, ...], ...]
    trainable: tuple[str, ...] = ()

    def read(self, theta: Theta, inputs: Inputs) -> Output:
        """Logits ``W h`` and the features h."""
        index = self._lookup(inputs)
        features = theta["features"]["table"]
        hidden = jnp.where((index >= 0)[:, :, None], features[index], jnp.nan)
        there = (inputs.streams > 0)[:, :, None]
        hidden = jnp.where(there, hidden, jnp.zeros((), features.dtype))
        return Output(self.readout(theta, inputs.wanted(hidden)), hidden)

    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """W h."""
        return unembedded(hidden, theta["unembedding"]["table"])

    def _lookup(self, inputs: Inputs) -> Int[Array, "N T"]:
        """Row of the context read at each position, -1 where there is none."""
        tokens, positions = inputs.tokens, inputs.positions
        longest = max(len(c) for c in self.contexts)
        table = np.full((len(self.contexts), longest), -1, np.int32)
        for i, context in enumerate(self.contexts):
            table[i, : len(context)] = context
        # prefix[n, t, p] is the token that position t reads at sequence position p, -1 if none
        at = (
            positions[:, None, :, None]
            == jnp.arange(longest, dtype=positions.dtype)[None, None, None, :]
        )
        seen = visible(positions, inputs.streams)[:, :, :, None] & at
        prefix = jnp.where(seen, tokens[:, None, :, None] + 1, 0).max(axis=2) - 1
        same = (prefix[:, :, None, :] == jnp.asarray(table, tokens.dtype)[None, None]).all(-1)
        same = same & (positions < longest)[:, :, None]
        return jnp.where(same.any(-1), same.argmax(-1), -1)


def _theta(
    contexts: int, vocab_size: int, width: int, scale: float, seed: int, dtype: str
) -> Theta:
    features, unembedding = jax.random.split(jax.random.key(seed))
    wide = accumulator(dtype)

    def normal(key: Array, rows: int) -> dict[str, Array]:
        return {"table": (scale * jax.random.normal(key, (rows, width), wide)).astype(dtype)}

    return {"features": normal(features, contexts), "unembedding": normal(unembedding, vocab_size)}


def linear_softmax(
    pairs: Sequence[Pair], vocab_size: int, width: int = 16, seed: int = 0, dtype: str = "float32"
) -> tuple[ContextApply, Theta]:
    """Linear-softmax model: frozen features φ(context) ~ N(0, 1/D), trained W ~ N(0, 1/D).

    The setting of Yuan et al. (arXiv 2410.13828, Sec. 4). Returns ``(apply, theta)``.
    """
    contexts = contexts_of(pairs)
    theta = _theta(len(contexts), vocab_size, width, 1 / math.sqrt(width), seed, dtype)
    return ContextApply(contexts, ("!features/*",)), theta


def unconstrained_features(
    pairs: Sequence[Pair], vocab_size: int, width: int = 16, seed: int = 0, dtype: str = "float32"
) -> tuple[ContextApply, Theta]:
    """Unconstrained-features model: h(context) and W both trained, both ~ N(0, 1/D).

    The setting of Razin et al. (arXiv 2410.08847, Sec. 4). Returns ``(apply, theta)``.
    """
    contexts = contexts_of(pairs)
    return ContextApply(contexts), _theta(
        len(contexts), vocab_size, width, 1 / math.sqrt(width), seed, dtype
    )
