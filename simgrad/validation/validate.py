"""Theory held against measured training steps: ``simgrad validate``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from simgrad.store import provenance
from simgrad.validation.agreement import (
    against_reference,
    between_devices,
    repeated,
    routes,
    runs,
    updates,
)
from simgrad.validation.cells import Base, Cell, alone, base_of, together
from simgrad.validation.checks import Check
from simgrad.validation.closed_forms import closed_forms
from simgrad.validation.grid import QUICK, TABLES, Arithmetic, Grid
from simgrad.validation.statements import Statement, statements
from simgrad.validation.subjects import subject, twin

Report = Callable[[str, int, int], None]


class Found(NamedTuple):
    """What one piece of work gives."""

    piece: str
    cells: list[Cell]
    checks: list[Check]


Piece = Callable[[], Found]
Part = Callable[[Grid, Base, Base, dict[str, str], Arithmetic], Iterable[Any]]


@dataclass(frozen=True)
class Validation:
    """What was found.

    Attributes:
        grid: what was asked.
        statements: what is claimed, and whether it holds.
        cells: one a setting.
        checks: one an identity.
        provenance: versions, devices, flags, seed, git revision.
    """

    grid: Grid
    statements: tuple[Statement, ...]
    cells: tuple[Cell, ...]
    checks: tuple[Check, ...]
    provenance: dict[str, Any]

    @property
    def failed(self) -> tuple[Statement, ...]:
        """Statements that do not hold."""
        return tuple(s for s in self.statements if s.holds is False)

    def record(self) -> dict[str, Any]:
        """Everything in plain values."""
        return {
            "grid": self.grid.record(),
            "statements": [dataclasses.asdict(s) for s in self.statements],
            "cells": [dataclasses.asdict(c) for c in self.cells],
            "checks": [{**dataclasses.asdict(c), "holds": c.holds} for c in self.checks],
            "provenance": self.provenance,
        }

    def save(self, path: Path) -> None:
        """Write :meth:`record` as JSON (numbers that are not finite as null)."""
        text = json.dumps(_finite(self.record()), indent=1, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x


def validate(grid: Grid = QUICK, report: Report = lambda what, done, of: None) -> Validation:
    """Test predictions against steps, closed forms against autodiff, devices against each other.

    Every model in every arithmetic is a piece of work; pieces are spread over the local devices,
    two at a time on a single one so that tracing and compiling overlap. Double precision is
    switched on for the duration.

    Args:
        grid: what to validate.
        report: called with (piece, pieces done, pieces in all).

    Raises:
        ValueError: JAX runs without a CPU backend, which the float64 reference needs; as in
            :class:`Grid`.
    """
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "the float64 reference runs on the CPU: set JAX_PLATFORMS to include cpu, or unset it"
        ) from error
    devices = jax.local_devices()
    with jax.enable_x64(True):
        for (
            name
        ) in grid.subjects:  # unreadable checkpoints and data are found before anything is compiled
            if name == grid.model:
                subject(name, grid, "float32")
    pieces = _pieces(grid, devices, host)
    workers = max(len(devices), min(2, os.cpu_count() or 1))
    cells: list[Cell] = []
    checks: list[Check] = []
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(piece) for piece in pieces]
        try:
            for done, job in enumerate(jobs, 1):
                found = job.result()
                cells += found.cells
                checks += found.checks
                report(found.piece, done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    if not cells:
        raise ValueError("no setting moves any pair: name other objectives, models or dtypes")
    return Validation(
        grid, tuple(statements(cells, checks)), tuple(cells), tuple(checks), _provenance(grid)
    )


def _pieces(grid: Grid, devices: Sequence[Any], host: Any) -> list[Piece]:
    """All pieces of work, ordered so that no two with the same programs run at the same time."""

    def of(name: str, part: Part, exact: bool) -> list[Piece]:
        return [
            _piece(
                grid,
                name,
                arithmetic,
                devices[(grid.subjects.index(name) + i) % len(devices)],
                host,
                part,
            )
            for i, arithmetic in enumerate(grid.arithmetics(devices[0].platform, name))
            if (arithmetic.dtype == "float64") == exact
        ]

    tables = [name for name in grid.subjects if name in TABLES]
    networks = [name for name in reversed(grid.subjects) if name not in TABLES]
    pieces = [piece for name in networks for piece in of(name, _cells, True)]
    pieces += [_closed(grid, device) for device in {d.device_kind: d for d in devices}.values()]
    pieces += [
        p
        for name in tables
        for exact in (True, False)
        for part in (_cells, _checks)
        for p in of(name, part, exact)
    ]
    for part, exact in ((_checks, True), (_cells, False), (_checks, False)):
        pieces += [piece for name in networks for piece in of(name, part, exact)]
    if len(devices) > 1:
        pieces.append(
            _piece(grid, grid.subjects[-1], Arithmetic("float64"), devices[0], host, _spread)
        )
    return pieces


def _closed(grid: Grid, device: Any) -> Piece:
    def work() -> Found:
        with (
            jax.enable_x64(True),
            jax.default_device(device),
            jax.default_matmul_precision("highest"),
        ):
            return Found("closed forms", [], closed_forms(grid.seed, device.device_kind))

    return work


def _piece(
    grid: Grid, name: str, arithmetic: Arithmetic, device: Any, host: Any, part: Part
) -> Piece:
    """One part of what is found for one model in one arithmetic on one device."""

    def work() -> Found:
        where = {"arithmetic": str(arithmetic), "device": device.device_kind}
        names = tuple(
            dict.fromkeys(("dpo", *grid.objective_names))
        )  # the identities are about steps of DPO
        with jax.enable_x64(True):
            with jax.default_device(device), jax.default_matmul_precision(arithmetic.precision):
                base = base_of(subject(name, grid, arithmetic.dtype), names)
            reference = base
            if (arithmetic.dtype, device.platform) != ("float64", "cpu"):
                with jax.default_device(host), jax.default_matmul_precision("highest"):
                    wide = twin(base.subject)
                    if device != host:
                        wide = dataclasses.replace(wide, theta=jax.device_put(wide.theta, host))
                    reference = base_of(wide, names)
            with jax.default_device(device), jax.default_matmul_precision(arithmetic.precision):
                found = [x for x in part(grid, base, reference, where, arithmetic) if x is not None]
        cells, checks = (
            [x for x in found if isinstance(x, Cell)],
            [x for x in found if isinstance(x, Check)],
        )
        return Found(f"{name}, {arithmetic}", cells, checks)

    return work


def _cells(
    grid: Grid, base: Base, reference: Base, where: dict[str, str], arithmetic: Arithmetic
) -> Iterable[Any]:
    for objective in grid.objective_names:
        yield alone(base, reference, objective, grid, where)
    for objective, name in grid.joint_cells():
        yield together(base, reference, objective, name, grid, where)


def _checks(
    grid: Grid, base: Base, reference: Base, where: dict[str, str], arithmetic: Arithmetic
) -> Iterable[Any]:
    exact = arithmetic.dtype == "float64"
    judged, rates = arithmetic.precision == "highest", grid.learning_rates or grid.rates
    yield from against_reference(base, reference, where, judged, grid.thorough)
    yield from repeated(base, rates, where)
    if exact and (
        grid.thorough or base.subject.name not in TABLES or grid.subjects == (base.subject.name,)
    ):
        yield from routes(base, rates, where)
        yield from updates(base, grid.optimizers, where)
        yield from runs(base, where, ("sgd", "adam") if grid.thorough else ("adam",))


def _spread(
    grid: Grid, base: Base, reference: Base, where: dict[str, str], arithmetic: Arithmetic
) -> Iterable[Any]:
    yield from between_devices(base, where, jax.local_devices())


def _provenance(grid: Grid) -> dict[str, Any]:
    return {
        **provenance(),
        "x64": True,
        **{package: metadata.version(package) for package in ("jaxlib", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "devices": [d.device_kind for d in jax.local_devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seed": grid.seed,
        "arguments": sys.argv[1:],
    }
