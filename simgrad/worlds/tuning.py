"""Preference tuning of many policies at once, each on pairs of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from simgrad import tree
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.dynamics.training import advance, begin, prepare
from simgrad.models import Apply
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["each_seed", "next_logp", "stacked", "tuned"]


def stacked(things: Any) -> Any:
    """Trees of one shape with a new leading axis, on the host."""
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *things)


def each_seed(thetas: Theta, copies: int) -> Theta:
    """Every policy ``copies`` times, one after the other."""
    return jax.tree.map(lambda x: np.repeat(np.asarray(x), copies, axis=0), thetas)


def tuned(apply: Apply, thetas: Theta, batches: Batch, recipe: Recipe, orders: Int[np.ndarray, "N E M"]) -> Theta:
    """Parameters after ``recipe`` for each policy and its pairs (leading axis); nan where a run diverged."""
    return spread(_tuning(apply, recipe), thetas, batches, orders)


@functools.lru_cache
def _tuning(apply: Apply, recipe: Recipe) -> Any:
    def run(theta: Theta, batch: Batch, order: Array) -> Theta:
        data, rest = prepare(apply, theta, batch, recipe)
        state = advance(apply, rest, recipe, data, begin(apply, theta, recipe), order, recipe.steps)
        return tree.combine(state.learned.policy, rest)

    return run


def next_logp(
    apply: Apply, thetas: Theta, prompts: Int[np.ndarray, "N P T"], lengths: Int[np.ndarray, "N P"] | None = None
) -> Float[np.ndarray, "N P V"]:
    """Log π(z | prompt) of every token, for each policy and its prompts, in nats."""
    if lengths is None:
        lengths = np.full(prompts.shape[:2], prompts.shape[-1], np.int32)
    return spread(_reading(apply), thetas, prompts, lengths)


@functools.lru_cache
def _reading(apply: Apply) -> Any:
    def run(theta: Theta, prompts: Array, lengths: Array) -> Array:
        logits = apply(theta, prompts, rows=(lengths - 1)[:, None]).logits[:, 0]
        return jax.nn.log_softmax(logits, axis=-1)

    return run
