"""The pair kernel against gradients taken one response at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import MODELS, PAIRS, TRANSFORMERS, close, force, model

from simgrad import tree
from simgrad.models import only
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import PairKernel, first_order, head_kernel, pair_kernel, responses
from simgrad.theory.kernel import pair_kernel_blocks
from simgrad.theory.kernel.gram import gradients
from simgrad.theory.kernel.rules import between_sides, between_tokens, outer_products
from simgrad.theory.kernel.signals import collect


def oracle(apply, theta, pairs, keep=lambda name: True):
    rows = []
    for pair in pairs:
        w, l = (  # noqa: E741
            reference.gradient(apply, theta, pair.prompt, r) for r in (pair.chosen, pair.rejected)
        )
        rows.append(
            [reference.dot(w, w, keep), reference.dot(w, l, keep), reference.dot(l, l, keep)]
        )
    return PairKernel(*jnp.array(rows).T)


@pytest.mark.parametrize("kind", MODELS)
def test_every_method_agrees_with_two_gradients(kind):
    apply, theta = model(kind)
    trainable = (
        (lambda name: not name.startswith("features")) if apply.trainable else (lambda name: True)
    )
    expected = oracle(apply, theta, PAIRS, trainable)
    close(pair_kernel(apply, theta, packed(PAIRS), method="plain"), expected)
    if kind in TRANSFORMERS:
        for method, layout in itertools.product(("ghost", "explicit"), (padded, packed)):
            close(pair_kernel(apply, theta, layout(PAIRS), method=method), expected)
    if kind in ("plain", "linear_softmax", "unconstrained_features"):
        close(pair_kernel(apply, theta, padded(PAIRS), method="plain"), expected)
        close(pair_kernel(apply, theta, padded(PAIRS)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_low_precision_stays_close_to_float64(kind, dtype):
    apply, theta = model(kind, dtype)
    exact, _ = model(kind)
    expected = pair_kernel(
        exact, jax.tree.map(lambda x: x.astype(jnp.float64), theta), padded(PAIRS)
    )
    got = pair_kernel(apply, theta, padded(PAIRS))
    assert got.inner.dtype == jnp.float32
    close(got, expected, dtype)
    if (
        kind == "rope_mqa_gated_tied"
    ):  # where the prompt is shared, low precision has a way of its own
        close(pair_kernel(apply, theta, packed(PAIRS), method="ghost"), expected, dtype)


@pytest.mark.parametrize("method", ["plain", "ghost", "explicit"])
@pytest.mark.parametrize("kind", ["tied_layernorm_biases", "rope_gqa_head_dim"])
def test_blocks_sum_to_the_whole_and_match_the_oracle(kind, method):
    apply, theta = model(kind)
    blocks = pair_kernel_blocks(apply, theta, padded(PAIRS), method=method)
    whole_scale = oracle(apply, theta, PAIRS)
    assert list(blocks) == tree.names(theta)
    for name, block in blocks.items():
        assert block.inner.shape == (
            (len(PAIRS), 2) if name.startswith("layers/") else (len(PAIRS),)
        )
        whole = jax.tree.map(lambda x: x.reshape(len(PAIRS), -1).sum(-1), block)
        expected = oracle(apply, theta, PAIRS, lambda n, name=name: n == name)
        for got, want, scale in zip(
            *map(jax.tree.leaves, (whole, expected, whole_scale)), strict=True
        ):
            # a key bias shifts all scores of a query alike, so its gradient is zero: compare with
            # the whole
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14 * np.abs(scale).max())
    total = [b.inner.reshape(len(PAIRS), -1).sum(-1) for b in blocks.values()]
    close(sum(total), pair_kernel(apply, theta, padded(PAIRS)).inner)


def test_repeated_tokens_need_the_cross_term_of_a_tied_table():
    """The tied table's kernel is more than lookup plus readout when a response repeats prompt
    tokens."""
    pairs = [Pair([4, 4, 4], [4, 4], [4, 5])]
    tied, theta = model("rope_mqa_gated_tied", pairs=pairs)
    untied, _ = model("rope_mqa_gated_tied", pairs=pairs, tied=False)
    table = pair_kernel_blocks(only(tied, "embedding/*"), theta, padded(pairs))["embedding/table"]
    apart = pair_kernel_blocks(untied, theta | {"unembedding": theta["embedding"]}, padded(pairs))
    without_cross = apart["embedding/table"].inner + apart["unembedding/table"].inner
    close(table.inner, oracle(tied, theta, pairs, lambda n: n.startswith("embedding")).inner)
    once = pair_kernel_blocks(only(tied, "embedding/*"), theta, packed(pairs), "ghost")[
        "embedding/table"
    ]
    close(once, table)
    assert np.abs(table.inner / without_cross - 1).max() > 1e-2


REPEATED = [Pair([4, 4, 4], [4, 4], [4, 5]), Pair([4, 5, 4], [5, 4, 4], [4])]
"""Tokens looked up, predicted, or both, several times; rows and positions that are padded."""


def tied_table(g):
    """A gradient's entries in the tied embedding table."""
    return np.asarray(g["embedding"]["table"], np.float64).ravel()


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("ghost", [True, False, None])
def test_a_tied_table_with_repeated_tokens_between_sides(layout, ghost):
    """Lookup and readout of one table: both squares and both cross terms, by either route."""
    apply, theta = model("rope_mqa_gated_tied", pairs=REPEATED)
    apply = only(apply, "embedding/*")
    batch = layout(REPEATED, length=11, rows=5)
    found, _ = collect(apply, theta, batch, lambda g: between_sides(g, ghost))
    assert list(found) == ["embedding/table"]
    close(found["embedding/table"], oracle(apply, theta, REPEATED, lambda n: "embedding" in n))


