"""Prompts as a model reads them: checked, padded, a few at a time; and what it expects next."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import Apply, LoraApply, merge_lora
from simgrad.pairs import chunks
from simgrad.typing import Array, Float, Int, Theta

AT_ONCE = 64
"""Sequences in memory at once unless told otherwise."""

Ids = tuple[int, ...]


def next_token_logp(
    apply: Apply, theta: Theta, prompts: Sequence[Sequence[int]], at_once: int | None = None
) -> Float[Array, "N V"]:
    """Log π(v | x) in nats of every token v after each prompt; prompts may differ in length.

    A function of ``theta`` that can be traced and differentiated. At most ``at_once`` prompts
    (None: 64) are evaluated together.

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> next_token_logp(apply, theta, [[1, 2], [3]]).shape
    (2, 9)

    Raises:
        ValueError: no prompts, an empty one, an id outside the vocabulary, or a prompt that is too
            long.
    """
    at_once = AT_ONCE if at_once is None else at_once
    require_positive(at_once=at_once)
    reading = reader(apply, theta, prompts)
    return jnp.concatenate(
        [logp for _, logp in reading.evaluated(next_logp, reading.prompts, at_once)]
    )


@dataclass(frozen=True)
class Reader:
    """A model without adapters, and prompts that it can read."""

    apply: Apply
    theta: Theta
    prompts: list[Ids]
    vocab_size: int
    max_length: int | None

    def padded(
        self, sequences: Sequence[Ids], more: int = 0
    ) -> tuple[Int[Array, "N T"], Int[Array, "N"]]:
        """Sequences right-padded to a width that leaves ``more`` positions free, and lengths."""
        lengths = np.array([len(s) for s in sequences], np.int32)
        width = _coarse(int(lengths.max()))
        if self.max_length is not None:
            width = min(width, self.max_length - more)
        tokens = np.zeros((len(sequences), width), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        return jnp.asarray(tokens), jnp.asarray(lengths)

    def evaluated(
        self, f: Callable[..., Any], sequences: Sequence[Ids], at_once: int
    ) -> Iterator[tuple[slice, Any]]:
        """``f`` of the sequences, a few at a time: which ones, and the result."""
        for chunk in chunks(len(sequences), at_once).tolist():
            here = slice(chunk[0], chunk[-1] + 1)
            result = f(self.apply, self.theta, *self.padded([sequences[i] for i in chunk]))
            yield here, jax.tree.map(lambda x, n=here.stop - here.start: x[:n], result)


def reader(
    apply: Apply, theta: Theta, prompts: Sequence[Sequence[int]], max_tokens: int = 0
) -> Reader:
    """The model with merged adapters, and the prompts.

    The model must be able to read each of the prompts and ``max_tokens`` more.
    """
    while isinstance(apply, LoraApply):
        apply, theta = apply.base, merge_lora(apply, theta)
    one = jnp.ones((1, 1), jnp.int32)
    vocab_size = next_logp.eval_shape(apply, theta, one, one[0]).shape[-1]
    max_length = getattr(getattr(apply, "config", None), "max_length", None)
    if not len(prompts):
        raise ValueError("no prompts: at least one is needed")
    read = [token_ids(f"prompt {i}", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(read):
        if not prompt:
            raise ValueError(
                f"prompt {i} is empty: no state predicts the first token (is a BOS token missing?)"
            )
        if max_length is not None and len(prompt) + max_tokens > max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: with max_tokens={max_tokens} that is more "
                f"than the {max_length} that the model reads"
            )
    return Reader(apply, theta, read, vocab_size, max_length)


def token_ids(name: str, tokens: Any, vocab_size: int) -> Ids:
    """The tokens as a tuple, if they are ids of the vocabulary."""
    try:
        ids = tuple(operator.index(token) for token in tokens)
    except TypeError:
        raise ValueError(
            f"{name} must hold token ids (whole numbers), got {tokens!r}: tokenize text first"
        ) from None
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}")
    return ids


def require_positive(**numbers: int) -> None:
    """Refuse a number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def require_known(logp: np.ndarray, owner: Sequence[int] | np.ndarray) -> None:
    """Refuse log-probs that are NaN; ``owner`` is the prompt of each row."""
    for i in np.flatnonzero(np.isnan(logp).any(axis=1)).tolist():
        raise ValueError(
            f"NaN logits after prompt {owner[i]}: a context that the model does not hold, or "
            "overflow"
        )


def _coarse(n: int) -> int:
    """Next length on a grid of two steps an octave.

    >>> [_coarse(n) for n in (1, 3, 5, 9, 17, 25, 100)]
    [1, 3, 6, 12, 24, 32, 128]
    """
    step = 1
    while n > 4 * step:
        step *= 2
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnames="apply")
def next_logp(
    apply: Apply, theta: Theta, tokens: Int[Array, "N T"], lengths: Int[Array, "N"]
) -> Float[Array, "N V"]:
    """Log-probs of the token after each right-padded sequence."""
    inside = jnp.arange(tokens.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
    output = apply(theta, tokens, None, inside.astype(tokens.dtype), lengths[:, None] - 1)
    return jax.nn.log_softmax(tree.widen(output.logits[:, 0]))
