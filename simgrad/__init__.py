"""simgrad: what preference optimisation does to the probability of each response, and of the rest.

>>> import simgrad
>>> policy = simgrad.load("path/to/checkpoint")                    # doctest: +SKIP
>>> table = simgrad.score(policy, "preferences.jsonl")             # doctest: +SKIP
>>> table["regime"][:3]                                            # doctest: +SKIP
>>> simgrad.write_report(table, "scores.report.html", policy)      # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simgrad.bridge import Policy, ScoreTable, load, save, score
    from simgrad.report.page import write_report

__version__ = "0.1.0"
__all__ = ["Policy", "ScoreTable", "load", "save", "score", "write_report"]
_MODULES = tuple(
    "bridge dynamics experiments models objectives pairs report store theory tree worlds".split()
)


def __dir__() -> list[str]:
    """Names for completion, those included that are imported when first asked for."""
    return sorted([*globals(), *__all__, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import the bridge when it is first asked for, so that ``import simgrad`` is quick."""
    if name == "write_report":
        return importlib.import_module("simgrad.report.page").write_report
    if name in __all__:
        return getattr(importlib.import_module("simgrad.bridge"), name)
    if name in _MODULES:
        return importlib.import_module(f"simgrad.{name}")
    raise AttributeError(f"module 'simgrad' has no attribute {name!r}")
