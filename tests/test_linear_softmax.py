"""Frozen features: closed forms against autodiff, and against what they assume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import VOCAB, close, model

from simgrad import tree
from simgrad.models import linear_softmax, unconstrained_features
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import PairKernel, head_kernel, responses
from simgrad.theory.linear_softmax import (
    prediction_error,
    response_inner,
    shared_lengths,
    shared_parts,
    single_token_kernel,
    single_token_rise,
    token_products,
    with_shared_tokens,
)

RNG = np.random.default_rng(3)
SHARED = [
    Pair([1, 2], [5, 6, 7, 3, 4, 0], [5, 6, 8, 3, 4, 0]),  # prefix and suffix around one token
    Pair([3], [7, 5, 5, 0], [8, 5, 5, 0]),  # suffix only
    Pair([4, 1], [2, 9, 6], [2, 9, 10]),  # prefix only, the last token differs
    Pair([6], [7], [9]),  # one token
    Pair([2], [5, 5, 5], [5, 5]),  # one response begins the other
    Pair([8], [1, 2, 3, 4], [5, 6]),  # nothing shared
]


@jax.jit
def logp_and_gradient(w, h, y):
    """log π(y|φ) of a linear softmax and its gradient in W, by autodiff."""
    return jax.value_and_grad(lambda w: jax.nn.log_softmax(w @ h)[y])(w)


def gradient(w, h, y):
    return np.asarray(logp_and_gradient(w, h, y)[1])


def test_one_token_against_autodiff():
    """⟨∇_W log π(y|φ), ∇_W log π(y'|φ')⟩ = ⟨φ,φ'⟩⟨e_y - π, e_y' - π'⟩ for any two tokens and contexts."""
    w = RNG.normal(size=(7, 4))
    hidden, tokens = RNG.normal(size=(5, 4)), RNG.integers(0, 7, 5)
    g = np.stack([gradient(w, h, y) for h, y in zip(hidden, tokens, strict=True)])
    error = prediction_error(jnp.asarray(hidden @ w.T), jnp.asarray(tokens))
    h = jnp.asarray(hidden)
    close(token_products(h, error, h, error), np.einsum("kvd,mvd->km", g, g))
    close(response_inner(h[:2], error[:2], h[2:], error[2:]), (g[:2].sum(0) * g[2:].sum(0)).sum())


def test_padding_counts_for_nothing():
    logits, targets = jnp.asarray(RNG.normal(size=(2, 3, 5))), jnp.asarray(RNG.integers(0, 5, (2, 3)))
    valid = jnp.array([[True, True, False], [True, False, False]])
    error = prediction_error(logits.at[0, 2].set(jnp.nan), targets, valid)
    np.testing.assert_array_equal(np.abs(error).sum(-1) > 0, valid)


def pair_of(g_w, g_l):
    """The kernel of two gradients that are there as vectors."""
    return PairKernel(*(jnp.asarray(a @ b) for a, b in ((g_w, g_w), (g_w, g_l), (g_l, g_l))))


def single_tokens(draws, spread):
    """W, one state, its logits, and two different tokens, for each of several draws."""
    for _ in range(draws):
        w, h = spread * RNG.normal(size=(6, 4)), RNG.normal(size=4)
        yield w, h, RNG.choice(6, 2, replace=False)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_single_token_kernel_and_rise_against_autodiff(spread):
    signs = set()
    for w, h, (y, z) in single_tokens(20, spread):
        g_w, g_l = gradient(w, h, y), gradient(w, h, z)
        one = (jnp.asarray(h), jnp.asarray(w @ h), jnp.asarray(y), jnp.asarray(z))
        close(single_token_kernel(*one), pair_of(g_w.ravel(), g_l.ravel()))
        rise = single_token_rise(*one)
        close(rise, ((g_w - g_l) * g_w).sum())
        assert rise >= 0
        p = np.exp(w @ h) / np.exp(w @ h).sum()
        negative = bool(single_token_kernel(*one).inner < 0)
        assert negative == (p[y] + p[z] > (p * p).sum())
        signs.add(negative)
    assert spread < 1 or signs == {True, False}  # mass on third tokens makes the gradients agree


