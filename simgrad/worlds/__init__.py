"""Small controllable settings in which the papers' effects happen in seconds: data and policies.

What was measured on them is in :mod:`simgrad.experiments`.

==================  ================================================================================
``verdicts``        preferring one refusal to another makes the model say yes
``suffix``          the longer the ending that both responses share, the more the chosen one falls
``refusals``        safety tuning on pairs of two refusals makes the model comply; what prevents it
``percentiles``     which score predicts Δlog π of the chosen response, alone and in joint training
``squeezing``       a token pushed down feeds the likeliest; NTHR on a group of both signs
``linear``          linear-softmax models: one token and many, the settings of Yuan et al.
``unconstrained``   unconstrained features: one token and many, the settings of Razin et al.
==================  ================================================================================
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from simgrad.worlds.world import Pretraining, World, pretrained, pretrained_anew

__all__ = ["Pretraining", "World", "get", "names", "pretrained", "pretrained_anew"]

_WORLDS = {
    "verdicts": "Verdicts",
    "suffix": "Suffix",
    "refusals": "Refusals",
    "percentiles": "Percentiles",
    "squeezing": "Squeezing",
    "linear": "Linear",
    "unconstrained": "Unconstrained",
}


def names() -> list[str]:
    """Names of all worlds.

    >>> "verdicts" in names()
    True
    """
    return list(_WORLDS)


def get(name: str, **knobs: Any) -> World:
    """A world by name, with other values of some knobs.

    >>> get("verdicts", overlap=0.5).overlap
    0.5

    Raises:
        ValueError: unknown name or knob, or a value of the wrong kind.
    """
    if name not in _WORLDS:
        near = difflib.get_close_matches(name, _WORLDS, 1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no world {name!r};{hint} there are: {', '.join(_WORLDS)}")
    module = importlib.import_module(f"simgrad.worlds.{name}")
    return getattr(module, _WORLDS[name])().with_knobs(**knobs)
