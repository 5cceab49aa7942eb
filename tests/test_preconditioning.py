"""A frozen P and drift reproduce optax's own step, and K_P predicts what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, model

from simgrad.objectives import DPO
from simgrad.pairs import padded
from simgrad.theory import entanglement_kernel, loss_gradient, responses
from simgrad.theory.kernel import preconditioning as pre
from simgrad.theory.optimizers import updated

OPTIMIZERS = {
    "sgd": (optax.sgd(1.0), lambda s, g: pre.sgd(g)),
    "momentum": (optax.sgd(1.0, momentum=0.9), lambda s, g: pre.momentum(s, g, 0.9)),
    "nesterov": (
        optax.sgd(1.0, momentum=0.8, nesterov=True),
        lambda s, g: pre.momentum(s, g, 0.8, nesterov=True),
    ),
    "rmsprop": (optax.rmsprop(1.0), lambda s, g: pre.rmsprop(s, g)),
    "rmsprop_outside": (
        optax.rmsprop(1.0, decay=0.95, eps=1e-3, eps_in_sqrt=False),
        lambda s, g: pre.rmsprop(s, g, 0.95, 1e-3, eps_in_sqrt=False),
    ),
    "adam": (optax.adam(1.0), lambda s, g: pre.adam(s, g)),
    "adam_other": (
        optax.adam(1.0, b1=0.8, b2=0.95, eps=1e-4, eps_root=1e-6),
        lambda s, g: pre.adam(s, g, 0.8, 0.95, 1e-4, 1e-6),
    ),
}


def state_after(optimizer, steps, seed=0):
    """Optimizer state after random gradients, and the gradient of the next step."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 4), "b": (4,)}

    def draw():
        return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    state = optimizer.init(draw())
    for _ in range(steps):
        _, state = updated(optimizer, draw(), state)
    return state, draw()


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_is_the_optimizers_own(name, steps):
    optimizer, make = OPTIMIZERS[name]
    state, gradient = state_after(optimizer, steps)
    update, _ = updated(optimizer, gradient, state)
    got = make(state, gradient).step(jax.tree.map(jnp.negative, gradient))
    close(got, update)


def test_adam_is_sign_like_at_its_first_step_and_not_later():
    optimizer, make = OPTIMIZERS["adam"]
    state, gradient = state_after(optimizer, 0)
    first = make(state, gradient).step(jax.tree.map(jnp.negative, gradient))
    close(first, jax.tree.map(lambda g: -jnp.sign(g), gradient), "float32")
    state, gradient = state_after(optimizer, 5)
    later = make(state, gradient).step(jax.tree.map(jnp.negative, gradient))
    assert np.abs(np.abs(later["w"]) - 1).max() > 0.1


def test_preconditioned_kernel_predicts_an_adam_step_and_the_plain_one_does_not():
    """Δu = η (K_P c + J drift) + O(η²), measured at Adam's state after three real steps."""
    apply, theta = model("plain")
    batch, objective = padded(PAIRS), DPO()
    reference = responses(apply, theta, batch).logp - jnp.array([[0.3, -0.2]])
    optimizer = optax.adam(1e-3)
    state = optimizer.init(theta)
    for _ in range(3):
        update, state = updated(
            optimizer, loss_gradient(apply, theta, batch, objective, reference), state
        )
        theta = optax.apply_updates(theta, update)
    gradient = loss_gradient(apply, theta, batch, objective, reference)
    p = pre.adam(state, gradient)
    start = responses(apply, theta, batch).logp
    pull = objective.force(start, reference, batch.lengths).reshape(-1) / len(PAIRS)
    _, along_drift = jax.jvp(lambda t: responses(apply, t, batch).logp, (theta,), (p.drift,))
    predicted = entanglement_kernel(
        apply, theta, batch, scale=p.scale
    ) @ pull + along_drift.reshape(-1)
    rates = np.geomspace(1e-6, 1e-4, 4)
    direction = p.step(jax.tree.map(jnp.negative, gradient))
    moved = [
        responses(apply, jax.tree.map(lambda t, d, r=r: t + r * d, theta, direction), batch).logp
        for r in rates
    ]
    measured = np.stack([np.asarray(m - start).reshape(-1) for m in moved])
    miss = np.abs(measured - rates[:, None] * np.asarray(predicted))
    slopes = np.polyfit(np.log(rates), np.log(miss), 1)[0]
    np.testing.assert_allclose(slopes, 2.0, atol=0.05)
    update, _ = updated(optimizer, gradient, state)  # the direction is optax's
    close(jax.tree.map(lambda d: 1e-3 * d, direction), update)
    plain = np.asarray(entanglement_kernel(apply, theta, batch) @ pull)
    cosine = plain @ measured[0] / np.linalg.norm(plain) / np.linalg.norm(measured[0])
    assert cosine < 0.99
    kernel = entanglement_kernel(apply, theta, batch, scale=p.scale)
    close(kernel, kernel.T)
    assert np.linalg.eigvalsh(kernel).min() > -1e-10 * np.abs(kernel).max()


def test_another_optimizers_state_is_refused_by_name():
    state, gradient = state_after(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"no ScaleByAdamState: was it made by optax\.adam"):
        pre.adam(state, gradient)
    with pytest.raises(ValueError, match="no TraceState"):
        pre.momentum(state, gradient, 0.9)
    with pytest.raises(ValueError, match="no ScaleByRmsState"):
        pre.rmsprop(state, gradient)
    state, gradient = state_after(optax.rmsprop(0.1, momentum=0.9), 1)
    with pytest.raises(ValueError, match="also holds momentum"):
        pre.rmsprop(state, gradient)


def test_behind_clipping_the_gradient_is_the_clipped_one():
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1.0))
    state, gradient = state_after(chain, 2)
    update, _ = updated(chain, gradient, state)
    clipped, _ = updated(optax.clip_by_global_norm(0.5), gradient, optax.EmptyState())
    close(pre.adam(state, clipped).step(jax.tree.map(jnp.negative, clipped)), update)
    naive = pre.adam(state, gradient).step(jax.tree.map(jnp.negative, gradient))
    assert np.abs(naive["w"] - update["w"]).max() > 0.05


def test_state_is_found_inside_a_chain():
    chain = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1.0, weight_decay=0.0))
    state = chain.init({"w": jnp.ones(3)})
    gradient = {"w": jnp.array([1.0, -2.0, 0.5])}
    update, _ = updated(chain, gradient, state, {"w": jnp.ones(3)})
    close(pre.adam(state, gradient).step(jax.tree.map(jnp.negative, gradient)), update)
