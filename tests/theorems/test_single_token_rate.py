"""d/dt log π(y⁺) = c (norms + state + alignment + others) for one token after one context, W and
h(context) trained.

Counter-example: with frozen features only the state term is left.
"""

import jax
import numpy as np
import pytest
from helpers import close
from oracles import (
    SINGLE,
    TOKENS,
    dot,
    gradient,
    index,
    minus_dpo_gradient,
    parameters,
    softmax,
    states,
)

from simgrad.theory.closed_forms.unconstrained import (
    mass_rates,
    single_token_rate,
    state_inner,
    state_kernel,
)

jitted_rate = jax.jit(single_token_rate)


@pytest.mark.parametrize("seed", range(4))
def test_single_token_flow(seed):
    """The four parts add up to -⟨∇ log π⁺, ∇L⟩ / c, and exchanged roles give the rejected's."""
    theta, (chosen, rejected) = parameters(seed), SINGLE
    direction, c = minus_dpo_gradient(theta, chosen, rejected)
    rate = jitted_rate(theta["w"], theta["h"][0], *index(3, 5))
    close(c * rate.total, dot(gradient(theta, *chosen), direction))
    other = jitted_rate(theta["w"], theta["h"][0], *index(5, 3))
    close(-c * other.total, dot(gradient(theta, *rejected), direction))
    close(c * rate.state, dot(gradient(theta, *chosen), direction, keep="w"))
    assert min(rate.norms, rate.state) >= 0


def test_parts_of_the_single_token_flow():
    """Each named part against its formula, written out in loops."""
    theta = parameters(11)
    w, h = np.asarray(theta["w"]), np.asarray(theta["h"][0])
    p = softmax(w @ h)
    rate = jitted_rate(theta["w"], theta["h"][0], *index(3, 5))
    close(rate.norms, (1 - p[3]) * w[3] @ w[3] + p[5] * w[5] @ w[5])
    close(rate.alignment, -(1 - p[3] + p[5]) * w[3] @ w[5])
    close(rate.others, -sum(p[z] * w[z] @ (w[3] - w[5]) for z in range(TOKENS) if z not in (3, 5)))


def test_single_token_flow_is_a_special_case():
    """Of the kernel of any two responses, and of the rates of all tokens."""
    theta, (chosen, rejected) = parameters(4), SINGLE
    kernel = state_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
    close(-kernel.gap, jitted_rate(theta["w"], theta["h"][0], *index(3, 5)).total)
    for z, rate in enumerate(mass_rates(theta["w"], theta["h"][0], *index(3, 5))):
        v = states(theta, (0,), (z,))
        inner = [state_inner(theta["w"], v, states(theta, *y)).total for y in SINGLE]
        close(inner[0] - inner[1], rate)


def test_frozen_features_leave_only_the_state_term():
    """With W alone trained the chosen cannot fall; with features trained it does in some draws."""
    fell = 0
    for seed in range(30):
        theta, (chosen, rejected) = parameters(seed, 2.0), SINGLE
        direction, c = minus_dpo_gradient(theta, chosen, rejected)
        g = gradient(theta, *chosen)
        rate = jitted_rate(theta["w"], theta["h"][0], *index(3, 5))
        frozen, trained = dot(g, direction, keep="w"), dot(g, direction)
        close(c * rate.state, frozen)
        assert frozen >= 0
        assert not np.isclose(c * rate.total, frozen, rtol=1e-3)
        fell += trained < 0
    assert fell > 0
