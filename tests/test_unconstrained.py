"""Unconstrained features under gradient flow: every closed form against autodiff, and against what it assumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, close, model

from simgrad.pairs import Pair, packed, padded
from simgrad.theory import ches, ideal_range, responses
from simgrad.theory.unconstrained import (
    TokenStates,
    contributions,
    different_first_tokens_rate,
    flow_inner,
    flow_kernel,
    mass_direction,
    mass_rates,
    sft_rate,
    single_token_rate,
    token_states,
    unconstrained_kernel,
)

WIDTH, TOKENS, CONTEXTS = 5, 8, 12
BETA = 0.3


def parameters(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(scale * rng.normal(size=(TOKENS, WIDTH))),
        "h": jnp.asarray(rng.normal(size=(CONTEXTS, WIDTH))),
    }


def log_prob(theta, contexts, tokens):
    """log π of a response, as one loop over its tokens."""
    total = 0.0
    for s, y in zip(contexts, tokens, strict=True):
        total = total + jax.nn.log_softmax(theta["w"] @ theta["h"][s])[y]
    return total


gradient = jax.jit(jax.grad(log_prob))


def dot(a, b, keep=("w", "h")):
    return sum(float((np.asarray(a[k]) * np.asarray(b[k])).sum()) for k in keep)


@jax.jit
def minus_dpo_gradient(theta, chosen, rejected):
    """-∇L of DPO on one pair against a reference margin, and c = β σ(-β m)."""

    def loss(theta):
        margin = log_prob(theta, *chosen) - log_prob(theta, *rejected) - 0.7
        return -jax.nn.log_sigmoid(BETA * margin), BETA * jax.nn.sigmoid(-BETA * margin)

    g, c = jax.grad(loss, has_aux=True)(theta)
    return jax.tree.map(jnp.negative, g), c


@jax.jit
def states(theta, contexts, tokens):
    """TokenStates of a response, right-padded with NaN."""
    n, length = len(tokens), 5
    contexts, tokens = (jnp.array([*x, *[0] * (length - n)]) for x in (contexts, tokens))
    valid = jnp.arange(length) < n
    hidden = jnp.where(valid[:, None], theta["h"][contexts], jnp.nan)
    return token_states(theta["w"], hidden, tokens, contexts, valid)


def index(*tokens):
    return [jnp.asarray(t) for t in tokens]


# responses as (contexts, tokens); the contexts of a pair coincide as far as its tokens do
DIFFERENT_FIRST = ((0, 1, 2), (3, 4, 1)), ((0, 3), (5, 4))
SHARED_PREFIX = ((0, 1, 2, 4), (3, 4, 1, 7)), ((0, 1, 3), (3, 5, 7))
ONE_BEGINS_THE_OTHER = ((0, 1), (3, 4)), ((0, 1, 2), (3, 4, 6))
OTHER_PROMPT = ((7, 8), (3, 1)), ((7, 9, 10), (2, 2, 0))
SINGLE = ((0,), (3,)), ((0,), (5,))
ALL = [DIFFERENT_FIRST, SHARED_PREFIX, ONE_BEGINS_THE_OTHER, OTHER_PROMPT, SINGLE]


@pytest.mark.parametrize("seed", range(4))
def test_single_token_flow(seed):
    """The four parts add up to -⟨∇ log π⁺, ∇L⟩ / c, and exchanged roles give the rejected's."""
    theta, (chosen, rejected) = parameters(seed), SINGLE
    direction, c = minus_dpo_gradient(theta, chosen, rejected)
    rate = single_token_rate(theta["w"], theta["h"][0], *index(3, 5))
    close(c * rate.total, dot(gradient(theta, *chosen), direction))
    other = single_token_rate(theta["w"], theta["h"][0], *index(5, 3))
    close(-c * other.total, dot(gradient(theta, *rejected), direction))
    close(c * rate.state, dot(gradient(theta, *chosen), direction, keep="w"))
    assert min(rate.norms, rate.state) >= 0


