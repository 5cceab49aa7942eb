"""d/dt log π(z) grows with ⟨W_z, W₊ - W₋⟩ for z outside a pair of single tokens, W and h trained,
d_w = d_l.

Counter-examples: the order fails for the pair's own tokens, for unequal weights, and for frozen
features.
"""

import jax
import numpy as np
import pytest
from helpers import close
from oracles import SINGLE, TOKENS, dot, gradient, index, parameters, softmax

from simgrad.theory.closed_forms.unconstrained import mass_direction, mass_rates

jitted_rates = jax.jit(mass_rates)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 1.3), (-0.2, 0.5)])
def test_where_the_mass_goes(weights):
    """d/dt log π(z) of every token, for any weights."""
    theta, (chosen, rejected) = parameters(5), SINGLE
    g_w, g_l = gradient(theta, *chosen), gradient(theta, *rejected)
    direction = jax.tree.map(lambda a, b: weights[0] * a - weights[1] * b, g_w, g_l)
    rates = jitted_rates(theta["w"], theta["h"][0], *index(3, 5), *weights)
    close(rates, np.array([dot(gradient(theta, (0,), (z,)), direction) for z in range(TOKENS)]))
    probs = np.asarray(jax.nn.softmax(theta["w"] @ theta["h"][0]))
    np.testing.assert_allclose(probs @ np.asarray(rates), 0.0, atol=1e-12)  # mass is only moved


def order(x, keep):
    return [z for z in np.argsort(np.asarray(x)) if z in keep]


def test_mass_is_ranked_by_the_direction_outside_the_pair():
    """The order of all tokens but the pair; it fails for the pair, for unequal weights, and for
    frozen features."""
    pair_breaks = weights_break = frozen_breaks = 0
    for seed in range(20):
        theta = parameters(seed, 0.7)
        at = (theta["w"], 3 * theta["h"][0], *index(3, 5))
        score, rates = mass_direction(theta["w"], *index(3, 5)), jitted_rates(*at)
        outside = set(range(TOKENS)) - {3, 5}
        assert order(score, outside) == order(rates, outside)
        differences = np.diff(np.asarray(rates)[list(outside)])
        close(differences, np.diff(np.asarray(score)[list(outside)]))
        pair_breaks += order(score, range(TOKENS)) != order(rates, range(TOKENS))
        weights_break += order(score, outside) != order(jitted_rates(*at, 0.2, 1.0), outside)
        h = np.asarray(at[1])
        p = softmax(np.asarray(theta["w"]) @ h)
        frozen = (h @ h) * (np.eye(TOKENS) - p) @ (np.eye(TOKENS)[3] - np.eye(TOKENS)[5])
        frozen_breaks += (
            np.ptp(frozen[list(outside)]) < 1e-12 * np.abs(frozen).max()
        )  # no order at all
    assert min(pair_breaks, weights_break) > 0
    assert frozen_breaks == 20
