"""z ← z - η (e_y - π): Δ log π_z = η (π_z - [z = y] - τ), so the likeliest other token gains most
and all below τ fall.

Counter-examples: the argmax itself pushed down, a uniform start, and a kernel that is no multiple
of the identity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from oracles import softmax

from simgrad.theory.closed_forms.learning_dynamics import (
    logit_residual,
    softmax_jacobian,
    squeeze,
    squeeze_step,
    unconstrained_logit_kernel,
)

DRAWS = [
    np.random.default_rng(s).normal(size=9) * scale
    for s in range(8)
    for scale in (0.3, 1.0, 3.0, 8.0)
]

jitted_step = jax.jit(squeeze_step)


@pytest.mark.parametrize("learning_rate", [1e-3, 0.5, 20.0])
def test_squeeze_step_is_the_actual_update(learning_rate):
    """Δ log π, the threshold and who rises, for steps of any size, against z - η (e_y - π) in
    numpy."""
    for z in DRAWS:
        y = int(np.argsort(z)[3])
        p = softmax(z)
        moved = softmax(z - learning_rate * (np.eye(9)[y] - p))
        got = jitted_step(jnp.asarray(z), jnp.asarray(y), learning_rate)
        change = np.log(moved) - np.log(p)
        np.testing.assert_allclose(got.change, change, rtol=1e-9, atol=1e-12)
        clear = np.abs(p - float(got.threshold)) > 1e-9
        for token in np.flatnonzero(clear):
            rises = moved[token] > p[token]
            assert bool(got.rises[token]) == rises
            assert token == y or rises == (p[token] > float(got.threshold))
        if learning_rate < 0.01:
            np.testing.assert_allclose(got.threshold, p @ p - p[y], atol=learning_rate)


def test_the_likeliest_other_token_gains_most():
    """Whatever is pushed down falls, the likeliest other rises, and log-ratios move by η (π_z -
    π_z')."""
    fallen = 0
    for z in DRAWS:
        p = softmax(z)
        for y in (int(np.argsort(z)[k]) for k in (0, 4, 8)):
            change = np.asarray(jitted_step(jnp.asarray(z), jnp.asarray(y), 0.7).change)
            others = np.delete(np.arange(9), y)
            top = others[np.argmax(z[others])]
            assert change[y] < 0 < change[top]
            assert np.argmax(change) == top
            ratios = change[others][:, None] - change[others][None]
            np.testing.assert_allclose(
                ratios, 0.7 * (p[others][:, None] - p[others][None]), atol=1e-12
            )
            fallen += (change[others] < 0).sum()
    assert fallen > 100  # bystanders fall as well


def test_pushing_the_argmax_does_not_feed_it():
    """The counter-example: if the pushed token is the argmax, the runner-up rises and takes its
    place."""
    overtaken = 0
    for z in DRAWS:
        y, runner_up = (int(np.argsort(z)[k]) for k in (-1, -2))
        change = np.asarray(jitted_step(jnp.asarray(z), jnp.asarray(y), 0.7).change)
        assert change[y] < 0
        assert np.argmax(change) == runner_up
        path = np.asarray(squeeze(jnp.asarray(z), jnp.asarray(y), 5.0, 40))
        if path[0, y] < np.log(0.9):  # the nearer π_y is to 1 the slower it falls
            assert path[-1].argmax() == runner_up
            overtaken += 1
    assert overtaken > 10


def test_uniform_start_squeezes_nobody():
    """The null: all others rise alike; any slope in the start breaks the tie."""
    change = np.asarray(squeeze_step(jnp.zeros(9), jnp.array(2), 0.7).change)
    others = np.delete(change, 2)
    assert np.ptp(others) < 1e-15
    assert (others > 0).all()
    tilted = np.delete(
        np.asarray(squeeze_step(jnp.linspace(0.0, 0.8, 9), jnp.array(2), 0.7).change), 2
    )
    assert np.ptp(tilted) > 1e-3


def test_peakier_means_more_squeezing():
    """Lower temperature: the argmax gains more on every other token, and fewer tokens rise."""
    not_monotone = 0
    for z in DRAWS[1::4]:
        y = int(np.argsort(z)[0])
        others = np.delete(np.arange(9), y)
        steps = [
            jitted_step(jnp.asarray(beta * z), jnp.asarray(y), 0.5)
            for beta in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)
        ]
        leads = np.array([s.change[z.argmax()] - np.asarray(s.change)[others] for s in steps])
        assert (np.diff(leads, axis=0) >= -1e-15).all()
        assert steps[0].rises.sum() == 8
        assert steps[-2].rises.sum() <= 2
        gains = np.array([s.change[z.argmax()] for s in steps])
        not_monotone += (np.diff(gains) < 0).any()
    assert not_monotone > 0  # the argmax's own gain is no measure of peakiness


