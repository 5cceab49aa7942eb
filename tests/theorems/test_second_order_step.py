"""Δlog π(y) = ⟨∇u, v⟩ + ½ vᵀ∇²u v + O(‖v‖³) along any optimizer's step v, for responses trained on
or not.

Counter-examples: without the second term the remainder is of second order; beyond the trust radius
|first|/|second| the first term's sign is lost.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, force, model
from oracles import slope

from simgrad.models import only
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import (
    displacement,
    first_order,
    optimizer_step,
    own_steps,
    pair_kernel,
    responses,
)

PROBES = [Pair([1, 5, 3], [9, 9], [7, 2, 3]), Pair([2], [11, 4], [1])]
FACTORS = np.geomspace(1e-3, 1e-1, 5)

OPTIMIZERS = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "adam": optax.adam(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(1.0)),
    "decayed": optax.adamw(1e-3, weight_decay=0.1),
    "scheduled": optax.adam(optax.warmup_cosine_decay_schedule(1e-4, 1e-3, 3, 10)),
}


@functools.cache
def after_two_steps(name, kind="plain"):
    """Parameters, optimizer state and reference in the middle of a run, and the next step."""
    apply, theta = model(kind)
    batch = padded(PAIRS)
    reference = responses(apply, theta, batch).logp - jnp.array([[0.3, -0.2]])
    state = None
    for _ in range(2):
        step = optimizer_step(apply, theta, batch, DPO(), OPTIMIZERS[name], state, reference)
        state, theta = step.state, optax.apply_updates(theta, step.direction)
    return (
        apply,
        theta,
        optimizer_step(apply, theta, batch, DPO(), OPTIMIZERS[name], state, reference).direction,
    )


@functools.partial(jax.jit, static_argnames="apply")
def moved(apply, theta, batch, direction, factor):
    """Log-probs after the step."""
    return responses(apply, jax.tree.map(lambda t, d: t + factor * d, theta, direction), batch).logp


@functools.partial(jax.jit, static_argnames=("apply", "side"))
def gradient(apply, theta, batch, side):
    return jax.grad(lambda t: responses(apply, t, batch).logp[0, side])(theta)


def slopes(apply, theta, batch, direction, terms):
    """Order of |measured - predicted| in the size of the step, for each response."""
    start, change = (
        responses(apply, theta, batch).logp,
        displacement(apply, theta, batch, direction),
    )
    # unit: a step that moves the responses by about one nat
    unit = 1.0 / float(jnp.abs(change.first).mean())
    sizes = [float(f * unit) for f in FACTORS]
    ends = [moved(apply, theta, batch, direction, size) for size in sizes]
    miss = [
        np.abs(e - start - getattr(change.scaled(h), terms)).reshape(-1)
        for e, h in zip(ends, sizes, strict=True)
    ]
    return slope(FACTORS, miss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_order_of_the_remainder_is_three_for_every_optimizer(name):
    apply, theta, direction = after_two_steps(name)
    np.testing.assert_allclose(
        np.median(slopes(apply, theta, padded(PAIRS), direction, "total")), 3.0, atol=0.05
    )


@pytest.mark.parametrize("kind", ["plain", "rope_mqa_gated_tied", "unconstrained_features"])
def test_order_of_the_remainder_is_two_without_the_second_term(kind):
    apply, theta, direction = after_two_steps("sgd", kind)
    np.testing.assert_allclose(
        np.median(slopes(apply, theta, padded(PAIRS), direction, "first")), 2.0, atol=0.1
    )
    np.testing.assert_allclose(
        np.median(slopes(apply, theta, padded(PAIRS), direction, "total")), 3.0, atol=0.1
    )


def test_probes_that_nobody_trains_on_are_predicted_alike():
    apply, theta, direction = after_two_steps("adam")
    np.testing.assert_allclose(
        np.median(slopes(apply, theta, padded(PROBES), direction, "total")), 3.0, atol=0.1
    )
    assert (jnp.abs(displacement(apply, theta, padded(PROBES), direction).first) > 0).all()


def test_own_steps_are_first_order_plus_half_the_curvature_along_the_pairs_gradient():
    apply, theta = model("plain")
    batch = padded(PAIRS)
    c = force(*jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, size=(2, len(PAIRS)))))
    change = own_steps(apply, theta, batch, c)
    close(change.first, first_order(pair_kernel(apply, theta, batch), c))
    h = 1e-4  # central second difference
    for i, pair in enumerate(PAIRS):
        one = padded([pair], length=8, rows=5)
        w, l = (gradient(apply, theta, one, side) for side in range(2))  # noqa: E741
        v = jax.tree.map(lambda a, b, i=i: c[i, 0] * a + c[i, 1] * b, w, l)
        left, middle, right = (np.asarray(moved(apply, theta, one, v, x)[0]) for x in (-h, 0.0, h))
        np.testing.assert_allclose(
            change.second[i], (right - 2 * middle + left) / h**2 / 2, rtol=1e-3
        )


def test_at_the_trust_radius_both_terms_are_equal_and_beyond_it_the_sign_is_lost():
    apply, theta = model("plain")
    one = jnp.ones(len(PAIRS))
    change = own_steps(apply, theta, padded(PAIRS), force(one, one))
    radius = change.trust_radius
    for i in range(len(PAIRS)):
        for side in range(2):
            at = change.scaled(float(radius[i, side]))
            np.testing.assert_allclose(abs(at.first[i, side]), abs(at.second[i, side]), rtol=1e-10)
            beyond = change.scaled(1.01 * float(radius[i, side]))
            against = np.sign(beyond.first[i, side]) != np.sign(beyond.second[i, side])
            flipped = np.sign(beyond.total[i, side]) != np.sign(beyond.first[i, side])
            assert flipped == against
    flat = dataclasses.replace(change, second=jnp.zeros_like(change.second))
    assert np.isinf(flat.trust_radius).all()


def test_subsets_move_only_what_they_select():
    apply, theta = model("plain")
    batch, part = padded(PAIRS), only(apply, "layers/mlp/*")
    step = optimizer_step(part, theta, batch, DPO(), optax.sgd(0.1))
    assert len(jax.tree.leaves(step.direction)) == len(jax.tree.leaves(theta["layers"]["mlp"]))
    whole = jax.tree.map(
        lambda t, d: jnp.zeros_like(t) if d is None else d,
        theta,
        step.direction,
        is_leaf=lambda x: x is None,
    )
    close(
        displacement(part, theta, batch, step.direction).total,
        displacement(apply, theta, batch, whole).total,
    )
