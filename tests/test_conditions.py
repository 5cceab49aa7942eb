"""Regimes and the disentanglement band."""

import jax.numpy as jnp
import numpy as np
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st

from simgrad import objectives
from simgrad.objectives import Coefficients
from simgrad.theory import PairKernel, Regime, band, compare_objectives, first_order, ideal_range, regime

RNG = np.random.default_rng(1)


def random_geometry(n=2000):
    """Kernels of actual vectors in three dimensions, so that Cauchy-Schwarz holds."""
    w, l = RNG.normal(size=(2, n, 3)) * RNG.lognormal(size=(2, n, 1))  # noqa: E741
    return PairKernel(*(jnp.asarray((a * b).sum(-1)) for a, b in ((w, w), (w, l), (l, l)))), w, l


def test_regime_is_what_the_step_along_the_gradient_does():
    """The step d_w g_w - d_l g_l, taken as a vector, decides the signs; any signs of d."""
    kernel, w, l = random_geometry()  # noqa: E741
    d_w, d_l = RNG.normal(size=(2, len(w)))
    step = d_w[:, None] * w - d_l[:, None] * l
    up_w, down_l = (step * w).sum(-1) >= 0, (step * l).sum(-1) <= 0
    expected = np.select(
        [up_w & down_l, ~up_w & down_l, up_w & ~down_l],
        [Regime.IDEAL, Regime.BOTH_FALL, Regime.BOTH_RISE],
        Regime.REVERSED,
    )
    got = regime(kernel, Coefficients(jnp.asarray(d_w), jnp.asarray(d_l)))
    np.testing.assert_array_equal(got, expected)
    assert set(np.unique(got)) == set(Regime)


def test_gradient_condition_in_its_published_form():
    kernel, w, _ = random_geometry()
    d_w, d_l = (jnp.asarray(RNG.lognormal(size=len(w))) for _ in range(2))
    got = regime(kernel, Coefficients(d_w, d_l))
    rises = kernel.inner <= d_w / d_l * kernel.sq_chosen
    falls = kernel.inner <= d_l / d_w * kernel.sq_rejected
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_RISE]), rises)
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_FALL]), falls)


def test_reversed_is_impossible_for_positive_coefficients_only():
    kernel, w, _ = random_geometry()
    one = jnp.ones(len(w))
    assert not (regime(kernel, Coefficients(one, 2 * one)) == Regime.REVERSED).any()
    assert (regime(kernel, Coefficients(-one, -one)) == Regime.REVERSED).any()


def test_negative_cosine_is_always_ideal_and_positive_is_not():
    kernel, w, _ = random_geometry()
    d = Coefficients(*(jnp.asarray(RNG.lognormal(size=len(w))) for _ in range(2)))
    apart = np.asarray(kernel.cosine) <= 0
    np.testing.assert_array_equal(regime(kernel, d)[apart], Regime.IDEAL)
    assert (regime(kernel, d)[~apart] != Regime.IDEAL).any()


@settings(deadline=None, max_examples=200)
@given(
    norm_w=st.floats(0.01, 100),
    norm_l=st.floats(0.01, 100),
    cosine=st.floats(-0.999, 0.999),
    d_w=st.floats(0.01, 100),
    d_l=st.floats(0.01, 100),
)
def test_band_is_the_ideal_regime(norm_w, norm_l, cosine, d_w, d_l):
    kernel = PairKernel(*(jnp.array([x]) for x in (norm_w**2, cosine * norm_w * norm_l, norm_l**2)))
    d = Coefficients(jnp.array([d_w]), jnp.array([d_l]))
    b = band(kernel, d)
    edge = float(b.half_width[0]) - abs(float(b.log_ratio[0] - b.centre[0]))
    if abs(edge) > 1e-9:  # on the edge itself rounding decides
        assert bool(b.inside[0]) == (int(regime(kernel, d)[0]) == Regime.IDEAL)
    calibrated = Coefficients(d.chosen * b.calibration, d.rejected / b.calibration)
    centred = band(kernel, calibrated)
    np.testing.assert_allclose(centred.log_ratio, centred.centre, atol=1e-9)
    assert int(regime(kernel, calibrated)[0]) == Regime.IDEAL


def test_angular_band_is_the_ideal_regime_for_any_signs():
    kernel, w, _ = random_geometry(5000)
    d = Coefficients(*(jnp.asarray(RNG.normal(size=len(w))) for _ in range(2)))
    b = band(kernel, d)
    clear = np.abs(np.abs(b.angle) - b.half_angle) > 1e-9
    np.testing.assert_array_equal(np.asarray(b.inside)[clear], np.asarray(regime(kernel, d) == Regime.IDEAL)[clear])
    negative = np.asarray((d.chosen < 0) | (d.rejected < 0))
    assert np.isnan(np.asarray(b.log_ratio)[negative]).all()
    assert np.asarray(b.inside)[negative].any()  # a push on the chosen or a pull on the rejected can still be ideal
    assert (np.asarray(kernel.cosine)[negative & np.asarray(b.inside)] < 0).all()


def test_no_movement_counts_as_ideal_in_band_and_regime():
    kernel, w, _ = random_geometry(50)
    zero = Coefficients(jnp.zeros(len(w)), jnp.zeros(len(w)))
    assert band(kernel, zero).inside.all()
    np.testing.assert_array_equal(regime(kernel, zero), Regime.IDEAL)


def test_ideal_range_is_where_the_regime_is_ideal():
    kernel, w, _ = random_geometry(3000)
    r = jnp.asarray(RNG.normal(size=len(w)) * 3)
    bounds = ideal_range(kernel)
    assert (bounds.lower <= bounds.upper).all()
    for sign, inside in ((1.0, (r >= bounds.lower) & (r <= bounds.upper)), (-1.0, r <= bounds.negative)):
        d_l = sign * jnp.ones_like(r)
        ideal = regime(kernel, Coefficients(r * d_l, d_l)) == Regime.IDEAL
        np.testing.assert_array_equal(ideal, inside)
        assert ideal.any()
        assert not ideal.all()


def test_objectives_inside_depend_on_the_geometry():
    """One kernel, several objectives: each one's ratio d_w/d_l against the pair's range."""
    kernel, w, _ = random_geometry(400)
    lengths = jnp.asarray(RNG.integers(1, 9, size=(len(w), 2)))
    logp = -jnp.asarray(RNG.uniform(1, 30, size=(len(w), 2)))
    candidates = [objectives.get(name) for name in ("dpo", "ipo", "simpo")]
    fates = compare_objectives(kernel, logp, logp, lengths, candidates)
    bounds = ideal_range(kernel)
    ratio = {"dpo": 1.0, "ipo": 1.0, "simpo": lengths[:, 1] / lengths[:, 0]}
    for objective, fate in fates.items():
        inside = (ratio[objective.name] >= bounds.lower) & (ratio[objective.name] <= bounds.upper)
        np.testing.assert_array_equal(fate.regime == Regime.IDEAL, inside)
        close(fate.change.chosen, first_order(kernel, fate.coefficients).chosen)
    assert (fates[candidates[0]].regime == fates[candidates[1]].regime).all()
    assert (fates[candidates[0]].regime != fates[candidates[2]].regime).any()
