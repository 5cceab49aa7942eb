"""The token kernel: its sums, its columns, and weights on tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import PAIRS, VOCAB, close, force, model

import simgrad.theory.kernel.tokens as module
from simgrad.models import only
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import Regime, first_order, pair_kernel, regime, responses, token_kernel
from simgrad.theory.kernel import masked_change, masked_kernel, token_columns
from simgrad.theory.mitigation import masked_logp

KINDS = ["plain", "rope_mqa_gated_tied", "linear_softmax", "unconstrained_features"]


def kernel_of(apply, theta, batch):
    return np.asarray(token_kernel(apply, theta, batch))


@pytest.mark.parametrize("kind", ["plain", "unconstrained_features"])
def test_entries_are_inner_products_of_single_token_gradients(kind):
    """A token's gradient is that of its response minus that of the response without it."""
    apply, theta = model(kind)
    pair = PAIRS[0]
    rows = []
    for response in (pair.chosen, pair.rejected):
        whole = [
            reference.gradient(apply, theta, pair.prompt, response[:k])
            for k in range(1, len(response) + 1)
        ]
        before = [jax.tree.map(jnp.zeros_like, theta), *whole[:-1]]
        rows.append([jax.tree.map(jnp.subtract, g, h) for g, h in zip(whole, before, strict=True)])
    got = kernel_of(apply, theta, padded([pair]))[0]
    for s in range(2):
        for t in range(2):
            expected = np.array([[reference.dot(a, b) for b in rows[t]] for a in rows[s]])
            close(got[s, : len(rows[s]), t, : len(rows[t])], expected, scale=10)


