r"""Token ids of preference rows.

Three kinds of rows are understood, as in TRL: standard (strings ``prompt``, ``chosen``,
``rejected``), conversational (lists of messages), and implicit-prompt (no ``prompt``: what chosen
and rejected share is the prompt; lists of messages, or HH-style transcripts with "\n\nHuman:" and
"\n\nAssistant:").
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simgrad.bridge.preferences.rows import PreferenceDataError, Row, Rows
from simgrad.errors import InputError
from simgrad.pairs import Pair
from simgrad.store import digest

_ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be scored, and why.

    Attributes:
        index: row number in the data, from 0.
        reason: one sentence.
    """

    index: int
    reason: str


@dataclass
class Encoded:
    """Token ids of a data set.

    Attributes:
        indices: row number of each pair in the data, in order.
        pairs: the pairs that can be scored.
        skipped: the rows that cannot.
        merged: responses tokenised apart from their prompt because tokenisation merged across the
            boundary.
        truncated: responses cut at ``max_length``.
        max_length: longest prompt + response that was allowed (None: any).
        source: where the rows were read (None: rows from elsewhere).
        split: of that source.
    """

    indices: list[int] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    merged: int = 0
    truncated: int = 0
    max_length: int | None = None
    source: str | None = None
    split: str | None = None

    def digest(self) -> str:
        """Name of all token ids, and of what was left out and why.

        >>> one, other = Encoded([0], [Pair([1], [2], [3])]), Encoded([0], [Pair([1], [3], [2])])
        >>> one.digest() == other.digest()
        False
        """
        parts = [part for p in self.pairs for part in (p.prompt, p.chosen, p.rejected)]
        lengths = np.array([len(part) for part in parts], np.int64)
        tokens = np.array([token for part in parts for token in part], np.int64)
        left_out = tuple((s.index, s.reason) for s in self.skipped)
        counts = (self.merged, self.truncated)
        return digest(np.array(self.indices, np.int64), lengths, tokens, left_out, counts)


