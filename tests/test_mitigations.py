"""What each mitigation promises to first order, where it stops, and that training with it does the
same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close, force, model

from simgrad.models import bind, sequence_logp
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import (
    PairKernel,
    Regime,
    band,
    first_order,
    ideal_range,
    pair_kernel,
    regime,
    responses,
    token_kernel,
)
from simgrad.theory.kernel import masked_kernel
from simgrad.theory.mitigation import (
    Calibrated,
    PairwiseNormalized,
    Projected,
    SparseMask,
    contrastive_mask,
    keep_lowest,
    masked_logp,
)
from simgrad.theory.prediction import ascent

RNG = np.random.default_rng(3)
MITIGATIONS = [PairwiseNormalized(), Calibrated(), Projected()]


def geometry(n=3000):
    w, l = RNG.normal(size=(2, n, 3)) * RNG.lognormal(size=(2, n, 1))  # noqa: E741
    return PairKernel(*(jnp.asarray((a * b).sum(-1)) for a, b in ((w, w), (w, l), (l, l)))), w, l


def equal(n):
    d = jnp.asarray(RNG.lognormal(size=n))
    return force(d, d)


def unequal(n):
    return force(*(jnp.asarray(RNG.lognormal(size=n)) for _ in range(2)))


def test_pairwise_normalised_steps_are_ideal_for_equal_coefficients_only():
    kernel, w, l = geometry()  # noqa: E741
    c = equal(len(w))
    assert (regime(first_order(kernel, c)) != Regime.IDEAL).any()
    change = first_order(kernel, PairwiseNormalized().changed(c, kernel))
    norm_w, norm_l = np.linalg.norm(w, axis=-1), np.linalg.norm(l, axis=-1)
    opening = 1 - (w * l).sum(-1) / norm_w / norm_l
    close(change[:, 0], c[:, 0] * norm_w * opening)
    close(change[:, 1], c[:, 1] * norm_l * opening)
    assert (change[:, 0] >= 0).all()
    assert (change[:, 1] <= 0).all()
    other = first_order(kernel, PairwiseNormalized().changed(unequal(len(w)), kernel))
    assert (regime(other) != Regime.IDEAL).any()


def test_calibration_moves_any_positive_pair_to_the_centre_and_keeps_the_product():
    kernel, w, _ = geometry()
    c = unequal(len(w))
    assert (regime(first_order(kernel, c)) != Regime.IDEAL).any()
    calibrated = Calibrated().changed(c, kernel)
    np.testing.assert_allclose(band(kernel, calibrated).angle, 0.0, atol=1e-9)
    np.testing.assert_array_equal(regime(first_order(kernel, calibrated)), Regime.IDEAL)
    close(calibrated.prod(-1), c.prod(-1))
    close(calibrated[:, 0], c[:, 0] * band(kernel, c).calibration)
    negative = force(-c[:, 0], -c[:, 1])
    close(Calibrated().changed(negative, kernel), negative)


def test_projection_spares_the_chosen_but_not_always_the_rejected():
    kernel, w, l = geometry()  # noqa: E741
    c = unequal(len(w))
    projected = Projected().changed(c, kernel)
    conflict = np.asarray(kernel.inner) > 0
    unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
    spared = np.where(conflict[:, None], l - (l * unit).sum(-1, keepdims=True) * unit, l)
    step = np.asarray(c)[:, :1] * w + np.asarray(c)[:, 1:] * spared
    change = first_order(kernel, projected)
    close(change[:, 0], (step * w).sum(-1))
    close(change[:, 1], (step * l).sum(-1))
    assert (change[:, 0] > 0).all()
    np.testing.assert_allclose(
        np.asarray(change[:, 0])[conflict],
        np.asarray(c[:, 0] * kernel.sq_chosen)[conflict],
        rtol=1e-9,
    )
    assert (regime(change) == Regime.BOTH_RISE).any()


@pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda r: type(r).__name__)
def test_a_vanishing_gradient_leaves_the_force_alone(mitigation):
    """A model that is certain of a response in float32 has no gradient left; nothing becomes
    nan."""
    zero, one = jnp.zeros(1), jnp.ones(1)
    for kernel in (
        PairKernel(zero, zero, one),
        PairKernel(one, zero, zero),
        PairKernel(zero, zero, zero),
    ):
        c = force(2 * one, 3 * one)
        close(mitigation.changed(c, kernel), c)
        assert band(kernel, c).inside.all()
        assert (regime(first_order(kernel, c)) == Regime.IDEAL).all()
        bounds = ideal_range(kernel)
        assert (bounds.lower <= 2 / 3).all()
        assert (bounds.upper >= 2 / 3).all()


@pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda r: type(r).__name__)
def test_a_step_along_the_changed_force_does_what_theory_says(mitigation):
    """A pair whose chosen falls under DPO; remainder of second order."""
    apply, theta = model("plain")
    pair = PAIRS[2]
    batch = padded([pair])
    start = responses(apply, theta, batch).logp
    kernel = pair_kernel(apply, theta, batch)
    c, kept = mitigation.update(DPO().force(start, start, batch.lengths), mitigation.init(), kernel)
    assert kept == ()
    up = ascent(bind(apply, theta), theta, batch, c)
    predicted = np.asarray(first_order(kernel, c)[0])
    rates = np.geomspace(1e-5, 1e-3, 3) / np.abs(predicted).max()
    miss = []
    for r in rates:
        moved = sequence_logp(apply, jax.tree.map(lambda t, g, r=r: t + r * g, theta, up), batch)
        miss.append(np.abs(np.asarray(moved - start)[0] - r * predicted))
    np.testing.assert_allclose(np.polyfit(np.log(rates), np.log(miss), 1)[0], 2.0, atol=0.1)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (Pair([1], [4, 5, 9], [4, 6, 7, 9]), ([0, 1, 0], [0, 1, 1, 0])),
        (Pair([1], [4, 5], [4, 5, 6]), ([0, 0], [0, 0, 1])),
        (Pair([1], [4, 5], [6, 4, 5]), ([0, 0], [1, 0, 0])),
        (Pair([1], [4, 4], [4]), ([0, 1], [0])),
        (Pair([1], [4, 4, 4], [4, 4]), ([0, 0, 1], [0, 0])),
        (Pair([1], [7], [8]), ([1], [1])),
        (Pair([1], [5, 6, 5], [5]), ([0, 1, 1], [0])),
    ],
)
def test_contrastive_mask_drops_common_beginnings_and_endings(pair, expected):
    mask = np.asarray(contrastive_mask(padded([pair], rows=6)))[0]
    for side, want in enumerate(expected):
        np.testing.assert_array_equal(mask[side], [*want, *[0] * (6 - len(want))])


def test_contrast_alone_is_unentangled_with_frozen_features_and_not_in_a_transformer():
    """One context: ⟨h,h⟩⟨e_w-π, e_l-π⟩ = ‖h‖² (‖π‖² - π_w - π_l), here negative; shared features
    change that."""
    batch = padded([PAIRS[3]])
    mask = contrastive_mask(batch).astype(jnp.float64)
    apply, theta = model("linear_softmax")
    contrast = masked_kernel(token_kernel(apply, theta, batch), mask)
    result = responses(apply, theta, batch)
    pi, h = np.exp(result.logits[0, 0, 0]), np.asarray(result.hidden[0, 0, 0])
    pi /= pi.sum()
    w, l = (int(t) for t in batch.targets[0, :, 0])  # noqa: E741
    close(contrast.inner[0], h @ h * (pi @ pi - pi[w] - pi[l]))
    assert float(contrast.cosine[0]) < 0
    deep, theta = model("plain")
    assert float(masked_kernel(token_kernel(deep, theta, batch), mask).cosine[0]) > 0.3


def test_weights_act_on_log_probs():
    apply, theta = model("plain")
    batch = padded(PAIRS)
    result = responses(apply, theta, batch)
    close(masked_logp(result, batch.valid.astype(jnp.float64)), result.logp)
    half = jnp.full(batch.targets.shape, 0.5)
    close(masked_logp(result, half), result.logp / 2)


def test_sparse_mask_closes_tokens_as_its_penalty_grows():
    apply, theta = model("plain")
    batch, lengths = padded(PAIRS), padded(PAIRS).lengths
    result = responses(apply, theta, batch)
    reference = result.token_logp - 0.1

    def trained(strength):
        mask = SparseMask(strength)
        parameters = mask.init(result.hidden.shape[-1], "float64")

        @jax.jit
        def gradient(p):
            def loss(p):
                a = mask.weights(p, result.hidden, batch.valid)
                u, ref = masked_logp(result, a), (a * reference).sum(-1)
                return (DPO().loss(u, ref, lengths) + mask.penalty(a)).sum()

            return jax.grad(loss)(p)

        for _ in range(100):
            parameters = jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient(parameters))
        return float(mask.weights(parameters, result.hidden, batch.valid).sum())

    start = float(
        SparseMask().weights(SparseMask().init(8, "float64"), result.hidden, batch.valid).sum()
    )
    assert start == pytest.approx(int(batch.valid.sum()) / (1 + np.exp(-2.0)))
    light, heavy = trained(0.01), trained(1.0)
    assert heavy < 0.3 * start < light
    with pytest.raises(ValueError, match="strength must not be negative"):
        SparseMask(-1.0)


def test_filter_keeps_the_lowest_scores_in_input_order():
    scores = jnp.array([0.3, -2.0, 5.0, 0.1, -2.0])
    assert keep_lowest(scores, 0.4).tolist() == [1, 4]
    assert keep_lowest(scores, 0.41).tolist() == [1, 3, 4]
    assert keep_lowest(scores, 0.2).tolist() == [1]
    assert keep_lowest(scores, 1.0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got 0.0"):
        keep_lowest(scores, 0.0)
    with pytest.raises(ValueError, match="score of pair 1 is not a number"):
        keep_lowest(jnp.array([1.0, jnp.nan]), 0.5)
