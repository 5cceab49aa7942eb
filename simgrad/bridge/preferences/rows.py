"""Preference rows from files, the Hub and worlds."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from simgrad.bridge.checkpoints.worlds import PREFIX, world_rows
from simgrad.errors import InputError

Row = Mapping[str, Any]


class PreferenceDataError(InputError):
    """Preference data that cannot be read, with the file, line or row at fault."""


class Rows(list[dict[str, Any]]):
    """Rows that know where they were read; a slice or a changed copy is a plain list.

    Attributes:
        source: file, folder, Hub name or world.
        split: of a folder or Hub data set.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], source: str, split: str) -> None:
        super().__init__(rows)
        self.source, self.split = source, split


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
    require_limit(limit)
    if str(source).startswith(PREFIX):
        return Rows(world_rows(str(source), limit), str(source), split)
    path = Path(source)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.is_file():
        if path.suffix not in readers:
            raise PreferenceDataError(
                f"{path}: unknown ending {path.suffix!r}; there are: {', '.join(readers)}"
            )
        rows = _read(path, readers[path.suffix], limit)
    elif path.suffix in readers:
        raise PreferenceDataError(f"{path}: no such file")
    else:
        rows = list(islice(_data_set(str(source), split), limit))
    if not rows:
        raise PreferenceDataError(f"{source}: no rows")
    return Rows(rows, str(source), split)


def require_limit(limit: int | None) -> None:
    """Refuse to read less than one row."""
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least one row is needed")


def _read(path: Path, reader: Callable[[Path], Iterator[dict]], limit: int | None) -> list[dict]:
    try:
        return list(islice(reader(path), limit))
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        remedy = (
            f"unpack it first (gunzip < {path.name} > rows{path.suffix})"
            if gzipped
            else "save it as UTF-8"
        )
        what = "compressed with gzip" if gzipped else f"not text in UTF-8 ({error.reason})"
        raise PreferenceDataError(f"{path}: {what}: {remedy}") from error
    except csv.Error as error:
        raise PreferenceDataError(f"{path}: not a CSV file ({error})") from error


def _parsed(where: str, text: str) -> Any:
    """JSON; ``where`` names the text in errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise PreferenceDataError(
            f"{where}: nested too deeply for a preference row: keep prompt, chosen and rejected"
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise PreferenceDataError(f"{where}: not JSON that can be read ({error})") from error


def _jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _parsed(f"{path}, line {number}", line)
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
        rows = _parsed(str(path), path.read_text(encoding="utf-8-sig"))
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
                    f"{path}, line {reader.line_num}: it has not as many fields as the header"
                )
            yield row


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
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