def test_the_lead_is_not_monotone_in_temperature_when_the_argmax_is_pushed():
    """The counter-example: the runner-up's lead over the next token first grows, then vanishes as
    π_y → 1."""
    z = jnp.array([3.0, 2.0, 1.0, 0.0])
    changes = [
        squeeze_step(beta * z, jnp.array(0), 0.5).change for beta in (0.5, 1.0, 2.0, 4.0, 10.0)
    ]
    leads = np.array([c[1] - c[2] for c in changes])
    assert leads[1] > leads[0]
    assert (np.diff(leads[1:]) < 0).all()
    assert leads[-1] < 1e-3 * leads[1]


@pytest.mark.parametrize("learning_rate", [1e-7, 1e-5, 0.5, 50.0])
def test_small_steps_keep_their_precision_in_float32(learning_rate):
    """Real learning rates: the threshold must not drown in the logarithm of a number near one."""
    z = np.array([2.0, 1.0, 0.0, -3.0])
    exact = squeeze_step(jnp.asarray(z), jnp.array(3), learning_rate)
    rough = squeeze_step(jnp.asarray(z, jnp.float32), jnp.array(3), learning_rate)
    close(rough.threshold, exact.threshold, "float32")
    close(rough.change, exact.change, "float32")
    np.testing.assert_array_equal(rough.rises, exact.rises)


@pytest.mark.parametrize("seed", range(6))
def test_long_squeezing_ends_in_the_argmax(seed):
    """Everything pushed out of an unlikely token ends in one place, and all others are drained."""
    z = np.random.default_rng(seed).normal(size=9)
    y, top = int(z.argmin()), int(z.argmax())
    path = np.asarray(squeeze(jnp.asarray(z), jnp.asarray(y), 2.0, 200))
    close(path[0], np.log(softmax(z)))
    step = squeeze_step(jnp.asarray(path[3]), jnp.asarray(y), 2.0)
    close(path[4] - path[3], step.change)
    assert (np.diff(path[:, top]) > -1e-12).all()
    assert path[-1, top] > np.log(0.98)
    assert (np.delete(path[-1] - path[0], top) < 0).all()


def test_a_kernel_that_is_no_multiple_of_the_identity_may_feed_another_token():
    """With trained features the freed mass need not go to the argmax: K = ‖h‖² I + W W^T redirects
    it."""
    redirected = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        w, h = 2 * rng.normal(size=(9, 4)), 0.5 * rng.normal(size=4)
        z = w @ h
        y = int(z.argmin())
        g = -np.asarray(logit_residual(jnp.asarray(z), jnp.asarray(y)))  # pushed down
        kernel = np.asarray(
            unconstrained_logit_kernel(jnp.asarray(w), jnp.asarray(h), jnp.asarray(h), True)
        )
        change = -np.asarray(softmax_jacobian(jnp.asarray(z))) @ kernel @ g
        plain = -np.asarray(softmax_jacobian(jnp.asarray(z))) @ g
        assert plain.argmax() == z.argmax()
        redirected += change.argmax() != z.argmax()
    assert redirected > 0