def encode(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> Encoded:
    """Token ids of every row.

    Plain text: ids(prompt + response) is split at ids(prompt) and EOS is appended to the response.
    Where tokenisation merges across the boundary, prompt and response are tokenised apart and
    counted. Messages: the tokenizer's chat template, whose end-of-turn tokens belong to the
    response.

    Args:
        rows: strings ``prompt``, ``chosen`` and ``rejected``, lists of messages, or rows whose
            prompt is what chosen and rejected share, as in TRL.
        tokenizer: a transformers tokenizer.
        max_length: longest prompt + response in tokens; the end of longer responses is cut (as
            TRL's ``truncation_mode="keep_start"`` does).
        vocab_size: the model's; a token id beyond it is an error rather than a wrong embedding.

    Raises:
        PreferenceDataError: a row lacks a field or has an unknown form, messages without a chat
            template, a token id that the model does not have; names the row (counted from 0).
        InputError: no tokenizer.
    """
    if tokenizer is None:
        raise InputError("there is no tokenizer: pass simgrad.pairs.Pair objects instead of text")
    source, split = (rows.source, rows.split) if isinstance(rows, Rows) else (None, None)
    result = Encoded(max_length=max_length, source=source, split=split)
    for index, row in enumerate(rows):
        try:
            pair, merged, truncated = _encode_row(row, tokenizer, max_length)
        except _UnusableRowError as error:
            result.skipped.append(Skipped(index, str(error)))
            continue
        except PreferenceDataError as error:
            raise PreferenceDataError(f"row {index} (counted from 0): {error}") from error
        if vocab_size is not None and (problem := outside(pair, vocab_size)):
            raise PreferenceDataError(
                f"row {index}: {problem}: tokenizer and model do not belong together"
            )
        result.indices.append(index)
        result.pairs.append(pair)
        result.merged += merged
        result.truncated += truncated
    return result


def outside(pair: Pair, vocab_size: int) -> str | None:
    """Names a token id that the model does not have, or None."""
    ids = (*pair.prompt, *pair.chosen, *pair.rejected)
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    return (
        None if bad is None else f"token id {bad} is outside the model's vocabulary of {vocab_size}"
    )


class _UnusableRowError(Exception):
    """This row says nothing about preferences; the others may."""


def _encode_row(row: Row, tokenizer: Any, max_length: int | None) -> tuple[Pair, int, int]:
    prompt, chosen, rejected = _split(row)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        text = response if isinstance(response, str) else "".join(m["content"] for m in response)
        if not text.strip():
            raise _UnusableRowError(f"empty {name} response")
    if chosen == rejected:
        raise _UnusableRowError("chosen and rejected are identical")
    if isinstance(prompt, list):
        prompt_ids, responses, merged = _messages(prompt, (chosen, rejected), tokenizer)
    else:
        prompt_ids, responses, merged = _text(prompt, (chosen, rejected), tokenizer)
    room = None if max_length is None else max(max_length - len(prompt_ids), 0)
    if room == 0:
        raise _UnusableRowError(
            f"nothing left of the responses: prompt has {len(prompt_ids)} of {max_length} tokens"
        )
    cut = [ids[:room] for ids in responses]
    pair = Pair(prompt_ids, *cut)
    truncated = sum(len(a) < len(b) for a, b in zip(cut, responses, strict=True))
    if problem := pair.problem():
        raise _UnusableRowError(
            problem + (f" after truncation to {max_length} tokens" if truncated else "")
        )
    return pair, merged, truncated


def _split(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected: three strings, or three lists of messages."""
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise PreferenceDataError(
            f"no field {', '.join(missing)}; the row has: {', '.join(map(str, row))}"
        )
    for name in ("chosen", "rejected"):
        if row[name] is None:
            raise _UnusableRowError(f"empty {name} response")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise PreferenceDataError(
            "chosen and rejected must both be strings or both be lists of messages"
        )
    if isinstance(chosen, str):
        if prompt is None:
            return _implicit_text(row, chosen, rejected)
        if not isinstance(prompt, str):
            raise PreferenceDataError("prompt must be a string when the responses are")
        return prompt, chosen, rejected
    for name, messages in (("chosen", chosen), ("rejected", rejected), ("prompt", prompt)):
        if isinstance(messages, str | None) and name == "prompt":
            continue
        if not isinstance(messages, Sequence) or not all(
            isinstance(m, Mapping) and "role" in m and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise PreferenceDataError(
                f"{name} must be a string or a list of messages with role and content"
            )
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return list(prompt), list(chosen), list(rejected)
    shared, chosen, rejected = _implicit_messages(chosen, rejected)
    if prompt is not None and not any(m["role"] == "user" for m in shared):
        shared = [*shared, {"role": "user", "content": prompt}]
    return shared, chosen, rejected


def _implicit_text(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    if chosen == rejected:
        raise _UnusableRowError("chosen and rejected are identical")
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (of characters, as meant)
    turn = common.rfind(_ASSISTANT)
    if turn < 0:
        raise PreferenceDataError(
            f"no field prompt, and chosen and rejected share no transcript up to {_ASSISTANT!r}; "
            "the row has: "
            f"{', '.join(map(str, row))}. Rename the column that holds the prompt to 'prompt'"
        )
    end = turn + len(_ASSISTANT)
    return common[:end], chosen[end:], rejected[end:]


def _implicit_messages(chosen: Sequence, rejected: Sequence) -> tuple[list, list, list]:
    if list(chosen) == list(rejected):
        raise _UnusableRowError("chosen and rejected are identical")
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and dict(chosen[n]) == dict(rejected[n]):
        n += 1
    return list(chosen[:n]), list(chosen[n:]), list(rejected[n:])


def _text(
    prompt: str, responses: tuple[str, str], tokenizer: Any
) -> tuple[list[int], list[list[int]], int]:
    eos = tokenizer.eos_token_id
    prompt_ids = _ids(tokenizer, prompt)
    if len(prompt_ids) > 1 and prompt_ids[-1] == eos and not prompt.endswith(tokenizer.eos_token):
        prompt_ids.pop()  # a tokenizer that closes every text
    out, merged = [], 0
    for response in responses:
        ids = _ids(tokenizer, prompt + response)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids, merged = _plain_ids(tokenizer, response), merged + 1
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        out.append(ids)
    return prompt_ids, out, merged


def _messages(
    prompt: list, responses: tuple[list, list], tokenizer: Any
) -> tuple[list[int], list[list[int]], int]:
    if not getattr(tokenizer, "chat_template", None):
        raise PreferenceDataError(
            "the data hold messages but the tokenizer has no chat template: use plain text rows"
        )
    if not prompt:
        raise _UnusableRowError(
            "no prompt: chosen and rejected share no message, and there is no field prompt"
        )
    start = (
        {"continue_final_message": True}
        if prompt[-1]["role"] == "assistant"
        else {"add_generation_prompt": True}
    )
    prompt_text = _templated(tokenizer, prompt, **start)
    prompt_ids = _plain_ids(tokenizer, prompt_text)
    out, merged = [], 0
    for response in responses:
        text = _templated(tokenizer, [*prompt, *response])
        if not text.startswith(prompt_text):
            raise _UnusableRowError(
                "the chat template does not continue the prompt (it rewrites earlier turns)"
            )
        ids = _plain_ids(tokenizer, text)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids, merged = _plain_ids(tokenizer, text[len(prompt_text) :]), merged + 1
        out.append(ids)
    return prompt_ids, out, merged


def _templated(tokenizer: Any, messages: list, **options: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError) as error:
        raise _UnusableRowError(f"the chat template refuses this row: {error}") from error


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # tokenizers raises plain ones, for words it does not know say
        raise _UnusableRowError(f"the tokenizer refuses this row: {error}") from error
