"""The one run driver: (gradient, optimizer, state, order, observe) → records.

Preference tuning, pretraining, sweeps and linearised runs are arguments to it. :func:`descend` is
the compiled loop; :func:`follow` drives it from record to record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.trajectory import Trajectory
from simgrad.theory.optimizers import begun, updated
from simgrad.typing import Array, Float, Int, Theta

CHECK = 100
"""Steps between two looks for a loss that is no longer finite."""

Gradient = Callable[[Theta, Array, Any], tuple[Array, Theta, Any]]
"""(parameters, indices of the step's examples, memory) → (loss, ∇ loss, memory)."""

Records = list[tuple[int, Any]]
"""Steps taken, and what was seen then."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a run is at one moment; enough to go on exactly.

    Attributes:
        step: updates taken so far.
        learned: what the optimizer updates (None where a leaf is not trained).
        optimizer: optax's state.
        memory: what the gradient keeps from step to step: a mitigation's average, an anchor.
        losses: of every step's batch before its update; nan for steps still to come.
    """

    step: Int[Array, ""]
    learned: Theta
    optimizer: Any
    memory: Any
    losses: Float[Array, " E"]


@dataclass(frozen=True)
class Training:
    """A run so far.

    Attributes:
        theta: all parameters now, trained and not.
        state: optimizer, position in the order, mask: what going on exactly needs.
        trajectory: what was recorded.
    """

    theta: Theta
    state: State
    trajectory: Trajectory


def started(
    optimizer: optax.GradientTransformation,
    learned: Theta,
    steps: int,
    memory: Any = (),
    parameters: Theta | None = None,
) -> State:
    """The state before the first of ``steps`` steps.

    ``parameters`` is what the optimizer is initialised with (None: ``learned``).
    """
    inner = begun(optimizer, learned if parameters is None else parameters)
    dtype = jax.tree.leaves(learned)[0].dtype
    return State(jnp.zeros((), jnp.int32), learned, inner, memory, jnp.full(steps, jnp.nan, dtype))


def descend(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    state: State,
    order: Int[Array, "E M"],
    until: int | Int[Array, ""],
    parameters: Callable[[State], Theta] = lambda state: state.learned,
) -> State:
    """Take steps from ``state.step`` until ``until``, each on its row of ``order``.

        θ_{t+1} = θ_t + optimizer(∇ L_t(θ_t))

    Loop bounds are values, not shapes: one program serves any number of steps. ``parameters`` is
    what the optimizer reads (weight decay), where it is not what it updates.
    """
    if not len(order):
        return state

    def body(at: Array, state: State) -> State:
        loss, grad, memory = gradient(state.learned, order[at], state.memory)
        update, inner = updated(optimizer, grad, state.optimizer, parameters(state))
        learned = jax.tree.map(jnp.add, state.learned, update)
        losses = state.losses.at[at].set(loss.astype(state.losses.dtype))
        return State(at + 1, learned, inner, memory, losses)

    return jax.lax.fori_loop(state.step, jnp.asarray(until, state.step.dtype), body, state)


def recorded(
    state: State, records: Records, reference: Float[Array, "B 2"], **config: Any
) -> Trajectory:
    """What a run saw until now."""
    steps, seen = zip(*records, strict=True)
    columns = jax.tree.map(lambda *xs: jnp.stack(xs), *seen)
    losses = state.losses[: int(state.step)]
    return Trajectory(jnp.asarray(steps), losses, reference, **columns, config=config)


class DivergedError(FloatingPointError):
    """A run is no longer finite.

    Attributes:
        step: the update that met or made it.
        trajectory: what was recorded before.
    """

    def __init__(self, step: int, trajectory: Trajectory) -> None:
        super().__init__(
            f"step {step} (counted from 0) met or left log-probs that are not finite: lower the "
            "learning rate or clip gradients, and begin anew"
        )
        self.step, self.trajectory = step, trajectory


def follow(
    advance: Callable[[State, int], State],
    state: State,
    stops: Sequence[int],
    observe: Callable[[State], dict[str, Any]],
    result: Callable[[State, Records], Training],
    records: Iterable[tuple[int, Any]] = (),
    keep: Callable[[Training], None] = lambda run: None,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Run from record to record, and give ``result`` of the last state and all records.

    Args:
        advance: takes the steps up to a number, for example :func:`descend`, compiled.
        state: where the run is now.
        stops: steps after which it is looked at.
        observe: what is recorded: arrays by name, ``logp`` among them.
        result: what is made of a state and the records so far.
        records: those made already.
        keep: called with the result at every record.
        progress: called with (steps taken, steps in all).

    Raises:
        DivergedError: a loss or log-prob that is not finite.
    """
    records = list(records)
    for stop in stops:
        while (at := int(state.step)) < stop:
            state = advance(state, min(stop, at + CHECK))
            bad = ~np.isfinite(np.asarray(state.losses[at : int(state.step)]))
            if bad.any():
                step = at + int(bad.argmax())
                raise DivergedError(step, result(state, records).trajectory)
            if progress is not None:
                progress(int(state.step), stops[-1])
        seen = observe(state)
        if not np.isfinite(np.asarray(seen["logp"])).all():
            raise DivergedError(stop - 1, result(state, records).trajectory)
        records.append((stop, seen))
        keep(result(state, records))
    return result(state, records)
