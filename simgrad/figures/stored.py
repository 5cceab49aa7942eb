"""Results of figures on disk: in the cache, and every plotted number beside the figure as JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import simgrad
from simgrad.store import cache_folder, digest, load_arrays, provenance, save_arrays

__all__ = ["NotDrawn", "computed", "plain", "to_json"]


class NotDrawn(ValueError):
    """A figure that needs something that was not given; the text says what."""


def computed(
    compute: Callable[[Any], Any], config: Any, result: type, fresh: bool = False, *inputs: Any
) -> Any:
    """``compute(config)``, taken from the cache where the same was computed before.

    The key holds the configuration, ``inputs`` (what was read from files), versions and device, the
    source of the library below the figures, and that of the figure's module, with those whose
    functions it takes, up to ``def plot``: redrawing, and other words, are free.
    ``result`` is a dataclass of arrays and plain values.
    """
    name = compute.__module__.rpartition(".")[2]
    path = cache_folder() / "figures" / f"{name}-{_key(compute, result, config, inputs)}.npz"
    if path.exists() and not fresh:
        arrays, values = load_arrays(path)
        return result(**arrays, **{name: _tuples(value) for name, value in values.items()})
    found = compute(config)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    save_arrays(path, arrays, {name: value for name, value in fields.items() if name not in arrays})
    return found


def _key(compute: Callable[[Any], Any], result: type, config: Any, inputs: tuple[Any, ...]) -> str:
    package = Path(simgrad.__file__).parent
    above = {package / "cli", package / "figures"}
    sources = [
        p.read_text(encoding="utf-8")
        for p in sorted(package.rglob("*.py"))
        if not above & set(p.parents)
    ]
    modules = [inspect.getmodule(thing) for thing in (compute, result)]
    modules += [
        inspect.getmodule(f) for m in modules for f in vars(m).values() if inspect.isfunction(f)
    ]
    files = sorted(
        {str(m.__file__) for m in modules if m is not None and "simgrad.figures" in m.__name__}
    )
    own = [Path(file).read_text(encoding="utf-8").partition("\ndef plot(")[0] for file in files]
    own = [_CAPTIONS.sub("", text) for text in own]
    where = {name: value for name, value in provenance().items() if name != "git_revision"}
    versions = [metadata.version(package) for package in ("jaxlib", "numpy", "optax", "scipy")]
    return digest(config, list(inputs), where, versions, own, sources)


_CAPTIONS = re.compile(r"^(TITLE|CAPTION|BEARS_ON) = (\(.*?^\)|.*?$)", re.MULTILINE | re.DOTALL)
"""Words about a figure, which do not change its numbers."""


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
