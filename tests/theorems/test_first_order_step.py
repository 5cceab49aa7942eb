"""Δlog π_w = η (d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩) + O(η²) after one SGD step on a pair alone, and
likewise Δlog π_l.

Counter-example: as if the two gradients were orthogonal, without ⟨g_w,g_l⟩, the remainder is of
first order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close, model
from oracles import slope

from simgrad import objectives
from simgrad.models import bind
from simgrad.pairs import padded
from simgrad.theory import first_order, pair_kernel, responses

CHANGES = np.geomspace(1e-5, 1e-3, 5)
"""Sizes of the predicted change, in nats: small enough for the order, large enough for float64."""


def measured_and_predicted(kind, objective, pair, drop_inner=False):
    """Arrays (changes, 2) for one pair; the reference is a perturbed policy, so that the margin is
    not zero."""
    apply, theta = model(kind)
    batch = padded([pair])
    bound = bind(apply, theta)
    trained = bound.trained
    reference = responses(apply, theta, batch).logp - jnp.array([[0.3, -0.2]])
    lengths = batch.lengths

    @jax.jit
    def logp(trained):
        return responses(apply, bound.whole(trained), batch).logp

    gradient = jax.jit(jax.grad(lambda t: objective.loss(logp(t), reference, lengths).sum()))(
        trained
    )
    start = logp(trained)
    kernel = pair_kernel(apply, theta, batch)
    if drop_inner:
        kernel = dataclasses.replace(kernel, inner=jnp.zeros_like(kernel.inner))
    force = objective.force(start, reference, lengths)
    per_unit = first_order(kernel, force)
    rates = CHANGES / float(jnp.abs(per_unit[0, 0]))
    measured = [
        logp(jax.tree.map(lambda t, g, r=r: t - r * g, trained, gradient)) - start for r in rates
    ]
    predicted = [first_order(kernel, force, float(r)) for r in rates]
    return np.stack(measured)[:, 0], np.stack(predicted)[:, 0]


def order(measured, predicted):
    return slope(CHANGES, np.abs(measured - predicted))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", "dpo"),
        ("linear_softmax", "dpo"),
        *(("unconstrained_features", name) for name in objectives.names()),
    ],
)
def test_remainder_is_of_second_order(kind, name):
    slopes = order(*measured_and_predicted(kind, objectives.get(name), PAIRS[0]))
    np.testing.assert_allclose(slopes, 2.0, atol=0.05)


def test_without_the_entanglement_term_it_is_of_first_order():
    """Dropping ⟨g_w, g_l⟩ leaves an error that shrinks only as fast as the step."""
    slopes = order(
        *measured_and_predicted("plain", objectives.get("dpo"), PAIRS[0], drop_inner=True)
    )
    np.testing.assert_allclose(slopes, 1.0, atol=0.05)


def test_learning_rate_scales_the_change():
    kernel = pair_kernel(*model("plain"), padded(PAIRS))
    ones = jnp.ones((len(PAIRS), 2))
    force = objectives.get("dpo").force(ones, ones, ones.astype(int))
    close(first_order(kernel, force, 0.3), 0.3 * first_order(kernel, force))
