"""Responses of a policy, drawn at random."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.dynamics.prompts import (
    AT_ONCE,
    Ids,
    reader,
    require_known,
    require_positive,
    token_ids,
)
from simgrad.models import Apply, CachedApply, cached
from simgrad.pairs import chunks
from simgrad.typing import Array, Bool, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """G sampled responses to each of N prompts.

    Attributes:
        tokens: the sampled ids, 0 after a response's end.
        lengths: tokens of each response, its stop token included.
        logp: log π(y|x) = Σ_k log π(y_k | x, y_<k) in nats, at temperature 1 whatever the draws'
            was.
    """

    tokens: Int[Array, "N G R"]
    lengths: Int[Array, "N G"]
    logp: Float[Array, "N G"]

    @property
    def responses(self) -> tuple[tuple[Ids, ...], ...]:
        """Token ids of each prompt's responses, without padding."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return tuple(
            tuple(tuple(row[:n].tolist()) for row, n in zip(*each, strict=True))
            for each in zip(tokens, lengths, strict=True)
        )


def sample(
    apply: Apply,
    theta: Theta,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Sequence[int] = (),
    count: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    at_once: int | None = None,
) -> Samples:
    """Draw ``count`` responses to each prompt: y_k ~ softmax(logits / temperature).

    A response ends with its first ``stop`` token, which belongs to it, or after ``max_tokens``. A
    draw depends on ``seed``, the prompt's number, the sample's number and k, not on what else is
    sampled. Models with a cache (:class:`simgrad.models.CachedApply`; adapters are merged first)
    read each token once; others read the whole sequence again for every token.

    Args:
        apply: the model.
        theta: its parameters.
        prompts: N sequences of token ids, of any lengths.
        max_tokens: R, the most tokens of a response.
        stop: ids that end a response.
        count: G, responses to each prompt.
        temperature: 0 takes the most likely token.
        seed: of the random numbers.
        at_once: most sequences in memory at once (None: 64).

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model reads,
            a negative temperature, a number below 1, or NaN logits (a context that a table does not
            hold).

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> samples = sample(apply, theta, [[1, 2], [3]], max_tokens=4, stop=[0], count=5)
    >>> samples.tokens.shape, len(samples.responses[0])
    ((2, 5, 4), 5)
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    at_once = AT_ONCE if at_once is None else at_once
    require_positive(max_tokens=max_tokens, count=count, at_once=at_once)
    reading = reader(apply, theta, prompts, max_tokens)
    generate = functools.partial(_generate, cached(reading.apply), reading.theta)
    stops = jnp.asarray(token_ids("stop", stop, reading.vocab_size), jnp.int32)
    key = jax.random.key(seed)
    by_length = sorted(range(len(reading.prompts)), key=lambda i: len(reading.prompts[i]))
    parts: list[tuple[Any, Samples]] = []
    for group in chunks(count, at_once):
        for some in chunks(len(by_length), max(1, at_once // len(group))):
            members = [by_length[i] for i in some]
            keys = _keys(key, jnp.asarray(members), jnp.asarray(group))
            read = reading.padded([reading.prompts[i] for i in members], max_tokens)
            drawn = generate(*read, keys, stops, temperature or None, max_tokens)
            parts.append((np.ix_(members, group), drawn))
    shape = len(reading.prompts), count
    tokens, lengths = np.zeros((*shape, max_tokens), np.int32), np.zeros(shape, np.int32)
    logp = np.zeros(shape, parts[0][1].logp.dtype)
    for at, drawn in parts:
        tokens[at], lengths[at], logp[at] = drawn.tokens, drawn.lengths, drawn.logp
    require_known(logp, range(len(logp)))
    return Samples(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(logp))


@jax.jit
def _keys(key: Array, prompts: Int[Array, "N"], samples: Int[Array, "G"]) -> Array:
    """A key for each sample of each prompt."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(fold(key, prompts), samples)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Drawn:
    """Responses under way: tokens written, which have ended, and the model's memory of them."""

    step: Int[Array, ""]
    tokens: Int[Array, "N R"]
    lengths: Int[Array, "N"]
    logp: Float[Array, "N"]
    ended: Bool[Array, "N"]
    memory: Any

    def grown(
        self, logits: Float[Array, "N V"], keys: Array, stop: Int[Array, "M"], temperature: Any
    ) -> _Drawn:
        """With one more token."""
        logp = jax.nn.log_softmax(tree.widen(logits))
        if temperature is None:
            token = logp.argmax(axis=1)
        else:
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, self.step)
            token = jax.vmap(jax.random.categorical)(now, logp / temperature)
        token = jnp.where(self.ended, 0, token.astype(jnp.int32))
        here = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
        return _Drawn(
            self.step + 1,
            self.tokens.at[:, self.step].set(token),
            self.lengths + (~self.ended).astype(jnp.int32),
            self.logp + jnp.where(self.ended, 0.0, here),
            self.ended | (token[:, None] == stop[None]).any(axis=1),
            self.memory,
        )


@functools.partial(jax.jit, static_argnames=("apply", "max_tokens"))
def _generate(
    apply: CachedApply,
    theta: Theta,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, "N"],
    keys: Any,
    stop: Int[Array, "M"],
    temperature: Any,
    max_tokens: int,
) -> Samples:
    """Read the prompts once, then write their responses side by side until all have ended."""
    (n, t), g = tokens.shape, keys.shape[1]
    at = jnp.broadcast_to(jnp.arange(t, dtype=lengths.dtype)[None], (n, t))
    output, memory = apply.extend(
        theta, tokens, at, apply.cache(theta, n, t + max_tokens - 1), lengths[:, None] - 1
    )
    logits, start, keys = (
        jnp.repeat(output.logits[:, 0], g, axis=0),
        jnp.repeat(lengths, g),
        keys.reshape(-1),
    )
    none = jnp.zeros(n * g, jnp.int32)
    blank = _Drawn(
        jnp.int32(0),
        jnp.zeros((n * g, max_tokens), jnp.int32),
        none,
        jnp.zeros(n * g, tree.accumulator(logits.dtype)),
        none > 0,
        memory.repeat(g),
    )

    def unfinished(drawn: _Drawn) -> Bool[Array, ""]:
        return (drawn.step < max_tokens) & ~drawn.ended.all()

    def write(drawn: _Drawn) -> _Drawn:
        last = jax.lax.dynamic_slice_in_dim(drawn.tokens, drawn.step - 1, 1, axis=1)
        output, memory = apply.extend(theta, last, (start + drawn.step - 1)[:, None], drawn.memory)
        return dataclasses.replace(drawn, memory=memory).grown(
            output.logits[:, 0], keys, stop, temperature
        )

    end = jax.lax.while_loop(unfinished, write, blank.grown(logits, keys, stop, temperature))
    return Samples(end.tokens.reshape(n, g, -1), end.lengths.reshape(n, g), end.logp.reshape(n, g))
