"""optax under strict promotion rules."""

from __future__ import annotations

from typing import Any

import jax
import optax

from simgrad.typing import Theta


def updated(
    optimizer: optax.GradientTransformation,
    gradient: Theta,
    state: Any,
    trained: Theta | None = None,
) -> tuple[Theta, Any]:
    """``optimizer.update``, whatever promotion rules are in force: optax needs the usual ones.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> optimizer, gradient = optax.sgd(0.5), {"w": jnp.array([2.0])}
    >>> updated(optimizer, gradient, optimizer.init(gradient))[0]["w"].item()
    -1.0
    """
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradient, state, trained)


def begun(optimizer: optax.GradientTransformation, trained: Theta) -> Any:
    """``optimizer.init``, whatever promotion rules are in force."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.init(trained)