@pytest.mark.parametrize(
    ("kind", "patterns"),
    [
        ("plain", []),
        ("tied_layernorm_biases", []),
        ("rope_mqa_gated_tied", []),
        ("rope_mqa_gated_tied", ["embedding/*"]),
        ("rope_mqa_gated_tied", ["layers/mlp/*"]),
        ("bare_embedding", []),
    ],
)
def test_both_methods_agree(kind, patterns):
    apply, theta = model(kind)
    apply = only(apply, *patterns)
    columns = token_kernel(apply, theta, padded(PAIRS), method="columns")
    close(token_kernel(apply, theta, padded(PAIRS), method="ghost"), columns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_stays_close_to_float64(dtype):
    apply, theta = model("rope_mqa_gated_tied", dtype)
    exact, _ = model("rope_mqa_gated_tied")
    expected = token_kernel(
        exact, jax.tree.map(lambda x: x.astype(jnp.float64), theta), padded(PAIRS)
    )
    got = token_kernel(apply, theta, padded(PAIRS))
    assert got.dtype == jnp.float32
    close(got, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_to_the_pair_kernel(kind):
    apply, theta = model(kind)
    tokens = kernel_of(apply, theta, padded(PAIRS)).sum((2, 4))
    pair = pair_kernel(apply, theta, padded(PAIRS))
    close(
        (tokens[:, 0, 0], tokens[:, 0, 1], tokens[:, 1, 1]),
        (pair.sq_chosen, pair.inner, pair.sq_rejected),
    )


def test_symmetric_positive_zero_where_padded_and_the_same_when_packed():
    apply, theta = model("plain")
    batch = padded(PAIRS)
    kernel = kernel_of(apply, theta, batch)
    b, _, r = batch.targets.shape
    matrix = kernel.reshape(b, 2 * r, 2 * r)
    close(matrix, matrix.swapaxes(1, 2))
    assert np.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.max()
    absent = ~np.asarray(batch.valid).reshape(b, 2 * r)
    assert not matrix[absent].any()
    assert matrix[~absent].any(-1).all()
    close(kernel_of(apply, theta, packed(PAIRS)), kernel, scale=10)


def test_columns_alone_are_the_columns_of_the_whole():
    apply, theta = model("rope_mqa_gated_tied")
    batch = padded(PAIRS)
    wanted = jnp.array([[[1, 0], [0, 1]]] * len(PAIRS))
    columns = token_columns(apply, theta, batch, wanted)
    whole = kernel_of(apply, theta, batch)
    close(columns, np.stack([whole[..., 1, 0], whole[..., 0, 1]], 1), scale=10)


def test_weights_on_tokens_give_the_kernel_of_weighted_log_probs():
    apply, theta = model("plain")
    batch = padded(PAIRS)
    weights = jnp.asarray(np.random.default_rng(0).uniform(size=batch.targets.shape))
    got = masked_kernel(token_kernel(apply, theta, batch), weights)
    for i, pair in enumerate(PAIRS):
        sides = []
        for s, response in enumerate((pair.chosen, pair.rejected)):
            ends = [
                reference.gradient(apply, theta, pair.prompt, response[:k])
                for k in range(1, len(response) + 1)
            ]
            a = np.append(np.asarray(weights)[i, s, : len(response)], 0.0)
            # summation by parts: Σ a_k (G_k - G_{k-1}) = Σ (a_k - a_{k+1}) G_k
            sides.append(
                jax.tree.map(
                    lambda *g, a=a: sum((a[k] - a[k + 1]) * x for k, x in enumerate(g)), *ends
                )
            )
        w, l = sides  # noqa: E741
        expected = [reference.dot(w, w), reference.dot(w, l), reference.dot(l, l)]
        close([x[i] for x in (got.sq_chosen, got.inner, got.sq_rejected)], expected)


def test_subsets_of_parameters():
    apply, theta = model("plain")
    part = only(apply, "unembedding/*")
    sums = kernel_of(part, theta, padded(PAIRS)).sum((2, 4))
    close(sums[:, 0, 1], pair_kernel(part, theta, padded(PAIRS)).inner)


def test_ghosts_need_two_sequences_and_a_transformer():
    apply, theta = model("plain")
    with pytest.raises(
        ValueError, match=r"needs a transformer and a padded batch \(pairs\.padded\)"
    ):
        token_kernel(apply, theta, packed(PAIRS), method="ghost")
    with pytest.raises(ValueError, match="use 'columns'"):
        token_kernel(*model("linear_softmax"), padded(PAIRS), method="ghost")


def test_less_memory_takes_more_parts_then_columns(monkeypatch):
    apply, theta = model("rope_mqa_gated_tied")
    taken = []
    ghost = module._ghost
    monkeypatch.setattr(module, "_ghost", lambda *args: taken.append(args[-1]) or ghost(*args))
    batch = padded(PAIRS[3:])
    roomy = token_kernel(apply, theta, batch)
    token = next(m for m in range(0, 10**6, 100) if module._chunk(apply, theta, batch, m) == 1) // 2
    for memory, parts in ((4 * token + 400, 3), (2 * token, 5)):
        close(token_kernel(apply, theta, batch, memory=memory), roomy)
        assert -(-5 // taken[-1]) == parts
    assert taken == [5, 2, 1]
    close(token_kernel(apply, theta, batch, memory=100), roomy)
    assert taken == [5, 2, 1]


def test_columns_of_tokens_that_are_not_there_are_refused():
    apply, theta = model("linear_softmax")
    for wanted in ([[2, 0]], [[0, 99]], [[1, -1]]):
        with pytest.raises(ValueError, match=r"no token \(side, index\) = "):
            token_columns(apply, theta, padded(PAIRS[:1]), jnp.array([wanted]))


@pytest.mark.optimised
def test_long_float32_pairs_keep_their_sums():
    """More than 65,536 numbers in a backward pass, where vmapped passes of a norm come out
    wrong."""
    draw = np.random.default_rng(0).integers
    pairs = [Pair(*(draw(0, VOCAB, n).tolist() for n in (100, 18, 18)))]
    apply, theta = model("plain", "float32", pairs, width=16, max_length=128)
    whole = pair_kernel(apply, theta, padded(pairs), method="plain")
    sums = np.asarray(token_kernel(apply, theta, padded(pairs))).sum((2, 4))[0]
    scale = float(jnp.maximum(whole.sq_chosen, whole.sq_rejected)[0])
    got, expected = (
        [sums[0, 0], sums[0, 1], sums[1, 1]],
        [float(x[0]) for x in jax.tree.leaves(whole)],
    )
    np.testing.assert_allclose(got, expected, atol=2e-5 * scale)


def test_masked_training_moves_whole_responses_as_predicted():
    """Remainder of second order; a pair whose mask looks ideal can lose its chosen response."""
    apply, theta = model("plain")
    batch = padded(PAIRS)
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=batch.targets.shape))
    c = force(*jnp.asarray(np.random.default_rng(2).uniform(0.5, 1, size=(2, len(PAIRS)))))
    change = masked_change(token_kernel(apply, theta, batch), weights, c)

    @jax.jit
    def moved(theta, one, a, c, rate):
        def loss(t):
            return -(c * masked_logp(responses(apply, t, one), a)).sum()

        gradient = jax.grad(loss)(theta)
        return responses(apply, jax.tree.map(lambda t, g: t - rate * g, theta, gradient), one).logp[
            0
        ]

    rates = np.geomspace(1e-5, 1e-3, 3)
    for i in (0, 3):
        one, a, own = jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, weights, c))
        start = moved(theta, one, a, own, 0.0)
        predicted = np.asarray(change[i])
        sizes = rates / np.abs(predicted).max()
        miss = [
            np.abs(np.asarray(moved(theta, one, a, own, r) - start) - r * predicted) for r in sizes
        ]
        np.testing.assert_allclose(np.polyfit(np.log(rates), np.log(miss), 1)[0], 2.0, atol=0.1)
    equal, nothing = force(jnp.ones(1), jnp.ones(1)), jnp.array([[[0.0], [1.0]]])
    blocks = jnp.ones((1, 2, 1, 2, 1))
    seen = first_order(masked_kernel(blocks, nothing), equal)
    assert int(regime(seen)[0]) == Regime.IDEAL
    assert masked_change(blocks, nothing, equal)[0, 0] < 0
