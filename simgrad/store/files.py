"""Files that are always whole, arrays with a header, and the cache folder."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simgrad.errors import InputError

_HEADER = "__header__"


def cache_folder() -> Path:
    """Folder of pretrained worlds and compiled programs: $SIMGRAD_CACHE or ~/.cache/simgrad."""
    return Path(os.environ.get("SIMGRAD_CACHE", Path.home() / ".cache" / "simgrad"))


def write(path: str | Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write a file at once: a reader finds the old one or the new one, never half of one.

    Args:
        path: the file; its folder is made if need be.
        content: text (UTF-8), bytes, or a function that writes to the path that it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: str | Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write named arrays and a JSON header to an npz file, at once.

    Raises:
        ValueError: another ending than .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{str(path)!r}: arrays are written as .npz")
    plain = {name: np.asarray(x) for name, x in arrays.items()}
    # numpy cannot write bfloat16: its bytes go as uint16, and the header says what they are
    narrow = {name: str(x.dtype) for name, x in plain.items() if x.dtype.kind == "V"}
    plain = {name: x.view(np.uint16) if name in narrow else x for name, x in plain.items()}
    text = json.dumps({"header": dict(header), "narrow": narrow}, sort_keys=True)
    everything: dict[str, Any] = {_HEADER: np.array(text), **plain}
    write(path, lambda temporary: np.savez(temporary, **everything))


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header that :func:`save_arrays` wrote.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a file of simgrad, or damaged.
    """
    try:
        with Path(path).open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        text = json.loads(str(arrays.pop(_HEADER)))
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{path} is not a file that simgrad wrote, or is damaged: {error}"
        ) from None
    for name, dtype in text["narrow"].items():
        arrays[name] = arrays[name].view(jax.numpy.dtype(dtype))
    return arrays, text["header"]


def write_parquet(
    path: str | Path, columns: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> None:
    """Write columns and a JSON header (key ``simgrad`` of the file's metadata), at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    meta = {b"simgrad": json.dumps(header, sort_keys=True).encode()}
    table = pa.table(dict(columns)).replace_schema_metadata(meta)
    write(path, lambda temporary: pq.write_table(table, temporary))
