"""Scoring: preference pairs in, one row of numbers a pair out. ``simgrad.score``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from simgrad import objectives
from simgrad.bridge.checkpoints.mesh import mesh_name
from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.engine.columns import SCORE_COLUMNS, score_batch, score_columns, text_table
from simgrad.bridge.engine.plan import Layout, Work, kernel_works, plan
from simgrad.bridge.engine.processes import on_all
from simgrad.bridge.engine.run import Progress, Task, carry_out, default_budget, named
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.encoding import Encoded
from simgrad.bridge.preferences.inputs import encoded_for
from simgrad.errors import InputError
from simgrad.objectives import Objective
from simgrad.pairs import Batch, Pair
from simgrad.theory.kernel.cost import Shapes
from simgrad.typing import Array

_COMPUTED_BY = ("simgrad.bridge.engine.columns", "simgrad.bridge.engine.plan")
F = TypeVar("F", bound=Callable[..., Any])


def _with_columns(function: F) -> F:
    lines = text_table(SCORE_COLUMNS).splitlines()
    table = "\n".join(f"        {line}" for line in lines)
    function.__doc__ = f"{function.__doc__}\n    Columns:\n{table}\n    "
    return function


@_with_columns
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

    Log-probs are in nats, and g = ∇_θ log π(y|x) is taken over all parameters. The columns are
    declared in :mod:`simgrad.bridge.engine.columns`; ``help(simgrad.score)`` lists them.

    Args:
        policy: from :func:`simgrad.load`, or ``Policy(apply, theta, apply.config)`` of a
            transformer from :func:`simgrad.models.create`. With parameters on a mesh, all its
            devices score; of many processes each calls this with the same arguments and gets the
            same table, and the first one writes ``out``.
        pairs: a file or Hub data set, rows as in TRL, or :class:`simgrad.pairs.Pair` objects.
        objective: name, or an object of :func:`simgrad.objectives.get`.
        learning_rate: η of the predicted change; None predicts per unit learning rate.
        gradients: without them, columns that need them are left out; about 5 times faster.
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
        RunMismatchError: ``out`` holds, or is being written by, another run (it names the parts
            that differ: the model's configuration, weights, data, code, versions ...); processes
            with different arguments.
        InputError: ``max_length`` beyond the model's; unknown objective; a learning rate that is
            not positive and finite; ``out`` that is no .parquet.
    """
    objective = objectives.get(objective) if isinstance(objective, str) else objective
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate={learning_rate}: a positive, finite number is needed")
    encoded = on_all(lambda: encoded_for(policy, pairs, max_length, limit, split))
    settings = {
        "objective": objective,
        "learning_rate": learning_rate,
        "gradients": gradients,
        "batch_tokens": batch_tokens,
        "layout": layout,
    }
    budget = default_budget(batch_tokens)

    def works() -> list[Work]:
        if gradients:
            shapes = Shapes.of(policy.apply, policy.theta)
            return kernel_works(encoded.pairs, shapes, budget, layout)
        return plan(encoded.pairs, True, budget, policy.config.vocab_size)

    def numbers(batch: Batch) -> dict[str, Array]:
        rate = 1.0 if learning_rate is None else learning_rate
        return score_batch(policy.apply, policy.theta, batch, objective, rate, gradients)

    task = Task(
        kind="score",
        columns=score_columns(gradients),
        identity=named(policy, encoded, *_COMPUTED_BY, **settings),
        run={
            **settings,
            "objective": repr(objective),
            "model": policy.name,
            "dtype": policy.config.dtype,
            "mesh": mesh_name(policy.theta),
        },
        works=works,
        numbers=numbers,
    )
    return carry_out(task, policy, encoded, out, progress)
