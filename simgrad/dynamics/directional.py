"""The directional displacement score: one data-set direction, one forward derivative a response."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from simgrad.dynamics.moments import met_by_moments, require_settling, settled
from simgrad.dynamics.recipe import Recipe
from simgrad.models import Apply, bind, sequence_logp
from simgrad.models.likelihood import require_shape
from simgrad.objectives import Objective
from simgrad.pairs import Batch, in_chunks
from simgrad.theory.optimizers import begun, updated
from simgrad.theory.prediction.steps import loss_gradient
from simgrad.typing import Array, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DirectionalScore:
    """Predicted Δlog π of responses over a run, in nats; the last axis is (chosen, rejected).

    Attributes:
        change: ⟨∇log π(y), D⟩.
        error: standard error from having seen only a sample of the pairs (0 if all were seen).
    """

    change: Float[Array, "B 2"]
    error: Float[Array, "B 2"]


def run_direction(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    reference: Float[Array, "B 2"] | None = None,
) -> Theta:
    """D: where the whole run would go if gradients stayed what they are now.

        D = Σ_{t < steps} optimizer_t(ḡ),        ḡ = mean gradient of all pairs at θ

    Schedules and momentum run as they do, decay acts at θ. For Adam, AdamW and RMSProp the second
    moment v is set before every update to the mean squared minibatch gradient of one epoch, and the
    first to the mean, so that the preconditioner is P = 1/(√v' + ε), v' = β₂ v + (1 - β₂) ḡ², about
    what it is after the first steps; both are of
    gradients as these transformations see them, behind clipping and whatever else stands before
    them in a chain. Without second moments clipping sees ḡ, whose norm is below a minibatch's. It
    costs one epoch of gradients (and one batch more where batches do not divide the pairs).

    Raises:
        ValueError: what :class:`Recipe` or the batch do not allow; mitigations and masks, which
            change the gradient with the policy; optimizers other than these, whose moments are not
            known here; a direction that is not finite.
    """
    if recipe.mitigation is not None or recipe.mask is not None:
        raise ValueError(
            "a direction of the plain objective only: drop mitigation and mask, or train"
        )
    size = batch.size if recipe.batch_size is None else recipe.batch_size
    order = jnp.asarray(recipe.replace(steps=-(-batch.size // size)).order(batch.size))
    start = sequence_logp(apply, theta, batch) if reference is None else reference
    require_shape("reference", start, (batch.size, 2))
    require_settling(recipe.optimizer, bind(apply, theta).trained)
    fixed = (recipe.objective, recipe.optimizer, recipe.steps)
    found = _direction(apply, theta, batch, *fixed, start, order)
    leaves = [x for x in jax.tree.leaves(found) if not isinstance(x, Tracer)]
    if not all(bool(jnp.isfinite(x).all()) for x in leaves):
        raise ValueError(
            "the direction of this run is not finite: parameters or gradients are not, or the "
            "optimizer changes gradients in a way that cannot be read here: use linearized_run, or "
            "train"
        )
    return found


@functools.partial(jax.jit, static_argnames=("apply", "objective", "optimizer", "steps"))
def _direction(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Array,
    order: Int[Array, "E M"],
) -> Theta:
    trained = bind(apply, theta).trained
    size, left = order.shape[1], batch.size % order.shape[1]
    state, zero = begun(optimizer, trained), jax.tree.map(jnp.zeros_like, trained)
    met = met_by_moments(optimizer, state, trained)

    def grad(index: Array) -> Theta:
        return met(loss_gradient(apply, theta, batch.take(index), objective, reference[index]))

    def gather(sums: tuple[Theta, Theta], row: tuple[Array, Array]) -> tuple[tuple, None]:
        index, weight = row
        g = grad(index)
        first = jax.tree.map(lambda m, x: m + weight.astype(x.dtype) * x, sums[0], g)
        return (first, jax.tree.map(lambda v, x: v + x * x / len(order), sums[1], g)), None

    # a last batch that had to be filled up counts for the second moment; its own pairs for the mean
    weights = jnp.full(len(order), size / batch.size).at[-1].multiply(0.0 if left else 1.0)
    (mean, square), _ = jax.lax.scan(gather, (zero, zero), (order, weights))
    if left:
        own = grad(order[-1, :left])
        mean = jax.tree.map(lambda m, x: m + (left / batch.size) * x, mean, own)
    # what stands before the moments (an L2 term) acts again when the mean is handed over
    fed = jax.tree.map(jnp.subtract, mean, met(zero))

    def step(_: Any, carry: tuple[Theta, Any]) -> tuple[Theta, Any]:
        total, state = carry
        update, state = updated(optimizer, fed, settled(state, mean, square), trained)
        return jax.tree.map(jnp.add, total, update), state

    return jax.lax.fori_loop(0, steps, step, (zero, state))[0]


def directional_change(
    apply: Apply, theta: Theta, batch: Batch, direction: Theta
) -> Float[Array, "B 2"]:
    """⟨∇log π(y), D⟩ of both responses of every pair: one forward derivative, about two forwards.

    Any responses will do, trained on or not, in either layout (packed computes prompts once). Unit:
    nats.

    Raises:
        ValueError: ``direction`` holds other parameters than the model trains.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, packed
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> nowhere = jax.tree.map(jnp.zeros_like, theta)
    >>> directional_change(apply, theta, packed([Pair([1, 2], [3], [4])]), nowhere).tolist()
    [[0.0, 0.0]]
    """
    bind(apply, theta).require_step(direction)
    return _change(apply, theta, batch, direction)


@functools.partial(jax.jit, static_argnames="apply")
def _change(apply: Apply, theta: Theta, batch: Batch, direction: Theta) -> Array:
    model = bind(apply, theta)

    def few(some: Batch) -> Array:
        return jax.jvp(lambda t: model.logp(t, some), (model.trained,), (direction,))[1]

    return in_chunks(few, batch)


def directional_score(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    *,
    follow: Batch | None = None,
    sample: int | None = None,
    groups: int = 4,
    seed: int = 0,
) -> DirectionalScore:
    """Predict Δlog π over a run on ``batch``.

    This is :func:`run_direction`, then :func:`directional_change`.

    Args:
        apply: the model.
        theta: its parameters at the start; the policy is its own reference.
        batch: all pairs of the run.
        recipe: how it is trained.
        follow: responses to predict (None: the pairs themselves).
        sample: see only so many pairs, drawn at random, for the direction. Its error is then given
            too.
        groups: parts of the sample whose separate directions give the error: their standard
            deviation over √groups, times √(1 - sample/pairs). Under Adam the parts' own moments
            make this an estimate.
        seed: of the sample.

    Raises:
        ValueError: a sample that is larger than the data, or too small for its groups.
    """
    follow = batch if follow is None else follow
    return directions(apply, theta, batch, recipe, sample, groups, seed).score(apply, theta, follow)


@dataclass(frozen=True)
class Directions:
    """Where a run goes, seen from all pairs or from a sample.

    Attributes:
        seen: the direction.
        parts: those that parts of the sample see; none without a sample.
        share: what their standard deviation counts for in the error.
    """

    seen: Theta
    parts: tuple[Theta, ...] = ()
    share: float = 0.0

    def score(self, apply: Apply, theta: Theta, batch: Batch) -> DirectionalScore:
        """Δlog π of any responses, and its error."""
        change = directional_change(apply, theta, batch, self.seen)
        if not self.parts:
            return DirectionalScore(change, jnp.zeros_like(change))
        each = jnp.stack([directional_change(apply, theta, batch, part) for part in self.parts])
        return DirectionalScore(change, each.std(0, ddof=1) * self.share)


def directions(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    sample: int | None = None,
    groups: int = 4,
    seed: int = 0,
) -> Directions:
    """The direction of a run, as :func:`directional_score` takes it, for many batches to be read.

    Raises:
        ValueError: as there.
    """
    if sample is None or sample == batch.size:
        return Directions(run_direction(apply, theta, batch, recipe))
    if not 2 <= groups <= sample <= batch.size:
        raise ValueError(
            f"sample={sample} of {batch.size} pairs in groups={groups}: 2 <= groups <= sample <= "
            "pairs"
        )

    def seen(index: np.ndarray) -> Theta:
        size = None if recipe.batch_size is None else min(recipe.batch_size, len(index))
        return run_direction(
            apply, theta, batch.take(index), recipe.replace(batch_size=size, accumulate=1)
        )

    drawn = np.random.default_rng(seed).permutation(batch.size)[:sample]
    each = sample // groups
    parts = tuple(seen(drawn[k * each : (k + 1) * each]) for k in range(groups))
    return Directions(seen(drawn), parts, float(np.sqrt((1 - sample / batch.size) / groups)))
