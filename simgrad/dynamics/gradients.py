"""The gradient of a preference loss on a batch: plain, accumulated, mitigated or masked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.dynamics.recipe import Recipe
from simgrad.models import Apply
from simgrad.objectives import Coefficients, batch_coupled
from simgrad.pairs import Batch
from simgrad.theory import RunningCalibrated, masked_logp, pair_kernel, responses
from simgrad.typing import Array, Float, Theta

__all__ = ["Learned", "mean_loss", "preference_gradient"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """What the optimizer updates: the policy's trained parameters, and a mask's (None without one)."""

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


def mean_loss(recipe: Recipe, logp: Array, reference: Array, batch: Batch) -> Array:
    """The objective's mean over the pairs."""
    return recipe.objective.loss(
        *(x[:, side] for x in (logp, reference, batch.lengths) for side in (0, 1))
    ).mean()


def preference_gradient(
    apply: Apply, rest: Theta, recipe: Recipe, data: Data, learned: Learned, memory: Any
) -> tuple[Array, Learned, Any]:
    """Loss, its gradient, and the mitigation's memory after the batch ``data``."""
    if recipe.mask is not None:
        loss, slope = _in_parts(
            functools.partial(_masked, apply, rest, recipe), recipe, data, learned
        )
        return loss, slope, memory
    if recipe.accumulate > 1 and not batch_coupled(recipe.objective) and recipe.mitigation is None:
        loss, slope = _in_parts(
            functools.partial(_plain, apply, rest, recipe), recipe, data, learned
        )
        return loss, slope, memory
    if recipe.accumulate == 1 and recipe.mitigation is None:
        return *_plain(apply, rest, recipe, data, learned), memory
    return _in_two_passes(apply, rest, recipe, data, learned, memory)


def _plain(
    apply: Apply, rest: Theta, recipe: Recipe, data: Data, learned: Learned
) -> tuple[Array, Learned]:
    """One forward and one backward pass."""
    logp, pullback = jax.vjp(_logp(apply, rest, data.batch), learned.policy)
    pull = (
        recipe.objective.signed_coefficients(logp, data.reference, data.batch.lengths)
        / data.batch.size
    )
    return mean_loss(recipe, logp, data.reference, data.batch), _descent(pullback, pull)


def _logp(apply: Apply, rest: Theta, batch: Batch) -> Any:
    return lambda policy: responses(apply, tree.combine(policy, rest), batch).logp


def _descent(pullback: Any, pull: Array) -> Learned:
    return Learned(jax.tree.map(jnp.negative, pullback(pull)[0]))


def _masked(
    apply: Apply, rest: Theta, recipe: Recipe, data: Data, learned: Learned
) -> tuple[Array, Learned]:
    """Objective of the weighted log-probs plus the penalty, differentiated in policy and mask."""
    mask, tokens = recipe.mask, data.token_reference
    assert mask is not None
    assert tokens is not None

    def loss(learned: Learned) -> Array:
        result = responses(apply, tree.combine(learned.policy, rest), data.batch)
        assert learned.mask is not None
        weights = mask.weights(learned.mask, result.hidden, data.batch.valid)
        reference = (weights.astype(tokens.dtype) * tokens).sum(-1)
        return (
            mean_loss(recipe, masked_logp(result, weights), reference, data.batch)
            + mask.penalty(weights).mean()
        )

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
    apply: Apply, rest: Theta, recipe: Recipe, data: Data, learned: Learned, memory: Any
) -> tuple[Array, Learned, Any]:
    """Log-probs (and kernels) of the whole batch first, for its d_w and d_l; then the gradient."""
    theta = tree.combine(learned.policy, rest)

    def look(part: Data) -> tuple[Array, Any]:
        kernel = (
            None
            if recipe.mitigation is None
            else pair_kernel(apply, theta, part.batch, recipe.include)
        )
        return responses(apply, theta, part.batch).logp, kernel

    logp, kernel = (
        look(data) if recipe.accumulate == 1 else _joined(jax.lax.map(look, _parts(recipe, data)))
    )
    pull = recipe.objective.signed_coefficients(logp, data.reference, data.batch.lengths)
    if recipe.mitigation is not None:
        d = Coefficients(pull[:, 0], -pull[:, 1])
        if isinstance(recipe.mitigation, RunningCalibrated):
            d, memory = recipe.mitigation.update(memory, d, kernel)
        else:
            d = recipe.mitigation(d, kernel)
        pull = jnp.stack([d.chosen, -d.rejected], axis=-1)
    pull = pull / len(pull)

    def add(total: Learned, part: tuple[Batch, Array]) -> tuple[Learned, None]:
        batch, pull = part
        _, pullback = jax.vjp(_logp(apply, rest, batch), learned.policy)
        return jax.tree.map(jnp.add, total, _descent(pullback, pull)), None

    zero = jax.tree.map(jnp.zeros_like, Learned(learned.policy))
    slope, _ = jax.lax.scan(add, zero, (_parts(recipe, data.batch), _parts(recipe, pull)))
    return mean_loss(recipe, logp, data.reference, data.batch), slope, memory


def _joined(parts: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
