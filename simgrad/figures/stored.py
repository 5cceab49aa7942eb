"""Results of figures on disk: in the cache, and every plotted number beside the figure as JSON."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from simgrad.store import cache_folder, code, digest, identity, load_arrays, save_arrays
from simgrad.worlds.world import pretrained_anew


class NotDrawn(ValueError):
    """A figure that needs something that was not given; the text says what."""


def computed(
    compute: Callable[[Any], Any], config: Any, result: type, fresh: bool = False, *inputs: Any
) -> Any:
    """``compute(config)``, taken from the cache where the same was computed before.

    Its name holds the configuration, ``inputs`` (what was read from files), the code that computes,
    versions and device. Drawing and words are free: of the figure's module, only what stands before
    ``plot`` counts, without its caption. ``fresh`` computes again, policies of worlds included.
    ``result`` is a dataclass of arrays and plain values.
    """
    name = compute.__module__.rpartition(".")[2]
    made_by = identity(
        __name__, config=config, inputs=inputs, computation=_code(compute.__module__)
    )
    path = cache_folder() / "figures" / f"{name}-{digest(made_by)}.npz"
    if path.exists() and not fresh:
        arrays, values = load_arrays(path)
        return result(**arrays, **{name: _tuples(value) for name, value in values.items()})
    with pretrained_anew() if fresh else contextlib.nullcontext():
        found = compute(config)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    save_arrays(path, arrays, {name: value for name, value in fields.items() if name not in arrays})
    return found


_WORDS = {"TITLE", "CAPTION", "BEARS_ON", "__all__"}


def _code(module: str) -> str:
    """Name of what a figure's module computes: its code before ``plot``, and what it imports."""
    found = []
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.FunctionDef) and node.name == "plot":
            break
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in _WORDS:
            continue
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("simgrad."):
            name = str(node.module)
            if name.startswith(("simgrad.drawing", __name__)):
                continue
            found.append(_code(name) if name.startswith("simgrad.figures") else code(name))
        found.append(ast.dump(node))
    return digest(found)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries for JSON; what is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool | None):
        return value
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def to_json(record: dict[str, Any]) -> str:
    """One line an entry, and one a field of ``data``."""
    lines = [
        f" {json.dumps(k)}: {json.dumps(plain(v), ensure_ascii=False)}"
        for k, v in record.items()
        if k != "data"
    ]
    data = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}"
        for k, v in plain(record["data"]).items()
    )
    return "{\n" + ",\n".join([*lines, ' "data": {\n' + data + "\n }"]) + "\n}\n"
