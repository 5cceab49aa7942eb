"""NAME=VALUE arguments."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from simgrad.errors import InputError


def assignments(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Names and values of arguments such as ``beta=0.1``.

    >>> assignments(["beta=0.1", "steps=200", "lengths=(0,4)", "tied=true", "rule=softer"], "--set")
    {'beta': 0.1, 'steps': 200, 'lengths': (0, 4), 'tied': True, 'rule': 'softer'}

    Raises:
        InputError: no equals sign, or a name that is given twice.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} takes NAME=VALUE, got {text!r}")
        if name in given:
            raise InputError(f"{option}: {name} is given twice")
        given[name] = value_of(value)
    return given


def mesh_axes(text: str) -> dict[str, int]:
    """Sizes of a mesh's axes; one that is not given has size 1.

    >>> mesh_axes("data=2,model=4"), mesh_axes("model=2")
    ({'data': 2, 'model': 4}, {'data': 1, 'model': 2})

    Raises:
        InputError: another axis, or a size that is no positive number.
    """
    given = assignments(text.split(","), "--mesh")
    if unknown := sorted(set(given) - {"data", "model"}):
        raise InputError(
            f"--mesh has no axis {unknown[0]!r}; there are data and model, as in --mesh "
            "data=2,model=2"
        )
    for name, size in given.items():
        if type(size) is not int or size < 1:
            raise InputError(f"--mesh {name}={size}: a positive number of devices is needed")
    return {"data": 1, "model": 1} | given


def value_of(text: str) -> Any:
    """A number, truth value, tuple or, failing these, the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
