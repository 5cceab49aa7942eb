"""Second moments in an optimizer's state: found, read, and held at their long-run values.

optax says nothing about what a chain does to a gradient, so that it is tried: an update from zero
moments shows the gradient that the moments see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad import tree
from simgrad.theory.optimizers import begun, updated
from simgrad.typing import Array, Theta


def adapts(optimizer: optax.GradientTransformation, trained: Theta) -> bool:
    """Whether the optimizer divides by the size of past gradients."""
    state = jax.eval_shape(lambda t: begun(optimizer, t), trained)
    return bool(_moments(state) or _unknown(state)) or not _is_proportional(optimizer)


_KNOWN = (
    "EmptyState TraceState ScaleByAdamState ScaleByRmsState ScaleByScheduleState MaskedState "
    "InjectHyperparamsState InjectStatefulHyperparamsState WrappedScheduleState PartitionState "
    "MaskedNode".split()
)
"""Parts of an optimizer's state whose role in a direction is known."""


def _unknown(state: Any) -> list[str]:
    """Names of the other parts of a state."""
    inside = state.values() if isinstance(state, dict) else state if type(state) is tuple else ()
    own = []
    if hasattr(state, "_fields"):
        inside = tuple(state)
        own = [type(state).__name__] if type(state).__name__ not in _KNOWN else []
    return own + [name for part in inside for name in _unknown(part)]


def _holds_moments(node: Any) -> bool:
    return hasattr(node, "_fields") and "nu" in node._fields


def _moments(state: Any) -> list[Any]:
    """The optimizer's states that hold second moments."""
    leaves = jax.tree.leaves(state, is_leaf=_holds_moments)
    return [node for node in leaves if _holds_moments(node)]


TINY = 2.0**-30
"""A gradient that no clipping touches: a power of two, so that products with it are exact."""


def met_by_moments(
    optimizer: optax.GradientTransformation, state: Any, trained: Theta
) -> Callable[[Theta], Theta]:
    """The gradient as the optimizer's moments see it: clipped, decayed, scaled.

    One update from zero moments leaves (1 - β₁) g in the first one, or (1 - β₂) g² in the second;
    the factor is read off the derivative of the first at a gradient of zero, where nothing is
    clipped, or off a tiny gradient. Parameters that have no
    moments, while others have, keep the share of their gradient that clipping left to the others.
    """
    if not (kept := _moments(state)):
        return lambda gradient: gradient
    name, zero = _read_from(kept), jax.tree.map(jnp.zeros_like, trained)
    bare = settled(state, zero, zero)

    def by_leaf(f: Callable[..., Any], gradient: Theta, nodes: list[Any]) -> Theta:
        # one moment a leaf: of several groups of parameters, the group's own
        def of_leaf(g: Array, *found: Any) -> Any:
            return f(g, next((x for x in found if not _masked(x)), None))

        trees = [_unmasked(getattr(node, name), gradient) for node in nodes]
        return jax.tree.map(of_leaf, gradient, *trees)

    def trace(g: Array, moment: Array | None) -> Array:
        if moment is None:
            return jnp.zeros_like(g)
        return moment if name == "mu" else jnp.sign(g) * jnp.sqrt(moment)

    def traces(gradient: Theta) -> Theta:
        after = updated(optimizer, gradient, bare, trained)[1]
        return by_leaf(trace, gradient, _moments(after))

    has_moments = by_leaf(lambda _, moment: moment is not None, trained, kept)
    nothing, one = traces(zero), jax.tree.map(jnp.ones_like, trained)
    if name == "mu":  # exact even behind an L2 term, in which a small gradient would drown
        factor = jax.jvp(traces, (zero,), (one,))[1]
    else:
        tiny = traces(jax.tree.map(lambda x: TINY * x, one))
        factor = jax.tree.map(lambda x: x / TINY, tiny)

    def unscaled(has: bool, x: Array, factor: Array) -> Array:
        return x / factor.reshape(-1)[0] if has else x

    def met(gradient: Theta) -> Theta:
        here = traces(gradient)
        seen = jax.tree.map(unscaled, has_moments, here, factor)
        if all(jax.tree.leaves(has_moments)):
            return seen
        change = jax.tree.map(jnp.subtract, here, nothing)
        clipped = jax.tree.map(unscaled, has_moments, change, factor)
        before = jax.tree.map(lambda has, g: g if has else jnp.zeros_like(g), has_moments, gradient)
        square = tree.inner(before, before)
        share = tree.inner(before, clipped) / jnp.where(square > 0, square, 1.0)
        share = jnp.where(square > 0, share, 1.0)
        return jax.tree.map(
            lambda has, x, g: x if has else share.astype(g.dtype) * g, has_moments, seen, gradient
        )

    return met


def _read_from(moments: list[Any]) -> str:
    """The moment off which gradients are read: the first, if all groups have one."""
    return "mu" if all("mu" in node._fields for node in moments) else "nu"


def _unmasked(moment: Theta, like: Theta) -> Theta:
    """A tree with one entry for every leaf of ``like``, masked ones included."""
    return jax.tree.structure(like).unflatten(jax.tree.leaves(moment, is_leaf=_masked))


