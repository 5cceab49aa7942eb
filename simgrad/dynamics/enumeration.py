"""All responses of a policy, with their exact probabilities."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.prompts import (
    AT_ONCE,
    Ids,
    next_logp,
    reader,
    require_known,
    require_positive,
    token_ids,
)
from simgrad.models import Apply
from simgrad.typing import Array, Float, Int, Theta

LIMIT = 1_000_000
"""Most responses that are enumerated unless told otherwise."""


@dataclass(frozen=True)
class Enumeration:
    """All responses to each of N prompts, the shorter first and then by token ids.

    For each prompt Σ_y π(y|x) + pruned + outside = 1.

    Attributes:
        responses: token ids, by prompt.
        logp: log π(y|x) in nats, by prompt.
        pruned: probability of everything that begins with a prefix less likely than ``least``.
        outside: probability of everything else that leaves the alphabet.
    """

    responses: tuple[tuple[Ids, ...], ...]
    logp: tuple[Float[np.ndarray, "_"], ...]
    pruned: Float[np.ndarray, "N"]
    outside: Float[np.ndarray, "N"]


def enumerate_responses(
    apply: Apply,
    theta: Theta,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Sequence[int] = (),
    alphabet: Sequence[int] | None = None,
    least: float = 0.0,
    limit: int = LIMIT,
    at_once: int | None = None,
) -> Enumeration:
    """Each response that ends with a ``stop`` token or has ``max_tokens``, with exact probability.

    Responses are made of the ``alphabet`` (None: the whole vocabulary) and the stop tokens;
    probabilities are the model's own, not renormalised to them. With ``least`` > 0 a prefix less
    likely than that is not followed, which leaves exactly the responses with π(y|x) >= least, at
    most 1 / least.

    Args:
        apply: the model.
        theta: its parameters.
        prompts: N sequences of token ids, of any lengths.
        max_tokens: the most tokens of a response.
        stop: ids that end a response.
        alphabet: ids that responses are made of.
        least: smallest probability of a response that is kept.
        limit: most responses, of all prompts together.
        at_once: most sequences in memory at once (None: 64).

    Raises:
        ValueError: as :func:`sample`; more than ``limit`` responses; ``least`` outside [0, 1].

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> found = enumerate_responses(apply, theta, [[1, 2]], max_tokens=2, stop=[0], alphabet=[3, 4])
    >>> found.responses
    (((0,), (3, 0), (3, 3), (3, 4), (4, 0), (4, 3), (4, 4)),)
    """
    at_once = AT_ONCE if at_once is None else at_once
    require_positive(max_tokens=max_tokens, limit=limit, at_once=at_once)
    if not 0 <= least <= 1:
        raise ValueError(f"least is a probability, got {least}")
    reading = reader(apply, theta, prompts, max_tokens)
    n, stops = len(reading.prompts), token_ids("stop", stop, reading.vocab_size)
    letters = (
        range(reading.vocab_size)
        if alphabet is None
        else token_ids("alphabet", alphabet, reading.vocab_size)
    )
    allowed = np.array(sorted({*letters, *stops}), np.int32)
    _countable(n, len(allowed), len(set(stops)), max_tokens, least, limit)
    children = functools.partial(_children, allowed=jnp.asarray(allowed))
    pruned, outside = np.zeros(n), np.zeros(n)
    prefixes, ended = _Prefixes(np.arange(n), np.zeros((n, 0), np.int32), np.zeros(n)), []
    for k in range(1, max_tokens + 1):
        longer = []
        read = [
            reading.prompts[i] + tuple(y)
            for i, y in zip(prefixes.owner, prefixes.tokens.tolist(), strict=True)
        ]
        for here, (after, beyond) in reading.evaluated(children, read, at_once):
            before = prefixes[here]
            require_known(np.asarray(after), before.owner)
            logp = before.logp[:, None] + np.asarray(after, np.float64)
            keep = np.exp(logp) >= least
            np.add.at(outside, before.owner, np.exp(before.logp) * np.asarray(beyond, np.float64))
            np.add.at(pruned, before.owner, np.where(keep, 0.0, np.exp(logp)).sum(axis=1))
            longer.append(before.followed(keep, allowed, logp))
        prefixes = _joined(longer)
        ends = np.isin(prefixes.tokens[:, -1], stops) | (k == max_tokens)
        ended.append(prefixes[ends])
        prefixes = prefixes[~ends]
        if not len(prefixes.owner):
            break
    found = [[part[part.owner == i] for part in ended] for i in range(n)]
    return Enumeration(
        tuple(tuple(tuple(y) for part in parts for y in part.tokens.tolist()) for parts in found),
        tuple(np.concatenate([part.logp for part in parts]) for parts in found),
        pruned,
        outside,
    )


@dataclass(frozen=True)
class _Prefixes:
    """Beginnings of responses: the prompt each follows, its tokens, its log-prob."""

    owner: np.ndarray
    tokens: np.ndarray
    logp: np.ndarray

    def __getitem__(self, some: Any) -> _Prefixes:
        return _Prefixes(self.owner[some], self.tokens[some], self.logp[some])

    def followed(self, keep: np.ndarray, letters: np.ndarray, logp: np.ndarray) -> _Prefixes:
        """Each prefix followed by its kept letters, in order; ``logp`` covers both together."""
        parent, letter = np.nonzero(keep)
        tokens = np.concatenate([self.tokens[parent], letters[letter][:, None]], axis=1)
        return _Prefixes(self.owner[parent], tokens, logp[keep])


def _joined(parts: list[_Prefixes]) -> _Prefixes:
    return _Prefixes(
        *(np.concatenate([getattr(part, f) for part in parts]) for f in ("owner", "tokens", "logp"))
    )


def _countable(
    prompts: int, letters: int, stops: int, max_tokens: int, least: float, limit: int
) -> None:
    """Refuse an enumeration of more than ``limit`` responses before it starts."""
    going = letters - stops
    most = (
        sum(going**k * stops for k in range(max_tokens - 1)) + going ** (max_tokens - 1) * letters
    )
    if least and most > 1 / least:
        most = int(1 / least)
    if prompts * most > limit:
        raise ValueError(
            f"there may be 10^{math.log10(prompts * most):.1f} responses, more than limit={limit}: "
            "lower max_tokens, restrict the alphabet or raise least"
        )


@functools.partial(jax.jit, static_argnames="apply")
def _children(
    apply: Apply,
    theta: Theta,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, "N"],
    allowed: Int[Array, "M"],
) -> tuple[Float[Array, "N M"], Float[Array, "N"]]:
    """Log-probs of the allowed next tokens, and the probability of all others."""
    logp = next_logp(apply, theta, tokens, lengths)
    inside = jnp.zeros(logp.shape[1], bool).at[allowed].set(True)
    return logp[:, allowed], jnp.where(inside[None], 0.0, jnp.exp(logp)).sum(axis=1)