def test_parts_of_the_single_token_flow():
    """Each named part against its formula, written out in loops."""
    theta = parameters(11)
    w, h = np.asarray(theta["w"]), np.asarray(theta["h"][0])
    p = np.exp(w @ h) / np.exp(w @ h).sum()
    rate = single_token_rate(theta["w"], theta["h"][0], *index(3, 5))
    close(rate.norms, (1 - p[3]) * w[3] @ w[3] + p[5] * w[5] @ w[5])
    close(rate.alignment, -(1 - p[3] + p[5]) * w[3] @ w[5])
    close(rate.others, -sum(p[z] * w[z] @ (w[3] - w[5]) for z in range(TOKENS) if z not in (3, 5)))


def test_frozen_features_leave_only_the_state_term():
    """With W alone trained the chosen cannot fall; with features trained it does in some draws."""
    fell = 0
    for seed in range(30):
        theta, (chosen, rejected) = parameters(seed, 2.0), SINGLE
        direction, c = minus_dpo_gradient(theta, chosen, rejected)
        g = gradient(theta, *chosen)
        rate = single_token_rate(theta["w"], theta["h"][0], *index(3, 5))
        frozen, trained = dot(g, direction, keep="w"), dot(g, direction)
        close(c * rate.state, frozen)
        assert frozen >= 0
        assert not np.isclose(c * rate.total, frozen, rtol=1e-3)
        fell += trained < 0
    assert fell > 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 1.3), (-0.2, 0.5)])
def test_where_the_mass_goes(weights):
    """d/dt log π(z) of every token, for any weights."""
    theta, (chosen, rejected) = parameters(5), SINGLE
    g_w, g_l = gradient(theta, *chosen), gradient(theta, *rejected)
    direction = jax.tree.map(lambda a, b: weights[0] * a - weights[1] * b, g_w, g_l)
    rates = mass_rates(theta["w"], theta["h"][0], *index(3, 5), *weights)
    close(rates, np.array([dot(gradient(theta, (0,), (z,)), direction) for z in range(TOKENS)]))
    probs = np.asarray(jax.nn.softmax(theta["w"] @ theta["h"][0]))
    np.testing.assert_allclose(probs @ np.asarray(rates), 0.0, atol=1e-12)  # mass is only moved


def order(x, keep):
    return [z for z in np.argsort(np.asarray(x)) if z in keep]


def test_mass_is_ranked_by_the_direction_outside_the_pair():
    """The order of all tokens but the pair; it fails for the pair, for unequal weights, and for frozen features."""
    pair_breaks = weights_break = frozen_breaks = 0
    for seed in range(20):
        theta = parameters(seed, 0.7)
        at = (theta["w"], 3 * theta["h"][0], *index(3, 5))
        score, rates = mass_direction(theta["w"], *index(3, 5)), mass_rates(*at)
        outside = set(range(TOKENS)) - {3, 5}
        assert order(score, outside) == order(rates, outside)
        differences = np.diff(np.asarray(rates)[list(outside)])
        close(differences, np.diff(np.asarray(score)[list(outside)]))
        pair_breaks += order(score, range(TOKENS)) != order(rates, range(TOKENS))
        weights_break += order(score, outside) != order(mass_rates(*at, 0.2, 1.0), outside)
        h = np.asarray(at[1])
        logits = np.asarray(theta["w"]) @ h
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        frozen = (h @ h) * (np.eye(TOKENS) - p) @ (np.eye(TOKENS)[3] - np.eye(TOKENS)[5])
        frozen_breaks += np.ptp(frozen[list(outside)]) < 1e-12 * np.abs(frozen).max()  # no order at all
    assert min(pair_breaks, weights_break) > 0
    assert frozen_breaks == 20


jitted_inner = jax.jit(flow_inner)


