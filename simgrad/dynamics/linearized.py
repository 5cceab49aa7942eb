"""Whole runs predicted without training: kernel flow and linearised optimization.

With the kernel frozen at θ₀ a run on the loss is a recursion in the log-probs themselves,

    u_{t+1} = u_t + η_t K c(u_t),        c = (d_w, -d_l)/n of the pairs in step t's batch,

which :func:`kernel_flow` iterates in R^{2B} for optimizers that are linear in the gradient (SGD,
momentum, schedules). :func:`linearized_run` keeps J instead of K, so that any optax optimizer can
be applied to the parameters themselves, and can take J anew every few steps.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from simgrad.dynamics.run import State, Training, descend, follow, recorded, started
from simgrad.dynamics.trajectory import Trajectory
from simgrad.models import Apply, bind
from simgrad.models.likelihood import require_shape, require_wide
from simgrad.objectives import Objective
from simgrad.pairs import Batch, in_chunks
from simgrad.theory.optimizers import begun, updated
from simgrad.theory.prediction.steps import require_training
from simgrad.typing import Array, Float, Int, Theta


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
) -> Trajectory:
    """``steps`` steps of training with the entanglement kernel frozen, recorded at every one.

    The parameters stay in θ₀ + Jᵀ a, so the optimizer runs on the 2B numbers a with gradient -c and
    u = u₀ + K a: exact for models that are linear in θ, first-order in ‖θ - θ₀‖ otherwise. One
    kernel serves every learning rate, schedule, order, objective and subset of the pairs.

    Args:
        kernel: :func:`simgrad.theory.entanglement_kernel` of the pairs; with the ``scale`` of a
            :class:`simgrad.theory.kernel.Preconditioner` the run follows that one, frozen.
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
            the parameters (weight decay); shapes that do not fit each other; ``order`` has other
            than ``steps`` rows or indices out of range.

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
    state = begun(optimizer, jnp.zeros(responses, logp.dtype)) if state is None else state
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
) -> Trajectory:
    def moved(matrix: Array, a: Array) -> Array:
        return jnp.matmul(matrix, a, precision="highest")

    def gradient(a: Array, chosen: Array, path: tuple[Array, Array]) -> tuple[Array, Array, Any]:
        (at, seen), u = path, logp + moved(kernel, a).reshape(logp.shape)
        some = u[chosen], reference[chosen], lengths[chosen]
        force = objective.force(*some) / len(chosen)
        grad = jnp.zeros_like(u).at[chosen].add(-force.astype(u.dtype)).reshape(-1)
        return objective.loss(*some).mean(), grad, (at + 1, seen.at[at].set(a))

    # the memory is the path of a itself: log-probs of every step are read off it at the end
    path = jnp.zeros((len(order) + 1, len(kernel)), logp.dtype)
    begin = started(optax.identity(), path[0], len(order), (jnp.int32(0), path))
    end = descend(gradient, optimizer, replace(begin, optimizer=state), order, len(order))
    path = end.memory[1].at[-1].set(end.learned)
    return Trajectory(
        jnp.arange(len(order) + 1),
        end.losses,
        reference,
        logp[None] + moved(path, kernel).reshape(-1, *logp.shape),
        moved(path, probes.T),
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
            "parameters (SGD, momentum, schedules): use linearized_run, or the kernel of a frozen "
            "preconditioner with optax.sgd"
        )


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "dtype"))
def _updates(optimizer: optax.GradientTransformation, steps: int, size: Array, dtype: Any) -> Array:
    """Updates over a run of alternating gradients, divided by their size."""
    gradients = jnp.asarray(np.array([[1.0, -2.0], [0.5, 3.0]])[np.arange(steps) % 2], dtype)

    def step(state: Any, gradient: Array) -> tuple[Any, Array]:
        update, state = updated(optimizer, size * gradient, state)
        return state, update / size

    return jax.lax.scan(step, optimizer.init(jnp.zeros(2, dtype)), gradients)[1]


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
    refresh: int | None = None,
    read: Literal["linear", "ray"] = "linear",
    record: int | None = None,
    state: Any = None,
) -> Training:
    """``steps`` steps of any optax optimizer on log-probs linearised at θ₀ or every ``refresh``.

    Log-probs are replaced by u(θ₀) + J (θ - θ₀) in the loss; optimizer state, clipping, weight
    decay and schedules act as they do in training. J is never stored: a step costs one forward, one
    forward derivative and one backward on its batch at θ₀; a record is a forward derivative of all
    pairs, a few at a time. It is driven from Python; the pieces between records and refreshes are
    one program.

    Args:
        apply: the model; :func:`simgrad.models.only` selects parameters.
        theta: its parameters, θ₀.
        batch: all B training pairs.
        objective: from :mod:`simgrad.objectives`; the loss is the mean over a step's pairs.
        optimizer: any optax transformation.
        steps: how many.
        reference: log π_ref (None: the policy at the start).
        order: indices of the pairs in each step's batch, as in :func:`kernel_flow` (None: all
            pairs).
        probes: pairs to follow that are not trained on.
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
    >>> run.trajectory.steps.tolist(), run.trajectory.logp.shape
    ([0, 2, 4], (3, 2, 2))
    """
    require_training(objective, optimizer)
    for name, value in (("refresh", refresh), ("record", record)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if read not in ("linear", "ray"):
        raise ValueError(f"read={read!r}: choose 'linear' or 'ray'")
    order = _checked_order(order, batch.size, steps)
    anchor = bind(apply, theta).trained
    require_wide(anchor)
    delta = jax.tree.map(jnp.zeros_like, anchor)
    # the run is in δ = θ - θ₀, which keeps the digits of small steps; θ₀ is its memory
    begin = started(optimizer, delta, steps, anchor, anchor)
    begin = begin if state is None else replace(begin, optimizer=state)
    model = bind(apply, theta)

    def observe(state: State) -> dict[str, Any]:
        see = functools.partial(_observe, apply, model.whole(state.memory), state.learned, read)
        nothing = jnp.zeros((0, 2), state.losses.dtype)
        return {"logp": see(batch), "probes": nothing if probes is None else see(probes)}

    first = observe(begin)
    start = first["logp"] if reference is None else reference
    require_shape("reference", start, (batch.size, 2))

    def advance(state: State, until: int) -> State:
        done = int(state.step)
        if refresh and done and done % refresh == 0:
            moved = jax.tree.map(jnp.add, state.memory, state.learned)
            state = replace(state, memory=moved, learned=delta)
        until = min(until, done + refresh - done % refresh) if refresh else until
        return _advance(apply, theta, batch, start, order, objective, optimizer, state, until)

    def result(state: State, records: list) -> Training:
        end = jax.tree.map(jnp.add, state.memory, state.learned)
        return Training(model.whole(end), state, recorded(state, records, start))

    stops = sorted({*range(record or steps, steps, record or steps), steps})
    return follow(advance, begin, stops, observe, result, [(0, first)])


@functools.partial(jax.jit, static_argnames=("apply", "read"))
def _observe(apply: Apply, theta: Theta, delta: Theta, read: str, batch: Batch) -> Array:
    model = bind(apply, theta)

    def few(some: Batch) -> Array:
        if read == "ray":
            return model.logp(jax.tree.map(jnp.add, model.trained, delta), some)
        value, change = jax.jvp(lambda t: model.logp(t, some), (model.trained,), (delta,))
        return value + change

    return in_chunks(few, batch)


@functools.partial(jax.jit, static_argnames=("apply", "objective", "optimizer"))
def _advance(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    reference: Array,
    order: Array,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: State,
    until: Any,
) -> State:
    """Steps of the run linearised at the state's anchor."""
    model = bind(apply, theta)

    def gradient(delta: Theta, chosen: Array, anchor: Theta) -> tuple[Array, Theta, Theta]:
        some = batch.take(chosen)
        value, push = jax.linearize(lambda t: model.logp(t, some), anchor)
        seen = value + push(delta), reference[chosen], some.lengths
        force = objective.force(*seen) / len(chosen)
        (up,) = jax.linear_transpose(push, anchor)(force.astype(value.dtype))
        return objective.loss(*seen).mean(), jax.tree.map(jnp.negative, up), anchor

    def parameters(state: State) -> Theta:
        return jax.tree.map(jnp.add, state.memory, state.learned)

    return descend(gradient, optimizer, state, order, until, parameters)
