"""Whatever may be given as pairs, as token ids that one policy reads, with its guards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.preferences.encoding import Encoded, Skipped, encode, outside
from simgrad.bridge.preferences.rows import Rows, read_rows, require_limit
from simgrad.errors import InputError
from simgrad.pairs import Pair


def encoded_for(
    policy: Policy,
    pairs: Any,
    max_length: int | None = None,
    limit: int | None = None,
    split: str = "train",
) -> Encoded:
    """Token ids of whatever :func:`simgrad.score` takes as pairs, as this policy reads them.

    Raises:
        PreferenceDataError: data that cannot be read, with file, line or row.
        InputError: ``max_length`` beyond the model's; text for a policy without tokenizer.
    """
    longest = policy.config.max_length
    if max_length is not None and not 1 <= max_length <= longest:
        raise InputError(
            f"max_length={max_length} is out of range: the model reads 1 to {longest} tokens"
        )
    require_limit(limit)
    most, words = max_length or longest, policy.config.vocab_size
    if isinstance(pairs, Encoded):
        if limit is not None:
            raise InputError("limit goes with rows or pairs; an Encoded data set is taken whole")
        return _readable(pairs, most, words)
    if isinstance(pairs, str | Path):
        pairs = read_rows(pairs, limit, split)
    given = list(pairs)[:limit]
    if all(isinstance(pair, Pair) for pair in given):
        return _readable(Encoded(list(range(len(given))), given), most, words)
    if policy.tokenizer is None:
        raise InputError(
            f"{policy.name} has no tokenizer: pass simgrad.pairs.Pair objects instead of text"
        )
    if isinstance(pairs, Rows):
        given = Rows(given, pairs.source, pairs.split)
    return encode(given, policy.tokenizer, most, words)


def _readable(given: Encoded, max_length: int, vocab_size: int) -> Encoded:
    """The pairs that the model can read; the others join the skipped rows."""
    kept = dataclasses.replace(
        given, indices=[], pairs=[], skipped=list(given.skipped), max_length=max_length
    )
    for i, pair in zip(given.indices, given.pairs, strict=True):
        total = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        problem = pair.problem() or outside(pair, vocab_size)
        if problem is None and total > max_length:
            problem = f"{total} tokens, but at most {max_length} are read"
        if problem:
            kept.skipped.append(Skipped(i, problem))
        else:
            kept.indices.append(i)
            kept.pairs.append(pair)
    return kept
