"""d/dt log π(y) = Σ_i a_i ⟨∇ log π(y), ∇ log π(y_i)⟩, where samples with other prompts enter
through W alone.

Counter-example: states that are no free parameters but share a trained map, h(x) = A φ(x), let
other prompts enter through the features as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close
from oracles import (
    DIFFERENT_FIRST,
    OTHER_PROMPT,
    SHARED_PREFIX,
    dot,
    gradient,
    log_prob,
    parameters,
    states,
)

from simgrad.theory.closed_forms.unconstrained import contributions

PROBE = SHARED_PREFIX[0]
TRAINING = [r for pair in (SHARED_PREFIX, OTHER_PROMPT, DIFFERENT_FIRST) for r in pair]
WEIGHTS = np.array([0.3, -0.4, 0.7, -0.1, 0.2, -0.9])
SAME_PROMPT = np.array([True, True, False, False, True, True])


def library(theta):
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(states(theta, *r) for r in TRAINING))
    return jax.jit(contributions)(theta["w"], states(theta, *PROBE), stacked, jnp.asarray(WEIGHTS))


def test_contributions_of_many_samples():
    """Each sample's share of d/dt log π; samples with another prompt have no part in the
    features."""
    theta = parameters(8)
    got = library(theta)
    g = gradient(theta, *PROBE)
    close(
        got.total,
        np.array([a * dot(g, gradient(theta, *r)) for a, r in zip(WEIGHTS, TRAINING, strict=True)]),
    )
    np.testing.assert_array_equal(np.asarray(got.features) != 0, SAME_PROMPT)

    def loss(theta):
        return -sum(a * log_prob(theta, *r) for a, r in zip(WEIGHTS, TRAINING, strict=True))

    close(got.total.sum(), -dot(g, jax.grad(loss)(theta)))


def test_a_shared_map_couples_the_prompts():
    """Same states, W's part unchanged; but A is read by every prompt, so every sample's features
    part changes."""
    theta = parameters(8)

    def shared(contexts, tokens):
        """By the chain rule at A = I."""
        g = gradient(theta, contexts, tokens)
        return {"w": g["w"], "a": g["h"].T @ np.asarray(theta["h"])}

    got, g = library(theta), shared(*PROBE)
    for i, (weight, response) in enumerate(zip(WEIGHTS, TRAINING, strict=True)):
        f = shared(*response)
        close(got.unembedding[i], weight * dot(g, f, keep="w"))
        through_a = weight * dot(g, f, keep="a")
        assert abs(through_a) > 1e-3
        assert not np.isclose(got.features[i], through_a, rtol=1e-3)
