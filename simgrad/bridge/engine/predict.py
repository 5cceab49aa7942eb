"""Predictions: what a whole run of training will do to every pair, before it is run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simgrad.bridge.checkpoints.mesh import mesh_name, mesh_of, whole
from simgrad.bridge.checkpoints.policy import Policy
from simgrad.bridge.engine.columns import PREDICTION_COLUMNS, Read
from simgrad.bridge.engine.plan import plan
from simgrad.bridge.engine.run import Progress, Task, carry_out, default_budget, named
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.encoding import Encoded
from simgrad.bridge.preferences.inputs import encoded_for
from simgrad.dynamics import Recipe, RunConfig, Setting
from simgrad.dynamics.directional import Directions, directions
from simgrad.dynamics.recipe import steps_of
from simgrad.errors import InputError
from simgrad.experiments.comparison import Comparison, compare
from simgrad.models import only, sequence_logp
from simgrad.pairs import Batch, Pair, padded
from simgrad.store import described, provenance, require_same, write_parquet
from simgrad.typing import Array

_COMPUTED_BY = (
    "simgrad.dynamics.directional",
    "simgrad.bridge.engine.columns",
    "simgrad.bridge.engine.plan",
)
_GROUPS = 4  # parts of a sample whose separate directions give the error


def predict(
    policy: Policy,
    pairs: str | Path | Sequence[Pair] | Sequence[Mapping[str, Any]] | Encoded,
    recipe: Recipe | RunConfig,
    *,
    epochs: int | None = None,
    sample: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    split: str = "train",
    out: str | Path | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Predict Δlog π of both responses of every pair over a whole run on all pairs together.

        Δlog π(y|x) ≈ ⟨∇log π(y|x), D⟩,    D = Σ_t optimizer_t(mean gradient at the start)

    One epoch of gradients gives D (:func:`simgrad.dynamics.run_direction`); then one forward
    derivative a response is read, bucket by bucket of similar lengths.

    Args:
        policy: as for :func:`simgrad.score`, on a mesh if you like (in one process); it is its own
            reference.
        pairs: as for :func:`simgrad.score`, with the same guards.
        recipe: how the pairs are trained on. A :class:`simgrad.dynamics.RunConfig` is kept readable
            in the table's metadata.
        epochs: passes over the pairs, in place of the recipe's steps, see
            :func:`simgrad.dynamics.recipe.steps_of`; its batch size is then at most the number of
            pairs.
        sample: see only so many pairs, drawn at random, for the direction; the error of having seen
            only these is given too.
        max_length: longest prompt + response in tokens (None: what the model allows).
        limit: use only the first rows.
        split: of a Hub data set.
        out: parquet file; progress is kept beside it, as by :func:`simgrad.score`. An interrupted
            run computes the direction again and reads only the pairs that are missing.
        batch_tokens: token positions evaluated at once (None: by device).
        progress: called with (pairs done, pairs in all).

    Returns:
        A table whose columns are :data:`simgrad.bridge.engine.columns.PREDICTION_COLUMNS`, in nats.

    Raises:
        PreferenceDataError: data that cannot be read, with file, line or row.
        RunMismatchError: ``out`` holds, or is being written by, another run.
        InputError: no pair that can be used; ``max_length`` beyond the model's; a sample that is
            larger than the data or too small for its error; many processes.
        ValueError: a recipe of which no direction is known.
    """
    if jax.process_count() > 1:
        raise InputError("predictions are made in one process: start one, with all its devices")
    encoded = _usable(encoded_for(policy, pairs, max_length, limit, split))
    count, mesh = len(encoded.pairs), mesh_of(policy.theta)
    if sample is not None and not _GROUPS <= sample <= count:
        raise InputError(
            f"sample={sample} of {count} pairs in groups={_GROUPS}: groups <= sample <= pairs"
        )
    run = _for_epochs(recipe, epochs, count)
    policy, made = _made(policy, run)
    made.order(count)  # refuses a batch that the pairs cannot fill
    settings = {"recipe": run, "sample": sample, "batch_tokens": batch_tokens}

    @functools.cache
    def found() -> Directions:
        batch = whole(padded(encoded.pairs), mesh)
        return directions(policy.apply, policy.theta, batch, made, sample, _GROUPS)

    def numbers(batch: Batch) -> dict[str, Array]:
        moved = found().score(policy.apply, policy.theta, batch)
        read = Read(sequence_logp(policy.apply, policy.theta, batch), moved.change, moved.error)
        asked = [c for c in PREDICTION_COLUMNS if c.needs in ("forward", "direction")]
        return {c.name: c.of(read) for c in asked if c.of is not None}

    task = Task(
        kind="prediction",
        columns=PREDICTION_COLUMNS,
        identity=named(policy, encoded, *_COMPUTED_BY, groups=_GROUPS, **settings),
        run={
            **_readable(run),
            "sample": sample,
            "model": policy.name,
            "dtype": policy.config.dtype,
            "mesh": mesh_name(policy.theta),
        },
        works=lambda: plan(
            encoded.pairs, True, default_budget(batch_tokens), policy.config.vocab_size
        ),
        numbers=numbers,
    )
    return carry_out(task, policy, encoded, out, progress)


