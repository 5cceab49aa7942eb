"""Gradient descent as one compiled loop, whatever the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simgrad.theory.prediction.steps import updated
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["Gradient", "State", "descend"]

Gradient = Callable[[Theta, Array, Any], tuple[Array, Theta, Any]]
"""(parameters, indices of the step's examples, memory) → (loss, ∇ loss, memory)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a run is at one moment; enough to go on exactly.

    Attributes:
        step: updates taken so far.
        learned: the trained parameters (None where a leaf is not trained).
        optimizer: optax's state.
        memory: running averages of a mitigation, if it keeps any.
        losses: of every step's batch before its update; nan for steps still to come.
    """

    step: Int[Array, ""]
    learned: Theta
    optimizer: Any
    memory: Any
    losses: Float[Array, " E"]


def descend(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    state: State,
    order: Int[Array, "E M"],
    until: int | Int[Array, ""],
) -> State:
    """Take steps from ``state.step`` until ``until``, each on its row of ``order``.

    Loop bounds are values, not shapes: one program serves any number of steps.
    """
    if not len(order):
        return state

    def body(at: Array, state: State) -> State:
        loss, slope, memory = gradient(state.learned, order[at], state.memory)
        update, inner = updated(optimizer, slope, state.optimizer, state.learned)
        learned = jax.tree.map(jnp.add, state.learned, update)
        return State(
            at + 1, learned, inner, memory, state.losses.at[at].set(loss.astype(state.losses.dtype))
        )

    return jax.lax.fori_loop(state.step, jnp.asarray(until, state.step.dtype), body, state)
