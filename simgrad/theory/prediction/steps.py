"""The step that an optax optimizer really takes on a preference loss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simgrad import tree
from simgrad.models import Apply
from simgrad.models.likelihood import CHUNK, in_chunks, log_probs, require_shape, responses
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Theta

__all__ = ["OptimizerStep", "loss_gradient", "optimizer_step", "require_training", "updated"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerStep:
    """One update: θ → θ + ``direction``.

    Attributes:
        direction: the update, learning rate included; None where a leaf is not trained.
        state: the optimizer's state after it.
        gradient: of the mean loss over the batch, before the optimizer saw it.
    """

    direction: Theta
    state: Any
    gradient: Theta


def require_training(objective: Any, optimizer: Any) -> None:
    """Refuse names in place of objectives, and learning rates in place of optimizers."""
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective is {objective!r}: get one by name, simgrad.objectives.get('dpo')"
        )
    if not hasattr(optimizer, "update"):
        raise ValueError(
            f"optimizer is {optimizer!r}: an optax transformation is needed, for example "
            "optax.sgd(1e-3)"
        )


def updated(
    optimizer: optax.GradientTransformation,
    gradient: Theta,
    state: Any,
    trained: Theta | None = None,
) -> tuple[Theta, Any]:
    """``optimizer.update``, whatever promotion rules are in force: optax needs the usual ones.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> optimizer, gradient = optax.sgd(0.5), {"w": jnp.array([2.0])}
    >>> updated(optimizer, gradient, optimizer.init(gradient))[0]["w"].item()
    -1.0
    """
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradient, state, trained)


def loss_gradient(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    reference: Float[Array, "B 2"] | None = None,
    include: Sequence[str] | None = None,
) -> Theta:
    """∇_θ of the mean loss over the pairs, -Jᵀ c with c = (d_w, -d_l)/B.

    ``reference`` holds log π_ref of both responses (None: the policy itself, as before the first
    step). A large batch is passed through a few pairs at a time, objectives that couple its pairs
    included.

    Raises:
        ValueError: a reference of another shape.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.objectives import DPO
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4])]
    >>> batch, (apply, theta) = padded(pairs), linear_softmax(pairs, 9, 4)
    >>> table = loss_gradient(apply, theta, batch, DPO())["unembedding"]["table"]
    >>> (jnp.abs(table).sum(-1) > 1e-6).nonzero()[0].tolist()  # one context, equal weights: no other token is pulled
    [3, 4]
    """
    if reference is not None:
        require_shape("reference", reference, (batch.size, 2))
    return _gradient(apply, theta, batch, objective, reference, tree.patterns(include))


@functools.partial(jax.jit, static_argnames=("apply", "objective", "include"))
def _gradient(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    reference: Array | None,
    include: tuple[str, ...] | None,
) -> Theta:
    if batch.size <= CHUNK:
        logp, trained = log_probs(apply, theta, batch, include)
        value, pullback = jax.vjp(logp, trained)
        pull = objective.signed_coefficients(
            value, value if reference is None else reference, batch.lengths
        )
        (ascent,) = pullback(pull / batch.size)
        return jax.tree.map(jnp.negative, ascent)
    # the coefficients first, from forward passes alone, then the gradient a few pairs at a time
    value = in_chunks(lambda some: responses(apply, theta, some).logp, batch)
    pull = objective.signed_coefficients(
        value, value if reference is None else reference, batch.lengths
    )
    count = -(-batch.size // CHUNK)
    at = jnp.arange(count * CHUNK).reshape(count, CHUNK)

    def add(total: Theta, at: Array) -> tuple[Theta, None]:
        index = jnp.minimum(at, batch.size - 1)
        logp, trained = log_probs(apply, theta, batch.take(index), include)
        _, pullback = jax.vjp(logp, trained)
        (ascent,) = pullback(jnp.where((at < batch.size)[:, None], pull[index] / batch.size, 0.0))
        return jax.tree.map(jnp.subtract, total, ascent), None

    trained, _ = tree.partition(theta, include, apply.frozen)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), at)[0]


def optimizer_step(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: Any = None,
    reference: Float[Array, "B 2"] | None = None,
    include: Sequence[str] | None = None,
) -> OptimizerStep:
    """The update of any optax optimizer (clipping, decay, schedules and all) on a preference batch.

    Args:
        apply: the model.
        theta: its parameters.
        batch: the pairs of the step; the loss is their mean.
        objective: from :mod:`simgrad.objectives`.
        optimizer: for example ``optax.adamw(1e-6)`` or
            ``optax.chain(optax.clip_by_global_norm(1.0), ..)``.
        state: its state (None: freshly initialised).
        reference: log π_ref (None: the policy itself).
        include: patterns of the parameters that are trained.

    Raises:
        ValueError: a name in place of an objective, a number in place of an optimizer; a reference
        of
            another shape; a pattern that matches nothing.

    >>> import optax
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.objectives import DPO
    >>> from simgrad.pairs import Pair, padded
    >>> from simgrad.theory import displacement
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch = padded([Pair([1, 2], [3, 4], [5, 4])])
    >>> step = optimizer_step(apply, theta, batch, DPO(), optax.adam(1e-3))
    >>> displacement(apply, theta, batch, step.direction).total.shape
    (1, 2)
    """
    require_training(objective, optimizer)
    trained, _ = tree.partition(theta, include, apply.frozen)
    gradient = loss_gradient(apply, theta, batch, objective, reference, include)
    direction, state = updated(
        optimizer, gradient, optimizer.init(trained) if state is None else state, trained
    )
    return OptimizerStep(direction, state, gradient)
