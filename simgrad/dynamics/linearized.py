"""Whole runs predicted without training: kernel flow and linearised optimization.

With the kernel frozen at θ₀ a run on the loss is a recursion in the log-probs themselves,

    u_{t+1} = u_t + η_t K c(u_t),        c = (d_w, -d_l)/n of the pairs in step t's batch,

which :func:`kernel_flow` iterates in R^{2B} for optimizers that are linear in the gradient (SGD,
momentum, schedules). :func:`linearized_run` keeps J instead of K, so that any optax optimizer can
be applied to the parameters themselves, and can take J anew every few steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from simgrad import tree
from simgrad.models import Apply
from simgrad.models.likelihood import in_chunks, log_probs, require_shape
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.theory.prediction.steps import require_training, updated
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["Flow", "Run", "kernel_flow", "linearized_run"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flow:
    """Log-probs along a kernel flow, in nats; step 0 is the start.

    Attributes:
        logp: of the pairs' responses.
        probe_change: Δlog π of the probe responses since the start (none if no probe kernel was
            given).
    """

    logp: Float[Array, "E B 2"]
    probe_change: Float[Array, "E probes"]


def kernel_flow(
    kernel: Float[Array, "U U"],
    logp: Float[Array, "B 2"],
    lengths: Int[Array, "B 2"],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Float[Array, "B 2"] | None = None,
    order: Int[Array, "E M"] | None = None,
    probe_kernel: Float[Array, "probes U"] | None = None,
    state: Any = None,
) -> Flow:
    """``steps`` steps of training with the entanglement kernel frozen.

    The parameters stay in θ₀ + Jᵀ a, so the optimizer runs on the 2B numbers a with gradient -c and
    u = u₀ + K a: exact for models that are linear in θ, first-order in ‖θ - θ₀‖ otherwise. One
    kernel serves every learning rate, schedule, order, objective and subset of the pairs.

    Args:
        kernel: :func:`simgrad.theory.entanglement_kernel` of the pairs; with the ``scale`` of a
            :class:`simgrad.theory.Preconditioner` the run follows that frozen preconditioner.
        logp: log π of both responses at the start.
        lengths: response lengths in tokens.
        objective: from :mod:`simgrad.objectives`; the loss is the mean over a step's pairs.
        optimizer: linear in the gradient: ``optax.sgd`` with or without momentum and schedule.
        steps: how many.
        reference: log π_ref (None: the policy at the start).
        order: indices of the pairs in each step's batch (None: all pairs in every step); batches
            are of one size, so drop an incomplete last one.
        probe_kernel: kernel rows of further responses against the pairs' responses.
        state: the optimizer's state at the start, for 2B numbers (None: freshly initialised). A
            program is compiled for each ``optimizer`` object; to sweep learning rates with one,
            make it by ``optax.inject_hyperparams`` and pass states with other ``hyperparams``.

    Raises:
        ValueError: the optimizer is not linear in the gradient (Adam, RMSProp, clipping) or needs
        the
            parameters (weight decay); shapes that do not fit each other; ``order`` has other than
            ``steps`` rows or indices out of range.

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
    require_training(objective, optimizer)
    reference = logp if reference is None else reference
    pairs, responses = len(logp), 2 * len(logp)
    probes = jnp.zeros((0, responses), kernel.dtype) if probe_kernel is None else probe_kernel
    require_shape("logp", logp, (pairs, 2))
    require_shape("kernel", kernel, (responses, responses))
    require_shape("probe_kernel", probes, (probes.shape[0], responses))
    for name, x in (("lengths", lengths), ("reference", reference)):
        require_shape(name, x, (pairs, 2))
    order = _checked_order(order, pairs, steps)
    _require_linear(optimizer, steps, logp.dtype)
    state = optimizer.init(jnp.zeros(responses, logp.dtype)) if state is None else state
    kernel, probes = kernel.astype(logp.dtype), probes.astype(logp.dtype)
    return _kernel_flow(
        kernel, logp, lengths, objective, optimizer, reference, order, probes, state
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
    state: Any,
) -> Flow:
    def at(a: Array) -> Array:
        return logp + jnp.matmul(kernel, a, precision="highest").reshape(logp.shape)

    def step(
        carry: tuple[Array, Any], chosen: Array
    ) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        a, state = carry
        u = at(a)
        pull = objective.signed_coefficients(u[chosen], reference[chosen], lengths[chosen]) / len(
            chosen
        )
        gradient = jnp.zeros_like(u).at[chosen].add(-pull.astype(u.dtype)).reshape(-1)
        update, state = updated(optimizer, gradient, state)
        a = a + update
        return (a, state), (at(a), jnp.matmul(probes, a, precision="highest"))

    _, (values, moved) = jax.lax.scan(step, (jnp.zeros(len(kernel), kernel.dtype), state), order)
    return Flow(
        jnp.concatenate([logp[None], values]),
        jnp.concatenate([jnp.zeros((1, len(probes)), moved.dtype), moved]),
    )