def test_chosen_can_fall_once_an_assumption_goes():
    """Trained features, different contexts, or unequal weights: each alone lets the chosen fall."""
    free = apart = unequal = 0
    for w, h, (y, z) in single_tokens(200, 2.0):
        other = RNG.normal(size=4)
        g_w, g_l, g_other = gradient(w, h, y), gradient(w, h, z), gradient(w, other, z)

        def in_state(h, token, w=w):
            p = np.exp(w @ h) / np.exp(w @ h).sum()
            return w[token] - p @ w

        assert ((g_w - g_l) * g_w).sum() >= 0
        free += ((g_w - g_l) * g_w).sum() + in_state(h, y) @ (in_state(h, y) - in_state(h, z)) < 0
        apart += ((g_w - g_other) * g_w).sum() < 0
        unequal += ((0.2 * g_w - g_l) * g_w).sum() < 0
    assert min(free, apart, unequal) > 0


def test_shared_lengths():
    lengths = shared_lengths(padded(SHARED, rows=9))
    assert lengths.prefix.tolist() == [2, 0, 2, 0, 2, 0]
    assert lengths.suffix.tolist() == [3, 3, 0, 0, 0, 0]


@pytest.mark.parametrize(("kind", "layout"), [("linear_softmax", padded), ("rope_mqa_gated_tied", packed)])
def test_parts_against_explicit_gradients(kind, layout):
    """Each part is an inner product of the V x D gradients of the tokens it names."""
    apply, theta = model(kind, pairs=SHARED, depth=1)
    batch = layout(SHARED, rows=7)
    result = responses(apply, theta, batch)
    parts, lengths = shared_parts(result, batch), shared_lengths(batch)
    close(parts.total, head_kernel(result, batch))
    for i, pair in enumerate(SHARED):
        n, s = int(lengths.prefix[i]), int(lengths.suffix[i])
        blocks = []
        for response in (pair.chosen, pair.rejected):
            logits, states = (np.asarray(x)[i, len(blocks), : len(response)] for x in (result.logits, result.hidden))
            cut = (slice(0, n), slice(n, len(response) - s), slice(len(response) - s, None))
            blocks.append([reference.head_gradient(logits[c], states[c], response[c]) for c in cut])
        for name, x, y in (("sq_chosen", 0, 0), ("inner", 0, 1), ("sq_rejected", 1, 1)):
            table = np.array([[(a * b).sum() for b in blocks[y]] for a in blocks[x]])
            expected = {"prefix": table[0, 0], "contrast": table[1, 1], "suffix": table[2, 2]}
            expected["cross"] = table.sum() - np.trace(table)
            for part, value in expected.items():
                got = getattr(getattr(parts, part), name)[i]
                np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-9, err_msg=f"{i} {part} {name}")


def test_shared_prefix_is_one_square_and_a_suffix_is_not():
    """The prefix has cosine 1 and gap 0 whatever the weights; different states break that for a suffix."""
    apply, theta = model("linear_softmax", pairs=SHARED)
    batch = padded(SHARED)
    parts = shared_parts(responses(apply, theta, batch), batch)
    prefix = parts.prefix
    close(prefix.gap, np.zeros(6), scale=1e288)
    close(prefix.sq_rejected, prefix.sq_chosen)
    np.testing.assert_array_equal(np.asarray(prefix.inner) > 0, np.asarray(shared_lengths(batch).prefix) > 0)
    assert (np.abs(parts.suffix.cosine[:2]) < 0.999).all()
    assert (np.abs(parts.suffix.gap[:2]) > 1e-3).all()


def test_contrast_of_one_last_token():
    """⟨·,·⟩ = ‖h‖²(‖π‖² - π_w - π_l) where nothing follows the differing token, with or without a prefix."""
    apply, theta = model("linear_softmax", pairs=SHARED)
    batch = padded(SHARED)
    result = responses(apply, theta, batch)
    contrast = shared_parts(result, batch).contrast
    for i, row in ((2, 2), (3, 0)):
        expected = single_token_kernel(
            result.hidden[i, 0, row], result.logits[i, 0, row], batch.targets[i, 0, row], batch.targets[i, 1, row]
        )
        close(jax.tree.map(lambda x, i=i: x[i], contrast), expected)


def test_differing_last_token_rises_but_its_response_may_fall():
    """The chosen's earlier tokens are the rejected token: pushing that down costs more than the last one gains."""
    w = RNG.normal(size=(7, 4))
    common = RNG.normal(size=4)
    hidden = common + 0.1 * RNG.normal(size=(4, 4))
    last, fell = 3, 0
    for chosen, rejected in ((2, 5), (5, 2), (0, 6)):
        pulls = gradient(w, hidden[last], chosen), gradient(w, hidden[last], rejected)
        before = sum(gradient(w, hidden[k], rejected) for k in range(last))
        step = pulls[0] - pulls[1]
        at = (jnp.asarray(hidden[last]), jnp.asarray(w @ hidden[last]), jnp.asarray(chosen), jnp.asarray(rejected))
        close(single_token_rise(*at), (pulls[0] * step).sum())
        fell += ((before + pulls[0]) * step).sum() < 0
    assert fell > 0


