"""What XLA's optimisation must not change.

The suite switches it off to compile quickly (conftest.py); ``XLA_FLAGS= pytest -m optimised`` runs
the tests that are marked so as users run the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgrad import tree


def _rms(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain


@pytest.mark.optimised
@pytest.mark.parametrize("count", [2, 36])
def test_gradients_of_several_cotangents_are_those_of_one_after_the_other(count):
    """36 cotangents of 118 x 16 numbers are more than 65,536: vmapped, they come out wrong."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    x, cotangents = draw(118, 16), draw(count, 118, 16)
    theta = {"gain": draw(1, 16), "kernel": draw(16, 16)}

    def network(theta):
        first = _rms(x, theta["gain"]) @ theta["kernel"]
        return jnp.tanh(_rms(first, theta["gain"])) @ theta["kernel"]

    @jax.jit
    def together(theta):
        return tree.pulled_back(jax.vjp(network, theta)[1], cotangents)

    _, pullback = jax.vjp(network, theta)
    for name, found in together(theta).items():
        one_by_one = np.stack([pullback(c)[0][name] for c in cotangents])
        scale = np.abs(one_by_one).max()
        np.testing.assert_allclose(found, one_by_one, atol=1e-5 * scale)
