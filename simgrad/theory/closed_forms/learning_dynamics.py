"""What one gradient step does to a whole next-token distribution, and where pushed-down mass goes.

A step θ' = θ - η ∇L whose loss reaches the parameters through the logits of a context x_u moves the
log-probs at another context x_o by

    Δ log π(·|x_o) = -η A K G + O(η²)

A = I - 1 π(·|x_o)^T turns logits into log-probs, K = (∂z_o/∂θ)(∂z_u/∂θ)^T is the block of the
empirical tangent kernel of the logits, and G = ∂L/∂z_u is what the objective asks for: π - e_y for
SFT on y, d_w (π - e_y) for the tokens of a chosen and -d_l (π - e_y) for those of a rejected
response.

Source: Ren & Sutherland, arXiv 2407.10490, Proposition 1 (decomposition) and the squeezing effect;
what is said about finite steps and thresholds of squeezing is derived here. The two contexts'
vocabulary axes are both ``V``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Apply, bind, prediction_error
from simgrad.typing import Array, Bool, Float, Int, Theta

__all__ = [
    "Decomposition",
    "Squeeze",
    "decompose",
    "linear_softmax_logit_kernel",
    "logit_kernel",
    "logit_residual",
    "predicted_change",
    "softmax_jacobian",
    "squeeze",
    "squeeze_step",
    "unconstrained_logit_kernel",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decomposition:
    """The three factors of a first-order change of log π(·|x_o).

    Attributes:
        adaptation: A = I - 1 π^T at the observed context; every row sums to 0.
        kernel: K, rows for the observed, columns for the updated context's logits.
        residual: G = ∂L/∂logits at the updated context.
    """

    adaptation: Float[Array, "V V"]
    kernel: Float[Array, "V V"]
    residual: Float[Array, " V"]

    def change(self, learning_rate: float | Float[Array, ""] = 1.0) -> Float[Array, " V"]:
        """-η A K G, the first-order change of log π(·|x_o) in nats."""
        pull = jnp.einsum("vu,u->v", self.kernel, self.residual, precision="highest")
        return -learning_rate * jnp.einsum("vu,u->v", self.adaptation, pull, precision="highest")


def softmax_jacobian(logits: Float[Array, " V"]) -> Float[Array, "V V"]:
    """A = I - 1 π^T, the Jacobian of log-softmax.

    >>> import jax.numpy as jnp
    >>> softmax_jacobian(jnp.zeros(2)).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    probs = jax.nn.softmax(tree.widen(logits))
    return jnp.eye(probs.shape[0], dtype=probs.dtype) - probs[None]


