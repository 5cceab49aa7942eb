"""Losses and coefficients against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from simgrad import objectives

RNG = np.random.default_rng(0)
W, L, REF_W, REF_L = (jnp.asarray(-20 * RNG.random(50)) for _ in range(4))
LEN_W, LEN_L = (jnp.asarray(RNG.integers(1, 30, 50)) for _ in range(2))
ARGS = (W, L, REF_W, REF_L, LEN_W, LEN_L)
M = (W - REF_W) - (L - REF_L)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_dpo():
    beta = 0.3
    objective = objectives.get("dpo", beta=beta)
    close(objective.loss(*ARGS), -np.log(sigmoid(beta * M)))
    d = objective.coefficients(*ARGS)
    close(d.chosen, beta * sigmoid(-beta * M))
    close(d.rejected, d.chosen)


def test_ipo_turns_negative_beyond_its_target():
    beta = 0.25
    objective = objectives.get("ipo", beta=beta)
    close(objective.loss(*ARGS), (M - 1 / (2 * beta)) ** 2)
    d = objective.coefficients(*ARGS)
    close(d.chosen, 2 * (1 / (2 * beta) - M))
    close(d.rejected, d.chosen)
    assert (d.chosen[M > 2.0] < 0).all()
    assert (M > 2.0).any()
    assert (d.chosen[M < 2.0] > 0).all()


def test_simpo_weighs_by_length_and_ignores_the_reference():
    beta, gamma = 2.5, 0.7
    objective = objectives.get("simpo", beta=beta, gamma=gamma)
    n_w, n_l = LEN_W.astype(float), LEN_L.astype(float)
    margin = beta * (W / n_w - L / n_l)
    close(objective.loss(*ARGS), -np.log(sigmoid(margin - gamma)))
    d = objective.coefficients(*ARGS)
    close(d.chosen, beta * sigmoid(gamma - margin) / n_w)
    close(d.rejected, beta * sigmoid(gamma - margin) / n_l)
    close(objective.coefficients(W, L, 3 * REF_W, REF_L, LEN_W, LEN_L), d)


@pytest.mark.parametrize("name", objectives.names())
def test_coefficients_are_what_the_gradient_of_the_loss_pulls_with(name):
    """-∇L = d_w ∇log π_w - d_l ∇log π_l along any direction of the log-probs, by central differences."""
    objective = objectives.get(name)
    d = objective.coefficients(*ARGS)
    a, b, h = RNG.normal(size=50), RNG.normal(size=50), 1e-5
    up = objective.loss(W + h * a, L + h * b, *ARGS[2:])
    down = objective.loss(W - h * a, L - h * b, *ARGS[2:])
    slope = d.rejected * b - d.chosen * a
    np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=1e-6, atol=1e-8 * np.abs(slope).max())


@pytest.mark.parametrize("name", objectives.names())
def test_objectives_work_under_transformations_in_float32(name):
    narrow = [x.astype(jnp.float32) if x.dtype == jnp.float64 else x for x in ARGS]
    objective = objectives.get(name)
    close(jax.jit(objective.coefficients)(*narrow), objective.coefficients(*ARGS), "float32")
    close(jax.vmap(objective.loss)(*ARGS), objective.loss(*ARGS))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: objectives.get("dpoo"), "unknown objective 'dpoo'; did you mean 'dpo'"),
        (lambda: objectives.get("xyz"), "there are: dpo, ipo, simpo"),
        (lambda: objectives.get("dpo", gamma=1.0), "dpo has no hyperparameter gamma; it takes: beta"),
        (lambda: objectives.get("ipo", beta=0.0), "beta must be positive, got 0.0"),
        (lambda: objectives.get("simpo", beta=float("nan")), "beta must be positive"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
