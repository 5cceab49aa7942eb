"""Speed of every task beside the published procedure and what the machine allows.

Every contestant is timed in turn within each repeat, so that a noisy machine disturbs all alike;
ratios are medians over repeats of the within-repeat ratio, with their range.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simgrad.store import provenance
from simgrad.validation.bench.tables import Growth, Route, growth, routes
from simgrad.validation.bench.tasks import TASKS, Measurement, measure
from simgrad.validation.bench.workbench import SHAPES, Config, Workbench, set_up, version

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
    record: dict[str, Any] = {
        "config": asdict(config),
        "shape": asdict(here.policy.config),
        "provenance": {**provenance(), "cores": os.cpu_count(), "torch": version("torch")},
        "measurements": [],
    }
    lengths = {
        "tokens": (config.token_lengths,),
        "dataset": config.lengths[:1],
        "directional": config.lengths[:1],
    }
    for task in (task for task in TASKS if task in tasks):
        for prompt, response in lengths.get(task, config.lengths):
            found = measure(task, here, prompt, response)
            report(found)
            record["measurements"].append(asdict(found))
    for table in (name for name in TABLES if name in tasks):
        rows = TABLES[table](here)
        for row in rows:
            report(row)
        record[table] = [asdict(row) for row in rows]
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """Save a record of :func:`bench` as JSON."""
    import json

    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
