"""Theory held against measured training steps: ``simgrad validate``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simgrad.store import provenance, write
from simgrad.validation.agreement import between_devices, identities
from simgrad.validation.cells import Cell, alone, together
from simgrad.validation.checks import Check
from simgrad.validation.closed_forms import closed_forms
from simgrad.validation.grid import QUICK, TABLES, Arithmetic, Grid
from simgrad.validation.statements import Statement, statements
from simgrad.validation.subjects import Base, base_of, subject, twin

Report = Callable[[str, int, int], None]
Found = list[Cell | Check]
Piece = tuple[str, Callable[[], Found]]
"""What a piece of work is about, and the work."""
Part = Callable[[Grid, Base, Base], Iterable[Cell | Check | None]]
"""Cells or checks of a model in one arithmetic, and of its twin in float64."""


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
    def judged(self) -> tuple[Statement, ...]:
        """Statements that hold or fail; the others are only reported."""
        return tuple(s for s in self.statements if s.holds is not None)

    @property
    def failed(self) -> tuple[Statement, ...]:
        """Statements that do not hold."""
        return tuple(s for s in self.judged if not s.holds)

    def record(self) -> dict[str, Any]:
        """Everything in plain values."""
        return {
            **dataclasses.asdict(self),
            "grid": self.grid.record(),
            "checks": [{**dataclasses.asdict(c), "holds": c.holds} for c in self.checks],
        }

    def save(self, path: Path) -> None:
        """Write :meth:`record` as JSON (numbers that are not finite as null)."""
        text = json.dumps(_finite(self.record()), indent=1, sort_keys=True, ensure_ascii=False)
        write(path, text + "\n")


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
    if grid.model:  # unreadable checkpoints and data are found before anything is compiled
        with jax.enable_x64(True):
            subject(grid.model, grid, "float32")
    workers = max(len(devices), min(2, os.cpu_count() or 1))
    found: Found = []
    with ThreadPoolExecutor(workers) as pool:
        jobs = [(name, pool.submit(work)) for name, work in _pieces(grid, devices, host)]
        try:
            for done, (name, job) in enumerate(jobs, 1):
                found += job.result()
                report(name, done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    cells = tuple(x for x in found if isinstance(x, Cell))
    checks = tuple(x for x in found if isinstance(x, Check))
    if not cells:
        raise ValueError("no setting moves any pair: name other objectives, models or dtypes")
    return Validation(grid, tuple(statements(cells, checks)), cells, checks, _provenance(grid))


def _pieces(grid: Grid, devices: Sequence[Any], host: Any) -> list[Piece]:
    """All pieces of work, ordered so that no two with the same programs run at the same time."""

    def piece(name: str, arithmetic: Arithmetic, part: Part, device: Any) -> Piece:
        work = functools.partial(_work, grid, name, arithmetic, part, device, host)
        return f"{name}, {arithmetic}", work

    def of(name: str, part: Part, exact: bool) -> list[Piece]:
        return [
            piece(name, arithmetic, part, devices[(grid.subjects.index(name) + i) % len(devices)])
            for i, arithmetic in enumerate(grid.arithmetics(devices[0].platform, name))
            if (arithmetic.dtype == "float64") == exact
        ]

    tables = [name for name in grid.subjects if name in TABLES]
    networks = [name for name in reversed(grid.subjects) if name not in TABLES]
    pieces = [p for name in networks for p in of(name, _cells, True)]
    for device in {d.device_kind: d for d in devices}.values():
        pieces.append(("closed forms", functools.partial(_closed_forms, grid, device)))
    for name, exact, part in itertools.product(tables, (True, False), (_cells, identities)):
        pieces += of(name, part, exact)
    for part, exact in ((identities, True), (_cells, False), (identities, False)):
        pieces += [p for name in networks for p in of(name, part, exact)]
    if len(devices) > 1:
        pieces.append(piece(grid.subjects[-1], Arithmetic("float64"), _spread, devices[0]))
    return pieces


@contextmanager
def _computing(device: Any, precision: str = "highest") -> Iterator[None]:
    """Double precision, a device and a precision of matrix products, in this thread."""
    with jax.enable_x64(True), jax.default_device(device), jax.default_matmul_precision(precision):
        yield


def _closed_forms(grid: Grid, device: Any) -> Found:
    with _computing(device):
        return [*closed_forms(grid.seed, device.device_kind)]


def _work(
    grid: Grid, name: str, arithmetic: Arithmetic, part: Part, device: Any, host: Any
) -> Found:
    """One part of what is found for one model in one arithmetic on one device."""
    # the identities are about steps of DPO, whatever objectives the cells are about
    names = tuple(dict.fromkeys(("dpo", *grid.objective_names)))
    with _computing(device, arithmetic.precision):
        start = subject(name, grid, arithmetic.dtype)
        base = reference = base_of(start, names, arithmetic)
    if arithmetic.dtype != "float64" or device.platform != "cpu":
        with _computing(host):
            theta = start.theta if device == host else jax.device_put(start.theta, host)
            wide = twin(dataclasses.replace(start, theta=theta))
            reference = base_of(wide, names, Arithmetic("float64"))
    with _computing(device, arithmetic.precision):
        return [x for x in part(grid, base, reference) if x is not None]


def _cells(grid: Grid, base: Base, reference: Base) -> Iterator[Cell | None]:
    for objective in grid.objective_names:
        yield alone(base, reference, objective, grid)
    for objective, name in grid.joint_cells():
        yield together(base, reference, objective, name, grid)


def _spread(grid: Grid, base: Base, reference: Base) -> Iterator[Check]:
    yield between_devices(base, jax.local_devices())


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
