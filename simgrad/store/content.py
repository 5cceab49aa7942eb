"""Names of the full content of arrays, configurations and functions: ``digest``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGE = Path(__file__).parents[1]
"""The folder of simgrad."""

_SLAB = 2**26  # bytes of an array that are brought to the host at once


def digest(*things: Any) -> str:
    """Name of the full content of trees of arrays, configurations, functions and texts.

    Equal things have equal names in every process and on every mesh. All values count. Of a
    function (an optimizer's update, say), its code and everything that it has closed over count; of
    what a user wrote, also the functions and values that its code calls by name, and the methods of
    its class. Arrays of JAX never change, so that each is read once only.

    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)}), digest(1) == digest(2)
    (True, False)
    """
    return _digest(things, ())


def _digest(things: Any, within: tuple[int, ...]) -> str:
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(things, is_leaf=lambda x: x is None):
        sha.update(f"{jax.tree_util.keystr(path)}={_content(leaf, within)};".encode())
    return sha.hexdigest()[:16]


def is_record(thing: Any) -> bool:
    """Whether this is an object of a dataclass."""
    return dataclasses.is_dataclass(thing) and not isinstance(thing, type)


@functools.cache
def _is_users(module: str) -> bool:
    """Whether a module is a user's: neither of a library nor of simgrad, whose code has a name."""
    file = getattr(sys.modules.get(module), "__file__", None)
    libraries = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    there = Path(file or "/").resolve()
    return module == "__main__" or (
        file is not None and not any(there.is_relative_to(x) for x in (PACKAGE, *libraries))
    )


def is_users(thing: Any) -> bool:
    """Whether a user wrote this function, or the class of this object."""
    return _is_users(getattr(thing, "__module__", None) or "")  # of some builtins it is None


def _content(leaf: Any, within: tuple[int, ...]) -> str:
    """Text that says all about a leaf; ``within`` are the things it is part of, for cycles."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return _array_digest(leaf)
    if isinstance(leaf, str | bytes | int | float | complex | np.generic | None):
        return repr(leaf)
    if id(leaf) in within:
        return f"cycle {within.index(id(leaf))}"
    inside = (*within, id(leaf))
    if isinstance(leaf, type | types.ModuleType | types.BuiltinFunctionType | np.ufunc | np.dtype):
        return f"{getattr(leaf, '__module__', '')}.{getattr(leaf, '__name__', leaf)}" + (
            _digest(_written(leaf), inside) if isinstance(leaf, type | types.ModuleType) else ""
        )
    if isinstance(leaf, types.CodeType):
        return f"{leaf.co_code!r}{leaf.co_names}{_digest(leaf.co_consts, inside)}"
    if isinstance(leaf, functools.partial):
        parts: Any = (leaf.func, leaf.args, leaf.keywords)
    elif is_record(leaf):
        parts = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    elif callable(leaf) and hasattr(inspect.unwrap(leaf), "__code__"):
        f: Any = inspect.unwrap(leaf)
        cells = [cell.cell_contents for cell in f.__closure__ or ()]
        bound = getattr(f, "__self__", None)
        known = f.__globals__ if is_users(f) else {}
        called = {name: known[name] for name in sorted(_names(f.__code__)) if name in known}
        parts = (f.__code__, f.__defaults__, f.__kwdefaults__, cells, bound, called)
        return f"{f.__module__}.{f.__qualname__}{_digest(parts, inside)}"
    elif isinstance(leaf, set | frozenset):
        parts = sorted(_content(x, inside) for x in leaf)
    else:
        text = repr(leaf)
        parts = text if " at 0x" not in text else vars(leaf) if hasattr(leaf, "__dict__") else ()
    kind = type(leaf)
    return f"{kind.__module__}.{kind.__qualname__}{_digest((parts, _written(kind)), inside)}"


def _names(code: types.CodeType) -> set[str]:
    """Names that a function's code reads from its module, those of functions within it included."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def _written(thing: type | types.ModuleType) -> Any:
    """What a user wrote in a class and the classes it extends, or in a module; () of others."""
    if isinstance(thing, types.ModuleType):
        file = getattr(thing, "__file__", None)
        there = _is_users(thing.__name__) and file is not None and Path(file).is_file()
        return Path(file).read_bytes() if there and file is not None else ()
    own = [kind for kind in thing.__mro__ if is_users(kind)]
    return [{n: _plain(x) for n, x in sorted(vars(kind).items()) if _is_code(x)} for kind in own]


def _is_code(x: Any) -> bool:
    return inspect.isfunction(x) or isinstance(x, staticmethod | classmethod | property)


def _plain(x: Any) -> Any:
    """The functions in what a class holds."""
    if isinstance(x, property):
        return (x.fget, x.fset)
    return x.__func__ if isinstance(x, staticmethod | classmethod) else x


_KNOWN: dict[int, tuple[weakref.ref, str]] = {}


def _array_digest(x: jax.Array | np.ndarray) -> str:
    key = id(x)
    if key in _KNOWN and _KNOWN[key][0]() is x:
        return _KNOWN[key][1]
    sha = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    for slab in _slabs(x):
        sha.update(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
    found = sha.hexdigest()
    if isinstance(x, jax.Array):
        _KNOWN[key] = (weakref.ref(x, lambda _: _KNOWN.pop(key, None)), found)
    return found


def _slabs(x: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """All bytes of an array in order, wherever its parts lie, without a copy of it on the host."""
    whole = isinstance(x, np.ndarray) or x.is_fully_addressable
    if isinstance(x, np.ndarray) or (whole and x.nbytes <= _SLAB) or not x.size:
        yield np.asarray(x)
        return
    from jax.experimental.multihost_utils import process_allgather

    rows = min(len(x), max(1, _SLAB * len(x) // x.nbytes))
    for start in range(0, len(x), rows):
        first = min(start, len(x) - rows)  # slices of one size: one program
        part = jax.lax.dynamic_slice_in_dim(x, first, rows)
        host = np.asarray(part if whole else process_allgather(part, tiled=True))
        yield host[start - first :]
