r"""Preference data: rows from files or the Hub, and their token ids.

Three kinds of rows are understood, as in TRL: standard (strings ``prompt``, ``chosen``,
``rejected``), conversational (lists of messages), and implicit-prompt (no ``prompt``: what chosen
and rejected share is the prompt; lists of messages, or HH-style transcripts with "\n\nHuman:" and
"\n\nAssistant:").
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from simgrad.bridge.checkpoints.worlds import PREFIX, world_rows
from simgrad.pairs import Pair

__all__ = ["Encoded", "PreferenceDataError", "Rows", "Skipped", "encode", "outside", "read_rows"]

Row = Mapping[str, Any]
_ASSISTANT = "\n\nAssistant:"


class PreferenceDataError(ValueError):
    """Preference data that cannot be read, with the file, line or row at fault."""


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be scored, and why.

    Attributes:
        index: row number in the data, from 0.
        reason: one sentence.
    """

    index: int
    reason: str


class Rows(list[dict[str, Any]]):
    """Rows that know where they were read; a slice or a changed copy is a plain list.

    Attributes:
        source: file, folder, Hub name or world.
        split: of a folder or Hub data set.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], source: str, split: str) -> None:
        super().__init__(rows)
        self.source, self.split = source, split


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


def read_rows(source: str | Path, limit: int | None = None, split: str = "train") -> Rows:
    """Rows of a .jsonl, .json, .csv or .parquet file, or of a data set (folder, Hub name or world).

    Args:
        source: file, folder or Hub name; a Hub configuration follows a colon ("org/name:config").
            The pairs of a world of :mod:`simgrad.worlds` go by ``"world:verdicts"``, or
            ``"world:verdicts:3"`` (seed 3).
        limit: read no more rows than this.
        split: of a folder or Hub data set.

    Raises:
        PreferenceDataError: names the file and line, or what the Hub answered.
    """
    if str(source).startswith(PREFIX):
        return Rows(world_rows(str(source), limit), str(source), split)
    path = Path(source)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.is_file():
        if path.suffix not in readers:
            raise PreferenceDataError(
                f"{path}: unknown ending {path.suffix!r}; there are: {', '.join(readers)}"
            )
        rows = list(islice(readers[path.suffix](path), limit))
    elif path.suffix in readers:
        raise PreferenceDataError(f"{path}: no such file")
    else:
        rows = list(islice(_data_set(str(source), split), limit))
    if not rows:
        raise PreferenceDataError(f"{source}: no rows")
    return Rows(rows, str(source), split)


def _jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PreferenceDataError(
                    f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})"
                ) from error
            if not isinstance(row, dict):
                raise PreferenceDataError(
                    f"{path}, line {number}: a row must be an object, not {type(row).__name__}"
                )
            yield row


def _json(path: Path) -> Iterator[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = (
            "; if it holds one object a line, call it .jsonl" if error.msg == "Extra data" else ""
        )
        raise PreferenceDataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}){hint}"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PreferenceDataError(
            f"{path}: must hold a list of objects (one object a line is .jsonl)"
        )
    yield from rows


def _csv(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(2**31 - 1)  # responses are longer than csv's default allows
        reader = csv.DictReader(lines)
        for row in reader:
            if None in row or None in row.values():
                raise PreferenceDataError(
                    f"{path}, line {reader.line_num}: as many fields as the header has, please"
                )
            yield row


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise PreferenceDataError(f"{path}: not a parquet file") from error
    for batch in table.iter_batches():
        yield from batch.to_pylist()


def _data_set(name: str, split: str) -> Iterator[dict]:
    import datasets

    local = os.path.isdir(name)
    repository, _, config = (name, "", "") if local else name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:
        raise PreferenceDataError(
            f"{name!r} (split {split!r}) is no file, and `datasets` could not load it: "
            f"{type(error).__name__}: {error}"
        ) from error
    yield from map(dict, rows)


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
        rows: see the module's text.
        tokenizer: a transformers tokenizer.
        max_length: longest prompt + response in tokens; the end of longer responses is cut (as
            TRL's ``truncation_mode="keep_start"`` does).
        vocab_size: the model's; a token id beyond it is an error rather than a wrong embedding.

    Raises:
        PreferenceDataError: a row lacks a field or has an unknown form, messages without a chat
            template, a token id that the model does not have; names the row (counted from 0).
    """
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
    except (
        Exception
    ) as error:  # tokenizers raises plain exceptions, for words it does not know for example
        raise _UnusableRowError(f"the tokenizer refuses this row: {error}") from error
