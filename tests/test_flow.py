"""Kernel flow and linearised runs against plain recursions and against training itself."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, model

from simgrad.dynamics import kernel_flow, linearized_run
from simgrad.models import bind
from simgrad.objectives import DPO, IPO, AOTUnpaired
from simgrad.pairs import Pair, padded
from simgrad.theory import entanglement_kernel, loss_gradient, responses
from simgrad.theory.optimizers import updated

PROBES = [Pair([1, 5, 3], [9, 9], [7, 2, 3])]
ORDER = jnp.array([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]])


def setting(kind="plain"):
    apply, theta = model(kind)
    batch = padded(PAIRS)
    start = responses(apply, theta, batch).logp
    return apply, theta, batch, start, start - jnp.array([[0.3, -0.2]])


def train(apply, theta, batch, objective, optimizer, order, reference):
    """The run itself, one optax step after another on real gradients."""
    bound = bind(apply, theta)
    trained, whole = bound.trained, bound.whole
    state, path = optimizer.init(trained), []
    for chosen in order:
        some = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
        gradient = loss_gradient(apply, whole(trained), some, objective, reference[chosen])
        update, state = updated(optimizer, gradient, state, trained)
        trained = jax.tree.map(jnp.add, trained, update)
        path.append(responses(apply, whole(trained), batch).logp)
    return np.stack(path), whole(trained)


def test_flow_of_gradient_descent_is_the_recursion_in_the_log_probs():
    """u ← u + η K c(u) with DPO's c written out in numpy, for minibatches."""
    apply, theta, batch, start, reference = setting()
    kernel = entanglement_kernel(apply, theta, batch)
    flow = kernel_flow(
        kernel, start, batch.lengths, DPO(beta=0.5), optax.sgd(1e-3), 5, reference, ORDER
    )
    u, ref = np.asarray(start).copy(), np.asarray(reference)
    for t, chosen in enumerate(np.asarray(ORDER)):
        c = np.zeros_like(u)
        for i in chosen:
            margin = (u[i, 0] - ref[i, 0]) - (u[i, 1] - ref[i, 1])
            c[i] = 0.5 / (1 + np.exp(0.5 * margin)) * np.array([1, -1]) / len(chosen)
        u = u + 1e-3 * (np.asarray(kernel) @ c.reshape(-1)).reshape(u.shape)
        close(flow.logp[t + 1], u)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1e-3),
        optax.sgd(1e-3, momentum=0.9, nesterov=True),
        optax.sgd(optax.cosine_decay_schedule(2e-3, 5)),
    ],
    ids=["sgd", "nesterov", "schedule"],
)
@pytest.mark.parametrize("kind", ["plain", "linear_softmax"])
def test_linear_optimizers_give_the_same_run_in_log_probs_and_in_parameters(kind, optimizer):
    apply, theta, batch, start, reference = setting(kind)
    kernel = entanglement_kernel(apply, theta, batch)
    probes = (
        PROBES if kind == "plain" else [Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS[:1]]
    )
    rows = entanglement_kernel(apply, theta, padded(probes), batch)
    flow = kernel_flow(kernel, start, batch.lengths, IPO(), optimizer, 5, reference, ORDER, rows)
    run = linearized_run(
        apply, theta, batch, IPO(), optimizer, 5, reference, ORDER, probes=padded(probes), record=1
    )
    close(flow.logp, run.trajectory.logp)
    close(
        flow.probes.reshape(6, -1, 2), run.trajectory.probes - run.trajectory.probes[:1], scale=100
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.rmsprop(1e-4),
        optax.chain(
            optax.clip_by_global_norm(0.1),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5), weight_decay=0.1),
        ),
    ],
    ids=["adam", "rmsprop", "clip_adamw_schedule"],
)
def test_refreshed_at_every_step_it_is_training_itself(optimizer):
    apply, theta, batch, start, reference = setting()
    expected, trained = train(apply, theta, batch, DPO(), optimizer, ORDER, reference)
    run = linearized_run(
        apply, theta, batch, DPO(), optimizer, 5, reference, ORDER, refresh=1, read="ray", record=1
    )
    close(run.trajectory.logp[1:], expected)
    close(run.theta, trained)
    close(run.trajectory.logp[0], start)