def _checked_order(order: Array | None, pairs: int, steps: int) -> Int[Array, "E M"]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if order is None:
        return jnp.asarray(np.tile(np.arange(pairs), (steps, 1)))
    order = jnp.asarray(order)
    if order.ndim != 2 or len(order) != steps:
        raise ValueError(
            f"order has shape {order.shape}: it needs one row of pairs a step, and steps={steps}"
        )
    if not isinstance(order, Tracer):
        wrong = np.asarray(order)[(np.asarray(order) < 0) | (np.asarray(order) >= pairs)]
        if wrong.size:
            raise ValueError(
                f"order names pair {wrong[0]}, but there are {pairs} pairs, counted from 0"
            )
    return order


def _require_linear(optimizer: optax.GradientTransformation, steps: int, dtype: Any) -> None:
    """A run on gradients of very different sizes must give proportional updates."""
    with jax.ensure_compile_time_eval():
        try:
            sizes = jnp.array([1e-6, 1.0, 1e6], dtype)
            small, middle, large = (
                np.asarray(_updates(optimizer, steps, size, dtype)) for size in sizes
            )
            linear = all(np.allclose(x, middle, rtol=1e-3, atol=1e-12) for x in (small, large))
        except ValueError:  # optax transformations that need the parameters say so by this
            linear = False
    if not linear:
        raise ValueError(
            "kernel_flow needs an optimizer that is linear in the gradient and does not read the "
            "parameters (SGD, "
            "momentum, schedules): use linearized_run, or the kernel of a frozen preconditioner "
            "with optax.sgd"
        )


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "dtype"))
def _updates(optimizer: optax.GradientTransformation, steps: int, size: Array, dtype: Any) -> Array:
    """Updates over a run of alternating gradients, divided by their size."""
    gradients = jnp.asarray(np.array([[1.0, -2.0], [0.5, 3.0]])[np.arange(steps) % 2], dtype)

    def step(state: Any, gradient: Array) -> tuple[Any, Array]:
        update, state = updated(optimizer, size * gradient, state)
        return state, update / size

    return jax.lax.scan(step, optimizer.init(jnp.zeros(2, dtype)), gradients)[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """Predicted log-probs at the recorded steps of a linearised run, in nats.

    Attributes:
        steps: number of steps taken at each record; the first is 0.
        logp: of the training pairs. Values above 0, or falls of tens of nats, say that the
            linearisation has left its range: refresh more often, or read along the ray.
        probes: log π of the probe pairs (none if no probes were given).
        trained: predicted parameters at the end (None where a leaf is not trained).
    """

    steps: Int[Array, " E"]
    logp: Float[Array, "E B 2"]
    probes: Float[Array, "E probes 2"]
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
    state: Any = None,
) -> Run:
    """``steps`` steps of any optax optimizer on the log-probs linearised at θ₀, or anew every ``refresh``.

    Log-probs are replaced by u(θ₀) + J (θ - θ₀) in the loss; optimizer state, clipping, weight
    decay and schedules act as they do in training. J is never stored: a step costs one forward, one
    forward derivative and one backward on its batch at θ₀; a record is a forward derivative of all
    pairs, a few at a time. It is driven from Python; the pieces between records and refreshes are
    one program.

    Args:
        apply: the model.
        theta: its parameters, θ₀.
        batch: all B training pairs.
        objective: from :mod:`simgrad.objectives`; the loss is the mean over a step's pairs.
        optimizer: any optax transformation.
        steps: how many.
        reference: log π_ref (None: the policy at the start).
        order: indices of the pairs in each step's batch, as in :func:`kernel_flow` (None: all
            pairs).
        probes: pairs to follow that are not trained on.
        include: patterns of the parameters that are trained.
        refresh: steps between two linearisations (None: frozen at θ₀). 1 is training itself.
        read: ``linear`` reports u(θ₀) + J (θ - θ₀); ``ray`` reports u at the predicted parameters,
            one forward pass, which is often closer (its parameters still come from the linearised
            run).
        record: steps between two records (None: start and end only).
        state: the optimizer's state at the start (None: freshly initialised); as in
            :func:`kernel_flow`, a program is compiled for each ``optimizer`` object.

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
    require_training(objective, optimizer)
    for name, value in (("refresh", refresh), ("record", record)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if read not in ("linear", "ray"):
        raise ValueError(f"read={read!r}: choose 'linear' or 'ray'")
    order = _checked_order(order, batch.size, steps)
    include = tree.patterns(include)
    observed = [batch] if probes is None else [batch, probes]
    anchor, rest = tree.partition(theta, include, apply.frozen)
    if narrow := [str(x.dtype) for x in jax.tree.leaves(anchor) if x.dtype.itemsize < 4]:
        raise ValueError(
            f"parameters are {narrow[0]}: small steps would be rounded away; convert theta to "
            "float32"
        )
    delta, state = (
        jax.tree.map(jnp.zeros_like, anchor),
        optimizer.init(anchor) if state is None else state,
    )
    see = functools.partial(_observe, apply, include=include, read=read)

    def whole(trained: Theta) -> Theta:
        return tree.combine(trained, rest)

    records = [[see(whole(anchor), b, delta) for b in observed]]
    reference = records[0][0] if reference is None else reference
    require_shape("reference", reference, (batch.size, 2))
    done = [0]
    piece = math.gcd(steps, record or steps, refresh or steps)
    for start in range(0, steps, piece):
        stop = start + piece
        if refresh and start and start % refresh == 0:
            anchor = jax.tree.map(jnp.add, anchor, delta)
            delta = jax.tree.map(jnp.zeros_like, delta)
        delta, state = _segment(
            apply,
            whole(anchor),
            delta,
            state,
            batch,
            reference,
            order[start:stop],
            objective,
            optimizer,
            include,
        )
        if stop == steps or stop % (record or steps) == 0:
            records.append([see(whole(anchor), b, delta) for b in observed])
            done.append(stop)
    logp, *other = (jnp.stack(column) for column in zip(*records, strict=True))
    followed = other[0] if other else jnp.zeros((len(done), 0, 2), logp.dtype)
    return Run(jnp.array(done), logp, followed, jax.tree.map(jnp.add, anchor, delta))


@functools.partial(jax.jit, static_argnames=("apply", "include", "read"))
def _observe(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    delta: Theta,
    include: tuple[str, ...] | None,
    read: str,
) -> Array:
    def few(some: Batch) -> Array:
        logp, anchor = log_probs(apply, theta, some, include)
        if read == "ray":
            return logp(jax.tree.map(jnp.add, anchor, delta))
        value, change = jax.jvp(logp, (anchor,), (delta,))
        return value + change

    return in_chunks(few, batch)


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
        some = batch.take(chosen)
        logp, anchor = log_probs(apply, theta, some, include)
        value, push = jax.linearize(logp, anchor)
        u = value + push(delta)
        pull = objective.signed_coefficients(u, reference[chosen], some.lengths) / len(chosen)
        (ascent,) = jax.linear_transpose(push, anchor)(pull)
        gradient = jax.tree.map(jnp.negative, ascent)
        update, state = updated(optimizer, gradient, state, jax.tree.map(jnp.add, anchor, delta))
        return (jax.tree.map(jnp.add, delta, update), state), None

    return jax.lax.scan(step, (delta, state), order)[0]
