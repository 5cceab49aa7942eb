"""For d_w, d_l > 0 a pair is ideal iff |log(d_w/d_l) - log(‖g_l‖/‖g_w‖)| ≤ -log cos(g_w,g_l), an
angle for any signs.

Counter-examples: for negative coefficients the logarithmic band says nothing, the angular one still
holds; a band centred at d_w = d_l, as if the norms were equal, is wrong.
"""

import jax.numpy as jnp
import numpy as np
from helpers import force
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import geometry

from simgrad.theory import PairKernel, Regime, band, first_order, regime


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
    c = force(jnp.array([d_w]), jnp.array([d_l]))
    b = band(kernel, c)
    edge = float(b.half_width[0]) - abs(float(b.log_ratio[0] - b.centre[0]))
    if abs(edge) > 1e-9:  # on the edge itself rounding decides
        assert bool(b.inside[0]) == (int(regime(first_order(kernel, c))[0]) == Regime.IDEAL)
    calibrated = force(d_w * b.calibration, d_l / b.calibration)
    centred = band(kernel, calibrated)
    np.testing.assert_allclose(centred.log_ratio, centred.centre, atol=1e-9)
    assert int(regime(first_order(kernel, calibrated))[0]) == Regime.IDEAL


def test_angular_band_is_the_ideal_regime_for_any_signs():
    rng = np.random.default_rng(1)
    kernel, w, _ = geometry(rng, 5000)
    c = force(*(jnp.asarray(rng.normal(size=len(w))) for _ in range(2)))
    b = band(kernel, c)
    clear = np.abs(np.abs(b.angle) - b.half_angle) > 1e-9
    np.testing.assert_array_equal(
        np.asarray(b.inside)[clear],
        np.asarray(regime(first_order(kernel, c)) == Regime.IDEAL)[clear],
    )
    negative = np.asarray((c[:, 0] < 0) | (-c[:, 1] < 0))
    assert np.isnan(np.asarray(b.log_ratio)[negative]).all()
    assert np.asarray(b.inside)[
        negative
    ].any()  # a push on the chosen or a pull on the rejected can still be ideal
    assert (np.asarray(kernel.cosine)[negative & np.asarray(b.inside)] < 0).all()


def test_no_movement_counts_as_ideal_in_band_and_regime():
    rng = np.random.default_rng(2)
    kernel, w, _ = geometry(rng, 50)
    zero = force(jnp.zeros(len(w)), jnp.zeros(len(w)))
    assert band(kernel, zero).inside.all()
    np.testing.assert_array_equal(regime(first_order(kernel, zero)), Regime.IDEAL)


def test_logarithmic_band_is_for_positive_coefficients_and_their_own_centre():
    """The same ratio with both signs turned is reversed; a band around d_w = d_l takes pairs in
    that are not ideal."""
    rng = np.random.default_rng(3)
    kernel, w, _ = geometry(rng)
    c = force(*(jnp.asarray(rng.lognormal(size=len(w))) for _ in range(2)))
    b = band(kernel, c)
    inside = np.abs(b.log_ratio - b.centre) < b.half_width - 1e-9
    turned = regime(first_order(kernel, -c))
    np.testing.assert_array_equal(turned[inside], Regime.REVERSED)
    fate = regime(first_order(kernel, c))
    np.testing.assert_array_equal(fate[inside], Regime.IDEAL)
    uncentred = np.abs(b.log_ratio) < b.half_width
    assert (fate[uncentred] != Regime.IDEAL).any()