@pytest.mark.parametrize("a", range(len(ALL)))
def test_inner_products_of_any_two_responses(a):
    """Both parts of ⟨∇ log π(y), ∇ log π(y')⟩: shared prefixes, other prompts, padding that holds NaN."""
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
    kernel = flow_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
    close(c * (kernel.sq_chosen - kernel.inner), dot(gradient(theta, *chosen), direction))
    close(c * (kernel.inner - kernel.sq_rejected), dot(gradient(theta, *rejected), direction))


def test_single_token_flow_is_a_special_case():
    theta, (chosen, rejected) = parameters(4), SINGLE
    kernel = flow_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
    close(-kernel.gap, single_token_rate(theta["w"], theta["h"][0], *index(3, 5)).total)
    for z, rate in enumerate(mass_rates(theta["w"], theta["h"][0], *index(3, 5))):
        v = states(theta, (0,), (z,))
        inner = [flow_inner(theta["w"], v, states(theta, *y)).total for y in SINGLE]
        close(inner[0] - inner[1], rate)


def test_different_first_tokens():
    """The four parts against autodiff; a shared first token breaks the formula, not the general kernel."""
    theta = parameters(6)
    for pair, holds in ((DIFFERENT_FIRST, True), (OTHER_PROMPT, True), (SINGLE, True), (SHARED_PREFIX, False)):
        chosen, rejected = pair
        direction, c = minus_dpo_gradient(theta, chosen, rejected)
        flow = dot(gradient(theta, *chosen), direction) / float(c)
        plus, minus = states(theta, *chosen), states(theta, *rejected)
        rate = different_first_tokens_rate(theta["w"], plus, minus, *index(chosen[1][0], rejected[1][0]))
        close(-flow_kernel(theta["w"], plus, minus).gap, flow)
        assert bool(np.isclose(rate.total, flow, rtol=1e-10)) == holds
        assert min(rate.norms, rate.own) >= 0
        w, h = (np.asarray(theta[k]) for k in "wh")
        p = [np.exp(w @ h[s]) / np.exp(w @ h[s]).sum() for s in chosen[0]]
        first = single_token_rate(theta["w"], theta["h"][chosen[0][0]], *index(chosen[1][0], rejected[1][0]))
        later = sum(np.square(w[y] - q @ w).sum() for q, y in zip(p[1:], chosen[1][1:], strict=True))
        close(rate.norms, first.norms + later)
        close(rate.first, first.alignment + first.others)
        close(rate.own, dot(gradient(theta, *chosen), gradient(theta, *chosen), keep="w"))


def test_error_products_are_at_most_two():
    """α = ⟨e - π, e' - π'⟩ ∈ [-2, 2], and the bounds are reached."""
    theta = parameters(7, 30.0)
    every = token_states(
        theta["w"], jnp.repeat(theta["h"], TOKENS, 0), jnp.tile(jnp.arange(TOKENS), CONTEXTS), jnp.arange(96)
    )
    alpha = np.asarray(every.error) @ np.asarray(every.error).T
    assert np.abs(alpha).max() <= 2 + 1e-12
    assert alpha.max() > 1.99
    assert alpha.min() < -1.99


def test_ches_is_the_unembeddings_gap_with_every_alpha_one():
    pairs = [Pair([1, 5], [7, 2, 4], [8, 9]), Pair([3], [6, 6], [6, 7, 7])]
    apply, theta = model("unconstrained_features", pairs=pairs)
    batch = padded(pairs)
    result = responses(apply, theta, batch)
    w = theta["unembedding"]["table"]
    unit = jnp.broadcast_to(jnp.eye(VOCAB)[0], (*batch.targets.shape, VOCAB))
    error = jnp.where(batch.valid[..., None], unit, 0.0)
    context = jnp.arange(6).reshape(2, 3)
    for i in range(2):
        plus, minus = (TokenStates(context[s], result.hidden[i, s], error[i, s]) for s in range(2))
        gap = flow_inner(w, plus, minus).unembedding - flow_inner(w, plus, plus).unembedding
        close(gap, ches(result, batch)[i])
        rate = different_first_tokens_rate(w, plus, minus, *batch.targets[i, :, 0])
        close(-(rate.own + rate.cross), ches(result, batch)[i])


