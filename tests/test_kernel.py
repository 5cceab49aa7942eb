"""The pair kernel against gradients taken one response at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import MODELS, PAIRS, TRANSFORMERS, close, model

from simgrad import tree
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import PairKernel, head_kernel, pair_kernel, responses
from simgrad.theory.kernel import pair_kernel_blocks
from simgrad.theory.kernel.gram import gradients, outer_products


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
        (lambda name: not name.startswith("features")) if apply.frozen else (lambda name: True)
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
    """The tied table's kernel is more than lookup plus readout when a response repeats prompt tokens."""
    pairs = [Pair([4, 4, 4], [4, 4], [4, 5])]
    tied, theta = model("rope_mqa_gated_tied", pairs=pairs)
    untied, _ = model("rope_mqa_gated_tied", pairs=pairs, tied=False)
    table = pair_kernel_blocks(tied, theta, padded(pairs), ["embedding/*"])["embedding/table"]
    apart = pair_kernel_blocks(untied, theta | {"unembedding": theta["embedding"]}, padded(pairs))
    without_cross = apart["embedding/table"].inner + apart["unembedding/table"].inner
    close(table.inner, oracle(tied, theta, pairs, lambda n: n.startswith("embedding")).inner)
    once = pair_kernel_blocks(tied, theta, packed(pairs), ["embedding/*"], "ghost")[
        "embedding/table"
    ]
    close(once, table)
    assert np.abs(table.inner / without_cross - 1).max() > 1e-2


def test_subsets_and_frozen_parameters():
    batch = padded(PAIRS)
    apply, theta = model("plain")
    attention = pair_kernel(apply, theta, batch, ["layers/attention/*"])
    close(attention, oracle(apply, theta, PAIRS, lambda n: n.startswith("layers/attention/")))
    frozen, _ = model("plain", frozen=("embedding/*", "positions/*", "layers/*"))
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
    """Σ ⟨h_k,h'_k'⟩⟨e-π, e'-π'⟩ from the forward pass equals the unembedding's kernel by differentiation."""
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
        close(pair_kernel(apply, theta, padded(PAIRS), ["unembedding/*"]), head)


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
        pair_kernel(apply, theta, padded(PAIRS), ["attn*"])
    with pytest.raises(ValueError, match="no parameter is left"):
        frozen, _ = model("plain", frozen=("*",))
        pair_kernel(frozen, theta, padded(PAIRS))
    with pytest.raises(ValueError, match="method 'plain' only"):
        pair_kernel(*model("linear_softmax"), padded(PAIRS), method="ghost")
