"""CHES and its relatives against double loops over the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import PAIRS, close, model
from hypothesis import given
from hypothesis import strategies as st

from simgrad.pairs import Pair, packed, padded
from simgrad.theory import (
    Responses,
    ches,
    embedding_cosine,
    head_gap,
    last_hidden_inner,
    ln_ches,
    normalized_edit_distance,
    responses,
)


@pytest.mark.parametrize("layout", [packed, padded])
def test_every_measure_against_its_definition(layout):
    apply, theta = model("rope_mqa_gated_tied")
    batch = layout(PAIRS, length=23, rows=8)
    result = responses(apply, theta, batch)
    got = {
        "ches": ches(result, batch),
        "ln_ches": ln_ches(result, batch),
        "ches_all": ches(result, batch, states="all"),
        "ln_ches_all": ln_ches(result, batch, states="all"),
        "last": last_hidden_inner(result),
        "cosine": embedding_cosine(result, batch),
        "head_gap": head_gap(result, batch),
    }
    for i, pair in enumerate(PAIRS):
        (_, logits_w, w, last_w), (_, logits_l, l, last_l) = (  # noqa: E741
            reference.sequence(apply, theta, pair.prompt, r) for r in (pair.chosen, pair.rejected)
        )
        mean_w, mean_l = w.mean(0), l.mean(0)
        g_w = reference.head_gradient(logits_w, w, pair.chosen)
        g_l = reference.head_gradient(logits_l, l, pair.rejected)
        plain, normal = reference.ches(w, l)
        plain_all, normal_all = reference.ches([*w, last_w], [*l, last_l])
        expected = {
            "ches": plain,
            "ln_ches": normal,
            "ches_all": plain_all,
            "ln_ches_all": normal_all,
            "last": last_w @ last_l,
            "cosine": mean_w @ mean_l / np.sqrt((mean_w @ mean_w) * (mean_l @ mean_l)),
            "head_gap": (g_w * g_l).sum() - (g_w * g_w).sum(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][i], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_single_token_responses_have_no_ches():
    """Both are predicted by the same state, so CHES vanishes; keeping the final state breaks that."""
    apply, theta = model("plain")
    pairs = [Pair([1, 2], [3], [4]), Pair([5], [6], [7])]
    batch = packed(pairs)
    result = responses(apply, theta, batch)
    close(ches(result, batch), np.zeros(2), scale=1e288)
    assert np.abs(ches(result, batch, states="all")).min() > 1e-3


def test_ches_is_the_head_gap_with_unit_error_products():
    """Replace every e - π by one and the same unit vector: the head gap becomes CHES."""
    apply, theta = model("plain")
    batch = padded(PAIRS)
    result = responses(apply, theta, batch)
    from simgrad.theory.gram import outer_products

    unit = jnp.where(batch.valid[..., None], jnp.eye(5)[0], 0.0)
    close(outer_products(result.hidden, unit).gap, ches(result, batch))
    assert np.abs(head_gap(result, batch) / ches(result, batch) - 1).min() > 1e-3


def test_wide_bfloat16_states_stay_finite_and_accurate():
    """512 tokens of width 4096: a bfloat16 or float16 sum is inf or percents off; float32 is not."""
    rows, width = 512, 4096
    key = jax.random.key(0)
    states = (jax.random.normal(key, (1, 2, rows, width)) * 8 + 3).astype(jnp.bfloat16)
    batch = padded([Pair([1], [2] * rows, [3] * rows)])
    logits = jnp.zeros((1, 2, rows, 4), jnp.float32)
    result = Responses(jnp.zeros((1, 2, rows), jnp.float32), logits, states, states[:, :, -1])
    exact = np.asarray(states, np.float64)
    w, l = exact[0].sum(1)  # noqa: E741
    for got, value in (
        (ches(result, batch), w @ l - w @ w),
        (ln_ches(result, batch), (w @ l - w @ w) / rows**2),
        (last_hidden_inner(result), exact[0, 0, -1] @ exact[0, 1, -1]),
        (embedding_cosine(result, batch), w @ l / np.sqrt((w @ w) * (l @ l))),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[0], value, rtol=1e-3)
    narrow = dataclasses.replace(result, hidden=states.astype(jnp.float16)).hidden.sum(2)
    assert not np.isfinite(np.asarray((narrow[:, 0] * narrow[:, 1]).sum(-1), np.float16)).all()


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_edit_distance_against_the_full_table(a, b):
    longest = max(len(a), len(b))
    expected = reference.edit_distance(a, b) / longest if longest else 0.0
    assert normalized_edit_distance(a, b) == pytest.approx(expected, abs=1e-12)


def test_unknown_convention_is_refused():
    apply, theta = model("plain")
    batch = packed(PAIRS)
    with pytest.raises(Exception, match="predicting"):
        ches(responses(apply, theta, batch), batch, states="last")
