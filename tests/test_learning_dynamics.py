"""The one-step decomposition against autodiff and actual steps; squeezing against its exact update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, close, model

from simgrad import tree
from simgrad.theory.learning_dynamics import (
    decompose,
    linear_softmax_logit_kernel,
    logit_kernel,
    logit_residual,
    predicted_change,
    softmax_jacobian,
    squeeze,
    squeeze_step,
    unconstrained_logit_kernel,
)

KINDS = ["no_norm_no_mlp_no_positions", "linear_softmax", "unconstrained_features"]
OBSERVED, UPDATED = (1, 5, 3, 7), (1, 5, 3)  # contexts that the table models know


def last(apply, theta, tokens):
    """log π of the next token after a sequence."""
    return jax.nn.log_softmax(apply(theta, jnp.array([tokens])).logits[0, -1])


def sft(kind):
    """The library's decomposition for SFT on a token after UPDATED, and by autodiff: (after a step, derivative)."""
    apply, theta = model(kind, depth=1)
    trained, rest = tree.partition(theta, None, apply.frozen)

    def updated(t):
        return last(apply, tree.combine(t, rest), UPDATED)

    @jax.jit
    def after(eta):
        gradient = jax.grad(lambda t: -updated(t)[4])(trained)
        moved = jax.tree.map(lambda x, g: x - eta * g, trained, gradient)
        return last(apply, tree.combine(moved, rest), OBSERVED)

    residual = logit_residual(jax.jit(updated)(trained), jnp.array(4))
    return decompose(apply, theta, jnp.array(OBSERVED), jnp.array(UPDATED), residual), after


@pytest.mark.parametrize("kind", KINDS)
def test_decomposition_against_autodiff_and_actual_steps(kind):
    """-A K G is the derivative of log π(·|x_o) along -∇L, and the remainder of a step has slope 2."""
    step, after = sft(kind)
    _, along = jax.jvp(after, (0.0,), (1.0,))
    close(step.change(0.3), 0.3 * along)
    np.testing.assert_allclose(step.adaptation.sum(1), np.zeros(VOCAB), atol=1e-12)

    rates = np.geomspace(1e-5, 1e-3, 5)

    def slope(share):
        errors = [np.abs(after(r) - after(0.0) - share * step.change(r)).max() for r in rates]
        return np.polyfit(np.log(rates), np.log(errors), 1)[0]

    assert 1.95 < slope(1.0) < 2.05
    assert slope(0.9) < 1.5  # a wrong prefactor shows


def test_adaptation_is_the_jacobian_of_log_softmax():
    logits = jnp.array([0.3, -2.0, 1.0, 5.0])
    close(softmax_jacobian(logits), jax.jacobian(jax.nn.log_softmax)(logits))


@pytest.mark.parametrize("kind", ["no_norm_no_mlp_no_positions", "unconstrained_features"])
def test_preference_step_moves_any_context(kind):
    """Chosen tokens carry weight d_w, rejected ones -d_l; their sum is the derivative along DPO's step."""
    apply, theta = model(kind, depth=1)
    prompt, chosen, rejected, beta = (1, 5, 3), (7, 2, 7, 1), (8, 9, 2), 0.3

    def logits_of(theta, response):
        return apply(theta, jnp.array([prompt + response])).logits[0, len(prompt) - 1 : -1]

    def log_prob(theta, response):
        every = jax.nn.log_softmax(logits_of(theta, response))
        return sum(every[k, y] for k, y in enumerate(response))

    @jax.jit
    def derivative(theta):
        def loss(theta):
            margin = log_prob(theta, chosen) - log_prob(theta, rejected) + 1.5
            return -jax.nn.log_sigmoid(beta * margin), beta * jax.nn.sigmoid(-beta * margin)

        gradient, d = jax.grad(loss, has_aux=True)(theta)
        _, along = jax.jvp(lambda t: last(apply, t, OBSERVED), (theta,), (gradient,))
        return along, d, logits_of(theta, chosen), logits_of(theta, rejected)

    along, d, *logits = derivative(theta)
    total = 0.0
    for response, weight, rows in ((chosen, d, logits[0]), (rejected, -d, logits[1])):
        residuals = logit_residual(rows, jnp.array(response), weight)
        tokens, at = jnp.array(prompt + response), jnp.arange(2, 2 + len(response))
        total += predicted_change(apply, theta, jnp.array(OBSERVED), tokens, at, residuals, 0.01)
    close(total, -0.01 * along)


