"""For d_w, d_l > 0 the chosen rises iff ⟨g_w,g_l⟩ ≤ (d_w/d_l) ‖g_w‖², the rejected falls iff it is
≤ (d_l/d_w) ‖g_l‖².

Counter-examples: with negative coefficients the chosen can fall while the rejected rises, which
positive ones exclude; with ⟨g_w,g_l⟩ > 0 the pair need not be ideal, which ⟨g_w,g_l⟩ ≤ 0
guarantees.
"""

import jax.numpy as jnp
import numpy as np
from helpers import force
from oracles import geometry

from simgrad.theory import Regime, first_order, regime


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
    got = regime(first_order(kernel, force(jnp.asarray(d_w), jnp.asarray(d_l))))
    np.testing.assert_array_equal(got, expected)
    assert set(np.unique(got)) == set(Regime)


def test_gradient_condition_in_its_published_form():
    rng = np.random.default_rng(2)
    kernel, w, _ = geometry(rng)
    d_w, d_l = (jnp.asarray(rng.lognormal(size=len(w))) for _ in range(2))
    got = regime(first_order(kernel, force(d_w, d_l)))
    rises = kernel.inner <= d_w / d_l * kernel.sq_chosen
    falls = kernel.inner <= d_l / d_w * kernel.sq_rejected
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_RISE]), rises)
    np.testing.assert_array_equal(np.isin(got, [Regime.IDEAL, Regime.BOTH_FALL]), falls)


def test_reversed_is_impossible_for_positive_coefficients_only():
    rng = np.random.default_rng(3)
    kernel, w, _ = geometry(rng)
    one = jnp.ones(len(w))
    assert not (regime(first_order(kernel, force(one, 2 * one))) == Regime.REVERSED).any()
    assert (regime(first_order(kernel, force(-one, -one))) == Regime.REVERSED).any()


def test_negative_cosine_is_always_ideal_and_positive_is_not():
    rng = np.random.default_rng(4)
    kernel, w, _ = geometry(rng)
    c = force(*(jnp.asarray(rng.lognormal(size=len(w))) for _ in range(2)))
    fate, apart = regime(first_order(kernel, c)), np.asarray(kernel.cosine) <= 0
    np.testing.assert_array_equal(fate[apart], Regime.IDEAL)
    assert (fate[~apart] != Regime.IDEAL).any()
