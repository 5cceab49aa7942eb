"""A pair is ideal exactly for ⟨g_w,g_l⟩/‖g_w‖² ≤ d_w/d_l ≤ ‖g_l‖²/⟨g_w,g_l⟩, if d_l > 0.

Counter-examples: with d_l < 0 the same ratios are reversed; and the kernel must be that of all that
is trained, the unembedding's range loses the chosen once the features learn.
"""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, force
from oracles import ALL, SINGLE, dot, geometry, gradient, pair_of, parameters, states

from simgrad import objectives
from simgrad.theory import PairKernel, Regime, compare_objectives, first_order, ideal_range, regime
from simgrad.theory.closed_forms.unconstrained import state_kernel

jitted_kernel = jax.jit(state_kernel)


def test_ideal_range_is_where_the_regime_is_ideal():
    rng = np.random.default_rng(1)
    kernel, w, _ = geometry(rng, 3000)
    r = jnp.asarray(rng.normal(size=len(w)) * 3)
    bounds = ideal_range(kernel)
    assert (bounds.lower <= bounds.upper).all()
    for sign, inside in (
        (1.0, (r >= bounds.lower) & (r <= bounds.upper)),
        (-1.0, r <= bounds.negative),
    ):
        d_l = sign * jnp.ones_like(r)
        ideal = regime(first_order(kernel, force(r * d_l, d_l))) == Regime.IDEAL
        np.testing.assert_array_equal(ideal, inside)
        assert ideal.any()
        assert not ideal.all()


def test_smallest_weight_ratio_that_keeps_the_chosen():
    """Just above it the chosen rises, just below it falls, along the actual direction."""
    for seed, (chosen, rejected) in enumerate(ALL):
        theta = parameters(seed)
        g_w, g_l = gradient(theta, *chosen), gradient(theta, *rejected)
        ratio = float(
            ideal_range(
                jitted_kernel(theta["w"], *(states(theta, *r) for r in (chosen, rejected)))
            ).lower
        )
        for factor, sign in ((1e-6, 1), (-1e-6, -1)):
            d_w = ratio + factor
            assert sign * dot(g_w, jax.tree.map(lambda a, b, d_w=d_w: d_w * a - b, g_w, g_l)) > 0


def test_objectives_inside_depend_on_the_geometry():
    """One kernel, several objectives: each one's ratio d_w/d_l against the pair's range."""
    rng = np.random.default_rng(2)
    kernel, w, _ = geometry(rng, 400)
    lengths = jnp.asarray(rng.integers(1, 9, size=(len(w), 2)))
    logp = -jnp.asarray(rng.uniform(1, 30, size=(len(w), 2)))
    candidates = [objectives.get(name) for name in ("dpo", "ipo", "simpo")]
    fates = compare_objectives(kernel, logp, logp, lengths, candidates)
    bounds = ideal_range(kernel)
    ratio = {"dpo": 1.0, "ipo": 1.0, "simpo": lengths[:, 1] / lengths[:, 0]}
    for objective, fate in fates.items():
        inside = (ratio[objective.name] >= bounds.lower) & (ratio[objective.name] <= bounds.upper)
        np.testing.assert_array_equal(fate.regime == Regime.IDEAL, inside)
        close(fate.change, first_order(kernel, fate.force))
    assert (fates[candidates[0]].regime == fates[candidates[1]].regime).all()
    assert (fates[candidates[0]].regime != fates[candidates[2]].regime).any()


def test_a_pulled_up_rejected_reverses_the_range():
    """Strictly inside, but with d_l < 0: the chosen falls and the rejected rises."""
    kernel, _, _ = geometry(np.random.default_rng(3))
    bounds = ideal_range(kernel)
    r = jnp.where(jnp.isinf(bounds.upper), bounds.lower + 1, (bounds.lower + bounds.upper) / 2)
    for sign, fate in ((1.0, Regime.IDEAL), (-1.0, Regime.REVERSED)):
        d_l = sign * jnp.ones_like(r)
        np.testing.assert_array_equal(regime(first_order(kernel, force(r * d_l, d_l))), fate)


def test_the_unembeddings_range_is_not_the_models():
    """d_w = d_l is always inside the unembedding's range for one token; with trained features the
    chosen falls."""
    fell = 0
    for seed in range(30):
        theta = parameters(seed, 2.0)
        g_w, g_l = (gradient(theta, *r) for r in SINGLE)
        head = pair_of(*(np.asarray(g["w"]).ravel() for g in (g_w, g_l)))
        assert ideal_range(head).lower <= 1 <= ideal_range(head).upper
        whole = PairKernel(
            *(jnp.asarray(dot(a, b)) for a, b in ((g_w, g_w), (g_w, g_l), (g_l, g_l)))
        )
        falls = dot(g_w, g_w) - dot(g_w, g_l) < 0
        assert falls == bool(ideal_range(whole).lower > 1)
        fell += falls
    assert fell > 0