@pytest.mark.parametrize("create", [linear_softmax, unconstrained_features])
def test_linear_softmax_kernel_is_the_heads_and_unconstrained_is_not(create):
    """All gradient of a linear softmax is in W; trained features add to it."""
    apply, theta = create(SHARED, VOCAB, 8, dtype="float64")
    batch = padded(SHARED)
    total = shared_parts(responses(apply, theta, batch), batch).total
    trained, rest = tree.partition(theta, None, apply.frozen)
    rows = jax.jacrev(lambda t: responses(apply, tree.combine(t, rest), batch).logp)(trained)
    flat = np.concatenate([np.asarray(x).reshape(len(SHARED), 2, -1) for x in jax.tree.leaves(rows)], -1)
    for name, x, y in (("sq_chosen", 0, 0), ("inner", 0, 1), ("sq_rejected", 1, 1)):
        equal = np.isclose(getattr(total, name), (flat[:, x] * flat[:, y]).sum(-1), rtol=1e-10)
        np.testing.assert_array_equal(equal, create is linear_softmax)


@pytest.mark.parametrize("seed", range(5))
def test_cosine_grows_with_the_shared_prefix(seed):
    """Against vectors: orthogonal shared tokens of equal size; the gap stays as it was."""
    rng = np.random.default_rng(seed)
    w, l = rng.normal(size=(2, 3))  # noqa: E741
    l = l * np.linalg.norm(w) / np.linalg.norm(l)  # noqa: E741 — equal norms: ⟨g_w,g_l⟩ ≤ min(‖g_w‖², ‖g_l‖²)
    start, token = pair_of(w, l), PairKernel(*(jnp.array(0.7),) * 3)
    cosines = []
    for count in (0, 1, 2, 5, 20):
        shared = np.sqrt(0.7) * np.eye(30)[3 : 3 + count].sum(0)
        a, b = (np.pad(x, (0, 27)) + shared for x in (w, l))
        got = with_shared_tokens(start, token, count)
        close(got, pair_of(a, b))
        close(got.gap, start.gap)
        cosines.append(got.cosine.item())
    assert (np.diff(cosines) > 0).all()
    assert with_shared_tokens(start, token, 10**6).cosine.item() > 0.9999


def test_cosine_can_fall_with_the_shared_prefix():
    """A short chosen gradient nearly parallel to a long rejected one; or shared tokens that are not orthogonal."""
    start = PairKernel(jnp.array([1.0]), jnp.array([9.9]), jnp.array([100.0]))
    token = PairKernel(*(jnp.array([1.0]),) * 3)
    assert with_shared_tokens(start, token, 1).cosine < start.cosine
    w, l, shared = np.array([1.0, 0.1]), np.array([1.0, -0.1]), np.array([-1.0, 0.0])  # noqa: E741
    assert pair_of(w, l).cosine > 0.9
    assert pair_of(w + shared, l + shared).cosine < -0.9


def test_longer_suffix_in_the_model_raises_the_cosine():
    """One differing token before ever longer suffixes with similar states: the cosine climbs."""
    width, vocab, length = 64, 12, 12
    w = RNG.normal(size=(vocab, width)) / 8
    common = RNG.normal(size=(1 + length, width))
    h_w, h_l = (common + 0.1 * RNG.normal(size=common.shape) for _ in range(2))
    h_l[0] = h_w[0]  # one and the same context predicts the differing tokens
    suffix = RNG.integers(0, vocab, length)
    cosines = []
    for n in (0, 1, 3, 12):
        g_w, g_l = (
            sum(gradient(w, h[k], y) for k, y in enumerate([first, *suffix[:n]])) for h, first in ((h_w, 3), (h_l, 4))
        )
        h, other = jnp.asarray(h_w[: n + 1]), jnp.asarray(h_l[: n + 1])
        e, f = (prediction_error(x @ w.T, jnp.asarray([first, *suffix[:n]])) for x, first in ((h, 3), (other, 4)))
        kernel = PairKernel(
            response_inner(h, e, h, e), response_inner(h, e, other, f), response_inner(other, f, other, f)
        )
        close(kernel.inner, (g_w * g_l).sum())
        cosines.append(kernel.cosine.item())
    assert cosines[0] < 0 < 0.8 < cosines[-1]
    assert (np.diff(cosines) > 0).all()
