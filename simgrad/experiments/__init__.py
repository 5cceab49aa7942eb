"""What the papers measured, on the worlds of :mod:`simgrad.worlds`: tables with claims.

Each module has the name of a world and one entry point, ``run(world, seeds) -> Findings``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from simgrad.experiments.comparison import Comparison, compare, predictor_table
from simgrad.experiments.findings import Claim, Findings, Interval, Table, interval, listing
from simgrad.worlds.world import World

__all__ = [
    "Claim",
    "Comparison",
    "Findings",
    "Interval",
    "Table",
    "compare",
    "interval",
    "listing",
    "predictor_table",
    "run",
]


def run(world: World, seeds: Sequence[int]) -> Findings:
    """Measure what the world is for, over seeds: the experiment that has the world's name.

    Raises:
        ValueError: no experiment has been written for this world.
    """
    module = f"{__name__}.{world.name}"
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"no experiment is written for the world {world.name!r}")
    return importlib.import_module(module).run(world, seeds)
