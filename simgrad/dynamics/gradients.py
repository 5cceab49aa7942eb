"""The gradient of a preference loss on a batch: plain, accumulated, mitigated or masked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from simgrad.dynamics.recipe import Recipe
from simgrad.models import Bound, responses
from simgrad.objectives import batch_coupled
from simgrad.pairs import Batch
from simgrad.theory import pair_kernel
from simgrad.theory.mitigation import masked_logp
from simgrad.theory.prediction.steps import ascent
from simgrad.typing import Array, Float, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """What the optimizer updates: the policy's trained parameters, and a mask's (None without)."""

    policy: Theta
    mask: Theta = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Data:
    """All pairs of a run, with log π_ref of their responses and, for masks, of their tokens."""

    batch: Batch
    reference: Float[Array, "*pairs 2"]
    token_reference: Float[Array, "*pairs 2 R"] | None

    def take(self, index: Array) -> Data:
        """The pairs at ``index``."""
        return jax.tree.map(lambda x: x[index], self)


def preference_gradient(
    model: Bound, recipe: Recipe, data: Data, learned: Learned, memory: Any
) -> tuple[Array, Learned, Any]:
    """Loss, its gradient, and the mitigation's memory after the batch ``data``."""
    if recipe.mask is None and (recipe.mitigation is not None or batch_coupled(recipe.objective)):
        return _in_two_passes(model, recipe, data, learned, memory)
    one = _plain if recipe.mask is None else _masked
    loss, grad = _in_parts(functools.partial(one, model, recipe), recipe, data, learned)
    return loss, grad, memory


def _loss(recipe: Recipe, logp: Array, data: Data) -> Array:
    return recipe.objective.loss(logp, data.reference, data.batch.lengths).mean()


def _descent(up: Theta) -> Learned:
    return Learned(jax.tree.map(jnp.negative, up))


def _plain(model: Bound, recipe: Recipe, data: Data, learned: Learned) -> tuple[Array, Learned]:
    """One forward and one backward pass."""
    logp, pullback = jax.vjp(lambda t: model.logp(t, data.batch), learned.policy)
    force = recipe.objective.force(logp, data.reference, data.batch.lengths) / data.batch.size
    return _loss(recipe, logp, data), _descent(pullback(force)[0])


def _masked(model: Bound, recipe: Recipe, data: Data, learned: Learned) -> tuple[Array, Learned]:
    """Objective of the weighted log-probs plus the penalty, differentiated in policy and mask."""
    mask, tokens = recipe.mask, data.token_reference
    assert mask is not None
    assert tokens is not None

    def loss(learned: Learned) -> Array:
        result = responses(model.apply, model.whole(learned.policy), data.batch)
        assert learned.mask is not None
        weights = mask.weights(learned.mask, result.hidden, data.batch.valid)
        reference = (weights.astype(tokens.dtype) * tokens).sum(-1)
        weighted = Data(data.batch, reference, None)
        return _loss(recipe, masked_logp(result, weights), weighted) + mask.penalty(weights).mean()

    return jax.value_and_grad(loss)(learned)


def _parts(recipe: Recipe, x: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(recipe.accumulate, -1, *a.shape[1:]), x)


def _in_parts(gradient: Any, recipe: Recipe, data: Data, learned: Learned) -> tuple[Array, Learned]:
    """Mean of the micro-batches' losses and gradients, one after the other."""
    if recipe.accumulate == 1:
        return gradient(data, learned)

    def add(total: tuple, part: Data) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(part, learned)), None

    parts = _parts(recipe, data)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), learned)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / recipe.accumulate, total)


def _in_two_passes(
    model: Bound, recipe: Recipe, data: Data, learned: Learned, memory: Any
) -> tuple[Array, Learned, Any]:
    """Log-probs (and kernels) of the whole batch first, for its force; then the gradient."""
    theta, mitigation = model.whole(learned.policy), recipe.mitigation

    def look(part: Batch) -> tuple[Array, Any]:
        kernel = None if mitigation is None else pair_kernel(model.apply, theta, part)
        return model.logp(learned.policy, part), kernel

    if recipe.accumulate == 1:
        logp, kernel = look(data.batch)
    else:
        looked = jax.lax.map(look, _parts(recipe, data.batch))
        logp, kernel = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), looked)
    force = recipe.objective.force(logp, data.reference, data.batch.lengths)
    if mitigation is not None:
        force, memory = mitigation.update(force, memory, kernel)
    most = data.batch.size // recipe.accumulate
    up = ascent(model, learned.policy, data.batch, force / len(force), most)
    return _loss(recipe, logp, data), _descent(up), memory
