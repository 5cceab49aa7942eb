"""Preference tuning of any policy: one compiled loop between two records."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.dynamics.gradients import Data, Learned, preference_gradient
from simgrad.dynamics.loop import State, descend
from simgrad.dynamics.prompts import next_token_logp
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.trace import Trace, from_arrays, to_arrays
from simgrad.models import Apply
from simgrad.models.likelihood import in_chunks, require_shape
from simgrad.objectives import Coefficients
from simgrad.pairs import Batch
from simgrad.store import digest, load_arrays, provenance, save_arrays
from simgrad.theory import RunningCalibrated, pair_kernel, responses
from simgrad.theory.prediction.steps import updated
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["DivergedError", "Training", "advance", "begin", "prepare", "train", "whole_policy"]

CHECK = 100
"""Steps between two looks for a loss that is no longer finite."""


@dataclass(frozen=True)
class Training:
    """A run so far.

    Attributes:
        theta: the parameters now, trained and frozen ones.
        state: optimizer, position in the order, mask: what going on exactly needs.
        trace: what was recorded.
    """

    theta: Theta
    state: State
    trace: Trace


class DivergedError(FloatingPointError):
    """Training is no longer finite: ``step`` is the update that met or made it, ``trace`` what was recorded before."""

    def __init__(self, step: int, trace: Trace) -> None:
        super().__init__(
            f"step {step} (counted from 0) met or left log-probs that are not finite: lower the "
            "learning rate or clip "
            "gradients, and begin anew; the records so far are in this error's .trace"
        )
        self.step, self.trace = step, trace


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
            (:func:`simgrad.models.add_lora`).
        theta: its parameters at the start, in float32 or better.
        batch: all pairs.
        recipe: objective, optimizer, steps, mini-batches, remedies.
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
        DivergedError: a loss or log-prob that is not finite; it holds the step and the trace so
        far, and ``out`` keeps
            the last finite record before it.
        ValueError: parameters below float32 (small steps would be rounded away), shapes that do not
        fit,
            pairs that the model knows nothing of, a run to continue that began with other
            arguments.

    >>> import optax
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.objectives import DPO
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch = padded([Pair([1, 2], [3, 4], [5, 4]), Pair([1], [6], [7])])
    >>> run = train(apply, theta, batch, Recipe(DPO(), optax.sgd(0.1), steps=4), record=2)
    >>> run.trace.steps.tolist(), run.trace.logp.shape, bool((run.trace.margin[-1] > 0).all())
    ([0, 2, 4], (3, 2, 2), True)
    """
    order, stops = jnp.asarray(recipe.order(batch.size)), _stops(record, recipe.steps)
    run = _identity(
        apply, theta, batch, recipe, reference, (probes, [list(p) for p in watch], kernels)
    )
    if out is not None and resume is not None:
        raise ValueError("give out or resume: a file that is there is continued by itself")
    data, rest = prepare(apply, theta, batch, recipe, reference)
    look = functools.partial(_observe, apply, rest, recipe, data, probes, kernels=kernels)

    def see(learned: Theta) -> dict[str, Any]:
        watched = (
            next_token_logp(apply, whole_policy(learned, rest), watch)
            if len(watch)
            else jnp.zeros((0, 0))
        )
        return look(learned) | {"watched": watched}

    state = begin(apply, theta, recipe)
    records: list[Any] = []
    if out is not None and Path(out).exists():
        resume = _read(Path(out), run, state, theta, rest)
    if resume is not None:
        _require_same(run, resume.trace.config, "the run to resume")
        state, records = _continued(resume, state, recipe.steps)
    else:
        records = [(0, see(state.learned))]
        _require_start(records[0][1])
    config = {**run, "provenance": provenance()}
    result = functools.partial(_result, rest, data, config)

    def keep() -> None:
        if out is not None:
            _write(Path(out), run, result(state, records))

    keep()
    for stop in stops:
        at = int(state.step)
        if stop <= at:
            continue
        while at < stop:
            until = min(stop, at + CHECK)
            state = advance(apply, rest, recipe, data, state, order, until)
            bad = ~np.isfinite(np.asarray(state.losses[at:until]))
            if bad.any():
                raise DivergedError(at + int(bad.argmax()), result(state, records).trace)
            at = until
            if progress is not None:
                progress(at, recipe.steps)
        seen = see(state.learned)
        if not np.isfinite(np.asarray(seen["logp"])).all():
            raise DivergedError(at - 1, result(state, records).trace)
        records.append((stop, seen))
        keep()
    return result(state, records)