MIXED = [
    Pair([1, 5], [7, 2, 4], [8, 9]),
    Pair([3], [6, 6, 2, 2], [6, 6, 7]),
    Pair([4], [5, 3], [5, 3, 9]),
    Pair([2, 2, 2], [9], [5]),
]


@pytest.mark.parametrize(
    ("kind", "layout", "exact"),
    [("unconstrained_features", padded, True), ("unconstrained_features", packed, True), ("plain", padded, False)],
)
def test_kernel_of_a_batch_from_the_forward_pass(kind, layout, exact):
    """Exact for the library's unconstrained-features model with shared prefixes; a transformer breaks it."""
    apply, theta = model(kind, pairs=MIXED, depth=1)
    batch = layout(MIXED, rows=6)
    got = unconstrained_kernel(theta["unembedding"]["table"], responses(apply, theta, batch), batch)
    rows = jax.jacrev(lambda t: responses(apply, t, batch).logp)(theta)
    flat = np.concatenate([np.asarray(x).reshape(len(MIXED), 2, -1) for x in jax.tree.leaves(rows)], -1)
    for name, x, y in (("sq_chosen", 0, 0), ("inner", 0, 1), ("sq_rejected", 1, 1)):
        equal = np.isclose(getattr(got, name), (flat[:, x] * flat[:, y]).sum(-1), rtol=1e-10)
        np.testing.assert_array_equal(equal, exact)


def test_contributions_of_many_samples():
    """Each sample's share of d/dt log π; samples with another prompt have no part in the features."""
    theta, probe = parameters(8), SHARED_PREFIX[0]
    training = [r for pair in (SHARED_PREFIX, OTHER_PROMPT, DIFFERENT_FIRST) for r in pair]
    weights = np.array([0.3, -0.4, 0.7, -0.1, 0.2, -0.9])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(states(theta, *r) for r in training))
    got = contributions(theta["w"], states(theta, *probe), stacked, jnp.asarray(weights))
    g = gradient(theta, *probe)
    close(got.total, np.array([a * dot(g, gradient(theta, *r)) for a, r in zip(weights, training, strict=True)]))
    np.testing.assert_array_equal(np.asarray(got.features) != 0, [True, True, False, False, True, True])

    def loss(theta):
        return -sum(a * log_prob(theta, *r) for a, r in zip(weights, training, strict=True))

    close(got.total.sum(), -dot(g, jax.grad(loss)(theta)))


def test_sft_term_only_helps():
    """-λ log π⁺ beside the preference loss adds λ ‖∇ log π⁺‖² to the flow of log π⁺."""
    for seed, (chosen, rejected) in enumerate(ALL):
        theta = parameters(seed)
        g = gradient(theta, *chosen)
        direction, _ = minus_dpo_gradient(theta, chosen, rejected)
        both = jax.tree.map(lambda d, x: d + 0.25 * x, direction, g)
        kernel = flow_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
        close(sft_rate(kernel, 0.25), dot(g, both) - dot(g, direction))
        assert sft_rate(kernel, 0.25) > 0


def test_smallest_weight_ratio_that_keeps_the_chosen():
    """Just above it the chosen rises, just below it falls, along the actual direction."""
    for seed, (chosen, rejected) in enumerate(ALL):
        theta = parameters(seed)
        g_w, g_l = gradient(theta, *chosen), gradient(theta, *rejected)
        ratio = float(ideal_range(flow_kernel(theta["w"], *(states(theta, *r) for r in (chosen, rejected)))).lower)
        for factor, sign in ((1e-6, 1), (-1e-6, -1)):
            d_w = ratio + factor
            assert sign * dot(g_w, jax.tree.map(lambda a, b, d_w=d_w: d_w * a - b, g_w, g_l)) > 0