def require_settling(optimizer: optax.GradientTransformation, trained: Theta) -> None:
    """Refuse moments other than Adam's or RMSProp's, and Adams that do not normalise at once."""
    state = jax.eval_shape(lambda t: begun(optimizer, t), trained)
    moments, unknown = _moments(state), _unknown(state)
    if moments and _read_from(moments) == "nu" and _sees_parameters(optimizer):
        raise ValueError(
            "the direction of a run is not known for RMSProp behind an L2 term, whose square alone "
            "is kept: decay after it, as AdamW does, or use linearized_run, or train"
        )
    usual = _normalises(optimizer) if moments else _is_proportional(optimizer)
    if usual and not unknown:
        return
    parts = ", ".join(dict.fromkeys(unknown or [type(node).__name__ for node in moments]))
    what = f"keeps {parts}" if parts else "takes steps that are not in proportion to gradients"
    raise ValueError(
        "the direction of a run is known for SGD, momentum, Adam, AdamW and RMSProp, with "
        f"clipping, decay and schedules; this optimizer is another one ({what}): use "
        "linearized_run, or train; for micro-batches give Recipe.accumulate"
    )


def _sees_parameters(optimizer: optax.GradientTransformation) -> bool:
    """Whether second moments grow without a gradient: a decay of the parameters comes before."""
    with jax.ensure_compile_time_eval():
        at = {"w": jnp.ones(1, jnp.float32)}
        try:
            _, after = updated(optimizer, {"w": 0 * at["w"]}, begun(optimizer, at), at)
        except (ValueError, KeyError, TypeError):
            return False  # made for the parameters' own tree
        grown = zip(_moments(begun(optimizer, at)), _moments(after), strict=True)
        return any(bool((y.nu["w"] > x.nu["w"]).any()) for x, y in grown)


def _normalises(optimizer: optax.GradientTransformation) -> bool:
    """Whether its first steps are divided by the size of gradients already.

    Then a gradient of twice the size, with four times the second moment, does not give steps of
    twice the size. That is tried at several sizes: small ones may drown in ε, large ones be
    clipped. There are a few steps, so that a warm-up has begun.
    """
    with jax.ensure_compile_time_eval():
        try:
            return any(_divides(optimizer, 2.0**k) for k in (-10, -6, -2, -14, -18))
        except (ValueError, KeyError, TypeError):
            return True  # made for the parameters' own tree: what its state holds is believed


def _is_proportional(optimizer: optax.GradientTransformation) -> bool:
    """Whether a small gradient of twice the size gives steps of twice the size."""
    probe = {"w": jnp.array([0.3, -0.7], jnp.float32)}
    with jax.ensure_compile_time_eval():
        try:
            once, twice = (_few_steps(optimizer, probe, 2.0**k)[0] for k in (-21, -20))
        except (ValueError, KeyError, TypeError):
            return True  # made for the parameters' own tree
    return bool(np.allclose(2 * once, twice, rtol=1e-2, atol=0))


def _divides(optimizer: optax.GradientTransformation, size: float) -> bool:
    probe = {"w": jnp.array([0.3, -0.7], jnp.float32)}
    (a, once), (b, twice) = (_few_steps(optimizer, probe, x) for x in (size, 2 * size))
    squares = [[n.nu["w"] for n in some if not _masked(n.nu["w"])] for some in (once, twice)]
    if not squares[0]:
        raise ValueError("the probe is masked by its shape, which is not that of the parameters")
    moments = [np.concatenate([np.ravel(x) for x in some]) for some in squares]
    untouched = moments[0].any() and np.allclose(4 * moments[0], moments[1], rtol=1e-2, atol=0)
    return bool(untouched and np.abs(b).sum() <= 1.5 * np.abs(a).sum())


def _few_steps(
    optimizer: optax.GradientTransformation, probe: dict[str, Array], size: float
) -> tuple[np.ndarray, list[Any]]:
    """Updates of four equal gradients at zero parameters, and the moments afterwards."""
    at = jax.tree.map(jnp.zeros_like, probe)
    state, steps = begun(optimizer, at), []
    for _ in range(4):
        update, state = updated(optimizer, {"w": size * probe["w"]}, state, at)
        steps.append(np.asarray(update["w"]))
    return np.stack(steps), _moments(state)


def settled(state: Any, mean: Theta, square: Theta) -> Any:
    """The optimizer's state with moments at their long-run values."""

    def held(old: Any, new: Theta) -> Any:
        return jax.tree.map(lambda o, n: o if _masked(o) else n, old, new, is_leaf=_masked)

    def settle(node: Any) -> Any:
        if not _holds_moments(node):
            return node
        moments = {"mu": mean, "nu": square}
        values = {n: held(getattr(node, n), x) for n, x in moments.items() if n in node._fields}
        if "count" in node._fields:
            values["count"] = jnp.full_like(node.count, 10**6)  # no bias correction
        return node._replace(**values)

    return jax.tree.map(settle, state, is_leaf=_holds_moments)


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
