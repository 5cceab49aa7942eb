"""The step that an optax optimizer really takes on a preference loss."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.models import Apply, Bound, bind, sequence_logp
from simgrad.models.likelihood import require_shape
from simgrad.objectives import Objective
from simgrad.pairs import AT_ONCE, Batch, chunks
from simgrad.theory.optimizers import begun, updated
from simgrad.typing import Array, Float, Theta


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


@functools.partial(jax.jit, static_argnames=("apply", "objective"))
def loss_gradient(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    reference: Float[Array, "B 2"] | None = None,
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
    >>> (jnp.abs(table).sum(-1) > 1e-6).nonzero()[0].tolist()  # no token but the two moves
    [3, 4]
    """
    model = bind(apply, theta)
    # the force first, from forward passes alone, then the gradient a few pairs at a time
    logp = sequence_logp(apply, theta, batch)
    against = logp if reference is None else reference
    require_shape("reference", against, (batch.size, 2))
    force = objective.force(logp, against, batch.lengths) / batch.size
    return jax.tree.map(jnp.negative, ascent(model, model.trained, batch, force))


def ascent(
    model: Bound, trained: Theta, batch: Batch, force: Float[Array, "B 2"], most: int = AT_ONCE
) -> Theta:
    """Jᵀ c: the direction that a force on the log-probs gives the parameters, in chunks of pairs.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4])]
    >>> model, nothing = bind(*linear_softmax(pairs, 9, 4)), jnp.zeros((1, 2))
    >>> up = ascent(model, model.trained, padded(pairs), nothing)
    >>> bool((up["unembedding"]["table"] == 0).all())
    True
    """

    def part(index: Array, force: Array) -> Theta:
        some = batch.take(index)
        value, pullback = jax.vjp(lambda t: model.logp(t, some), trained)
        return pullback(force.astype(value.dtype))[0]

    index = chunks(batch.size, most)
    if len(index) == 1:
        return part(jnp.asarray(index[0]), force)
    # the last chunk repeats its final pair, which counts once
    once = np.arange(index.size).reshape(index.shape) < batch.size
    forces = jnp.where(jnp.asarray(once)[..., None], force[jnp.asarray(index)], 0.0)

    def add(total: Theta, item: tuple[Array, Array]) -> tuple[Theta, None]:
        return jax.tree.map(jnp.add, total, part(*item)), None

    zero = jax.tree.map(jnp.zeros_like, trained)
    return jax.lax.scan(add, zero, (jnp.asarray(index), forces.astype(force.dtype)))[0]


def optimizer_step(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: Any = None,
    reference: Float[Array, "B 2"] | None = None,
) -> OptimizerStep:
    """The update of any optax optimizer (clipping, decay, schedules and all) on a preference batch.

    Args:
        apply: the model; :func:`simgrad.models.only` selects parameters.
        theta: its parameters.
        batch: the pairs of the step; the loss is their mean.
        objective: from :mod:`simgrad.objectives`.
        optimizer: for example ``optax.adamw(1e-6)`` or
            ``optax.chain(optax.clip_by_global_norm(1.0), ..)``.
        state: its state (None: freshly initialised).
        reference: log π_ref (None: the policy itself).

    Raises:
        ValueError: a name in place of an objective, a number in place of an optimizer; a reference
            of another shape.

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
    trained = bind(apply, theta).trained
    gradient = loss_gradient(apply, theta, batch, objective, reference)
    state = begun(optimizer, trained) if state is None else state
    return OptimizerStep(*updated(optimizer, gradient, state, trained), gradient)
