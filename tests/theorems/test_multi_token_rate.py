"""⟨∇ log π(y), ∇ log π(y')⟩ = Σ ⟨h_k, h'_m⟩⟨e_k, e'_m⟩ + [same context] ⟨W^T e_k, W^T e'_m⟩, W and
every h trained.

Counter-examples: the four-part rate assumes different first tokens, so a shared prefix breaks it
(not the kernel); the kernel assumes free states, so a transformer breaks it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, model
from oracles import (
    ALL,
    CONTEXTS,
    DIFFERENT_FIRST,
    OTHER_PROMPT,
    SHARED_PREFIX,
    SINGLE,
    TOKENS,
    dot,
    dpo_loss,
    gradient,
    index,
    kernel_of_rows,
    log_prob,
    minus_dpo_gradient,
    parameters,
    softmax,
    states,
)

from simgrad.pairs import Pair, packed, padded
from simgrad.theory import responses
from simgrad.theory.closed_forms.unconstrained import (
    different_first_tokens_rate,
    single_token_rate,
    state_inner,
    state_kernel,
    token_states,
    unconstrained_kernel,
)

jitted_inner, jitted_kernel = jax.jit(state_inner), jax.jit(state_kernel)


def test_explicit_gradients_are_those_of_autodiff():
    """The oracle's ∇ log π and -∇L, against jax.grad of the log-prob and of the loss."""
    theta = parameters(1)
    for chosen, rejected in ALL:
        close(gradient(theta, *chosen), jax.grad(log_prob)(theta, *chosen))
        descent, _ = minus_dpo_gradient(theta, chosen, rejected)
        close(descent, jax.tree.map(jnp.negative, jax.grad(dpo_loss)(theta, chosen, rejected)))


@pytest.mark.parametrize("a", range(len(ALL)))
def test_inner_products_of_any_two_responses(a):
    """Both parts of ⟨∇ log π(y), ∇ log π(y')⟩: shared prefixes, other prompts, padding that holds
    NaN."""
    theta = parameters(2)
    for pair in ALL:
        for y, z in ((ALL[a][0], pair[1]), (ALL[a][1], pair[0])):
            got = jitted_inner(theta["w"], states(theta, *y), states(theta, *z))
            g, f = gradient(theta, *y), gradient(theta, *z)
            close(got.unembedding, dot(g, f, keep="w"))
            np.testing.assert_allclose(got.features, dot(g, f, keep="h"), rtol=1e-10, atol=1e-12)
            close(got.total, dot(g, f))


@pytest.mark.parametrize("pair", ALL)
def test_flow_of_both_responses(pair):
    theta, (chosen, rejected) = parameters(3), pair
    direction, c = minus_dpo_gradient(theta, chosen, rejected)
    kernel = jitted_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
    close(c * (kernel.sq_chosen - kernel.inner), dot(gradient(theta, *chosen), direction))
    close(c * (kernel.inner - kernel.sq_rejected), dot(gradient(theta, *rejected), direction))


def test_different_first_tokens():
    """The four parts against autodiff; a shared first token breaks the formula, not the general
    kernel."""
    theta = parameters(6)
    for pair, holds in (
        (DIFFERENT_FIRST, True),
        (OTHER_PROMPT, True),
        (SINGLE, True),
        (SHARED_PREFIX, False),
    ):
        chosen, rejected = pair
        direction, c = minus_dpo_gradient(theta, chosen, rejected)
        flow = dot(gradient(theta, *chosen), direction) / float(c)
        plus, minus = states(theta, *chosen), states(theta, *rejected)
        rate = different_first_tokens_rate(
            theta["w"], plus, minus, *index(chosen[1][0], rejected[1][0])
        )
        close(-jitted_kernel(theta["w"], plus, minus).gap, flow)
        assert bool(np.isclose(rate.total, flow, rtol=1e-10)) == holds
        assert min(rate.norms, rate.own) >= 0
        w, h = (np.asarray(theta[k]) for k in "wh")
        p = [softmax(w @ h[s]) for s in chosen[0]]
        first = single_token_rate(
            theta["w"], theta["h"][chosen[0][0]], *index(chosen[1][0], rejected[1][0])
        )
        later = sum(
            np.square(w[y] - q @ w).sum() for q, y in zip(p[1:], chosen[1][1:], strict=True)
        )
        close(rate.norms, first.norms + later)
        close(rate.first, first.alignment + first.others)
        close(rate.own, dot(gradient(theta, *chosen), gradient(theta, *chosen), keep="w"))


def test_error_products_are_at_most_two():
    """α = ⟨e - π, e' - π'⟩ ∈ [-2, 2], and the bounds are reached."""
    theta = parameters(7, 30.0)
    every = token_states(
        theta["w"],
        jnp.repeat(theta["h"], TOKENS, 0),
        jnp.tile(jnp.arange(TOKENS), CONTEXTS),
        jnp.arange(96),
    )
    alpha = np.asarray(every.error) @ np.asarray(every.error).T
    assert np.abs(alpha).max() <= 2 + 1e-12
    assert alpha.max() > 1.99
    assert alpha.min() < -1.99


MIXED = [
    Pair([1, 5], [7, 2, 4], [8, 9]),
    Pair([3], [6, 6, 2, 2], [6, 6, 7]),
    Pair([4], [5, 3], [5, 3, 9]),
    Pair([2, 2, 2], [9], [5]),
]


@pytest.mark.parametrize(
    ("kind", "layout", "exact"),
    [
        ("unconstrained_features", padded, True),
        ("unconstrained_features", packed, True),
        ("plain", padded, False),
    ],
)
def test_kernel_of_a_batch_from_the_forward_pass(kind, layout, exact):
    """Exact for the library's unconstrained-features model with shared prefixes; a transformer
    breaks it."""
    apply, theta = model(kind, pairs=MIXED, depth=1)
    batch = layout(MIXED, rows=6)
    got = unconstrained_kernel(theta["unembedding"]["table"], responses(apply, theta, batch), batch)
    for name, value in kernel_of_rows(lambda t: responses(apply, t, batch).logp, theta).items():
        np.testing.assert_array_equal(np.isclose(getattr(got, name), value, rtol=1e-10), exact)