def test_a_tied_table_with_repeated_tokens_between_tokens():
    """A token's gradient is that of the response up to it minus that up to the one before."""
    apply, theta = model("rope_mqa_gated_tied", pairs=REPEATED)
    apply = only(apply, "embedding/*")
    for pair in REPEATED:
        rows = np.zeros((2, 4, theta["embedding"]["table"].size))
        for s, response in enumerate((pair.chosen, pair.rejected)):
            whole = [
                tied_table(reference.gradient(apply, theta, pair.prompt, response[:k]))
                for k in range(1, len(response) + 1)
            ]
            rows[s, : len(response)] = np.diff([np.zeros_like(whole[0]), *whole], axis=0)
        batch = padded([pair], length=8, rows=4)
        found, _ = collect(apply, theta, batch, between_tokens, jnp.arange(4))
        expected = np.einsum("skp,ujp->skuj", rows, rows)
        close(found["embedding/table"], expected)
        some, _ = collect(apply, theta, batch, between_tokens, jnp.array([1, 0]))
        close(some["embedding/table"], expected[:, [1, 0]][..., [1, 0]])


def test_matrix_holds_the_three_numbers_and_gives_the_three_number_formula():
    """K c against d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩ and d_w ⟨g_w,g_l⟩ - d_l ‖g_l‖², any signs."""
    rng = np.random.default_rng(0)
    w, l = rng.normal(size=(2, 4, 50, 3)) * rng.lognormal(size=(2, 4, 50, 1))  # noqa: E741
    a, b, c = (w * w).sum(-1), (w * l).sum(-1), (l * l).sum(-1)
    kernel = PairKernel(*map(jnp.asarray, (a, b, c)))
    both = np.stack([w, l], -2)
    np.testing.assert_allclose(kernel.matrix, both @ both.swapaxes(-1, -2), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(kernel.matrix, kernel.matrix.swapaxes(-1, -2))
    d_w, d_l = rng.normal(size=(2, 4, 50))
    got = np.asarray(first_order(kernel, force(jnp.asarray(d_w), jnp.asarray(d_l)), 0.3))
    for side, (x, y) in enumerate(((a, b), (b, c))):
        size = np.abs(d_w * x) + np.abs(d_l * y)  # of what is subtracted
        assert (np.abs(got[..., side] - 0.3 * (d_w * x - d_l * y)) <= 1e-12 * size).all()


def test_subsets_and_frozen_parameters():
    batch = padded(PAIRS)
    apply, theta = model("plain")
    attention = pair_kernel(only(apply, "layers/attention/*"), theta, batch)
    close(attention, oracle(apply, theta, PAIRS, lambda n: n.startswith("layers/attention/")))
    frozen = only(apply, "!embedding/*", "!positions/*", "!layers/*")
    kept = oracle(apply, theta, PAIRS, lambda n: n.startswith(("final_norm", "unembedding")))
    close(pair_kernel(frozen, theta, batch), kept)
    close(pair_kernel(frozen, theta, batch, method="plain"), kept)


@pytest.mark.parametrize("kind", MODELS)
def test_symmetric_positive_and_swapped_with_the_responses(kind):
    apply, theta = model(kind)
    kernel = pair_kernel(apply, theta, padded(PAIRS))
    assert (kernel.inner**2 <= kernel.sq_chosen * kernel.sq_rejected * (1 + 1e-12)).all()
    assert (np.abs(kernel.cosine) <= 1 + 1e-12).all()
    swapped = pair_kernel(
        apply, theta, padded([Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS])
    )
    close(PairKernel(swapped.sq_rejected, swapped.inner, swapped.sq_chosen), kernel)


@pytest.mark.parametrize("kind", ["plain", "rope_mqa_gated_tied"])
def test_invariant_to_padding_and_batch_order(kind):
    apply, theta = model(kind)
    kernel = pair_kernel(apply, theta, padded(PAIRS))
    close(pair_kernel(apply, theta, padded(PAIRS, length=27, rows=11)), kernel)
    close(pair_kernel(apply, theta, packed(PAIRS, length=29, rows=11)), kernel)
    backwards = pair_kernel(apply, theta, padded(PAIRS[::-1]))
    close(jax.tree.map(lambda x: x[::-1], backwards), kernel)


@pytest.mark.parametrize("kind", [*TRANSFORMERS, "linear_softmax"])
def test_head_kernel_is_the_kernel_of_the_unembedding(kind):
    """Σ ⟨h_k,h'_k'⟩⟨e-π, e'-π'⟩ from the forward pass equals the unembedding's kernel by
    differentiation."""
    apply, theta = model(kind)
    head = head_kernel(responses(apply, theta, packed(PAIRS)), packed(PAIRS))
    expected = []
    for pair in PAIRS:
        w, l = (  # noqa: E741  # noqa: E741
            reference.head_gradient(*reference.sequence(apply, theta, pair.prompt, r)[1:3], r)
            for r in (pair.chosen, pair.rejected)
        )
        expected.append([(w * w).sum(), (w * l).sum(), (l * l).sum()])
    close(head, PairKernel(*jnp.array(expected).T))
    if kind == "linear_softmax":  # features frozen: the head is all there is
        close(pair_kernel(apply, theta, packed(PAIRS)), head)
    elif "unembedding" in theta:
        close(pair_kernel(only(apply, "unembedding/*"), theta, padded(PAIRS)), head)


def test_head_kernel_is_not_the_whole_once_features_learn():
    apply, theta = model("unconstrained_features")
    head = head_kernel(responses(apply, theta, packed(PAIRS)), packed(PAIRS))
    whole = pair_kernel(apply, theta, packed(PAIRS))
    assert (np.abs(head.inner / whole.inner - 1) > 1e-3).all()


@pytest.mark.parametrize("shape", [(3, 2, 5, 4, 7), (2, 2, 40, 3, 3)])
def test_outer_products_by_both_routes(shape):
    b, s, t, i, o = shape
    a, e = (
        jax.random.normal(jax.random.key(0), (b, s, t, i)),
        jax.random.normal(jax.random.key(1), (b, s, t, o)),
    )
    explicit = gradients(jnp.einsum("bxti,bxto->bxio", a, e))
    for ghost in (True, False, None):
        close(outer_products(a, e, ghost=ghost)[0], explicit)
    shared = jnp.broadcast_to(a[:, :1], a.shape)
    explicit = [gradients(jnp.einsum("bxti,bxto->bxio", shared, x)) for x in (e, e[..., :2])]
    for ghost in (True, False, None):
        close(outer_products(a[:, :1], e, e[..., :2], ghost=ghost), explicit)


def test_errors_name_the_remedy():
    apply, theta = model("plain")
    with pytest.raises(
        ValueError, match=r"no parameter matches 'attn\*'; there are: embedding/table"
    ):
        pair_kernel(only(apply, "attn*"), theta, padded(PAIRS))
    with pytest.raises(ValueError, match="no parameter is left"):
        pair_kernel(only(apply, "!*"), theta, padded(PAIRS))
    with pytest.raises(ValueError, match="method 'plain' only"):
        pair_kernel(*model("linear_softmax"), padded(PAIRS), method="ghost")
