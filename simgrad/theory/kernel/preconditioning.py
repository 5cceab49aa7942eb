"""Optimizers as the kernel sees them: a step is P ⊙ (ascent direction) plus what is carried on.

One update of optax's SGD, momentum, RMSProp or Adam on the loss gradient g reads

    θ ← θ + η (P ⊙ (-g) + drift)

with a diagonal P and a drift (past gradients) that are fixed by the optimizer's state *after* it
has seen g, second moments included. The kernel that decides who rises and who falls is then K_P = J
P J^T (:func:`simgrad.theory.entanglement_kernel` takes ``scale=P``) and Δu = η (K_P c + J drift) +
O(η²).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simgrad.theory.optimizers import updated
from simgrad.typing import Array, Theta

__all__ = ["Preconditioner", "adam", "momentum", "rmsprop", "sgd"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Preconditioner:
    """P and drift of one step, per unit learning rate; trees like the trained parameters.

    Attributes:
        scale: the diagonal of P, as :func:`simgrad.theory.entanglement_kernel` takes it.
        drift: what past gradients add to the step, whatever the gradient of this one.

    >>> import jax.numpy as jnp
    >>> Preconditioner(jnp.array([2.0]), jnp.array([-1.0])).step(jnp.array([3.0])).item()
    5.0
    """

    scale: Theta
    drift: Theta

    def step(self, ascent: Theta) -> Theta:
        """Step P ⊙ ascent + drift per unit learning rate; ``ascent`` is minus the loss gradient."""
        return jax.tree.map(lambda p, a, d: p * a + d, self.scale, ascent, self.drift)


def _state(state: Any, name: str, maker: str) -> Any:
    found = optax.tree.get(state, name)
    if found is None:
        raise ValueError(f"the optimizer state holds no {name}: was it made by {maker}?")
    return found


def sgd(gradient: Theta) -> Preconditioner:
    """P = 1, no drift.

    >>> import jax.numpy as jnp
    >>> sgd({"w": jnp.array([3.0])}).step({"w": jnp.array([-3.0])})["w"].item()
    -3.0
    """
    return Preconditioner(
        jax.tree.map(jnp.ones_like, gradient), jax.tree.map(jnp.zeros_like, gradient)
    )


def momentum(state: Any, gradient: Theta, decay: float, nesterov: bool = False) -> Preconditioner:
    """Heavy ball, v ← g + μ v: P = 1 and drift -μ v; with Nesterov's P = 1 + μ and drift -μ² v.

    Args:
        state: of ``optax.sgd(.., momentum=decay)`` or any chain that holds ``optax.trace``'s,
            before the step.
        gradient: of the loss at the step, as this transformation sees it: behind clipping it is the
            clipped gradient, and K_P c is then scaled by the same factor.
        decay: μ.
        nesterov: whether the optimizer was made with ``nesterov=True``.

    Raises:
        ValueError: the state holds no trace.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> g, optimizer = {"w": jnp.array([2.0])}, optax.sgd(1.0, momentum=0.5)
    >>> _, state = updated(optimizer, g, optimizer.init(g))
    >>> momentum(state, g, 0.5).step({"w": -g["w"]})["w"].item()  # -(g + 0.5 g)
    -3.0
    """
    trace = _state(state, "TraceState", "optax.sgd(.., momentum=..)").trace
    p, d = (1 + decay, decay**2) if nesterov else (1.0, decay)
    return Preconditioner(
        jax.tree.map(lambda g: jnp.full_like(g, p), gradient), jax.tree.map(lambda v: -d * v, trace)
    )


def rmsprop(
    state: Any, gradient: Theta, decay: float = 0.9, eps: float = 1e-8, eps_in_sqrt: bool = True
) -> Preconditioner:
    """P = 1/√(v + ε), or 1/(√v + ε), with the second moment v after it has seen ``gradient``.

    Defaults are optax.rmsprop's. ``state`` and ``gradient`` as in :func:`momentum`, of
    ``optax.rmsprop`` without momentum or bias correction.

    Raises:
        ValueError: the state holds no second moment of RMSProp, or momentum besides.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> g = {"w": jnp.array([3.0, -0.1])}
    >>> p = rmsprop(optax.rmsprop(1.0).init(g), g, decay=0.0)
    >>> p.step({"w": -g["w"]})["w"].round(4).tolist()
    [-1.0, 1.0]
    """
    before = _state(state, "ScaleByRmsState", "optax.rmsprop(..)")
    if optax.tree.get(state, "TraceState") is not None:
        raise ValueError(
            "the optimizer state also holds momentum, which P and drift of rmsprop do not describe"
        )
    _, after = updated(optax.scale_by_rms(decay, eps, eps_in_sqrt=eps_in_sqrt), gradient, before)
    scale = jax.tree.map(
        lambda v: jax.lax.rsqrt(v + eps) if eps_in_sqrt else 1 / (jnp.sqrt(v) + eps), after.nu
    )
    return Preconditioner(scale, jax.tree.map(jnp.zeros_like, gradient))


def adam(
    state: Any,
    gradient: Theta,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> Preconditioner:
    """P = (1-β₁)/(1-β₁ᵗ) / (√v̂ + ε), drift = -β₁ m /(1-β₁ᵗ) / (√v̂ + ε).

    m is the first moment before the step and v̂ the bias-corrected second moment after it has seen
    ``gradient``; t counts steps from one. At t = 1, P ⊙ g is sign-like: |g| cancels. Defaults are
    optax.adam's; for AdamW the decoupled decay, -λθ, is not part of P or drift. ``state`` and
    ``gradient`` as in :func:`momentum`, of ``optax.adam`` or ``optax.adamw``; Nadam keeps the same
    state but steps differently and is not described.

    Source: Kingma & Ba, arXiv 1412.6980, Algorithm 1.

    Raises:
        ValueError: the state holds no moments of Adam.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> g = {"w": jnp.array([3.0, -0.1])}
    >>> p = adam(optax.adam(1.0).init(g), g)
    >>> p.step({"w": -g["w"]})["w"].round(4).tolist()  # the first step is a sign
    [-1.0, 1.0]
    """
    before = _state(state, "ScaleByAdamState", "optax.adam(..)")
    _, after = updated(optax.scale_by_adam(b1, b2, eps, eps_root), gradient, before)
    with jax.numpy_dtype_promotion("standard"):
        second = optax.tree.bias_correction(after.nu, b2, after.count)
    root = jax.tree.map(lambda v: 1 / (jnp.sqrt(v + eps_root) + eps), second)

    def times(factor: float, r: Array) -> Array:
        return factor / (1 - b1 ** after.count.astype(r.dtype)) * r

    return Preconditioner(
        jax.tree.map(lambda r: times(1 - b1, r), root),
        jax.tree.map(lambda r, m: -times(b1, r) * m, root, before.mu),
    )