def logit_residual(
    logits: Float[Array, "*rows V"],
    targets: Int[Array, "*rows"],
    weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*rows V"]:
    """G = weight (π - e_y), weight 1 for SFT tokens, d_w for chosen and -d_l for rejected tokens.

    >>> import jax.numpy as jnp
    >>> logit_residual(jnp.zeros(2), jnp.array(0)).tolist()
    [-0.5, 0.5]
    """
    return -weight * prediction_error(logits, targets)


def _logits(apply: Apply, theta: Theta, tokens: Array, rows: Array) -> Float[Array, "Q V"]:
    return tree.widen(apply(theta, tokens[None], rows=rows[None]).logits[0])


def _last(tokens: Int[Array, " T"]) -> Int[Array, " Q"]:
    return jnp.array([tokens.shape[0] - 1], tokens.dtype)


@functools.partial(jax.jit, static_argnames="apply")
def logit_kernel(
    apply: Apply, theta: Theta, observed: Int[Array, " T"], updated: Int[Array, " _"]
) -> Float[Array, "V V"]:
    """K between the next-token logits after two token sequences, over all trained parameters.

    Forms both V x θ Jacobians, so it is for small models and for looking; :func:`predicted_change`
    needs neither. Unit: nats² per unit of θ².

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair
    >>> apply, theta = linear_softmax([Pair([1, 2], [3], [4])], 5, 4)
    >>> kernel = logit_kernel(apply, theta, jnp.array([1]), jnp.array([1, 2]))
    >>> jnp.allclose(kernel, kernel[0, 0] * jnp.eye(5, dtype=kernel.dtype)).item()  # ⟨φ, φ'⟩ I
    True
    """
    model = bind(apply, theta)

    def jacobian(tokens: Array) -> Theta:
        def logits(trained: Theta) -> Array:
            return _logits(apply, model.whole(trained), tokens, _last(tokens))[0]

        value, pullback = jax.vjp(logits, model.trained)
        return tree.pulled_back(pullback, jnp.eye(value.shape[0], dtype=value.dtype))

    def product(a: Array, b: Array) -> Array:
        flat = (tree.widen(x).reshape(x.shape[0], -1) for x in (a, b))
        return jnp.einsum("vi,ui->vu", *flat, precision="highest")

    blocks = jax.tree.map(product, jacobian(observed), jacobian(updated))
    return jnp.stack(jax.tree.leaves(blocks)).sum(0)


def linear_softmax_logit_kernel(
    hidden: Float[Array, " D"], other: Float[Array, " D"], vocab_size: int
) -> Float[Array, "V V"]:
    """K = ⟨φ, φ'⟩ I for frozen features and a trained unembedding.

    >>> import jax.numpy as jnp
    >>> linear_softmax_logit_kernel(jnp.ones(3), 2 * jnp.ones(3), 2).tolist()
    [[6.0, 0.0], [0.0, 6.0]]
    """
    product = tree.dot(hidden, other)
    return product * jnp.eye(vocab_size, dtype=product.dtype)


def unconstrained_logit_kernel(
    unembedding: Float[Array, "V D"],
    hidden: Float[Array, " D"],
    other: Float[Array, " D"],
    same_context: bool,
) -> Float[Array, "V V"]:
    """K = ⟨h, h'⟩ I + [same context] W W^T for an unconstrained-features model. Derived here.

    >>> import jax.numpy as jnp
    >>> w, h = jnp.array([[1.0], [-1.0]]), jnp.array([2.0])
    >>> [unconstrained_logit_kernel(w, h, h, same).tolist() for same in (True, False)]
    [[[5.0, -1.0], [-1.0, 5.0]], [[4.0, 0.0], [0.0, 4.0]]]
    """
    kernel = linear_softmax_logit_kernel(hidden, other, unembedding.shape[0])
    w = tree.widen(unembedding)
    return kernel + jnp.einsum("vd,ud->vu", w, w, precision="highest") if same_context else kernel


@functools.partial(jax.jit, static_argnames="apply")
def decompose(
    apply: Apply,
    theta: Theta,
    observed: Int[Array, " T"],
    updated: Int[Array, " _"],
    residual: Float[Array, " V"],
) -> Decomposition:
    """A, K and G for the next tokens after two sequences.

    A response of many tokens, or a pair, is a sum of such steps: one for each token's context, with
    its :func:`logit_residual`; :func:`predicted_change` takes them in one go.

    >>> from simgrad.models import ModelConfig, create
    >>> import jax.numpy as jnp
    >>> apply, theta = create(ModelConfig(vocab_size=5, width=4, depth=1, heads=2))
    >>> step = decompose(apply, theta, jnp.array([1, 2]), jnp.array([3]), jnp.ones(5, "float32"))
    >>> step.change(0.1).shape
    (5,)
    """
    logits = _logits(apply, theta, observed, _last(observed))[0]
    return Decomposition(
        softmax_jacobian(logits), logit_kernel(apply, theta, observed, updated), residual
    )


@functools.partial(jax.jit, static_argnames="apply")
def predicted_change(
    apply: Apply,
    theta: Theta,
    observed: Int[Array, " T"],
    updated: Int[Array, " _"],
    rows: Int[Array, " Q"],
    residuals: Float[Array, "Q V"],
    learning_rate: float | Float[Array, ""] = 1.0,
) -> Float[Array, " V"]:
    """Σ_q -η A K_q G_q: first-order Δ log π(·|observed) after a step on many rows of one sequence.

    ``rows`` are the positions of ``updated`` whose logits carry ``residuals``. Costs one backward
    and one forward derivative and forms no Jacobian.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair
    >>> apply, theta = linear_softmax([Pair([1, 2], [3], [4])], 5, 4)
    >>> tokens, row = jnp.array([1, 2]), jnp.array([1])
    >>> residual = logit_residual(apply(theta, tokens[None]).logits[0, row], jnp.array([3]))
    >>> change = predicted_change(apply, theta, tokens, tokens, row, residual, 0.1)
    >>> (change > 0).tolist()  # SFT on token 3
    [False, False, False, True, False]
    """
    model = bind(apply, theta)

    def at(tokens: Array, rows: Array):
        return lambda trained: _logits(apply, model.whole(trained), tokens, rows)

    _, pullback = jax.vjp(at(updated, rows), model.trained)
    (gradient,) = pullback(residuals)
    logits, moved = jax.jvp(at(observed, _last(observed)), (model.trained,), (gradient,))
    return -learning_rate * (moved[0] - tree.dot(jax.nn.softmax(logits[0]), moved[0]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Squeeze:
    """One step of pushing a token down in its logits.

    Attributes:
        change: Δ log π of every token, in nats, exact for any step size.
        threshold: τ; among the tokens that are not pushed, exactly those with π_z > τ rise.
        rises: which tokens rise.
    """

    change: Float[Array, " V"]
    threshold: Float[Array, ""]
    rises: Bool[Array, " V"]


def squeeze_step(
    logits: Float[Array, " V"], token: Int[Array, ""], learning_rate: float | Float[Array, ""]
) -> Squeeze:
    """Gradient descent on log π(y) in the logits themselves: z ← z - η (e_y - π).

    Exactly, for every η > 0, with τ = (1/η) log Σ_j π_j exp(η (π_j - [j = y])),

        Δ log π_z = η (π_z - [z = y] - τ)      and so      Δ log(π_z / π_z') = η (π_z - π_z')

    for z, z' ≠ y. Since π_y - 1 < τ < max_{z ≠ y} π_z, the pushed token always falls and the
    likeliest of the others always rises and gains on each of them, while every z below τ (‖π‖² -
    π_y as η → 0) falls although it was not pushed. If y is not the argmax, the argmax's lead over
    every other token grows the more the lower the temperature; its own Δ log π is not monotone, it
    vanishes as π_max → 1. If y is the argmax, the runner-up gains most, but less again at low
    temperature. If π is uniform the others rise alike.

    Source: the squeezing effect of Ren & Sutherland, arXiv 2407.10490; threshold derived here.

    >>> import jax.numpy as jnp
    >>> squeeze_step(jnp.array([2.0, 1.0, 0.0, -3.0]), jnp.array(3), 0.5).rises.tolist()
    [True, False, False, False]
    """
    log_probs = jax.nn.log_softmax(tree.widen(logits))
    pull = -prediction_error(logits, token)
    push = learning_rate * pull
    # for small steps the logarithm of a sum near one cancels, for large ones the exponentials
    # overflow
    near = jnp.log1p(tree.dot(jnp.exp(log_probs), jnp.expm1(jnp.clip(push, -1.0, 1.0))))
    far = jax.nn.logsumexp(log_probs + push)
    threshold = jnp.where(jnp.abs(push).max() <= 1, near, far) / learning_rate
    change = learning_rate * (pull - threshold)
    return Squeeze(change, threshold, change > 0)


def squeeze(
    logits: Float[Array, " V"],
    token: Int[Array, ""],
    learning_rate: float | Float[Array, ""],
    steps: int,
) -> Float[Array, "E V"]:
    """Log-probs before and after each of ``steps`` steps of :func:`squeeze_step` (steps + 1 rows).

    >>> import jax.numpy as jnp
    >>> squeeze(jnp.array([2.0, 1.0, -3.0]), jnp.array(2), 1.0, 50)[-1].argmax().item()
    0
    """

    def step(logits: Array, _: None) -> tuple[Array, Array]:
        moved = logits - learning_rate * prediction_error(logits, token)
        return moved, moved

    start = tree.widen(logits)
    _, path = jax.lax.scan(step, start, None, length=steps)
    return jax.nn.log_softmax(jnp.concatenate([start[None], path]), axis=-1)