def test_both_routes_agree():
    apply, theta = model("linear_softmax")
    g = jnp.asarray(np.random.default_rng(0).normal(size=VOCAB))
    at = (apply, theta, jnp.array(OBSERVED), jnp.array(UPDATED))
    close(predicted_change(*at, jnp.array([2]), g[None], 0.2), decompose(*at, g).change(0.2))


def test_closed_forms_of_the_logit_kernel():
    """⟨φ,φ'⟩ I for frozen features, + W W^T after one context if they learn; a transformer has neither."""
    here, there = jnp.array(UPDATED), jnp.array(OBSERVED)
    for kind in ("linear_softmax", "unconstrained_features", "no_norm_no_mlp_no_positions"):
        apply, theta = model(kind, depth=1)
        h, other = (apply(theta, x[None]).hidden[0, -1] for x in (here, there))
        for tokens, state, same in ((here, h, True), (there, other, False)):
            exact = logit_kernel(apply, theta, here, tokens)
            frozen = linear_softmax_logit_kernel(h, state, VOCAB)
            free = unconstrained_logit_kernel(theta["unembedding"]["table"], h, state, same)
            assert np.allclose(exact, frozen, rtol=1e-10, atol=1e-12) == (
                kind == "linear_softmax" or (kind == "unconstrained_features" and not same)
            )
            assert np.allclose(exact, free, rtol=1e-10, atol=1e-12) == (
                kind == "unconstrained_features" or (kind == "linear_softmax" and not same)
            )


DRAWS = [np.random.default_rng(s).normal(size=9) * scale for s in range(8) for scale in (0.3, 1.0, 3.0, 8.0)]


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


jitted_step = jax.jit(squeeze_step)


@pytest.mark.parametrize("learning_rate", [1e-3, 0.5, 20.0])
def test_squeeze_step_is_the_actual_update(learning_rate):
    """Δ log π, the threshold and who rises, for steps of any size, against z - η (e_y - π) in numpy."""
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
    """Whatever is pushed down falls, the likeliest other rises, and log-ratios move by η (π_z - π_z')."""
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
            np.testing.assert_allclose(ratios, 0.7 * (p[others][:, None] - p[others][None]), atol=1e-12)
            fallen += (change[others] < 0).sum()
    assert fallen > 100  # bystanders fall as well


def test_pushing_the_argmax_does_not_feed_it():
    """The counter-example: if the pushed token is the argmax, the runner-up rises and takes its place."""
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
    tilted = np.delete(np.asarray(squeeze_step(jnp.linspace(0.0, 0.8, 9), jnp.array(2), 0.7).change), 2)
    assert np.ptp(tilted) > 1e-3


def test_peakier_means_more_squeezing():
    """Lower temperature: the argmax gains more on every other token, and fewer tokens rise."""
    not_monotone = 0
    for z in DRAWS[1::4]:
        y = int(np.argsort(z)[0])
        others = np.delete(np.arange(9), y)
        steps = [jitted_step(jnp.asarray(beta * z), jnp.asarray(y), 0.5) for beta in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)]
        leads = np.array([s.change[z.argmax()] - np.asarray(s.change)[others] for s in steps])
        assert (np.diff(leads, axis=0) >= -1e-15).all()
        assert steps[0].rises.sum() == 8
        assert steps[-2].rises.sum() <= 2
        gains = np.array([s.change[z.argmax()] for s in steps])
        not_monotone += (np.diff(gains) < 0).any()
    assert not_monotone > 0  # the argmax's own gain is no measure of peakiness


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
    """With trained features the freed mass need not go to the argmax: K = ‖h‖² I + W W^T redirects it."""
    redirected = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        w, h = 2 * rng.normal(size=(9, 4)), 0.5 * rng.normal(size=4)
        z = w @ h
        y = int(z.argmin())
        g = -np.asarray(logit_residual(jnp.asarray(z), jnp.asarray(y)))  # pushed down
        kernel = np.asarray(unconstrained_logit_kernel(jnp.asarray(w), jnp.asarray(h), jnp.asarray(h), True))
        change = -np.asarray(softmax_jacobian(jnp.asarray(z))) @ kernel @ g
        plain = -np.asarray(softmax_jacobian(jnp.asarray(z))) @ g
        assert plain.argmax() == z.argmax()
        redirected += change.argmax() != z.argmax()
    assert redirected > 0
