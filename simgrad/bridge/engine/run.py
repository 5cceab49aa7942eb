"""The one road from encoded pairs to a table of numbers: identity, resume, batches, progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simgrad.bridge.checkpoints.mesh import fill, groups, mesh_name, mesh_of, replicated, split
from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.engine.columns import Column
from simgrad.bridge.engine.plan import Work, side_by_side
from simgrad.bridge.engine.processes import is_first, on_first, require_same_everywhere
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.encoding import Encoded, Skipped
from simgrad.errors import InputError
from simgrad.pairs import Batch, Pair, packed, padded
from simgrad.store import RowStore, RunMismatchError, described, digest, identity, require_same
from simgrad.store import provenance as made_by
from simgrad.typing import Array

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """What is computed of every pair.

    Attributes:
        kind: of the table, ``score`` or ``prediction``.
        columns: of the table.
        identity: what names the result, see :func:`named`.
        run: the arguments, for people.
        works: which pairs share a batch; the same in every run of the same identity.
        numbers: of a batch, by column name.
    """

    kind: str
    columns: Sequence[Column]
    identity: Mapping[str, str]
    run: Mapping[str, Any]
    works: Callable[[], Sequence[Work]]
    numbers: Callable[[Batch], dict[str, Array]]


def policy_parts(policy: Policy) -> dict[str, str]:
    """What names a policy: its model with all that is configured, weights, tokenizer."""
    backend = getattr(policy.tokenizer, "backend_tokenizer", None)
    tokenizer: Any = policy.tokenizer
    if backend is not None:
        # padding and truncation change with every call, and not what simgrad asks for
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        template = getattr(policy.tokenizer, "chat_template", None)
        tokenizer = (json.dumps(content), template, policy.tokenizer.eos_token_id)
    return described(model=policy.apply, weights=digest(policy.theta), tokenizer=digest(tokenizer))


def named(policy: Policy, encoded: Encoded, *computed_by: str, **settings: Any) -> dict[str, str]:
    """Identity of a task: policy, data, settings, mesh, and the modules whose code computes it."""
    mesh = mesh_name(policy.theta)
    parts = identity(
        computed_by, data=encoded.digest(), pairs=len(encoded.pairs), mesh=mesh, **settings
    )
    return policy_parts(policy) | parts


def default_budget(batch_tokens: int | None) -> int:
    """Token positions evaluated at once, by device unless given."""
    if batch_tokens is not None:
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens}: at least one position is needed")
        return batch_tokens
    return 1024 if jax.default_backend() == "cpu" else 16384


def carry_out(
    task: Task, policy: Policy, encoded: Encoded, out: str | Path | None, progress: Progress | None
) -> ScoreTable:
    """The table of a task, computed, continued, or found finished in ``out``.

    Raises:
        RunMismatchError: ``out`` holds, or is being written by, another run; processes with
            different arguments.
        InputError: ``out`` that is no .parquet.
    """
    if out is not None and Path(out).suffix != ".parquet":
        raise InputError(f"--out {out}: tables are written as .parquet")
    require_same_everywhere(dict(task.identity) | {"out": str(out)})
    if (table := on_first(lambda: _finished(out, task))) is not None:
        return table
    partial = None if out is None else Path(f"{out}.partial.npz")
    with _shared_rows(partial, task.identity, len(encoded.pairs)) as rows:
        # finished by others while this process waited for the lock
        if (table := on_first(lambda: _finished(out, task))) is None:
            mesh = mesh_of(policy.theta)
            if progress:
                progress(int(rows.done.sum()), len(encoded.pairs))
            for work in side_by_side(task.works(), groups(mesh)):
                members = list(work.members)
                if not rows.done[members].all():
                    batch = _batch([encoded.pairs[i] for i in members], work, mesh)
                    found = jax.device_get(replicated(task.numbers(batch), mesh))
                    # pairs that only fill up the last batch come last
                    host = {k: np.asarray(x, np.float64) for k, x in found.items()}
                    rows.add(members, {k: x[: len(members)] for k, x in host.items()})
                if progress:
                    progress(int(rows.done.sum()), len(encoded.pairs))
            table = _table(task, encoded, rows.columns)
            if out is not None:
                on_first(lambda: table.save(out))
        rows.remove()
    return table


def _batch(pairs: Sequence[Pair], work: Work, mesh: Mesh | None) -> Batch:
    layout = packed if work.packed else padded
    return split(layout(fill(pairs, mesh), work.length, work.rows), mesh)


def _finished(out: str | Path | None, task: Task) -> ScoreTable | None:
    """The table of a run that is complete, if there is one."""
    if out is None or not Path(out).exists():
        return None
    try:
        table = ScoreTable.load(out)
    except ValueError as error:
        raise RunMismatchError(f"{error}: choose another --out or delete it") from error
    require_same(out, table.metadata.get("identity", {}), task.identity)
    return table


@contextmanager
def _shared_rows(path: Path | None, identity: Mapping[str, str], count: int) -> Iterator[RowStore]:
    """A :class:`RowStore` that the first process keeps on disk, and that all fill alike."""
    rows = RowStore(path if is_first() else None, identity, count)

    def opened() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rows.__enter__()
        return rows.done, rows.columns

    rows.done, rows.columns = on_first(opened)
    try:
        yield rows
    finally:
        rows.__exit__()


def _table(task: Task, encoded: Encoded, found: Mapping[str, np.ndarray]) -> ScoreTable:
    columns: dict[str, np.ndarray] = {}
    for c in task.columns:
        if c.needs == "row":
            columns[c.name] = np.array(encoded.indices, np.int64)
        elif c.needs == "tokens" and c.of is not None:
            kind = np.int64 if c.unit == "tokens" else np.float64
            columns[c.name] = np.array([c.of(pair) for pair in encoded.pairs], kind)
        else:
            columns[c.name] = found.get(c.name, np.zeros(0))
    bad = {name: ~np.isfinite(values) for name, values in columns.items()}
    skipped = list(encoded.skipped)
    for k in np.flatnonzero(np.any(list(bad.values()), axis=0)):
        names = [name for name in bad if bad[name][k]]
        more = f" and {len(names) - 1} more columns" if len(names) > 1 else ""
        skipped.append(Skipped(encoded.indices[k], f"non-finite {names[0]}{more}"))
    good = ~np.any(list(bad.values()), axis=0)
    columns = {name: values[good] for name, values in columns.items()}
    for c in task.columns:
        if c.labels:
            columns[c.name] = np.array([c.labels[int(x)] for x in columns[c.name]], object)
    counts = {
        "scored": int(good.sum()),
        "skipped": len(skipped),
        "merged": encoded.merged,
        "truncated": encoded.truncated,
    }
    source = {"data": encoded.source, "split": encoded.split, "max_length": encoded.max_length}
    metadata = {
        "kind": task.kind,
        "run": dict(task.run),
        "identity": dict(task.identity),
        "source": source,
        "provenance": made_by(),
        "counts": counts,
    }
    return ScoreTable(columns, tuple(sorted(skipped, key=lambda s: s.index)), metadata)
