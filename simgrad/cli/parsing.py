"""NAME=VALUE arguments."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

__all__ = ["assignments", "value_of"]


def assignments(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Names and values of arguments such as ``beta=0.1``.

    >>> assignments(["beta=0.1", "steps=200", "lengths=(0,4)", "tied=true", "rule=softer"], "--set")
    {'beta': 0.1, 'steps': 200, 'lengths': (0, 4), 'tied': True, 'rule': 'softer'}

    Raises:
        ValueError: no equals sign, or a name that is given twice.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} takes NAME=VALUE, got {text!r}")
        if name in given:
            raise ValueError(f"{option}: {name} is given twice")
        given[name] = value_of(value)
    return given


def value_of(text: str) -> Any:
    """A number, truth value, tuple or, failing these, the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
