"""Δ log π(·|x_o) = -η A K G + O(η²) for a step whose loss reaches the parameters through the
logits at x_u.

Counter-examples: a wrong prefactor, or a second sample in the step that G leaves out, gives a
remainder of first order; the closed forms of K hold in their own models only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, close, model
from oracles import slope

from simgrad.models import bind
from simgrad.theory.closed_forms.learning_dynamics import (
    decompose,
    linear_softmax_logit_kernel,
    logit_kernel,
    logit_residual,
    predicted_change,
    softmax_jacobian,
    unconstrained_logit_kernel,
)

KINDS = ["no_norm_no_mlp_no_positions", "linear_softmax", "unconstrained_features"]
OBSERVED, UPDATED, ELSEWHERE = (
    (1, 5, 3, 7),
    (1, 5, 3),
    (1, 5),
)  # contexts that the table models know
RATES = np.geomspace(1e-5, 1e-3, 5)


def last(apply, theta, tokens):
    """log π of the next token after a sequence."""
    return jax.nn.log_softmax(apply(theta, jnp.array([tokens])).logits[0, -1])


def sft(kind, also=None):
    """The library's decomposition for SFT on a token after UPDATED, and log π(·|OBSERVED) after an
    actual step.

    With ``also`` the step is taken on a token after that context, too.
    """
    apply, theta = model(kind, depth=1)
    bound = bind(apply, theta)
    trained = bound.trained

    def after_context(t, context):
        return last(apply, bound.whole(t), context)

    def loss(t):
        return -sum(after_context(t, context)[4] for context in (UPDATED, also) if context)

    @jax.jit
    def after(eta):
        moved = jax.tree.map(lambda x, g: x - eta * g, trained, jax.grad(loss)(trained))
        return after_context(moved, OBSERVED)

    residual = logit_residual(
        jax.jit(after_context, static_argnums=1)(trained, UPDATED), jnp.array(4)
    )
    return decompose(apply, theta, jnp.array(OBSERVED), jnp.array(UPDATED), residual), after


def order(step, after, share=1.0):
    """Order of the remainder in η."""
    return slope(
        RATES, [np.abs(after(r) - after(0.0) - share * step.change(r)).max() for r in RATES]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decomposition_against_autodiff_and_actual_steps(kind):
    """-A K G is the derivative of log π(·|x_o) along -∇L, and the remainder of a step has slope
    2."""
    step, after = sft(kind)
    _, along = jax.jvp(after, (0.0,), (1.0,))
    close(step.change(0.3), 0.3 * along)
    np.testing.assert_allclose(step.adaptation.sum(1), np.zeros(VOCAB), atol=1e-12)
    assert 1.95 < order(step, after) < 2.05
    assert order(step, after, share=0.9) < 1.5  # a wrong prefactor shows


def test_a_second_sample_in_the_step_leaves_a_remainder_of_first_order():
    """The counter-example: the loss reaches the parameters through a second context, which G does
    not name."""
    np.testing.assert_allclose(order(*sft("linear_softmax", also=ELSEWHERE)), 1.0, atol=0.05)


def test_adaptation_is_the_jacobian_of_log_softmax():
    logits = jnp.array([0.3, -2.0, 1.0, 5.0])
    close(softmax_jacobian(logits), jax.jacobian(jax.nn.log_softmax)(logits))


@pytest.mark.parametrize("kind", ["no_norm_no_mlp_no_positions", "unconstrained_features"])
def test_preference_step_moves_any_context(kind):
    """Chosen tokens carry weight d_w, rejected ones -d_l; their sum is the derivative along DPO's
    step."""
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
    """⟨φ,φ'⟩ I for frozen features, + W W^T after one context if they learn; a transformer has
    neither."""
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
