"""Preference tuning of any policy: one compiled loop between two records."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.gradients import Data, Learned, preference_gradient
from simgrad.dynamics.prompts import next_token_logp
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.run import Records, State, Training, descend, follow, recorded, started
from simgrad.dynamics.trajectory import Trajectory, from_arrays, to_arrays
from simgrad.models import Apply, Bound, bind, responses, sequence_logp
from simgrad.models.likelihood import require_shape, require_wide
from simgrad.pairs import Batch, in_chunks
from simgrad.store import (
    RunMismatchError,
    differences,
    identity,
    load_arrays,
    locked,
    provenance,
    require_same,
    save_arrays,
)
from simgrad.theory import pair_kernel
from simgrad.typing import Array, Float, Int, Theta


def train(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    *,
    reference: Float[Array, "B 2"] | None = None,
    probes: Batch | None = None,
    watch: Sequence[Sequence[int]] = (),
    record: int | Sequence[int] | None = None,
    kernels: bool = False,
    resume: Training | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Train on preference pairs and record what happens to them.

        θ_{t+1} = θ_t + optimizer(∇ mean_{i ∈ batch t} L_i(θ_t))

    The steps between two records are one compiled loop, the same program for every length.
    Log-probs of the reference are computed once.

    Args:
        apply: any model: of :mod:`simgrad.models`, a loaded checkpoint's, or with adapters
            (:func:`simgrad.models.add_lora`); :func:`simgrad.models.only` selects parameters.
        theta: its parameters at the start, in float32 or better.
        batch: all pairs.
        recipe: objective, optimizer, steps, mini-batches, mitigations.
        reference: log π_ref of the pairs (None: the policy at the start).
        probes: pairs to follow that are not trained on.
        watch: prompts whose whole next-token distribution is recorded (small vocabularies).
        record: steps between two records, or the steps to record; start and end always are.
        kernels: record each pair's kernel too, hence regimes: a backward pass of all pairs a
            record.
        resume: a run to continue up to ``recipe.steps``, exactly as if it had not stopped.
        out: .npz file kept up to date at every record. If it is there, the run continues from it.
        progress: called with (steps taken, steps in all).

    Raises:
        DivergedError: a loss or log-prob that is not finite; it holds the step and the records so
            far, and ``out`` keeps the last finite record before it.
        RunMismatchError: ``out`` holds, or is being written by, another run.
        ValueError: parameters below float32 (small steps would be rounded away), shapes that do not
            fit, pairs that the model knows nothing of, a run to continue that began with other
            arguments.

    >>> import optax
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.objectives import DPO
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch = padded([Pair([1, 2], [3, 4], [5, 4]), Pair([1], [6], [7])])
    >>> run = train(apply, theta, batch, Recipe(DPO(), optax.sgd(0.1), steps=4), record=2)
    >>> seen = run.trajectory
    >>> seen.steps.tolist(), seen.logp.shape, bool((seen.margin[-1] > 0).all())
    ([0, 2, 4], (3, 2, 2), True)
    """
    order, stops = jnp.asarray(recipe.order(batch.size)), _stops(record, recipe.steps)
    if out is not None and resume is not None:
        raise ValueError("give out or resume: a file that is there is continued by itself")
    data = prepare(apply, theta, batch, recipe, reference)
    state = begin(apply, theta, recipe)
    run = _identity(apply, theta, batch, recipe, reference, (probes, [*map(tuple, watch)], kernels))

    def observe(state: State) -> dict[str, Any]:
        seen = _observe(apply, theta, recipe, data, probes, state.learned, kernels=kernels)
        whole = policy(bind(apply, theta), state.learned)
        nothing = jnp.zeros((0, 0), seen["logp"].dtype)
        return seen | {"watched": next_token_logp(apply, whole, watch) if len(watch) else nothing}

    made_by = provenance()

    def result(state: State, records: Records) -> Training:
        seen = recorded(state, records, data.reference, identity=run, provenance=made_by)
        return Training(policy(bind(apply, theta), state.learned), state, seen)

    def keep(training: Training) -> None:
        if out is not None:
            leaves = {f"state/{i}": x for i, x in enumerate(jax.tree.leaves(training.state))}
            header = {"kind": "training", "config": dict(training.trajectory.config)}
            save_arrays(out, {**to_arrays(training.trajectory), **leaves}, header)

    def go_on(state: State, until: int) -> State:
        return advance(apply, theta, recipe, data, state, order, until)

    with nullcontext() if out is None else locked(out):
        if out is not None and Path(out).exists():
            resume = _read(Path(out), state, bind(apply, theta), run)
        elif resume is not None:
            _require_begun_alike(resume.trajectory, run)
        if resume is None:
            records = [(0, observe(state))]
            _require_start(records[0][1])
        else:
            state, records = _continued(resume, recipe.steps)
        keep(result(state, records))
        stops = [stop for stop in stops if stop > int(state.step)]
        return follow(go_on, state, stops, observe, result, records, keep, progress)


