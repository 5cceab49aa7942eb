"""Pretraining and supervised fine-tuning on plain sequences, by the preference-tuning loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.recipe import batch_order
from simgrad.dynamics.run import descend, started
from simgrad.models import Apply, bind
from simgrad.typing import Array, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Corpus:
    """N sequences of tokens, padded on the right.

    Attributes:
        tokens: ids, 0 where padded.
        streams: 1 on tokens, 0 where padded.
        weights: of each token's loss; 0 on the first token, on padding and on what is only read
            (prompts).
    """

    tokens: Int[Array, "*runs N T"]
    streams: Int[Array, "*runs N T"]
    weights: Float[Array, "*runs N T"]


def corpus(sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> Corpus:
    """A corpus of token ids; ``starts`` gives each sequence's first learned token (default: 1).

    >>> corpus([[1, 2, 3], [1, 4]], starts=[2, 1]).weights.tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    Raises:
        ValueError: no sequences, or one without a token to learn.
    """
    starts = [1] * len(sequences) if starts is None else list(starts)
    if not len(sequences) or len(starts) != len(sequences):
        raise ValueError(
            f"{len(sequences)} sequences and {len(starts)} starts: one start each, and at least one"
        )
    shape = len(sequences), max(map(len, sequences))
    tokens, streams = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        if not 1 <= start < len(sequence):
            raise ValueError(
                f"sequence {i} of {len(sequence)} tokens has nothing to learn from token {start} on"
            )
        end = len(sequence)
        tokens[i, :end], streams[i, :end], weights[i, start:end] = sequence, 1, 1
    return Corpus(jnp.asarray(tokens), jnp.asarray(streams), jnp.asarray(weights))


def pretrain(
    apply: Apply,
    theta: Theta,
    data: Corpus,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> tuple[Theta, Float[Array, " E"]]:
    """Minimise Σ_t w_t (-log π(x_t | x_<t)) / Σ_t w_t, in nats, over batches of sequences.

    This is maximum likelihood.

    Returns the trained parameters and every step's loss.

    Raises:
        ValueError: more sequences a step than there are.
        FloatingPointError: a loss that is not finite.

    >>> import optax
    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=5, width=8, depth=1, heads=2))
    >>> data, adam = corpus([[1, 2, 3]] * 4), optax.adam(1e-2)
    >>> theta, losses = pretrain(apply, theta, data, adam, steps=50, batch_size=4)
    >>> bool(losses[-1] < 0.1 < losses[0])
    True
    """
    count = len(data.tokens)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}, but there are {count} sequences")
    order = jnp.asarray(batch_order(count, batch_size, steps, seed))
    theta, losses = fit(apply, theta, data, optimizer, order)
    if not np.isfinite(np.asarray(losses)).all():
        step = int(np.argmin(np.isfinite(np.asarray(losses))))
        raise FloatingPointError(f"the loss of step {step} is not finite: lower the learning rate")
    return theta, losses


@functools.partial(jax.jit, static_argnames=("apply", "optimizer"))
def fit(
    apply: Apply,
    theta: Theta,
    data: Corpus,
    optimizer: optax.GradientTransformation,
    order: Int[Array, "E M"],
) -> tuple[Theta, Float[Array, " E"]]:
    """:func:`pretrain` with the order given and nothing checked, to be mapped over seeds."""
    model = bind(apply, theta)

    def gradient(trained: Theta, index: Array, memory: Any) -> tuple[Array, Theta, Any]:
        some = jax.tree.map(lambda x: x[index], data)
        loss, grad = jax.value_and_grad(lambda t: _loss(apply, model.whole(t), some))(trained)
        return loss, grad, memory

    state = started(optimizer, model.trained, len(order))
    state = descend(gradient, optimizer, state, order, len(order))
    return model.whole(state.learned), state.losses


def _loss(apply: Apply, theta: Theta, data: Corpus) -> Float[Array, ""]:
    logits = apply(theta, data.tokens, streams=data.streams).logits[:, :-1]
    at_target = jnp.take_along_axis(logits, data.tokens[:, 1:, None], axis=-1)[..., 0]
    logp = at_target - jax.nn.logsumexp(logits, axis=-1)
    weights = data.weights[:, 1:].astype(logp.dtype)
    return -(weights * logp).sum() / weights.sum()
