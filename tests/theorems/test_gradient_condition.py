"""For d_w, d_l > 0 the chosen rises iff ⟨g_w,g_l⟩ ≤ (d_w/d_l) ‖g_w‖², the rejected falls iff it is ≤ (d_l/d_w) ‖g_l‖².

Counter-examples: with negative coefficients the chosen can fall while the rejected rises, which
positive ones exclude; with ⟨g_w,g_l⟩ > 0 the pair need not be ideal, which ⟨g_w,g_l⟩ ≤ 0
guarantees.
"""

import jax.numpy as jnp
import numpy as np
from oracles import geometry

from simgrad.objectives import Coefficients
from simgrad.theory import Regime, regime


def test_regime_is_what_the_step_along_the_gradient_does():
    """The step d_w g_w - d_l g_l, taken as a vector, decides the signs; any signs of d."""
    rng = np.random.default_rng(1)
    kernel, w, l = geometry(rng)  # noqa: E741
    d_w, d_l = rng.normal(size=(2, len(w)))
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
    rng = np.random.default_rng(2)
    kernel, w, _ = geometry(rng)
    d_w, d_l = (jnp.asarray(rng.lognormal(size=len(w))) for _ in range(2))
    got = regime(kernel, Coefficients(d_w, d_l))
    rises = kernel.inner <= d_w / d_l * kernel.sq_chosen
    falls = kernel.inner <= d_l / d_w * kernel.sq_rejected
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_RISE]), rises)
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_FALL]), falls)


def test_reversed_is_impossible_for_positive_coefficients_only():
    rng = np.random.default_rng(3)
    kernel, w, _ = geometry(rng)
    one = jnp.ones(len(w))
    assert not (regime(kernel, Coefficients(one, 2 * one)) == Regime.REVERSED).any()
    assert (regime(kernel, Coefficients(-one, -one)) == Regime.REVERSED).any()


def test_negative_cosine_is_always_ideal_and_positive_is_not():
    rng = np.random.default_rng(4)
    kernel, w, _ = geometry(rng)
    d = Coefficients(*(jnp.asarray(rng.lognormal(size=len(w))) for _ in range(2)))
    apart = np.asarray(kernel.cosine) <= 0
    np.testing.assert_array_equal(regime(kernel, d)[apart], Regime.IDEAL)
    assert (regime(kernel, d)[~apart] != Regime.IDEAL).any()