def prepare(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    reference: Float[Array, "B 2"] | None = None,
) -> Data:
    """The run's data with its reference's log-probs."""
    require_wide(bind(apply, theta).trained)
    tokens = None
    if reference is None:
        tokens = _reference(apply, theta, batch)
        start = tokens.sum(-1)
    elif recipe.mask is not None:
        raise ValueError(
            "a mask weights the reference's tokens too: the reference is then the policy at the "
            "start"
        )
    else:
        start = reference
    require_shape("reference", start, (batch.size, 2))
    return Data(batch, start, tokens if recipe.mask is not None else None)


def begin(apply: Apply, theta: Theta, recipe: Recipe) -> State:
    """The state before the first step."""
    policy, mask, memory = bind(apply, theta).trained, None, ()
    dtype = str(jax.tree.leaves(policy)[0].dtype)
    if recipe.mask is not None:
        mask = recipe.mask.init(_width(apply, theta), dtype)
    if recipe.mitigation is not None:
        memory = recipe.mitigation.init(dtype)
    learned = policy if mask is None else Learned(policy, mask)
    return started(recipe.optimizer, learned, recipe.steps, memory)


@functools.partial(jax.jit, static_argnames=("apply", "recipe"))
def advance(
    apply: Apply,
    theta: Theta,
    recipe: Recipe,
    data: Data,
    state: State,
    order: Int[Array, "E M"],
    until: Any,
) -> State:
    """Steps up to ``until``, compiled; differentiable and mappable like any function of arrays."""
    model = bind(apply, theta)

    def gradient(learned: Theta, index: Array, memory: Any) -> tuple[Array, Theta, Any]:
        whole = learned if isinstance(learned, Learned) else Learned(learned)
        loss, grad, memory = preference_gradient(model, recipe, data.take(index), whole, memory)
        return loss, grad if isinstance(learned, Learned) else grad.policy, memory

    return descend(gradient, recipe.optimizer, state, order, until)


@functools.partial(jax.jit, static_argnames="apply")
def _reference(apply: Apply, theta: Theta, batch: Batch) -> Array:
    return in_chunks(lambda some: responses(apply, theta, some).token_logp, batch)


def _width(apply: Apply, theta: Theta) -> int:
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t, x: apply(t, x).hidden, theta, token).shape[-1]


def _stops(record: int | Sequence[int] | None, steps: int) -> list[int]:
    if record is None:
        return [steps]
    if isinstance(record, int | np.integer):
        record = int(record)
        if record < 1:
            raise ValueError(f"record must be at least 1, got {record}")
        record = range(record, steps, record)
    if outside := [r for r in record if not 0 <= r <= steps]:
        raise ValueError(f"record names step {outside[0]}, but the run goes from 0 to {steps}")
    return sorted({*record, steps} - {0})