def test_a_frozen_preconditioner_turns_the_kernel_into_j_p_j():
    apply, theta, batch, start, reference = setting()
    scale = jax.tree.map(lambda x: 1 / (jnp.abs(x) + 0.1), theta)
    kernel = entanglement_kernel(apply, theta, batch, scale=scale)
    flow = kernel_flow(kernel, start, batch.lengths, DPO(), optax.sgd(1e-4), 5, reference, ORDER)
    scaled = optax.chain(
        optax.stateless(lambda g, _: jax.tree.map(jnp.multiply, scale, g)), optax.sgd(1e-4)
    )
    run = linearized_run(apply, theta, batch, DPO(), scaled, 5, reference, ORDER, record=1)
    close(flow.logp, run.trajectory.logp)
    plain = linearized_run(
        apply, theta, batch, DPO(), optax.sgd(1e-4), 5, reference, ORDER, record=1
    )
    assert np.abs(plain.trajectory.logp[-1] - run.trajectory.logp[-1]).max() > 1e-3


def test_error_of_a_frozen_run_is_of_second_order_and_refreshing_reduces_it():
    apply, theta, batch, _start, reference = setting()
    rates = np.geomspace(1e-5, 1e-3, 3)
    frozen, once = [], []
    for rate in rates:
        optimizer = optax.sgd(float(rate), momentum=0.5)
        actual, _ = train(apply, theta, batch, DPO(), optimizer, ORDER, reference)
        for refresh, errors in ((None, frozen), (3, once)):
            run = linearized_run(
                apply, theta, batch, DPO(), optimizer, 5, reference, ORDER, refresh=refresh
            )
            errors.append(np.abs(run.trajectory.logp[-1] - actual[-1]).max())
    assert np.polyfit(np.log(rates), np.log(frozen), 1)[0] == pytest.approx(2.0, abs=0.05)
    assert (np.array(once) < 0.7 * np.array(frozen)).all()


def test_own_pair_kernels_mispredict_a_joint_run():
    """Dropping the entries between pairs leaves an error of first order."""
    apply, theta, batch, start, reference = setting()
    kernel = entanglement_kernel(apply, theta, batch)
    own = kernel * jnp.kron(jnp.eye(4), jnp.ones((2, 2)))
    rates = np.geomspace(1e-6, 1e-4, 3)
    errors = {"whole": [], "own": []}
    for rate in rates:
        actual, _ = train(apply, theta, batch, DPO(), optax.sgd(float(rate)), ORDER[:2], reference)
        for name, k in (("whole", kernel), ("own", own)):
            flow = kernel_flow(
                k, start, batch.lengths, DPO(), optax.sgd(float(rate)), 2, reference, ORDER[:2]
            )
            errors[name].append(np.abs(flow.logp[-1] - actual[-1]).max())
    assert np.polyfit(np.log(rates), np.log(errors["whole"]), 1)[0] == pytest.approx(2.0, abs=0.05)
    assert np.polyfit(np.log(rates), np.log(errors["own"]), 1)[0] == pytest.approx(1.0, abs=0.05)


def test_ray_reads_log_probs_at_the_predicted_parameters():
    apply, theta, batch, _start, reference = setting()
    run = linearized_run(apply, theta, batch, DPO(), optax.adam(1e-2), 5, reference, read="ray")
    close(run.trajectory.logp[-1], responses(apply, run.theta, batch).logp)
    linear = linearized_run(apply, theta, batch, DPO(), optax.adam(1e-2), 5, reference)
    close(linear.theta, run.theta)
    assert np.abs(linear.trajectory.logp[-1] - run.trajectory.logp[-1]).max() > 1e-3


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.rmsprop(1e-3),
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    ],
    ids=["adam", "rmsprop", "adamw", "clip", "decay"],
)
def test_kernel_flow_refuses_what_is_not_linear_in_the_gradient(optimizer):
    with pytest.raises(ValueError, match="use linearized_run"):
        kernel_flow(jnp.eye(2), jnp.zeros((1, 2)), jnp.ones((1, 2), int), DPO(), optimizer, 1)


def test_bad_orders_and_counts_are_refused_by_name():
    apply, theta, batch, *_ = setting()
    with pytest.raises(ValueError, match=r"order names pair 4, but there are 4 pairs"):
        linearized_run(apply, theta, batch, DPO(), optax.sgd(0.1), 1, order=jnp.array([[4]]))
    with pytest.raises(
        ValueError, match=r"order has shape \(5, 2\): it needs one row of pairs a step, and steps=4"
    ):
        linearized_run(apply, theta, batch, DPO(), optax.sgd(0.1), 4, order=ORDER)
    with pytest.raises(ValueError, match=r"order names pair -1, but there are 4 pairs"):
        linearized_run(apply, theta, batch, DPO(), optax.sgd(0.1), 1, order=jnp.array([[0, -1]]))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        linearized_run(apply, theta, batch, DPO(), optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match=r"refresh must be at least 1, got 0"):
        linearized_run(apply, theta, batch, DPO(), optax.sgd(0.1), 4, refresh=0)


