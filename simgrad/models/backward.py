"""A transformer's backward pass by layer, for many cotangents at once, without weight gradients.

Each cotangent has a copy of every sequence on the batch axis. A layer's nonlinear parts are
computed again for the copies; its linear maps are not, since their outputs were kept
(:class:`simgrad.models.layers.Tape`), so a layer costs one matrix product a map. What ``visit``
makes of its signals is all that is kept of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simgrad.models.layers import Tape, visible
from simgrad.models.output import Inputs, Use, Visit
from simgrad.typing import Array, Float


def backward(
    model: Any,
    inputs: Inputs,
    uses: dict[str, Use],
    cotangents: Float[Array, "J N T D"],
    visit: Visit,
) -> dict[str, Any]:
    """As :meth:`simgrad.models.TappedApply.backward`, on a :class:`simgrad.models.Transformer`."""
    copies = cotangents.shape[0]
    signal = cotangents.reshape(-1, *cotangents.shape[2:])
    found: dict[str, Any] = {}
    if hasattr(model, "final_norm"):
        last = {name: uses[name] for name in ("state", "final_norm")}
        signal, found = _through(
            lambda x, tape: model.final_norm(x, "final_norm", tape), last, signal, copies, visit
        )
    if model.config.depth:
        layers = {
            name.removeprefix("layers/"): use
            for name, use in uses.items()
            if name.startswith("layers/")
        }
        graph, stacked = nnx.split(model.layers)
        mask = visible(inputs.positions, inputs.streams)
        at, mask = (_copied(x, copies) for x in (inputs.positions, mask))

        def step(signal: Array, layer: tuple[Any, dict[str, Use]]) -> tuple[Array, dict[str, Any]]:
            block = nnx.merge(graph, layer[0])
            return _through(
                lambda x, tape: block(x, at, mask, tape), layer[1], signal, copies, visit
            )

        signal, layered = jax.lax.scan(step, signal, (stacked, layers), reverse=True)
        found |= layered
    for use in (uses[site] for site in ("embedding", "positions") if site in uses):
        found |= visit(use, (_by_copy(signal, copies),))
    return found


def _copied(x: Array, copies: int) -> Array:
    return jnp.broadcast_to(x[None], (copies, *x.shape)).reshape(-1, *x.shape[1:])


def _by_copy(x: Array, copies: int) -> Array:
    return x.reshape(copies, -1, *x.shape[1:])


def _through(
    run: Callable[[Array, Tape], Array],
    uses: dict[str, Use],
    signal: Array,
    copies: int,
    visit: Visit,
) -> tuple[Array, dict[str, Any]]:
    """The signal at the state that ``run`` received, and what was made of those on the way."""
    operations = [use for use in uses.values() if use.sites]
    known, taps = {}, {}
    for use in operations:
        for site, y in zip(use.sites, use.outputs or (use.input,) * len(use.sites), strict=True):
            name = site.removeprefix("layers/")
            taps[name] = jnp.zeros_like(_copied(y, copies))
            if use.outputs:
                known[name] = _copied(y, copies)
    _, pullback = jax.vjp(
        lambda x, taps: run(x, Tape(known=known, taps=taps)),
        _copied(uses["state"].input, copies),
        taps,
    )
    # each signal is made once, then read
    signal, at = jax.lax.optimization_barrier(pullback(signal))
    found: dict[str, Any] = {}
    for use in operations:
        found |= visit(
            use, tuple(_by_copy(at[site.removeprefix("layers/")], copies) for site in use.sites)
        )
    return signal, found
