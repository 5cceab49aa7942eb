"""Preference pairs as arrays: one pair, padded batches, packed batches.

A :class:`Batch` holds B pairs, each laid out on S sequences of T positions. ``padded`` uses two
sequences, prompt + chosen and prompt + rejected. ``packed`` uses one, prompt + chosen + rejected,
with positions that restart at the rejected response and streams that hide the responses from each
other, so that the prompt is computed once. Both give the same log-probs and hidden states.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.typing import Array, Bool, Int

__all__ = ["CHOSEN", "REJECTED", "Batch", "Pair", "packed", "padded"]

CHOSEN = 1
"""Stream bit of the tokens that the chosen response reads; those of a prompt carry both bits."""
REJECTED = 2
"""Stream bit of the tokens that the rejected response reads."""


def _ids(name: str, tokens: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(t) for t in tokens)
    except TypeError:
        raise ValueError(
            f"{name} must hold token ids (whole numbers), got {tokens!r}: tokenize text first"
        ) from None


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt, its chosen and its rejected response.

    The end-of-sequence or end-of-turn token belongs to the response.

    >>> Pair([1, 5], [7, 2], [8, 2])
    Pair(prompt=(1, 5), chosen=(7, 2), rejected=(8, 2))
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    def __post_init__(self) -> None:
        """Store plain tuples of ints, so that pairs hash and compare; refuse invalid token ids."""
        for name in ("prompt", "chosen", "rejected"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))

    def problem(self) -> str | None:
        """Why this pair says nothing about preferences, or None.

        >>> Pair([1], [7], [7]).problem()
        'chosen and rejected are identical'
        """
        if not self.prompt:
            return (
                "empty prompt: no state predicts the first response token (is a BOS token missing?)"
            )
        if not self.chosen:
            return "empty chosen response"
        if not self.rejected:
            return "empty rejected response"
        if self.chosen == self.rejected:
            return "chosen and rejected are identical"
        if (least := min(*self.prompt, *self.chosen, *self.rejected)) < 0:
            return f"token id {least} is outside any vocabulary: ids count from 0"
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B preference pairs on S sequences each; see the module's text for the two layouts.

    Attributes:
        tokens: ids, 0 where padded.
        positions: position of each token in its own response's sequence.
        streams: bits of :data:`CHOSEN` and :data:`REJECTED`, 0 where padded.
        rows: for each response token, the position (in its sequence) of the state that predicts it:
            last prompt position to last-but-one response position.
        targets: the response tokens.
        valid: which rows hold a response token.
        last: position of each response's last token.
    """

    tokens: Int[Array, "*pairs S T"]
    positions: Int[Array, "*pairs S T"]
    streams: Int[Array, "*pairs S T"]
    rows: Int[Array, "*pairs 2 R"]
    targets: Int[Array, "*pairs 2 R"]
    valid: Bool[Array, "*pairs 2 R"]
    last: Int[Array, "*pairs 2"]

    @property
    def size(self) -> int:
        """Pairs in the batch."""
        return self.tokens.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether each pair lies on one sequence."""
        return self.tokens.shape[-2] == 1

    @property
    def lengths(self) -> Int[Array, "*pairs 2"]:
        """Response lengths in tokens."""
        return self.valid.sum(-1)

    def take(self, index: Any) -> Batch:
        """The pairs at ``index``: whole numbers, a slice, or an array of either index kind."""
        return jax.tree.map(lambda x: x[index], self)


def _check(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("no pairs: a batch needs at least one")
    for i, pair in enumerate(pairs):
        if problem := pair.problem():
            raise ValueError(f"pair {i}: {problem}")


def _fit(need: int, given: int | None, name: str) -> int:
    if given is not None and given < need:
        raise ValueError(f"{name}={given} is too small: the longest needs {need}")
    return need if given is None else given


class _Draft(SimpleNamespace):
    """A batch of numpy arrays to be filled in."""

    def __init__(self, pairs: Sequence[Pair], sequences: int, length: int, rows: int) -> None:
        b = len(pairs)
        for name in ("tokens", "positions", "streams"):
            setattr(self, name, np.zeros((b, sequences, length), np.int32))
        for name in ("rows", "targets"):
            setattr(self, name, np.zeros((b, 2, rows), np.int32))
        self.valid = np.zeros((b, 2, rows), bool)
        self.last = np.zeros((b, 2), np.int32)

    def batch(self) -> Batch:
        return Batch(**{name: jnp.asarray(array) for name, array in vars(self).items()})


def _longest_response(pairs: Sequence[Pair]) -> int:
    return max(max(len(p.chosen), len(p.rejected)) for p in pairs)


def padded(pairs: Sequence[Pair], length: int | None = None, rows: int | None = None) -> Batch:
    """Two right-padded sequences a pair: prompt + chosen, prompt + rejected.

    ``length`` (T) and ``rows`` (R) default to what the longest needs; a larger value pads.

    >>> batch = padded([Pair([1, 5], [7, 2], [8, 9, 2])])
    >>> batch.tokens.tolist()
    [[[1, 5, 7, 2, 0], [1, 5, 8, 9, 2]]]
    >>> batch.rows.tolist(), batch.lengths.tolist()
    ([[[1, 2, 0], [1, 2, 3]]], [[2, 3]])

    Raises:
        ValueError: no pairs, an unusable pair (:meth:`Pair.problem`), or a size that is too small.
    """
    _check(pairs)
    rows = _fit(_longest_response(pairs), rows, "rows")
    need = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    draft = _Draft(pairs, 2, _fit(need, length, "length"), rows)
    for i, pair in enumerate(pairs):
        start = len(pair.prompt)
        for side, (response, bit) in enumerate(((pair.chosen, CHOSEN), (pair.rejected, REJECTED))):
            end, n = start + len(response), len(response)
            draft.tokens[i, side, :end] = (*pair.prompt, *response)
            draft.positions[i, side, :end] = np.arange(end)
            draft.streams[i, side, :end] = bit
            draft.rows[i, side, :n] = np.arange(start - 1, end - 1)
            draft.targets[i, side, :n] = response
            draft.valid[i, side, :n] = True
            draft.last[i, side] = end - 1
    return draft.batch()


def packed(pairs: Sequence[Pair], length: int | None = None, rows: int | None = None) -> Batch:
    """One right-padded sequence a pair: prompt, chosen, rejected.

    >>> batch = packed([Pair([1, 5], [7, 2], [8, 9, 2])])
    >>> batch.tokens.tolist(), batch.positions.tolist()
    ([[[1, 5, 7, 2, 8, 9, 2]]], [[[0, 1, 2, 3, 2, 3, 4]]])
    >>> batch.streams.tolist(), batch.rows.tolist()
    ([[[3, 3, 1, 1, 2, 2, 2]]], [[[1, 2, 0], [1, 4, 5]]])

    Raises:
        ValueError: no pairs, an unusable pair (:meth:`Pair.problem`), or a size that is too small.
    """
    _check(pairs)
    rows = _fit(_longest_response(pairs), rows, "rows")
    need = max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    draft = _Draft(pairs, 1, _fit(need, length, "length"), rows)
    for i, pair in enumerate(pairs):
        start = len(pair.prompt)
        draft.tokens[i, 0, :start] = pair.prompt
        draft.positions[i, 0, :start] = np.arange(start)
        draft.streams[i, 0, :start] = CHOSEN | REJECTED
        at = start
        for side, (response, bit) in enumerate(((pair.chosen, CHOSEN), (pair.rejected, REJECTED))):
            n = len(response)
            draft.tokens[i, 0, at : at + n] = response
            draft.positions[i, 0, at : at + n] = np.arange(start, start + n)
            draft.streams[i, 0, at : at + n] = bit
            draft.rows[i, side, :n] = (start - 1, *range(at, at + n - 1))
            draft.targets[i, side, :n] = response
            draft.valid[i, side, :n] = True
            draft.last[i, side] = at + n - 1
            at += n
    return draft.batch()


AT_ONCE = 8
"""Pairs evaluated at once where a whole data set is followed."""


def chunks(count: int, most: int = AT_ONCE) -> Int[np.ndarray, "N M"]:
    """Indices 0 … count - 1 in rows of one size, at most ``most``.

    The last index fills up the last row. One size means one compiled program.

    >>> chunks(5, 3).tolist()
    [[0, 1, 2], [3, 4, 4]]
    """
    rows = -(-count // most)
    size = -(-count // rows)
    return np.minimum(np.arange(rows * size, dtype=np.int32), count - 1).reshape(rows, size)


def in_chunks(f: Callable[[Batch], Any], batch: Batch) -> Any:
    """``f`` of the batch, a few pairs at a time so that memory does not grow with their number.

    ``f`` maps a batch to arrays with a leading pair axis, each pair by itself.
    """
    if batch.size <= AT_ONCE:
        return f(batch)
    pieces = jax.lax.map(lambda i: f(batch.take(i)), jnp.asarray(chunks(batch.size)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: batch.size], pieces)


def one_by_one(f: Callable[..., Any], batch: Batch, *more: Any) -> Any:
    """``f`` of each pair as a batch of one, one after the other; results stacked.

    ``more`` has pairs on its leading axis and goes along, a pair's entry at a time.
    """

    def one(item: tuple) -> Any:
        pair, *rest = item
        return f(jax.tree.map(lambda x: x[None], pair), *rest)

    return jax.lax.map(one, (batch, *more))
