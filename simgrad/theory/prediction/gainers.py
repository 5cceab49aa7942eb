"""Where the mass goes: which tokens gain at each position of a response."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from simgrad.models import Apply, bind, responses
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenGains:
    """The K tokens that gain most at each response position, best first.

    Attributes:
        tokens: their ids; -1 where padded, with probability and gain 0.
        probability: π(token | context) before the step.
        gain: first-order change of π (``by="probability"``) or of log π in nats (``by="logp"``).
    """

    tokens: Int[Array, "B 2 R K"]
    probability: Float[Array, "B 2 R K"]
    gain: Float[Array, "B 2 R K"]


def token_displacement(
    apply: Apply, theta: Theta, batch: Batch, step: Theta
) -> Float[Array, "B 2 R V"]:
    """First-order Δlog π(z | x, y_<k), in nats, of every token z at each response position.

    It is 0 where padded.

    ``step`` is a parameter step as for :func:`simgrad.theory.displacement`. Σ_z π_z Δlog π_z = 0.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import unconstrained_features
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4])]
    >>> apply, theta = unconstrained_features(pairs, 9, 4)
    >>> up = jax.tree.map(jnp.zeros_like, theta)
    >>> state, table = theta["features"]["table"][1], up["unembedding"]["table"]
    >>> up["unembedding"]["table"] = table.at[3].set(state)
    >>> gains = token_displacement(apply, theta, padded(pairs), up)[0, 0, 0]
    >>> (gains > 0).nonzero()[0].tolist()
    [3]
    """
    return _tokens(apply, theta, batch, step)[1]


def top_gainers(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    step: Theta,
    k: int = 10,
    by: Literal["probability", "logp"] = "probability",
) -> TokenGains:
    """The ``k`` tokens that gain most to first order from a step, at each response position.

    For a single-token pair position 0 of either side is the distribution after the prompt: the
    tokens that take the mass y⁺ and y⁻ lose. ``by="probability"`` ranks by Δπ_z = π_z Δlog π_z
    (where the mass goes), ``"logp"`` by Δlog π_z (what grows fastest from wherever it was). For
    one-token pairs in unconstrained-features models under SGD with d_w = d_l, the latter orders all
    tokens but y± by ⟨W_z, W_w - W_l⟩ (Razin et al., arXiv 2410.08847, Thm 2).

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary's size.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> nowhere = jax.tree.map(jnp.zeros_like, theta)
    >>> top_gainers(apply, theta, padded([Pair([1, 2], [3], [4])]), nowhere, k=2).tokens.shape
    (1, 2, 1, 2)
    """
    logits, change = _tokens(apply, theta, batch, step)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} tokens of a vocabulary of {logits.shape[-1]}")
    if by not in ("probability", "logp"):
        raise ValueError(f"by={by!r}: choose 'probability' or 'logp'")
    probability = jax.nn.softmax(logits, axis=-1)
    gain, tokens = jax.lax.top_k(probability * change if by == "probability" else change, k)
    there = batch.valid[..., None]
    probability = jnp.take_along_axis(probability, tokens, axis=-1)
    return TokenGains(jnp.where(there, tokens, -1), jnp.where(there, probability, 0.0), gain)


@functools.partial(jax.jit, static_argnames="apply")
def _tokens(apply: Apply, theta: Theta, batch: Batch, step: Theta) -> tuple[Array, Array]:
    model = bind(apply, theta)

    def logits(trained: Theta) -> Array:
        return responses(apply, model.whole(trained), batch).logits

    value, tangent = jax.jvp(logits, (model.trained,), (step,))
    change = tangent - (jax.nn.softmax(value, axis=-1) * tangent).sum(-1, keepdims=True)
    return value, jnp.where(batch.valid[..., None], change, 0.0)