def prepare(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    reference: Float[Array, "B 2"] | None = None,
) -> tuple[Data, Theta]:
    """The run's data with its reference's log-probs, and the parameters that are not trained."""
    trained, rest = tree.partition(theta, recipe.include, apply.frozen)
    if narrow := [str(x.dtype) for x in jax.tree.leaves(trained) if x.dtype.itemsize < 4]:
        raise ValueError(
            f"parameters are {narrow[0]}: small steps would be rounded away; convert theta to "
            "float32"
        )
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
    return Data(batch, start, tokens if recipe.mask is not None else None), rest


def begin(apply: Apply, theta: Theta, recipe: Recipe) -> State:
    """The state before the first step."""
    policy, _ = tree.partition(theta, recipe.include, apply.frozen)
    learned, memory, dtype = policy, None, str(jax.tree.leaves(policy)[0].dtype)
    if recipe.mask is not None:
        learned = Learned(policy, recipe.mask.init(_width(apply, theta), dtype))
    if isinstance(recipe.mitigation, RunningCalibrated):
        memory = recipe.mitigation.init(dtype)
    with jax.numpy_dtype_promotion("standard"):
        inner = recipe.optimizer.init(cast(Any, learned))
    return State(
        jnp.zeros((), jnp.int32), learned, inner, memory, jnp.full(recipe.steps, jnp.nan, dtype)
    )


@functools.partial(jax.jit, static_argnames=("apply", "recipe"))
def advance(
    apply: Apply,
    rest: Theta,
    recipe: Recipe,
    data: Data,
    state: State,
    order: Int[Array, "E M"],
    until: Any,
) -> State:
    """Steps up to ``until``, compiled; differentiable and mappable like any function of arrays."""

    def gradient(learned: Theta, index: Array, memory: Any) -> tuple[Array, Theta, Any]:
        whole = learned if isinstance(learned, Learned) else Learned(learned)
        loss, slope, memory = preference_gradient(
            apply, rest, recipe, data.take(index), whole, memory
        )
        return loss, slope if isinstance(learned, Learned) else slope.policy, memory

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
    rest: Theta,
    recipe: Recipe,
    data: Data,
    probes: Batch | None,
    learned: Theta,
    kernels: bool,
) -> dict[str, Any]:
    theta, batch = whole_policy(learned, rest), data.batch

    def look(some: Batch) -> dict[str, Any]:
        result = responses(apply, theta, some)
        seen: dict[str, Any] = {"token_logp": result.token_logp}
        if recipe.mask is not None:
            seen["token_weights"] = recipe.mask.weights(learned.mask, result.hidden, some.valid)
        if kernels:
            seen["kernel"] = pair_kernel(apply, theta, some, recipe.include)
        return seen

    seen = in_chunks(look, batch)
    logp = seen["token_logp"].sum(-1)
    pull = recipe.objective.signed_coefficients(logp, data.reference, batch.lengths)
    seen |= {"logp": logp, "coefficients": Coefficients(pull[:, 0], -pull[:, 1])}
    seen["probes"] = jnp.zeros((0, 2), logp.dtype)
    if probes is not None:
        seen["probes"] = in_chunks(lambda some: responses(apply, theta, some).logp, probes)
    return seen


def _result(
    rest: Theta, data: Data, config: dict[str, Any], state: State, records: list[Any]
) -> Training:
    steps, seen = zip(*records, strict=True)
    columns = jax.tree.map(lambda *xs: jnp.stack(xs), *seen)
    absent = {"kernel": None, "token_weights": None}
    losses = state.losses[: int(state.step)]
    trace = Trace(
        jnp.asarray(steps), losses, data.reference, **{**absent, **columns}, config=config
    )
    return Training(whole_policy(state.learned, rest), state, trace)


def whole_policy(learned: Theta, rest: Theta) -> Theta:
    """All parameters of the policy, from what is trained (with a mask or without) and the rest."""
    return tree.combine(learned.policy if isinstance(learned, Learned) else learned, rest)


def _require_start(seen: dict[str, Any]) -> None:
    """Refuse pairs, probes and prompts of which the model says nothing."""
    for name, what in (("logp", "pair"), ("probes", "probe"), ("watched", "watched prompt")):
        bad = ~np.isfinite(np.asarray(seen[name])).all(axis=tuple(range(1, seen[name].ndim)))
        if bad.any():
            raise ValueError(
                f"log π of {what} {int(bad.argmax())} is not finite before the first step: token "
                "ids beyond the "
                "vocabulary, a context that the model does not hold, or overflow"
            )


