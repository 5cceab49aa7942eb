"""‖g_w‖² - ⟨g_w,g_l⟩ = ‖h‖² (1 - π_w + π_l) ≥ 0 for one token after one context, W alone trained,
d_w = d_l.

So the chosen cannot fall. Counter-examples: trained features, different contexts, or unequal
weights each let it fall; so do more tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, close
from oracles import SHARED, kernel_of_rows, pair_of, softmax, unembedding_gradient

from simgrad.models import bind, linear_softmax, unconstrained_features
from simgrad.pairs import padded
from simgrad.theory import responses
from simgrad.theory.closed_forms.linear_softmax import (
    prediction_error,
    response_inner,
    shared_parts,
    single_token_kernel,
    single_token_rise,
    token_products,
)


def test_one_token_against_autodiff():
    """⟨∇_W log π(y|φ), ∇_W log π(y'|φ')⟩ = ⟨φ,φ'⟩⟨e_y - π, e_y' - π'⟩ for any two tokens and
    contexts."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(7, 4))
    hidden, tokens = rng.normal(size=(5, 4)), rng.integers(0, 7, 5)
    g = np.stack([unembedding_gradient(w, h, y) for h, y in zip(hidden, tokens, strict=True)])
    error = prediction_error(jnp.asarray(hidden @ w.T), jnp.asarray(tokens))
    h = jnp.asarray(hidden)
    close(token_products(h, error, h, error), np.einsum("kvd,mvd->km", g, g))
    close(response_inner(h[:2], error[:2], h[2:], error[2:]), (g[:2].sum(0) * g[2:].sum(0)).sum())


def test_padding_counts_for_nothing():
    rng = np.random.default_rng(4)
    logits, targets = (
        jnp.asarray(rng.normal(size=(2, 3, 5))),
        jnp.asarray(rng.integers(0, 5, (2, 3))),
    )
    valid = jnp.array([[True, True, False], [True, False, False]])
    error = prediction_error(logits.at[0, 2].set(jnp.nan), targets, valid)
    np.testing.assert_array_equal(np.abs(error).sum(-1) > 0, valid)


def single_tokens(rng, draws, spread):
    """W, one state, and two different tokens, for each of several draws."""
    for _ in range(draws):
        w, h = spread * rng.normal(size=(6, 4)), rng.normal(size=4)
        yield w, h, rng.choice(6, 2, replace=False)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_single_token_kernel_and_rise_against_autodiff(spread):
    signs = set()
    for w, h, (y, z) in single_tokens(np.random.default_rng(5), 20, spread):
        g_w, g_l = unembedding_gradient(w, h, y), unembedding_gradient(w, h, z)
        one = (jnp.asarray(h), jnp.asarray(w @ h), jnp.asarray(y), jnp.asarray(z))
        close(single_token_kernel(*one), pair_of(g_w.ravel(), g_l.ravel()))
        rise = single_token_rise(*one)
        close(rise, ((g_w - g_l) * g_w).sum())
        assert rise >= 0
        p = softmax(w @ h)
        negative = bool(single_token_kernel(*one).inner < 0)
        assert negative == (p[y] + p[z] > (p * p).sum())
        signs.add(negative)
    assert spread < 1 or signs == {True, False}  # mass on third tokens makes the gradients agree


def test_chosen_can_fall_once_an_assumption_goes():
    """Trained features, different contexts, or unequal weights: each alone lets the chosen fall."""
    rng = np.random.default_rng(6)
    free = apart = unequal = 0
    for w, h, (y, z) in single_tokens(rng, 200, 2.0):
        other = rng.normal(size=4)
        g_w, g_l, g_other = (unembedding_gradient(w, *at) for at in ((h, y), (h, z), (other, z)))

        def in_state(h, token, w=w):
            return w[token] - softmax(w @ h) @ w

        assert ((g_w - g_l) * g_w).sum() >= 0
        free += ((g_w - g_l) * g_w).sum() + in_state(h, y) @ (in_state(h, y) - in_state(h, z)) < 0
        apart += ((g_w - g_other) * g_w).sum() < 0
        unequal += ((0.2 * g_w - g_l) * g_w).sum() < 0
    assert min(free, apart, unequal) > 0


def test_differing_last_token_rises_but_its_response_may_fall():
    """The chosen's earlier tokens are the rejected token: pushing that down costs more than the
    last one gains."""
    rng = np.random.default_rng(7)
    w = rng.normal(size=(7, 4))
    common = rng.normal(size=4)
    hidden = common + 0.1 * rng.normal(size=(4, 4))
    last, fell = 3, 0
    for chosen, rejected in ((2, 5), (5, 2), (0, 6)):
        pulls = [unembedding_gradient(w, hidden[last], token) for token in (chosen, rejected)]
        before = sum(unembedding_gradient(w, hidden[k], rejected) for k in range(last))
        step = pulls[0] - pulls[1]
        at = (
            jnp.asarray(hidden[last]),
            jnp.asarray(w @ hidden[last]),
            jnp.asarray(chosen),
            jnp.asarray(rejected),
        )
        close(single_token_rise(*at), (pulls[0] * step).sum())
        fell += ((before + pulls[0]) * step).sum() < 0
    assert fell > 0


@pytest.mark.parametrize("create", [linear_softmax, unconstrained_features])
def test_linear_softmax_kernel_is_the_heads_and_unconstrained_is_not(create):
    """All gradient of a linear softmax is in W; trained features add to it."""
    apply, theta = create(SHARED, VOCAB, 8, dtype="float64")
    batch = padded(SHARED)
    total = shared_parts(responses(apply, theta, batch), batch).total
    bound = bind(apply, theta)

    def logp(trained):
        return responses(apply, bound.whole(trained), batch).logp

    for name, value in kernel_of_rows(jax.jit(logp), bound.trained).items():
        np.testing.assert_array_equal(
            np.isclose(getattr(total, name), value, rtol=1e-10), create is linear_softmax
        )


@pytest.mark.parametrize("certainty", [5.0, 14.0, 25.0])
def test_certain_tokens_keep_their_gradient_in_float32(certainty):
    """1 - π_y must not cancel: a token of probability 1 - 1e-11 still has a direction."""
    logits = np.random.default_rng(4).normal(size=50)
    logits[3] += certainty
    arguments = (jnp.array([3]), jnp.array([7]))
    exact = single_token_kernel(jnp.ones((1, 2)), jnp.asarray(logits)[None], *arguments)
    rough = single_token_kernel(
        jnp.ones((1, 2), jnp.float32), jnp.asarray(logits, jnp.float32)[None], *arguments
    )
    for x, y in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
