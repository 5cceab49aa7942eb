"""A shared prefix adds one and the same square to ‖g_w‖², ⟨g_w,g_l⟩ and ‖g_l‖²: the cosine grows,
the gap stays.

Counter-examples: a suffix has different states and moves the gap; a chosen gradient much shorter
than the rejected one, or shared tokens that are not orthogonal to the rest, let the cosine fall.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import close, model
from oracles import SHARED, pair_of, unembedding_gradient

from simgrad.pairs import packed, padded
from simgrad.theory import PairKernel, head_kernel, responses
from simgrad.theory.closed_forms.linear_softmax import (
    prediction_error,
    response_inner,
    shared_lengths,
    shared_parts,
    single_token_kernel,
    with_shared_tokens,
)


def test_shared_lengths():
    lengths = shared_lengths(padded(SHARED, rows=9))
    assert lengths.prefix.tolist() == [2, 0, 2, 0, 2, 0]
    assert lengths.suffix.tolist() == [3, 3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "layout"), [("linear_softmax", padded), ("rope_mqa_gated_tied", packed)]
)
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
            logits, states = (
                np.asarray(x)[i, len(blocks), : len(response)]
                for x in (result.logits, result.hidden)
            )
            cut = (slice(0, n), slice(n, len(response) - s), slice(len(response) - s, None))
            blocks.append([reference.head_gradient(logits[c], states[c], response[c]) for c in cut])
        for name, x, y in (("sq_chosen", 0, 0), ("inner", 0, 1), ("sq_rejected", 1, 1)):
            table = np.array([[(a * b).sum() for b in blocks[y]] for a in blocks[x]])
            expected = {"prefix": table[0, 0], "contrast": table[1, 1], "suffix": table[2, 2]}
            expected["cross"] = table.sum() - np.trace(table)
            for part, value in expected.items():
                got = getattr(getattr(parts, part), name)[i]
                np.testing.assert_allclose(
                    got, value, rtol=1e-9, atol=1e-9, err_msg=f"{i} {part} {name}"
                )


def test_shared_prefix_is_one_square_and_a_suffix_is_not():
    """The prefix has cosine 1 and gap 0 whatever the weights; different states break that for a
    suffix."""
    apply, theta = model("linear_softmax", pairs=SHARED)
    batch = padded(SHARED)
    parts = shared_parts(responses(apply, theta, batch), batch)
    prefix = parts.prefix
    close(prefix.gap, np.zeros(6), scale=1e288)
    close(prefix.sq_rejected, prefix.sq_chosen)
    np.testing.assert_array_equal(
        np.asarray(prefix.inner) > 0, np.asarray(shared_lengths(batch).prefix) > 0
    )
    assert (np.abs(parts.suffix.cosine[:2]) < 0.999).all()
    assert (np.abs(parts.suffix.gap[:2]) > 1e-3).all()


def test_contrast_of_one_last_token():
    """⟨·,·⟩ = ‖h‖²(‖π‖² - π_w - π_l) where nothing follows the differing token, with or without a
    prefix."""
    apply, theta = model("linear_softmax", pairs=SHARED)
    batch = padded(SHARED)
    result = responses(apply, theta, batch)
    contrast = shared_parts(result, batch).contrast
    for i, row in ((2, 2), (3, 0)):
        expected = single_token_kernel(
            result.hidden[i, 0, row],
            result.logits[i, 0, row],
            batch.targets[i, 0, row],
            batch.targets[i, 1, row],
        )
        close(jax.tree.map(lambda x, i=i: x[i], contrast), expected)


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
    """A short chosen gradient nearly parallel to a long rejected one; or shared tokens that are
    not orthogonal."""
    start = PairKernel(jnp.array([1.0]), jnp.array([9.9]), jnp.array([100.0]))
    token = PairKernel(*(jnp.array([1.0]),) * 3)
    assert with_shared_tokens(start, token, 1).cosine < start.cosine
    w, l, shared = np.array([1.0, 0.1]), np.array([1.0, -0.1]), np.array([-1.0, 0.0])  # noqa: E741
    assert pair_of(w, l).cosine > 0.9
    assert pair_of(w + shared, l + shared).cosine < -0.9


def test_longer_suffix_in_the_model_raises_the_cosine():
    """One differing token before ever longer suffixes with similar states: the cosine climbs."""
    rng = np.random.default_rng(3)
    width, vocab, length = 64, 12, 12
    w = rng.normal(size=(vocab, width)) / 8
    common = rng.normal(size=(1 + length, width))
    h_w, h_l = (common + 0.1 * rng.normal(size=common.shape) for _ in range(2))
    h_l[0] = h_w[0]  # one and the same context predicts the differing tokens
    suffix = rng.integers(0, vocab, length)
    cosines = []
    for n in (0, 1, 3, 12):
        g_w, g_l = (
            sum(unembedding_gradient(w, h[k], y) for k, y in enumerate([first, *suffix[:n]]))
            for h, first in ((h_w, 3), (h_l, 4))
        )
        h, other = jnp.asarray(h_w[: n + 1]), jnp.asarray(h_l[: n + 1])
        e, f = (
            prediction_error(x @ w.T, jnp.asarray([first, *suffix[:n]]))
            for x, first in ((h, 3), (other, 4))
        )
        kernel = PairKernel(
            response_inner(h, e, h, e),
            response_inner(h, e, other, f),
            response_inner(other, f, other, f),
        )
        close(kernel.inner, (g_w * g_l).sum())
        cosines.append(kernel.cosine.item())
    assert cosines[0] < 0 < 0.8 < cosines[-1]
    assert (np.diff(cosines) > 0).all()
