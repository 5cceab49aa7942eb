"""What one step does to the log-probs of any response, to first and to second order.

A step θ → θ + v changes u = log π(y|x) by ⟨∇u, v⟩ + ½ vᵀ∇²u v + O(‖v‖³), for the responses that are
trained on and for any other (a paraphrase, a harmful answer) alike. v may be a pair's own gradient,
a batch's, or whatever an optax optimizer makes of it (:mod:`simgrad.theory.prediction.steps`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad.models import Apply, bind
from simgrad.pairs import Batch, in_chunks, one_by_one
from simgrad.theory.kernel.gram import PairKernel
from simgrad.typing import Array, Float, Theta


def first_order(
    kernel: PairKernel,
    force: Float[Array, "*pairs 2"],
    learning_rate: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*pairs 2"]:
    """First-order change of (chosen, rejected) after one SGD step on the pair alone, in nats.

        Δu = η K c + O(η²),        c = (d_w, -d_l)

    that is Δlog π_w = η (d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩), Δlog π_l = η (d_w ⟨g_w,g_l⟩ - d_l ‖g_l‖²).
    With η = 1 (the default) the result is per unit learning rate. In a batch of n pairs whose loss
    is a mean, a pair's own contribution is 1/n of this and the other pairs add theirs.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> first_order(kernel, jnp.array([[0.5, -0.5]]), learning_rate=0.25).tolist()
    [[-0.0625, -0.3125]]
    """
    moved = jnp.einsum("...ij,...j->...i", kernel.matrix, force, precision="highest")
    return learning_rate * moved


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepChange:
    """Terms of Δlog π along a step v, in nats; the axis of length 2 is (chosen, rejected).

    Attributes:
        first: ⟨∇u, v⟩.
        second: ½ vᵀ∇²u v.

    >>> import jax.numpy as jnp
    >>> change = StepChange(jnp.array([2.0, -1.0]), jnp.array([-4.0, -4.0]))
    >>> change.trust_radius.tolist(), change.scaled(0.5).total.tolist()
    ([0.5, 0.25], [0.0, -1.5])
    """

    first: Float[Array, "*pairs 2"]
    second: Float[Array, "*pairs 2"]

    @property
    def total(self) -> Float[Array, "*pairs 2"]:
        """Prediction to second order; its remainder is of third order in the step."""
        return self.first + self.second

    def scaled(self, factor: float | Float[Array, ""]) -> StepChange:
        """Terms of the step ``factor`` · v."""
        return StepChange(factor * self.first, factor**2 * self.second)

    @property
    def trust_radius(self) -> Float[Array, "*pairs 2"]:
        """η* = |first| / |second|: the factor on v at which both terms are equal in size.

        Beyond it a first-order statement about the response means nothing. Infinite where the
        second order vanishes, which may happen to one response of many: then the third order
        decides, and :attr:`safe_radius` is the better guide.
        """
        return _ratio(jnp.abs(self.first), jnp.abs(self.second))

    @property
    def safe_radius(self) -> Float[Array, "*pairs 2"]:
        """½ min(η*, ‖first‖/‖second‖), norms over all responses: up to it signs can be believed.

        At η* itself both orders may cancel, and a response whose second order happens to vanish has
        an η* far beyond the range of any expansion. ``simgrad validate`` counts how often signs are
        right inside both radii.
        """
        whole = _ratio(jnp.linalg.norm(self.first), jnp.linalg.norm(self.second))
        return jnp.minimum(self.trust_radius, whole) / 2


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b == 0, jnp.inf, a / jnp.where(b == 0, 1.0, b))


def _terms(logp: Callable[[Theta], Array], trained: Theta, step: Theta) -> StepChange:
    def rate(point: Theta) -> Array:
        return jax.jvp(logp, (point,), (step,))[1]

    first, bend = jax.jvp(rate, (trained,), (step,))
    return StepChange(first, bend / 2)


def displacement(apply: Apply, theta: Theta, batch: Batch, step: Theta) -> StepChange:
    """Δlog π of both responses of every pair along a parameter step, to second order.

    Two nested forward derivatives, about three forward passes, a few pairs at a time; the
    first-order part is the directional score ⟨∇log π(y), v⟩.

    Args:
        apply: the model that the step was made with.
        theta: its parameters.
        batch: the responses to follow, trained on or not.
        step: v, a tree like the trained parameters (None elsewhere), for example of
            :func:`simgrad.theory.optimizer_step`.

    Raises:
        ValueError: ``step`` holds other parameters than the model trains.

    Source: second-order term derived here; first-order as in :func:`first_order`.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> nowhere = jax.tree.map(jnp.zeros_like, theta)
    >>> displacement(apply, theta, padded([Pair([1, 2], [3], [4, 5])]), nowhere).total.tolist()
    [[0.0, 0.0]]
    """
    bind(apply, theta).require_step(step)
    return _displacement(apply, theta, batch, step)


@functools.partial(jax.jit, static_argnames="apply")
def _displacement(apply: Apply, theta: Theta, batch: Batch, step: Theta) -> StepChange:
    model = bind(apply, theta)
    return in_chunks(lambda some: _terms(lambda t: model.logp(t, some), model.trained, step), batch)


@functools.partial(jax.jit, static_argnames="apply")
def own_steps(apply: Apply, theta: Theta, batch: Batch, force: Float[Array, "B 2"]) -> StepChange:
    """Each pair trained alone by SGD with η = 1: v = d_w g_w - d_l g_l, both orders.

    ``.first`` is :func:`first_order`, ``.trust_radius`` the learning rate up to which the pair's
    regime can be believed, ``.scaled(η).total`` the second-order prediction.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch, force = padded([Pair([1, 2], [3], [4, 5])]), jnp.array([[1.0, -1.0]])
    >>> own_steps(apply, theta, batch, force).trust_radius.shape
    (1, 2)
    """
    model = bind(apply, theta)

    def one(pair: Batch, c: Array) -> StepChange:
        value, pullback = jax.vjp(lambda t: model.logp(t, pair), model.trained)
        (step,) = pullback(c[None].astype(value.dtype))
        terms = _terms(lambda t: model.logp(t, pair), model.trained, step)
        return jax.tree.map(lambda x: x[0], terms)

    return one_by_one(one, batch, force)