def check(
    policy: Policy,
    pairs: str | Path | Sequence[Pair] | Sequence[Mapping[str, Any]] | Encoded,
    recipe: Recipe | RunConfig,
    *,
    epochs: int | None = None,
    max_length: int | None = None,
    out: str | Path | None = None,
) -> Comparison:
    """Train as well, and hold every predictor against what happened.

    Args:
        policy: as for :func:`predict`.
        pairs: likewise.
        recipe: likewise.
        epochs: likewise.
        max_length: likewise.
        out: parquet file of the measured and predicted Δlog π of every chosen response, in nats;
            its metadata hold the agreement, the run's configuration and its identity.

    Raises:
        DivergedError: training does not stay finite.
        InputError: fewer than two pairs.
        RunMismatchError: ``out`` holds another comparison.
    """
    encoded = _usable(encoded_for(policy, pairs, max_length))
    if len(encoded.pairs) < 2:
        raise InputError("pairs are compared with each other: at least two are needed")
    run = _for_epochs(recipe, epochs, len(encoded.pairs))
    identity = named(policy, encoded, "simgrad.experiments.comparison", recipe=run)
    if out is not None and Path(out).exists():
        require_same(out, ScoreTable.load(out).metadata.get("identity", {}), identity)
    policy, made = _made(policy, run)
    found = compare(Setting(policy.apply, policy.theta, padded(encoded.pairs), made))
    if out is not None:
        columns = {
            "index": np.asarray(encoded.indices),
            "measured_dlogp_chosen": found.measured,
            **found.predicted,
        }
        header = {
            "kind": "check",
            "run": _readable(run) | {"model": policy.name, "dtype": policy.config.dtype},
            "identity": identity,
            "predictors": found.rows(f"{made.steps} steps"),
            "provenance": provenance(),
        }
        write_parquet(out, columns, header)
    return found


def _usable(encoded: Encoded) -> Encoded:
    if not encoded.pairs:
        reason = encoded.skipped[0].reason if encoded.skipped else "there is none"
        raise InputError(f"no row can be used; the first: {reason}")
    return encoded


def _made(policy: Policy, run: Recipe | RunConfig) -> tuple[Policy, Recipe]:
    """The recipe, and the policy with what the run trains."""
    if isinstance(run, Recipe):
        return policy, run
    apply = only(policy.apply, *run.include or ())
    return dataclasses.replace(policy, apply=apply), run.recipe()


def _for_epochs(recipe: Recipe | RunConfig, epochs: int | None, pairs: int) -> Recipe | RunConfig:
    if epochs is None:
        return recipe
    size = min(recipe.batch_size or pairs, pairs)
    return dataclasses.replace(recipe, steps=steps_of(epochs, pairs, size), batch_size=size)


def _readable(recipe: Recipe | RunConfig) -> dict[str, str]:
    return described(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