def _require_same(run: dict[str, Any], there: Mapping[str, Any], what: str) -> None:
    if differ := sorted(k for k in run if there.get(k) != run[k]):
        raise ValueError(
            f"{what} is another one (other {', '.join(differ)}): give the arguments it began with "
            "(theta: the "
            "parameters at its start), or begin anew"
        )


def _continued(run: Training, fresh: State, steps: int) -> tuple[State, list[Any]]:
    """State and records of a run that goes on, with room for its further losses."""
    state, trace = run.state, run.trace
    done = int(state.step)
    if jax.tree.structure(state.optimizer) != jax.tree.structure(fresh.optimizer):
        raise ValueError("the run to resume has the state of another optimizer")
    if done > steps:
        raise ValueError(f"the run has taken {done} steps already, more than steps={steps}")
    room = jnp.full(steps, jnp.nan, state.losses.dtype).at[:done].set(state.losses[:done])
    names = ("token_logp", "token_weights", "kernel", "logp", "coefficients", "probes", "watched")
    columns = {n: getattr(trace, n) for n in names if getattr(trace, n) is not None}
    records = [
        (int(s), jax.tree.map(lambda x, i=i: x[i], columns)) for i, s in enumerate(trace.steps)
    ]
    return State(state.step, state.learned, state.optimizer, state.memory, room), records


def _identity(
    apply: Apply, theta: Theta, batch: Batch, recipe: Recipe, reference: Any, followed: Any
) -> dict[str, Any]:
    """What must be equal for one run to continue another; the number of steps may grow."""
    return {
        "objective": repr(recipe.objective),
        "optimizer": _behaviour(apply, theta, recipe),
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "include": None if recipe.include is None else list(recipe.include),
        "accumulate": recipe.accumulate,
        "mitigation": repr(recipe.mitigation),
        "mask": repr(recipe.mask),
        "model": digest(apply),
        "theta": digest(theta),
        "pairs": digest(batch, reference),
        "followed": digest(followed),
    }


def _behaviour(apply: Apply, theta: Theta, recipe: Recipe) -> list[str]:
    """An optimizer is functions, which cannot be compared: what it makes of a few fixed gradients."""
    updates = _probed(recipe, begin(apply, theta, recipe).learned)
    return [f"{x:.5e}" for x in np.asarray(updates).tolist()]


@functools.partial(jax.jit, static_argnames="recipe")
def _probed(recipe: Recipe, learned: Theta) -> Float[Array, " E"]:
    ones = jax.tree.map(jnp.ones_like, learned)

    def step(state: Any, t: Array) -> tuple[Any, Array]:
        slope = jax.tree.map(lambda x: jnp.cos(3 * t).astype(x.dtype) * x, ones)
        update, state = updated(recipe.optimizer, slope, state, ones)
        return state, jnp.stack(
            [jnp.abs(u).mean().astype(jnp.float32) for u in jax.tree.leaves(update)]
        ).mean()

    with jax.numpy_dtype_promotion("standard"):
        state = recipe.optimizer.init(cast(Any, ones))
    return jax.lax.scan(step, state, jnp.arange(6, dtype=jnp.float32))[1]


def _write(path: Path, run: dict[str, Any], training: Training) -> None:
    leaves = {f"state/{i}": x for i, x in enumerate(jax.tree.leaves(training.state))}
    header = {"kind": "training", "run": run, "config": dict(training.trace.config)}
    save_arrays(path, {**to_arrays(training.trace, "trace/"), **leaves}, header)


def _read(path: Path, run: dict[str, Any], state: State, theta: Theta, rest: Theta) -> Training:
    arrays, header = load_arrays(path)
    _require_same(run, header.get("run", {}), f"the run in {path}")
    leaves, treedef = jax.tree.flatten(state)
    count = sum(name.startswith("state/") for name in arrays)
    stored = [jnp.asarray(arrays[f"state/{i}"]) for i in range(count)]
    if count != len(leaves) or any(
        a.shape != b.shape for a, b in zip(stored[:-1], leaves[:-1], strict=True)
    ):
        raise ValueError(
            f"{path} was written with another optimizer: choose another out, or delete the file"
        )
    trace = from_arrays(
        {k.removeprefix("trace/"): v for k, v in arrays.items() if k.startswith("trace/")}, header
    )
    state = treedef.unflatten(stored)
    return Training(whole_policy(state.learned, rest), state, trace)
