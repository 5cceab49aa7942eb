"""What a step really does to log-probs, measured without cancellation.

The difference of two log-probs loses its digits when the step is small: in float32 a change of 1e-4
nats is good to a few per mille. The fundamental theorem gives the same number as an integral of
derivatives along the step,

    log π(θ + ηv) - log π(θ) = η ∫₀¹ ⟨∇log π(θ + sηv), v⟩ ds

whose relative error stays at rounding however small η is. Four Gauss-Legendre nodes are exact for
polynomials of degree seven in s; where a step moves a log-prob by a nat or more, the difference has
digits enough and is taken.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import Apply, bind
from simgrad.pairs import Batch
from simgrad.theory.prediction import ascent
from simgrad.typing import Array, Float, Theta

NODES = 4


def _moved(trained: Theta, step: Theta, by: Array) -> Theta:
    """θ + by · v, added in the accumulator's precision and rounded once."""

    def add(t: Array, v: Array) -> Array:
        wide = tree.widen(t)
        return (wide + by.astype(wide.dtype) * tree.widen(v)).astype(t.dtype)

    return jax.tree.map(add, trained, step)


@functools.partial(jax.jit, static_argnames="apply")
def measured_along(
    apply: Apply, theta: Theta, batch: Batch, step: Theta, rates: Float[Array, " E"]
) -> Float[Array, "E B 2"]:
    """Δ log π of both responses of every pair after θ → θ + η v, at every rate η, in nats.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch, step = padded([Pair([1, 2], [3], [4, 5])]), jax.tree.map(jnp.ones_like, theta)
    >>> path = measured_along(apply, theta, batch, step, jnp.array([0.01]))[0]
    >>> bool(jnp.allclose(path, difference(apply, theta, batch, step, jnp.array(0.01)), atol=1e-5))
    True
    """
    model = bind(apply, theta)
    x, w = np.polynomial.legendre.leggauss(NODES)
    nodes = jnp.asarray((x + 1) / 2, rates.dtype), jnp.asarray(w / 2, rates.dtype)
    start = model.logp(model.trained, batch)

    def one(eta: Array) -> Array:
        def rate(node: tuple[Array, Array]) -> Array:
            s, weight = node
            point = _moved(model.trained, step, s * eta)
            slope = jax.jvp(lambda t: model.logp(t, batch), (point,), (step,))[1]
            return weight.astype(slope.dtype) * slope

        total = jax.lax.map(rate, nodes).sum(0)
        plain = model.logp(_moved(model.trained, step, eta), batch) - start
        return jnp.where(jnp.abs(plain) < 1, eta.astype(total.dtype) * total, plain)

    return jax.lax.map(one, rates)


@functools.partial(jax.jit, static_argnames="apply")
def difference(
    apply: Apply, theta: Theta, batch: Batch, step: Theta, rate: Float[Array, ""]
) -> Float[Array, "B 2"]:
    """The plain difference log π(θ + ηv) - log π(θ)."""
    model = bind(apply, theta)
    moved = model.logp(_moved(model.trained, step, rate), batch)
    return moved - model.logp(model.trained, batch)


@functools.partial(jax.jit, static_argnames="apply")
def pulled(apply: Apply, theta: Theta, batch: Batch, force: Float[Array, "B 2"]) -> Theta:
    """Jᵀ c over both responses of all pairs: minus the loss gradient for this force."""
    model = bind(apply, theta)
    return ascent(model, model.trained, batch, force)