@functools.partial(jax.jit, static_argnames=("apply", "recipe", "kernels"))
def _observe(
    apply: Apply,
    theta: Theta,
    recipe: Recipe,
    data: Data,
    probes: Batch | None,
    learned: Theta,
    kernels: bool,
) -> dict[str, Any]:
    now, batch = policy(bind(apply, theta), learned), data.batch

    def look(some: Batch) -> dict[str, Any]:
        result = responses(apply, now, some)
        seen: dict[str, Any] = {"token_logp": result.token_logp}
        if recipe.mask is not None:
            seen["token_weights"] = recipe.mask.weights(learned.mask, result.hidden, some.valid)
        if kernels:
            seen["kernel"] = pair_kernel(apply, now, some)
        return seen

    seen = in_chunks(look, batch)
    logp = seen["token_logp"].sum(-1)
    force = recipe.objective.force(logp, data.reference, batch.lengths)
    seen |= {"logp": logp, "force": force, "probes": jnp.zeros((0, 2), logp.dtype)}
    if probes is not None:
        seen["probes"] = sequence_logp(apply, now, probes)
    return seen


def policy(model: Bound, learned: Theta) -> Theta:
    """All parameters of the policy, from what is learned (with a mask or without)."""
    return model.whole(learned.policy if isinstance(learned, Learned) else learned)


def _require_start(seen: dict[str, Any]) -> None:
    """Refuse pairs, probes and prompts of which the model says nothing."""
    for name, what in (("logp", "pair"), ("probes", "probe"), ("watched", "watched prompt")):
        bad = ~np.isfinite(np.asarray(seen[name])).all(axis=tuple(range(1, seen[name].ndim)))
        if bad.any():
            raise ValueError(
                f"log π of {what} {int(bad.argmax())} is not finite before the first step: token "
                "ids beyond the vocabulary, a context that the model does not hold, or overflow"
            )


def _identity(
    apply: Apply, theta: Theta, batch: Batch, recipe: Recipe, reference: Any, followed: Any
) -> dict[str, str]:
    """What must be equal for one run to continue another; the number of steps may grow."""
    return identity(
        "simgrad.dynamics.training",
        model=apply,
        theta=theta,
        pairs=batch,
        reference=reference,
        followed=followed,
        recipe=recipe.replace(steps=0),
    )


def _require_begun_alike(trajectory: Trajectory, run: Mapping[str, str]) -> None:
    if differ := differences(trajectory.config.get("identity", {}), run):
        raise RunMismatchError(
            f"the run to resume is another one ({differ}): give the arguments it began with "
            "(theta: the parameters at its start), or begin anew"
        )


def _continued(run: Training, steps: int) -> tuple[State, Records]:
    """State and records of a run that goes on, with room for its further losses."""
    state, seen = run.state, run.trajectory
    done = int(state.step)
    if done > steps:
        raise ValueError(f"the run has taken {done} steps already, more than steps={steps}")
    room = jnp.full(steps, jnp.nan, state.losses.dtype).at[:done].set(state.losses[:done])
    names = "token_logp token_weights kernel logp force probes watched".split()
    columns = {n: getattr(seen, n) for n in names if getattr(seen, n) is not None}
    records = [
        (int(s), jax.tree.map(lambda x, i=i: x[i], columns)) for i, s in enumerate(seen.steps)
    ]
    return replace(state, losses=room), records


def _read(path: Path, state: State, model: Bound, run: Mapping[str, str]) -> Training:
    arrays, header = load_arrays(path)
    if header.get("kind") != "training":
        raise ValueError(f"{path} holds no run of this kind: choose another out, or delete it")
    require_same(path, header["config"].get("identity", {}), run)
    leaves, treedef = jax.tree.flatten(state)
    state = treedef.unflatten([jnp.asarray(arrays[f"state/{i}"]) for i in range(len(leaves))])
    return Training(policy(model, state.learned), state, from_arrays(arrays, header))
