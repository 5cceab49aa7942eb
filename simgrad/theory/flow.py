"""Whole runs predicted without training: kernel flow and linearised optimization.

With the kernel frozen at θ₀ a run on the loss is a recursion in the log-probs themselves,

    u_{t+1} = u_t + η_t K c(u_t),        c = (d_w, -d_l)/n of the pairs in step t's batch,

which :func:`kernel_flow` iterates in R^{2B} for optimizers that are linear in the gradient (SGD,
momentum, schedules). :func:`linearized_run` keeps J instead of K, so that any optax optimizer can be
applied to the parameters themselves, and can take J anew every few steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad import tree
from simgrad.models import Apply
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.theory.likelihood import log_probs
from simgrad.theory.steps import updated
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["Flow", "Run", "kernel_flow", "linearized_run"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flow:
    """Log-probs along a kernel flow, in nats; step 0 is the start.

    Attributes:
        logp: of the pairs' responses.
        probes: Δlog π of the probe responses (none if no probe kernel was given).
    """

    logp: Float[Array, "E B 2"]
    probes: Float[Array, "E K"]


def kernel_flow(
    kernel: Float[Array, "U U"],
    logp: Float[Array, "B 2"],
    lengths: Int[Array, "B 2"],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Float[Array, "B 2"] | None = None,
    order: Int[Array, "E M"] | None = None,
    probe_kernel: Float[Array, "K U"] | None = None,
) -> Flow:
    """``steps`` steps of training with the entanglement kernel frozen.

    The parameters stay in θ₀ + Jᵀ a, so the optimizer runs on the 2B numbers a with gradient -c and
    u = u₀ + K a: exact for models that are linear in θ, first-order in ‖θ - θ₀‖ otherwise. One kernel
    serves every learning rate, schedule, order, objective and subset of the pairs.

    Args:
        kernel: :func:`simgrad.theory.entanglement_kernel` of the pairs; with the ``scale`` of a
            :class:`simgrad.theory.Preconditioner` the run follows that frozen preconditioner.
        logp: log π of both responses at the start.
        lengths: response lengths in tokens.
        objective: from :mod:`simgrad.objectives`; the loss is the mean over a step's pairs.
        optimizer: linear in the gradient: ``optax.sgd`` with or without momentum and schedule.
        steps: how many.
        reference: log π_ref (None: the policy at the start).
        order: indices of the pairs in each step's batch (None: all pairs in every step).
        probe_kernel: kernel rows of further responses against the pairs' responses.

    Raises:
        ValueError: the optimizer is not linear in the gradient (Adam, RMSProp, clipping) or needs the
            parameters (weight decay); ``order`` has other than ``steps`` rows or indices out of range.

    Source: neural-tangent-kernel dynamics (Jacot et al., arXiv 1806.07572) in sequence log-probs.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from simgrad.objectives import DPO
    >>> start, lengths = jnp.zeros((1, 2)), jnp.ones((1, 2), int)
    >>> kernel = jnp.array([[1.0, 1.5], [1.5, 4.0]])
    >>> flow = kernel_flow(kernel, start, lengths, DPO(beta=1.0), optax.sgd(0.1), steps=1)
    >>> [round(x, 4) for x in flow.logp[-1, 0].tolist()]
    [-0.025, -0.125]
    """
    _require_linear(optimizer, kernel.dtype)
    order = _checked_order(order, len(logp), steps)
    probes = jnp.zeros((0, len(kernel)), kernel.dtype) if probe_kernel is None else probe_kernel
    return _kernel_flow(
        kernel, logp, lengths, objective, optimizer, logp if reference is None else reference, order, probes
    )


@functools.partial(jax.jit, static_argnames=("objective", "optimizer"))
def _kernel_flow(
    kernel: Array,
    logp: Array,
    lengths: Array,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    reference: Array,
    order: Array,
    probes: Array,
) -> Flow:
    def at(a: Array) -> Array:
        return logp + jnp.matmul(kernel, a, precision="highest").reshape(logp.shape)

    def step(carry: tuple[Array, Any], chosen: Array) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        a, state = carry
        u = at(a)
        pull = objective.signed_coefficients(u[chosen], reference[chosen], lengths[chosen]) / len(chosen)
        gradient = jnp.zeros_like(u).at[chosen].add(-pull.astype(u.dtype)).reshape(-1)
        update, state = updated(optimizer, gradient, state)
        a = a + update
        return (a, state), (at(a), jnp.matmul(probes, a, precision="highest"))

    start = jnp.zeros(len(kernel), kernel.dtype)
    _, (values, moved) = jax.lax.scan(step, (start, optimizer.init(start)), order)
    return Flow(
        jnp.concatenate([logp[None], values]),
        jnp.concatenate([jnp.zeros((1, len(probes)), moved.dtype), moved]),
    )


def _checked_order(order: Array | None, pairs: int, steps: int) -> Int[Array, "E M"]:
    if order is None:
        return jnp.asarray(np.tile(np.arange(pairs), (steps, 1)))
    if len(order) != steps:
        raise ValueError(f"order has {len(order)} rows, one a step, but steps={steps}")
    if order.size and (int(order.min()) < 0 or int(order.max()) >= pairs):
        raise ValueError(f"order names pair {int(order.max())}, but there are {pairs} pairs, counted from 0")
    return order


def _require_linear(optimizer: optax.GradientTransformation, dtype: Any) -> None:
    """Two steps on gradients of very different sizes must give proportional updates."""
    gradients = jnp.array([[1.0, -2.0], [0.5, 3.0]], dtype)

    def updates(size: float) -> list[np.ndarray]:
        state, result = optimizer.init(jnp.zeros(2, dtype)), []
        for gradient in gradients:
            update, state = updated(optimizer, size * gradient, state)
            result.append(np.asarray(update) / size)
        return result

    try:
        linear = all(np.allclose(updates(1.0), updates(size), rtol=1e-3, atol=0) for size in (1e-6, 1e6))
    except ValueError:  # optax transformations that need the parameters say so by this
        linear = False
    if not linear:
        raise ValueError(
            "kernel_flow needs an optimizer that is linear in the gradient and does not read the parameters (SGD, "
            "momentum, schedules): use linearized_run, or the kernel of a frozen preconditioner with optax.sgd"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """Predicted log-probs at the recorded steps of a linearised run, in nats.

    Attributes:
        steps: number of steps taken at each record; the first is 0.
        logp: of the training pairs.
        probes: of the probe pairs (none if no probes were given).
        trained: predicted parameters at the end (None where a leaf is not trained).
    """

    steps: Int[Array, " E"]
    logp: Float[Array, "E B 2"]
    probes: Float[Array, "E K 2"]
    trained: Theta


def linearized_run(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Float[Array, "B 2"] | None = None,
    order: Int[Array, "E M"] | None = None,
    probes: Batch | None = None,
    include: Sequence[str] | None = None,
    refresh: int | None = None,
    read: Literal["linear", "ray"] = "linear",
    record: int | None = None,
) -> Run:
    """``steps`` steps of any optax optimizer on the log-probs linearised at θ₀, or anew every ``refresh``.

    Log-probs are replaced by u(θ₀) + J (θ - θ₀) in the loss; optimizer state, clipping, weight decay
    and schedules act as they do in training. J is never stored: a step costs one forward, one forward
    derivative and one backward on its batch at θ₀.

    Args:
        apply: the model.
        theta: its parameters, θ₀.
        batch: all B training pairs.
        objective: from :mod:`simgrad.objectives`; the loss is the mean over a step's pairs.
        optimizer: any optax transformation.
        steps: how many.
        reference: log π_ref (None: the policy at the start).
        order: indices of the pairs in each step's batch (None: all pairs in every step).
        probes: pairs to follow that are not trained on.
        include: patterns of the parameters that are trained.
        refresh: steps between two linearisations (None: frozen at θ₀). 1 is training itself.
        read: ``linear`` reports u(θ₀) + J (θ - θ₀); ``ray`` reports u at the predicted parameters, one
            forward pass, which is often closer (its parameters still come from the linearised run).
        record: steps between two records (None: start and end only).

    Raises:
        ValueError: counts below one; parameters in less than float32, where small steps are rounded
            away; ``order`` as in :func:`kernel_flow`.

    >>> import optax
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.objectives import DPO
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch = padded([Pair([1, 2], [3, 4], [5, 4]), Pair([1], [6], [7])])
    >>> run = linearized_run(apply, theta, batch, DPO(), optax.adam(1e-3), steps=4, record=2)
    >>> run.steps.tolist(), run.logp.shape
    ([0, 2, 4], (3, 2, 2))
    """
    for name, value in (("steps", steps), ("refresh", refresh), ("record", record)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if read not in ("linear", "ray"):
        raise ValueError(f"read={read!r}: choose 'linear' or 'ray'")
    order = _checked_order(order, batch.size, steps)
    include = None if include is None else tuple(include)
    observed = [batch] if probes is None else [batch, probes]
    anchor, rest = tree.partition(theta, include, apply.frozen)
    if narrow := [str(x.dtype) for x in jax.tree.leaves(anchor) if x.dtype.itemsize < 4]:
        raise ValueError(f"parameters are {narrow[0]}: small steps would be rounded away; convert theta to float32")
    delta, state = jax.tree.map(jnp.zeros_like, anchor), optimizer.init(anchor)
    see = functools.partial(_observe, apply, include=include, read=read)

    def whole(trained: Theta) -> Theta:
        return tree.combine(trained, rest)

    records = [[see(whole(anchor), b, delta) for b in observed]]
    reference = records[0][0] if reference is None else reference
    done = [0]
    stops = sorted({steps, *range(0, steps, record or steps), *range(0, steps, refresh or steps)} - {0})
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        if refresh and start and start % refresh == 0:
            anchor = jax.tree.map(jnp.add, anchor, delta)
            delta = jax.tree.map(jnp.zeros_like, delta)
        delta, state = _segment(
            apply, whole(anchor), delta, state, batch, reference, order[start:stop], objective, optimizer, include
        )
        if stop == steps or stop % (record or steps) == 0:
            records.append([see(whole(anchor), b, delta) for b in observed])
            done.append(stop)
    logp, *other = (jnp.stack(column) for column in zip(*records, strict=True))
    followed = other[0] if other else jnp.zeros((len(done), 0, 2), logp.dtype)
    return Run(jnp.array(done), logp, followed, jax.tree.map(jnp.add, anchor, delta))


@functools.partial(jax.jit, static_argnames=("apply", "include", "read"))
def _observe(
    apply: Apply, theta: Theta, batch: Batch, delta: Theta, include: tuple[str, ...] | None, read: str
) -> Array:
    logp, anchor = log_probs(apply, theta, batch, include)
    if read == "ray":
        return logp(jax.tree.map(jnp.add, anchor, delta))
    value, change = jax.jvp(logp, (anchor,), (delta,))
    return value + change


@functools.partial(jax.jit, static_argnames=("apply", "objective", "optimizer", "include"))
def _segment(
    apply: Apply,
    theta: Theta,
    delta: Theta,
    state: Any,
    batch: Batch,
    reference: Array,
    order: Array,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    include: tuple[str, ...] | None,
) -> tuple[Theta, Any]:
    """Steps between two relinearisations or records."""

    def step(carry: tuple[Theta, Any], chosen: Array) -> tuple[tuple[Theta, Any], None]:
        delta, state = carry
        some = jax.tree.map(lambda x: x[chosen], batch)
        logp, anchor = log_probs(apply, theta, some, include)
        value, push = jax.linearize(logp, anchor)
        u = value + push(delta)
        pull = objective.signed_coefficients(u, reference[chosen], some.lengths) / len(chosen)
        (ascent,) = jax.linear_transpose(push, anchor)(pull)
        gradient = jax.tree.map(jnp.negative, ascent)
        update, state = updated(optimizer, gradient, state, jax.tree.map(jnp.add, anchor, delta))
        return (jax.tree.map(jnp.add, delta, update), state), None

    return jax.lax.scan(step, (delta, state), order)[0]