def test_arrays_of_other_shapes_are_refused_and_not_clamped():
    """JAX gathers out-of-range rows from the last one without a word."""
    apply, theta, batch, start, reference = setting()
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"reference has shape \(1, 2\), but \(4, 2\) is needed"):
        linearized_run(apply, theta, batch, DPO(), optimizer, 1, reference[:1])
    with pytest.raises(ValueError, match=r"reference has shape \(1, 2\), but \(4, 2\) is needed"):
        loss_gradient(apply, theta, batch, DPO(), reference[:1])
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 2\), but \(8, 8\) is needed"):
        kernel_flow(jnp.eye(2), start, batch.lengths, DPO(), optimizer, 1)


def test_optimizers_that_turn_nonlinear_later_are_refused():
    late = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    warm = optax.adam(optax.linear_schedule(0.0, 0.1, 10, transition_begin=2))
    for optimizer in (late, warm):
        with pytest.raises(ValueError, match="use linearized_run"):
            kernel_flow(jnp.eye(2), jnp.zeros((1, 2)), jnp.ones((1, 2), int), DPO(), optimizer, 8)


def test_learning_rates_in_the_state_are_swept_by_one_program():
    apply, theta, batch, start, _ = setting("linear_softmax")
    kernel = entanglement_kernel(apply, theta, batch)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)

    def end(rate):
        state = optimizer.init(jnp.zeros(len(kernel)))
        state = state._replace(hyperparams={"learning_rate": rate})
        return kernel_flow(kernel, start, batch.lengths, DPO(), optimizer, 3, state=state).logp[-1]

    rates = jnp.array([1e-3, 1e-2])
    both = jax.vmap(end)(rates)
    for rate, got in zip(rates, both, strict=True):
        close(
            got,
            kernel_flow(kernel, start, batch.lengths, DPO(), optax.sgd(float(rate)), 3).logp[-1],
        )


def test_frozen_adam_against_a_dense_jacobian_in_numpy():
    """Adam written out on θ₀ + δ with u = u₀ + J δ, refreshed after three steps."""
    apply, theta, batch, _, reference = setting("unconstrained_features")
    steps, refresh, rate, b1, b2, eps = 5, 3, 1e-2, 0.9, 0.999, 1e-8
    run = linearized_run(
        apply,
        theta,
        batch,
        DPO(0.5),
        optax.adam(rate),
        steps,
        reference,
        ORDER,
        refresh=refresh,
        record=1,
    )
    flat, unflatten = jax.flatten_util.ravel_pytree(theta)

    @jax.jit
    def logp(x):
        return responses(apply, unflatten(x), batch).logp.reshape(-1)

    anchor, delta = np.asarray(flat).copy(), np.zeros(len(flat))
    m, v, ref = np.zeros(len(flat)), np.zeros(len(flat)), np.asarray(reference).reshape(-1)
    for t in range(steps):
        if t % refresh == 0:
            anchor, delta = anchor + delta, np.zeros_like(delta)
            u0, j = np.asarray(logp(anchor)), np.asarray(jax.jacobian(logp)(jnp.asarray(anchor)))
        u, c = u0 + j @ delta, np.zeros(len(ref))
        for i in np.asarray(ORDER[t]):
            margin = (u - ref)[2 * i] - (u - ref)[2 * i + 1]
            c[2 * i : 2 * i + 2] = (
                0.5 / (1 + np.exp(0.5 * margin)) * np.array([1, -1]) / ORDER.shape[1]
            )
        g = -j.T @ c
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        delta = delta - rate * (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        close(run.trajectory.logp[t + 1].reshape(-1), u0 + j @ delta, scale=100)


@pytest.mark.parametrize("objective", [DPO(), AOTUnpaired()], ids=["dpo", "aot_unpaired"])
def test_gradient_of_a_large_batch_is_that_of_the_mean_loss(objective):
    """More pairs than are held at once; with an objective that couples them, too."""
    apply, theta = model("unconstrained_features")
    batch = padded(PAIRS * 5)
    reference = responses(apply, theta, batch).logp - jnp.asarray(
        np.random.default_rng(0).uniform(size=(20, 2))
    )

    @jax.jit
    def loss(t):
        u = responses(apply, t, batch).logp
        return objective.loss(u, reference, batch.lengths).mean()

    close(loss_gradient(apply, theta, batch, objective, reference), jax.grad(loss)(theta))


def test_half_precision_parameters_are_refused():
    apply, theta = model("plain", "bfloat16")
    with pytest.raises(
        ValueError, match="parameters are bfloat16: small steps would be rounded away"
    ):
        linearized_run(apply, theta, padded(PAIRS), DPO(), optax.sgd(0.1), 1)
