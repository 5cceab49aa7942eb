"""What names a result, and where a number came from."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from simgrad.errors import InputError
from simgrad.store.content import PACKAGE, digest, is_record, is_users
from simgrad.store.source import code

_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "scipy")  # what numbers depend on
_READABLE = 100  # characters of a part of an identity that is kept as text


class RunMismatchError(InputError):
    """Results of another run are in the way."""


def identity(computed_by: str | Sequence[str], **parts: Any) -> dict[str, str]:
    """What names a result: each part that makes it, the code that computes it, and versions.

    A part that is short is kept as readable text. A configuration that is long is split by its
    fields, and everything else stands as the :func:`digest` of its full content.

    Args:
        computed_by: module or modules whose code makes the result, see :func:`code`.
        parts: what goes into it: configuration, weights, data, recipe ...

    >>> found = identity("simgrad.tree", learning_rate=0.1, data=jax.numpy.zeros(3))
    >>> found["learning_rate"], len(found["data"])
    ('0.1', 16)
    >>> " ".join(sorted(found))
    'code data device jax jaxlib learning_rate numpy optax scipy simgrad x64'
    """
    where = provenance()
    modules = [computed_by] if isinstance(computed_by, str) else computed_by
    return {
        **described(**parts),
        "code": code(*modules),
        **{name: str(where[name]) for name in ("simgrad", *_LIBRARIES, "device", "x64")},
    }


def described(**parts: Any) -> dict[str, str]:
    """The parts of an :func:`identity` that are given, each as text or as a digest."""
    found = {}
    for name, part in parts.items():
        found |= _described(name, part)
    return found


def _described(name: str, part: Any) -> dict[str, str]:
    text: str = part if type(part) is str else repr(part)
    if len(text) <= _READABLE and _is_plain(part):
        return {name: f"{text} {digest(part)}" if is_users(part) else text}
    if not is_record(part) or is_users(part):
        return {name: digest(part)}
    record: Any = part
    fields = {f"{name}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(record)}
    return described(**fields)


def _is_plain(part: Any) -> bool:
    """Whether the text of a part says all that it holds."""
    if is_record(part):
        return all(_is_plain(getattr(part, field.name)) for field in dataclasses.fields(part))
    leaves = jax.tree.leaves(part, is_leaf=lambda x: x is None)
    if len(leaves) == 1 and leaves[0] is part:
        return isinstance(part, str | int | float | None)
    return all(map(_is_plain, leaves))


def differences(
    one: Mapping[str, str], other: Mapping[str, str], where: tuple[str, str] = ("there", "now")
) -> str:
    """The parts in which two identities differ, for a sentence; empty where they are the same.

    >>> differences({"objective": "DPO()", "data": "a"}, {"objective": "IPO()", "data": "a"})
    'objective: DPO() there, IPO() now'
    """
    differ = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))
    return "; ".join(
        f"{k}: {one.get(k, 'nothing')} {where[0]}, {other.get(k, 'nothing')} {where[1]}"
        for k in differ
    )


def require_same(path: str | Path, there: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to mix two runs.

    Raises:
        RunMismatchError: the identities differ; it names the parts, and what to do.
    """
    if differ := differences(there, now):
        raise RunMismatchError(
            f"{path} belongs to another run ({differ}). Choose another --out or delete it"
        )


def provenance() -> dict[str, Any]:
    """Versions of simgrad and of what its numbers depend on, device kind and git revision."""
    return {
        "simgrad": metadata.version("simgrad"),
        "git_revision": _git_revision(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


@functools.cache
def _git_revision() -> str | None:
    """Revision that last changed the package, with a plus sign if it has local changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        revision = git("log", "-1", "--format=%H", "--", str(PACKAGE))
        return revision + ("+" if git("status", "--porcelain", "--", str(PACKAGE)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None
