"""The worst pairs of a score table: which tokens the pair's own step raises or lowers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.bridge.engine.table import ScoreTable
from simgrad.errors import InputError
from simgrad.pairs import Pair, padded
from simgrad.report.scored import Scored
from simgrad.theory.kernel import token_changes
from simgrad.theory.mitigation import contrastive_mask

WINDOW, PROMPT = 160, 60
"""Tokens shown of a response, and of a prompt's end."""
_CONTEXT, _LONGEST = 8, 6  # tokens decoded before a piece; tokens of one character


@dataclass(frozen=True)
class Piece:
    """The least run of tokens that is whole characters: mostly one token.

    Attributes:
        text: decoded.
        change: first-order Δlog π of these tokens caused by the pair's own step.
        contrastive: outside what the responses share at their beginning and end.
        tokens: how many they are.
    """

    text: str
    change: float
    contrastive: bool
    tokens: int


@dataclass(frozen=True)
class ResponseView:
    """A response, or the window of it where most happens.

    Attributes:
        pieces: those shown.
        tokens: in the response.
        first: number of tokens before the window.
        change: Δlog π of the response: the sum over all its tokens.
        contrastive: the part of it that falls on contrastive tokens.
    """

    pieces: tuple[Piece, ...]
    tokens: int
    first: int
    change: float
    contrastive: float

    @property
    def shown(self) -> int:
        """Tokens shown."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def outside(self) -> float:
        """What the tokens that are not shown contribute."""
        return self.change - sum(piece.change for piece in self.pieces)


@dataclass(frozen=True)
class PairView:
    """One pair.

    Attributes:
        row: number of its row in the data.
        regime: label, or None without gradients in the table.
        prompt: its end, decoded.
        prompt_tokens: in all of it.
        chosen: the chosen response.
        rejected: the rejected one.
        expected: the table's predicted change of both, or None without gradients.
    """

    row: int
    regime: str | None
    prompt: str
    prompt_tokens: int
    chosen: ResponseView
    rejected: ResponseView
    expected: tuple[float, float] | None


def pair_views(table: ScoreTable, scored: Scored, positions: Sequence[int]) -> tuple[PairView, ...]:
    """The pairs at these positions of the table, in the unit of its predictions.

    Raises:
        InputError: ``scored`` without model or pairs.
    """
    if scored.policy is None or scored.pairs is None:
        raise InputError("model and pairs of the table are needed: " + " ".join(scored.problems))
    if not len(positions):
        return ()
    policy, members = scored.policy, [scored.pairs[int(table["index"][i])] for i in positions]
    # lengths in steps of 32: few shapes to compile for
    total = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in members)
    longest = max(max(len(p.chosen), len(p.rejected)) for p in members)
    batch = padded(members, *(-(-n // 32) * 32 for n in (total, longest)))
    wide = "float64" if policy.config.dtype == "float64" else "float32"
    d_w, d_l = (table[f"d_{side}"][list(positions)] for side in ("chosen", "rejected"))
    force = jnp.asarray(np.stack([d_w, -d_l], -1), wide)
    rate = table.metadata["run"]["learning_rate"]
    changes = token_changes(policy.apply, policy.theta, batch, force)
    changes = np.asarray(jax.device_get(changes), np.float64) * (1.0 if rate is None else rate)
    masks = np.asarray(contrastive_mask(batch)) > 0
    return tuple(
        _view(table, position, pair, policy.tokenizer, changes[k], masks[k])
        for k, (position, pair) in enumerate(zip(positions, members, strict=True))
    )


def _view(
    table: ScoreTable,
    position: int,
    pair: Pair,
    tokenizer: Any,
    changes: np.ndarray,
    masks: np.ndarray,
) -> PairView:
    prompt, regime, expected = list(pair.prompt), None, None
    if "predicted_dlogp_chosen" in table:
        regime = str(table["regime"][position])
        w, l = (float(table[f"predicted_dlogp_{s}"][position]) for s in ("chosen", "rejected"))  # noqa: E741
        expected = (w, l)
    return PairView(
        int(table["index"][position]),
        regime,
        "".join(text for text, _ in pieces(tokenizer, [], prompt[-PROMPT:])),
        len(prompt),
        _response(tokenizer, prompt, list(pair.chosen), changes[0], masks[0]),
        _response(tokenizer, prompt, list(pair.rejected), changes[1], masks[1]),
        expected,
    )


def _response(
    tokenizer: Any, prompt: list[int], ids: list[int], changes: np.ndarray, mask: np.ndarray
) -> ResponseView:
    changes, mask = changes[: len(ids)], mask[: len(ids)]
    size = np.concatenate([[0.0], np.cumsum(np.abs(changes))])
    shown = min(WINDOW, len(ids))
    first = int(np.argmax(size[shown:] - size[: len(size) - shown]))
    found, at = [], first
    for text, count in pieces(tokenizer, [*prompt, *ids[:first]], ids[first : first + shown]):
        some = slice(at, at + count)
        found.append(Piece(text, float(changes[some].sum()), bool(mask[some].any()), count))
        at += count
    return ResponseView(
        tuple(found), len(ids), first, float(changes.sum()), float(changes[mask].sum())
    )


def pieces(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> list[tuple[str, int]]:
    """Texts of tokens as they read after ``before``, with the number of tokens of each.

    Tokens that hold parts of one character stay together. Without a tokenizer the ids stand for
    themselves.

    >>> from simgrad.bridge import word_tokenizer
    >>> pieces(word_tokenizer(["yes", "no"]), [0], [1, 0])
    [(' no', 1), (' yes', 1)]
    """
    if tokenizer is None:
        return [(f" {i}", 1) for i in ids]

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    found: list[tuple[str, int]] = []
    pending: list[int] = []
    # what stands before, by pieces: bytes of one character must not be torn apart
    recent = [_whole(text, list(before))]
    for k, token in enumerate(ids):
        pending.append(token)
        context = [t for piece in recent for t in piece]
        start, whole = text(context) if context else "", text([*context, *pending])
        if whole.endswith("\ufffd") and len(pending) < _LONGEST and k + 1 < len(ids):
            continue
        found.append(
            (whole[len(start) :] if whole.startswith(start) else text(pending), len(pending))
        )
        recent, pending = [*recent, pending][-_CONTEXT:], []
    return found


def _whole(text: Callable[[list[int]], str], tokens: list[int]) -> list[int]:
    """The last tokens: :data:`_CONTEXT`, plus as few as avoid starting within a character."""
    few = (tokens[-n:] for n in range(_CONTEXT, _CONTEXT + _LONGEST))
    return next((some for some in few if some and "\ufffd" not in text(some)), tokens[-_CONTEXT:])
