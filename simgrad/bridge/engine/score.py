"""Scoring: preference pairs in, one row of numbers a pair out. ``simgrad.score``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simgrad import objectives
from simgrad.bridge.checkpoints.mesh import (
    fill,
    mesh_name,
    mesh_of,
    replicated,
    side_by_side,
    split,
)
from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.engine.fingerprint import fingerprint
from simgrad.bridge.engine.journal import (
    Journal,
    RunMismatchError,
    check_same_processes,
    check_same_run,
)
from simgrad.bridge.engine.plan import Layout, Work, kernel_works, plan
from simgrad.bridge.engine.processes import on_all, on_first
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.inputs import data_fingerprint, encoded_for
from simgrad.bridge.preferences.rows import Encoded, Skipped
from simgrad.models import Apply
from simgrad.objectives import Coefficients, Objective
from simgrad.pairs import Batch, Pair, packed, padded
from simgrad.store import provenance
from simgrad.theory import (
    Regime,
    Responses,
    ches,
    embedding_cosine,
    first_order,
    head_gap,
    kernel_and_responses,
    last_hidden_inner,
    ln_ches,
    normalized_edit_distance,
    regime,
    responses,
)
from simgrad.theory.kernel.cost import Shapes
from simgrad.typing import Array, Float, Theta

__all__ = ["score", "score_batch"]

Progress = Callable[[int, int], None]


def score(
    policy: Policy,
    pairs: str | Path | Sequence[Pair] | Sequence[Mapping[str, Any]] | Encoded,
    *,
    objective: str | Objective = "dpo",
    learning_rate: float | None = None,
    gradients: bool = True,
    max_length: int | None = None,
    limit: int | None = None,
    split: str = "train",
    out: str | Path | None = None,
    batch_tokens: int | None = None,
    layout: Layout = "auto",
    progress: Progress | None = None,
) -> ScoreTable:
    """Score every preference pair under a policy.

    Columns (log-probs in nats, g = ∇_θ log π(y|x) over all parameters):

    ========================  ==============================================================
    index                     row number in the data, from 0
    n_prompt, n_chosen, ...   tokens; the end-of-sequence token counts in the response
    logp_chosen, ...          Σ_k log π(y_k | x, y_<k)
    ches, ln_ches             :func:`simgrad.theory.ches`, :func:`simgrad.theory.ln_ches`
    last_hidden_inner         :func:`simgrad.theory.last_hidden_inner`
    edit_distance             :func:`simgrad.theory.normalized_edit_distance`, of tokens
    embedding_cosine          :func:`simgrad.theory.embedding_cosine`
    head_gap                  :func:`simgrad.theory.head_gap`
    d_chosen, d_rejected      the objective's d_w, d_l for the pair alone, the policy its own reference
    grad_inner, grad_cosine   ⟨g_w, g_l⟩ and its cosine
    grad_sq_chosen, ...       ‖g_w‖², ‖g_l‖²
    predicted_dlogp_...       first-order Δlog π after one SGD step on the pair alone, per unit
                              learning rate (or for ``learning_rate``, when given)
    regime                    ideal, both_fall, both_rise or reversed
    ========================  ==============================================================

    Args:
        policy: from :func:`simgrad.load`, or ``Policy(apply, theta, apply.config)`` of a
            transformer from
            :func:`simgrad.models.create`. With parameters on a mesh, all its devices score; of many
            processes each calls this with the same arguments and gets the same table, and the first
            one writes ``out``.
        pairs: a file or Hub data set, rows as in TRL, or :class:`simgrad.pairs.Pair` objects.
        objective: name, or an object of :func:`simgrad.objectives.get`.
        learning_rate: η of the predicted change; None predicts per unit learning rate.
        gradients: without them, columns from ``grad_`` to ``regime`` are left out; about 5 times
            faster.
        max_length: longest prompt + response in tokens (None: what the model allows).
        limit: use only the first rows.
        split: of a Hub data set.
        out: parquet file. Progress is kept beside it: killed at any moment and run again with the
            same arguments, it continues and gives the table an uninterrupted run gives.
        batch_tokens: token positions evaluated at once, for each device of a mesh's data axis
            (None: by device).
        layout: of pairs whose gradients are taken: ``padded``, ``packed``, or whichever costs less
            (``auto``).
        progress: called with (pairs done, pairs in all).

    Returns:
        The table, in input order; rows that cannot be scored are in ``table.skipped``.

    In float32 the scalars are good to about 1e-5; a gap that is much smaller than its two terms
    (responses that differ in one late token) keeps only what remains of that. Score such pairs with
    float64.

    Raises:
        PreferenceDataError: data that cannot be read, with file, line or row.
        RunMismatchError: ``out`` holds, or is being written by, a run with other arguments or on
        another mesh;
            processes with different arguments.
        ValueError: ``max_length`` beyond the model's; unknown objective; ``out`` that is no
        .parquet.
    """
    objective = objectives.get(objective) if isinstance(objective, str) else objective
    if out is not None and Path(out).suffix != ".parquet":
        raise ValueError(f"out={str(out)!r}: tables are written as .parquet")
    encoded = on_all(lambda: encoded_for(policy, pairs, max_length, limit, split))
    run = _run(policy, encoded, objective, learning_rate, gradients, batch_tokens, layout)
    check_same_processes(run | {"out": str(out)})
    if out is not None and (table := on_first(lambda: _finished(Path(out), run))) is not None:
        return table
    if batch_tokens is None:
        batch_tokens = 1024 if jax.default_backend() == "cpu" else 16384
    one = functools.partial(_score_work, policy, encoded.pairs, objective, learning_rate, gradients)
    todo = _plan(policy, encoded.pairs, gradients, batch_tokens, layout)
    todo = side_by_side(todo, mesh_of(policy.theta))
    if out is None:
        results: dict[int, dict[str, Any]] = {}
        _work_through(todo, results, one, results.update, progress)
        return _assemble(encoded, results, run)
    with Journal(Path(f"{out}.partial.jsonl"), run) as journal:
        if (
            table := on_first(lambda: _finished(Path(out), run))
        ) is not None:  # finished by others in the meantime
            on_first(journal.remove)
            return table
        _work_through(todo, journal.done, one, journal.add, progress)
        table = _assemble(encoded, journal.done, run)
        on_first(lambda: table.save(out))
        on_first(journal.remove)
    return table


def _plan(
    policy: Policy, pairs: Sequence[Pair], gradients: bool, budget: int, layout: Layout
) -> list[Work]:
    if not gradients:
        return plan(pairs, True, budget, policy.config.vocab_size) if pairs else []
    return kernel_works(pairs, Shapes.of(policy.apply, policy.theta), budget, layout)


def _run(
    policy: Policy,
    encoded: Encoded,
    objective: Objective,
    learning_rate: float | None,
    gradients: bool,
    budget: int | None,
    layout: Layout,
) -> dict[str, Any]:
    """What must agree for two runs to give the same numbers."""
    return {
        "model": policy.name,
        "weights": fingerprint(policy.theta),
        "dtype": policy.config.dtype,
        "data": data_fingerprint(encoded),
        "pairs": len(encoded.pairs),
        "objective": repr(objective),
        "learning_rate": learning_rate,
        "gradients": gradients,
        "batch_tokens": budget,
        "mesh": mesh_name(policy.theta),
        "layout": layout,
        **{k: v for k, v in provenance().items() if k in ("simgrad", "jax", "device")},
    }


def _finished(out: Path, run: dict[str, Any]) -> ScoreTable | None:
    """The table of a run that is complete, if there is one."""
    if not out.exists():
        return None
    try:
        table = ScoreTable.load(out)
    except ValueError as error:
        raise RunMismatchError(f"{error}: choose another --out or delete it") from error
    check_same_run(out, table.metadata["run"], run)
    return table


def _work_through(
    todo: Sequence[Work],
    done: Mapping[int, Any],
    one: Callable[[Work], dict[int, dict[str, Any]]],
    keep: Callable[[dict[int, dict[str, Any]]], None],
    progress: Progress | None,
) -> None:
    total = sum(len(work.members) for work in todo)
    for work in todo:
        if not all(i in done for i in work.members):
            keep(one(work))
        if progress:
            progress(len(done), total)


def _score_work(
    policy: Policy,
    pairs: Sequence[Pair],
    objective: Objective,
    learning_rate: float | None,
    gradients: bool,
    work: Work,
) -> dict[int, dict[str, Any]]:
    members, mesh = [pairs[i] for i in work.members], mesh_of(policy.theta)
    batch = (packed if work.packed else padded)(fill(members, mesh), work.length, work.rows)
    rate = 1.0 if learning_rate is None else learning_rate
    device = score_batch(policy.apply, policy.theta, split(batch, mesh), objective, rate, gradients)
    host = {
        name: np.asarray(values, np.float64)
        for name, values in jax.device_get(replicated(device, mesh)).items()
    }
    results = {}
    for k, (i, pair) in enumerate(zip(work.members, members, strict=True)):
        values = {name: column[k].item() for name, column in host.items()}
        bad = [name for name in _ORDER if not np.isfinite(values.get(name, 0.0))]
        if bad:
            more = f" and {len(bad) - 1} more columns" if len(bad) > 1 else ""
            results[i] = {"skip": f"non-finite {bad[0]}{more}"}
            continue
        distance = normalized_edit_distance(pair.chosen, pair.rejected)
        counts = {
            "n_prompt": len(pair.prompt),
            "n_chosen": len(pair.chosen),
            "n_rejected": len(pair.rejected),
        }
        results[i] = {"row": {**counts, "edit_distance": distance, **values}}
    return results


@functools.partial(jax.jit, static_argnames=("apply", "objective", "gradients"))
def score_batch(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    learning_rate: float | Float[Array, ""],
    gradients: bool,
) -> dict[str, Array]:
    """All scores of a batch that need the model: column name to array (B,)."""
    if gradients:
        kernel, result = kernel_and_responses(apply, theta, batch)
    else:
        kernel, result = None, responses(apply, theta, batch)
    # one pair at a time, so that objectives which couple pairs see the batch that the columns speak
    # of
    alone = jax.vmap(
        lambda logp, lengths: objective.signed_coefficients(logp[None], logp[None], lengths[None])[
            0
        ]
    )
    pull = alone(result.logp, batch.lengths)
    coefficients = Coefficients(pull[:, 0], -pull[:, 1])
    columns = {
        "logp_chosen": result.logp[:, 0],
        "logp_rejected": result.logp[:, 1],
        **_similarities(result, batch),
        "d_chosen": coefficients.chosen,
        "d_rejected": coefficients.rejected,
    }
    if kernel is None:
        return columns
    change = first_order(kernel, coefficients, learning_rate)
    return columns | {
        "grad_inner": kernel.inner,
        "grad_sq_chosen": kernel.sq_chosen,
        "grad_sq_rejected": kernel.sq_rejected,
        "grad_cosine": kernel.cosine,
        "predicted_dlogp_chosen": change.chosen,
        "predicted_dlogp_rejected": change.rejected,
        "regime": regime(kernel, coefficients),
    }


def _similarities(result: Responses, batch: Batch) -> dict[str, Array]:
    return {
        "ches": ches(result, batch),
        "ln_ches": ln_ches(result, batch),
        "last_hidden_inner": last_hidden_inner(result),
        "embedding_cosine": embedding_cosine(result, batch),
        "head_gap": head_gap(result, batch),
    }


_ORDER = (
    "index n_prompt n_chosen n_rejected logp_chosen logp_rejected ches ln_ches last_hidden_inner "
    "edit_distance "
    "embedding_cosine head_gap grad_inner grad_sq_chosen grad_sq_rejected grad_cosine d_chosen "
    "d_rejected "
    "predicted_dlogp_chosen predicted_dlogp_rejected regime"
).split()
_COUNTS = {"index", "n_prompt", "n_chosen", "n_rejected"}


def _assemble(
    encoded: Encoded, results: Mapping[int, dict[str, Any]], run: dict[str, Any]
) -> ScoreTable:
    rows, skipped = [], list(encoded.skipped)
    for i, index in enumerate(encoded.indices):
        if "skip" in results[i]:
            skipped.append(Skipped(index, results[i]["skip"]))
        else:
            rows.append({"index": index, **results[i]["row"]})
    grads = run["gradients"]
    names = [
        n for n in _ORDER if grads or not (n.startswith(("grad_", "predicted_")) or n == "regime")
    ]
    columns = {
        n: np.array([row[n] for row in rows], np.int64 if n in _COUNTS else np.float64)
        for n in names
    }
    if grads:
        columns["regime"] = np.array(
            [Regime(int(value)).label for value in columns["regime"]], object
        )
    counts = {
        "scored": len(rows),
        "skipped": len(skipped),
        "merged": encoded.merged,
        "truncated": encoded.truncated,
    }
    source = {"data": encoded.source, "split": encoded.split, "max_length": encoded.max_length}
    metadata = {"run": run, "source": source, "provenance": provenance(), "counts": counts}
    return ScoreTable(columns, tuple(sorted(skipped, key=lambda s: s.index)), metadata)
