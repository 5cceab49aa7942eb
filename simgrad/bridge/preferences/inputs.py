"""What is scored: any kind of pairs as token ids that one policy reads, and a hash of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.preferences.rows import Encoded, Rows, Skipped, encode, outside, read_rows
from simgrad.pairs import Pair

__all__ = ["data_fingerprint", "encoded_for"]


def encoded_for(
    policy: Policy,
    pairs: Any,
    max_length: int | None = None,
    limit: int | None = None,
    split: str = "train",
) -> Encoded:
    """Token ids, as this policy reads them, of whatever :func:`simgrad.score` takes as pairs.

    The arguments are those of :func:`simgrad.score`.

    Raises:
        PreferenceDataError: data that cannot be read, with file, line or row.
        ValueError: ``max_length`` beyond the model's; text for a policy without tokenizer.
    """
    longest = policy.config.max_length
    if max_length is not None and not 1 <= max_length <= longest:
        raise ValueError(
            f"max_length={max_length} is out of range: the model reads 1 to {longest} tokens"
        )
    if isinstance(pairs, Encoded):
        if limit is not None:
            raise ValueError("limit goes with rows or pairs; an Encoded data set is scored whole")
        return _checked(pairs, max_length or longest, policy.config.vocab_size)
    if isinstance(pairs, str | Path):
        pairs = read_rows(pairs, limit, split)
    given = list(pairs)[:limit]
    if all(isinstance(pair, Pair) for pair in given):
        whole = Encoded(list(range(len(given))), given)
        return _checked(whole, max_length or longest, policy.config.vocab_size)
    if policy.tokenizer is None:
        raise ValueError(
            f"{policy.name} has no tokenizer: pass simgrad.pairs.Pair objects instead of text"
        )
    if isinstance(pairs, Rows):
        given = Rows(given, pairs.source, pairs.split)
    return encode(given, policy.tokenizer, max_length or longest, policy.config.vocab_size)


def _checked(given: Encoded, max_length: int, vocab_size: int) -> Encoded:
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


def data_fingerprint(encoded: Encoded) -> str:
    """Hash of all token ids, and of what was left out and why.

    >>> one, other = Encoded([0], [Pair([1], [2], [3])]), Encoded([0], [Pair([1], [3], [2])])
    >>> data_fingerprint(one) == data_fingerprint(other)
    False
    """
    tokens = [(p.prompt, p.chosen, p.rejected) for p in encoded.pairs]
    left_out = [(s.index, s.reason) for s in encoded.skipped]
    data = json.dumps([encoded.indices, tokens, left_out, encoded.merged, encoded.truncated])
    return hashlib.sha256(data.encode()).hexdigest()[:16]
