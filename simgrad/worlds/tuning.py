"""Preference tuning of many policies at once, each on pairs of its own."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics import prompts
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.dynamics.training import advance, begin, policy, prepare
from simgrad.models import Apply, bind
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Int, Theta


def stacked(things: Any) -> Any:
    """Trees of one shape with a new leading axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *things)


def joined(things: Any) -> Any:
    """Trees of one shape, one after the other along their leading axes."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *things)


def cut(found: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """Results of many runs, cut along their leading axis into ``count`` equal parts."""
    return [{k: np.split(x, count)[i] for k, x in found.items()} for i in range(count)]


def each_seed(thetas: Theta, copies: int) -> Theta:
    """Every policy ``copies`` times, one after the other."""
    return jax.tree.map(lambda x: np.repeat(np.asarray(x), copies, axis=0), thetas)


@functools.lru_cache(maxsize=64)
def recipe_for(
    objective: Objective,
    optimizer: Literal["sgd", "adam"],
    learning_rate: float,
    steps: int,
    batch_size: int | None = None,
) -> Recipe:
    """A recipe, one object for equal settings so that compiled programs are shared."""
    return Recipe(
        objective,
        {"sgd": optax.sgd, "adam": optax.adam}[optimizer](learning_rate),
        steps,
        batch_size,
    )


def trained(
    apply: Apply, recipe: Recipe, theta: Theta, batch: Batch, order: Array | None = None
) -> Theta:
    """Parameters after a run, a pure function to be mapped over runs; nan where it diverged."""
    data = prepare(apply, theta, batch, recipe)
    order = jnp.asarray(recipe.order(batch.size)) if order is None else order
    state = advance(apply, theta, recipe, data, begin(apply, theta, recipe), order, recipe.steps)
    return policy(bind(apply, theta), state.learned)


def tuned(
    apply: Apply, thetas: Theta, batches: Batch, recipe: Recipe, orders: Int[np.ndarray, "N E M"]
) -> Theta:
    """Parameters after ``recipe`` for each policy and its pairs (leading axis), on all devices."""
    return spread(_tuning(apply, recipe), thetas, batches, orders)


@functools.lru_cache
def _tuning(apply: Apply, recipe: Recipe) -> Any:
    return functools.partial(trained, apply, recipe)


def next_logp(
    apply: Apply,
    thetas: Theta,
    tokens: Int[np.ndarray, "N P T"],
    lengths: Int[np.ndarray, "N P"] | None = None,
) -> Float[np.ndarray, "N P V"]:
    """Log π(z | prompt) of every token, for each policy and its prompts, in nats."""
    if lengths is None:
        lengths = np.full(tokens.shape[:2], tokens.shape[-1], np.int32)
    return spread(_reading(apply), thetas, tokens, lengths)


@functools.lru_cache
def _reading(apply: Apply) -> Any:
    return functools.partial(prompts.next_logp, apply)
