"""CHES and its relatives against double loops over the definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import PAIRS, close, model
from hypothesis import given
from hypothesis import strategies as st

from simgrad.pairs import Pair, packed, padded
from simgrad.theory import Responses, ches, head_gap, ln_ches, responses
from simgrad.theory.groups import Group, gwhes, nthr
from simgrad.theory.similarity import embedding_cosine, last_hidden_inner, normalized_edit_distance


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
    """Both are predicted by the same state, so CHES vanishes; keeping the final state breaks
    that."""
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
    from simgrad.theory.kernel.rules import outer_products

    unit = jnp.where(batch.valid[..., None], jnp.eye(5)[0], 0.0)
    close(outer_products(result.hidden, unit)[0].gap, ches(result, batch))
    assert np.abs(head_gap(result, batch) / ches(result, batch) - 1).min() > 1e-3


WIDE, LONG, SMALL = 4096, 512, 32


def wide_states(dtype):
    """One pair of 512-token responses of width 4096: a common mean, noise, four outlier
    dimensions."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(1, 2, LONG, WIDE)) * 2 + rng.normal(size=WIDE)
    states[..., [7, 99, 1500, 4000]] *= [20.0, -60.0, 150.0, 90.0]
    states = jnp.asarray(states, jnp.float32).astype(dtype)
    logits = jnp.asarray(3 * rng.normal(size=(1, 2, LONG, SMALL)), jnp.float32)
    batch = padded([Pair([1], *rng.integers(0, SMALL, (2, LONG)).tolist())])
    return Responses(jnp.zeros((1, 2, LONG), jnp.float32), logits, states, states[:, :, -1]), batch


def oracle(result, batch):
    """Every measure in numpy float64 on the same rounded states, with the size of the terms it
    subtracts."""
    (w, l), targets = np.asarray(result.hidden[0], np.float64), np.asarray(batch.targets[0])  # noqa: E741
    p = np.exp(np.asarray(result.logits[0], np.float64))
    e, f = np.eye(SMALL)[targets] - p / p.sum(-1, keepdims=True)
    s, t = w.sum(0), l.sum(0)
    g_w, g_l = e.T @ w, f.T @ l
    each = np.einsum("kd,kv,vd->k", l, f, g_w)
    cross, own = (g_w * g_l).sum(), (g_w * g_w).sum()
    last = w[-1] @ l[-1]
    return {
        "ches": (s @ t - s @ s, s @ t + s @ s),
        "ln_ches": ((s @ t - s @ s) / LONG**2, (s @ t + s @ s) / LONG**2),
        "last": (last, abs(last)),
        "cosine": (s @ t / np.sqrt((s @ s) * (t @ t)), 1.0),
        "head_gap": (cross - own, abs(cross) + own),
        "nthr": (each, np.abs(each).max()),
        "gwhes": (2 * cross - 3 * own, 2 * abs(cross) + 3 * own),
    }


def measure(result, batch):
    group, correct = (
        Group(result.hidden[0], result.logits[0], batch.targets[0], batch.valid[0]),
        jnp.array([True, False]),
    )
    return {
        "ches": ches(result, batch)[0],
        "ln_ches": ln_ches(result, batch)[0],
        "last": last_hidden_inner(result)[0],
        "cosine": embedding_cosine(result, batch)[0],
        "head_gap": head_gap(result, batch)[0],
        "nthr": nthr(group, correct)[1],
        "gwhes": gwhes(group, correct, jnp.array([3.0, -2.0], jnp.float32))[0],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wide_half_precision_states_stay_finite_and_accurate(dtype):
    """To 1e-3 of the value, although CHES subtracts terms 300 times as large; to 1e-5 of those
    terms."""
    result, batch = wide_states(dtype)
    got = measure(result, batch)
    for name, (value, size) in oracle(result, batch).items():
        assert got[name].dtype == jnp.float32, name
        assert np.isfinite(got[name]).all(), name
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5 * size, err_msg=name)
        np.testing.assert_allclose(
            got[name], value, rtol=0, atol=1e-3 * np.abs(value).max(), err_msg=name
        )


def test_narrow_sums_are_neither_finite_nor_accurate():
    """What the test above guards against: float16 sums overflow, bfloat16 sums are off by far more
    than 1e-3."""
    for dtype, finite in (("float16", False), ("bfloat16", True)):
        result, batch = wide_states(dtype)
        w, l = np.asarray(result.hidden[0]).sum(1, dtype=result.hidden.dtype)  # noqa: E741
        with np.errstate(over="ignore", invalid="ignore"):
            naive = (w * (l - w)).sum(dtype=w.dtype)
        assert np.isfinite(naive) == finite
        assert not np.isclose(float(naive), oracle(result, batch)["ches"][0], rtol=1e-2)


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
