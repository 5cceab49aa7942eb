"""Arrays on disk: one npz file with a JSON header, written at once; the cache folder; fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["cache_folder", "digest", "load_arrays", "save_arrays"]

_HEADER = "__header__"


def cache_folder() -> Path:
    """Where pretrained worlds and compiled programs are kept: $SIMGRAD_CACHE, or ~/.cache/simgrad."""
    return Path(os.environ.get("SIMGRAD_CACHE", Path.home() / ".cache" / "simgrad"))


def save_arrays(path: str | Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write named arrays and a JSON header to an npz file; a reader never sees half of it."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{str(path)!r}: arrays are written as .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    plain = {name: np.asarray(x) for name, x in arrays.items()}
    # numpy cannot write bfloat16: its bytes go as uint16, and the header says what they are
    narrow = {name: str(x.dtype) for name, x in plain.items() if x.dtype.kind == "V"}
    plain = {name: x.view(np.uint16) if name in narrow else x for name, x in plain.items()}
    text = json.dumps({"header": dict(header), "narrow": narrow}, sort_keys=True)
    try:
        everything: dict[str, Any] = {_HEADER: np.array(text), **plain}
        np.savez(temporary, **everything)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header that :func:`save_arrays` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of simgrad, or damaged.
    """
    try:
        with np.load(Path(path)) as file:
            arrays = {name: file[name] for name in file.files}
        text = json.loads(str(arrays.pop(_HEADER)))
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} is not a file that simgrad wrote, or is damaged: {error}"
        ) from None
    for name, dtype in text["narrow"].items():
        arrays[name] = arrays[name].view(jax.numpy.dtype(dtype))
    return arrays, text["header"]


def digest(*things: Any) -> str:
    """Fingerprint of configurations and trees of arrays; equal things have equal ones in every process.

    >>> import numpy as np
    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)}), digest(1) == digest(2)
    (True, False)
    """
    sha = hashlib.sha256()
    for thing in things:
        for path, leaf in jax.tree_util.tree_leaves_with_path(thing, is_leaf=lambda x: x is None):
            sha.update(jax.tree_util.keystr(path).encode())
            if isinstance(leaf, jax.Array | np.ndarray):
                array = np.asarray(leaf)
                sha.update(f"{array.dtype}{array.shape}".encode())
                sha.update(np.ascontiguousarray(array).tobytes())
            else:
                sha.update(_text(leaf).encode())
    return sha.hexdigest()[:16]


def _text(leaf: Any) -> str:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = {f.name: _text(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)}
        return f"{type(leaf).__qualname__}{sorted(fields.items())}"
    return repr(leaf)
