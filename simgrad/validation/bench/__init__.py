"""Speed of every task beside the published procedure and what the machine allows.

Every contestant is timed in turn within each repeat, so that a noisy machine disturbs all alike;
ratios are medians over repeats of the within-repeat ratio, with their range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simgrad import store
from simgrad.validation.bench.tables import Growth, Route, growth, routes
from simgrad.validation.bench.tasks import TASKS, Measurement, measure
from simgrad.validation.bench.workbench import SHAPES, Config, Workbench, machine, set_up

__all__ = [
    "SHAPES",
    "TABLES",
    "TASKS",
    "Config",
    "Growth",
    "Measurement",
    "Route",
    "bench",
    "write",
]

TABLES: dict[str, Callable[[Workbench], list[Any]]] = {"routes": routes, "growth": growth}
"""What is measured of simgrad alone: the cost formula's choices, growth with pairs and tokens."""


def bench(
    config: Config,
    report: Callable[[Any], None] = lambda _: None,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, Any]:
    """Time tasks (and tables) on every length; returns a record that goes into JSON.

    Token kernels are timed on ``config.token_lengths``; data-set kernels and directional scores on
    the first of the lengths.

    Raises:
        ValueError: no such task.
    """
    for task in tasks:
        if task not in TASKS and task not in TABLES:
            raise ValueError(f"task {task!r}: choose from {', '.join([*TASKS, *TABLES])}")
    here = set_up(config)
    first = config.lengths[:1]
    lengths = {"tokens": (config.token_lengths,), "dataset": first, "directional": first}

    def reported(rows: Iterable[Any]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            report(row)
            found.append(asdict(row))
        return found

    measurements = (
        measure(task, here, prompt, response)
        for task in TASKS
        if task in tasks
        for prompt, response in lengths.get(task, config.lengths)
    )
    return {
        "config": asdict(config),
        "shape": asdict(here.policy.config),
        "provenance": machine(),
        "measurements": reported(measurements),
        **{name: reported(table(here)) for name, table in TABLES.items() if name in tasks},
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Save a record of :func:`bench` as JSON."""
    store.write(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
