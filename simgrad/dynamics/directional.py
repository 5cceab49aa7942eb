"""The directional displacement score: one data-set direction, one forward derivative a response."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad import tree
from simgrad.dynamics.recipe import Recipe
from simgrad.models import Apply, bind, responses
from simgrad.models.likelihood import require_shape
from simgrad.objectives import Objective
from simgrad.pairs import Batch, in_chunks
from simgrad.theory.optimizers import begun, updated
from simgrad.theory.prediction.changes import require_step
from simgrad.theory.prediction.steps import loss_gradient
from simgrad.typing import Array, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DirectionalScore:
    """Predicted Δlog π of responses over a run, in nats; the last axis is (chosen, rejected).

    Attributes:
        change: ⟨∇log π(y), D⟩.
        error: standard error from having seen only a sample of the pairs (0 if all were seen).
    """

    change: Float[Array, "B 2"]
    error: Float[Array, "B 2"]


def run_direction(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    reference: Float[Array, "B 2"] | None = None,
) -> Theta:
    """D: where the whole run would go if gradients stayed what they are now.

        D = Σ_{t < steps} optimizer_t(ḡ),        ḡ = mean gradient of all pairs at θ

    Schedules and momentum run as they do, decay acts at θ. For Adam, AdamW and RMSProp the second
    moment is held at the mean squared minibatch gradient of one epoch, so that the preconditioner
    is P = 1/(√v + ε) as it is after the first steps, and the first moment at the mean; both are of
    gradients as these transformations see them, behind clipping and whatever else stands before
    them in a chain. Without second moments clipping sees ḡ, whose norm is below a minibatch's. It
    costs one epoch of gradients (and one batch more where batches do not divide the pairs).

    Raises:
        ValueError: what :class:`Recipe` or the batch do not allow; mitigations and masks, which
            change the gradient with the policy; adaptive optimizers other than these, whose moments
            are not known here.
    """
    if recipe.mitigation is not None or recipe.mask is not None:
        raise ValueError(
            "a direction of the plain objective only: drop mitigation and mask, or train"
        )
    size = batch.size if recipe.batch_size is None else recipe.batch_size
    order = jnp.asarray(recipe.replace(steps=-(-batch.size // size)).order(batch.size))
    start = _logp(apply, theta, batch) if reference is None else reference
    require_shape("reference", start, (batch.size, 2))
    _require_settling(recipe.optimizer, bind(apply, theta).trained)
    fixed = (recipe.objective, recipe.optimizer, recipe.steps)
    return _direction(apply, theta, batch, *fixed, start, order)


@functools.partial(jax.jit, static_argnames="apply")
def _logp(apply: Apply, theta: Theta, batch: Batch) -> Array:
    return in_chunks(lambda some: responses(apply, theta, some).logp, batch)


@functools.partial(jax.jit, static_argnames=("apply", "objective", "optimizer", "steps"))
def _direction(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Array,
    order: Int[Array, "E M"],
) -> Theta:
    trained = bind(apply, theta).trained
    size, left = order.shape[1], batch.size % order.shape[1]
    state, zero = begun(optimizer, trained), jax.tree.map(jnp.zeros_like, trained)
    met = _met_by_moments(optimizer, state, trained)

    def grad(index: Array) -> Theta:
        return met(loss_gradient(apply, theta, batch.take(index), objective, reference[index]))

    def gather(sums: tuple[Theta, Theta], row: tuple[Array, Array]) -> tuple[tuple, None]:
        index, weight = row
        g = grad(index)
        first = jax.tree.map(lambda m, x: m + weight.astype(x.dtype) * x, sums[0], g)
        return (first, jax.tree.map(lambda v, x: v + x * x / len(order), sums[1], g)), None

    # a last batch that had to be filled up counts for the second moment; its own pairs for the mean
    weights = jnp.full(len(order), size / batch.size).at[-1].multiply(0.0 if left else 1.0)
    (mean, square), _ = jax.lax.scan(gather, (zero, zero), (order, weights))
    if left:
        own = grad(order[-1, :left])
        mean = jax.tree.map(lambda m, x: m + (left / batch.size) * x, mean, own)
    # what stands before the moments (an L2 term) acts again when the mean is handed over
    fed = jax.tree.map(jnp.subtract, mean, met(zero))

    def step(_: Any, carry: tuple[Theta, Any]) -> tuple[Theta, Any]:
        total, state = carry
        update, state = updated(optimizer, fed, _settled(state, mean, square), trained)
        return jax.tree.map(jnp.add, total, update), state

    return jax.lax.fori_loop(0, steps, step, (zero, state))[0]


def adapts(optimizer: optax.GradientTransformation, trained: Theta) -> bool:
    """Whether the optimizer divides by the size of past gradients."""
    return bool(_moments(jax.eval_shape(lambda t: begun(optimizer, t), trained)))


def _holds_moments(node: Any) -> bool:
    return hasattr(node, "_fields") and "nu" in node._fields


def _moments(state: Any) -> list[Any]:
    """The optimizer's states that hold second moments."""
    leaves = jax.tree.leaves(state, is_leaf=_holds_moments)
    return [node for node in leaves if _holds_moments(node)]


TINY = 2.0**-30
"""A gradient that no clipping touches: a power of two, so that products with it are exact."""


def _met_by_moments(
    optimizer: optax.GradientTransformation, state: Any, trained: Theta
) -> Callable[[Theta], Theta]:
    """The gradient as the optimizer's moments see it: clipped, decayed, scaled.

    One update from zero moments leaves (1 - β₁) g in the first one, or (1 - β₂) g² in the second;
    the factor is read off a gradient that is too small to be clipped. Parameters that have no
    moments, while others have, keep the share of their gradient that clipping left to the others.
    """
    if not (kept := _moments(state)):
        return lambda gradient: gradient
    name, zero = _read_from(kept), jax.tree.map(jnp.zeros_like, trained)
    bare = _settled(state, zero, zero)

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
    nothing = traces(zero)
    probe = traces(jax.tree.map(lambda x: jnp.full_like(x, TINY), trained))

    def unscaled(has: bool, x: Array, p: Array, n: Array) -> Array:
        return x * TINY / (p - n).reshape(-1)[0] if has else x

    def met(gradient: Theta) -> Theta:
        here = traces(gradient)
        seen = jax.tree.map(unscaled, has_moments, here, probe, nothing)
        if all(jax.tree.leaves(has_moments)):
            return seen
        change = jax.tree.map(jnp.subtract, here, nothing)
        clipped = jax.tree.map(unscaled, has_moments, change, probe, nothing)
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


def _require_settling(optimizer: optax.GradientTransformation, trained: Theta) -> None:
    """Refuse moments other than Adam's or RMSProp's, and Adams that do not normalise at once."""
    moments = _moments(jax.eval_shape(lambda t: begun(optimizer, t), trained))
    if moments and _read_from(moments) == "nu" and _sees_parameters(optimizer):
        raise ValueError(
            "the direction of a run is not known for RMSProp behind an L2 term, whose square alone "
            "is kept: decay after it, as AdamW does, or use linearized_run, or train"
        )
    for node in moments:
        known = isinstance(node, optax.ScaleByAdamState | optax.ScaleByRmsState)
        if not known or not _normalises(optimizer):
            raise ValueError(
                "the direction of a run is known for SGD, momentum, Adam, AdamW and RMSProp, with "
                "clipping, decay and schedules; this optimizer keeps second moments otherwise "
                f"({type(node).__name__}): use linearized_run, or train"
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


def _divides(optimizer: optax.GradientTransformation, size: float) -> bool:
    probe = {"w": jnp.array([0.3, -0.7], jnp.float32)}
    (a, once), (b, twice) = (_few_steps(optimizer, probe, x) for x in (size, 2 * size))
    moments = [np.concatenate([np.ravel(n.nu["w"]) for n in some]) for some in (once, twice)]
    untouched = np.allclose(4 * moments[0], moments[1], rtol=1e-2, atol=0)
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


def _settled(state: Any, mean: Theta, square: Theta) -> Any:
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


def directional_change(
    apply: Apply, theta: Theta, batch: Batch, direction: Theta
) -> Float[Array, "B 2"]:
    """⟨∇log π(y), D⟩ of both responses of every pair: one forward derivative, about two forwards.

    Any responses will do, trained on or not, in either layout (packed computes prompts once). Unit:
    nats.

    Raises:
        ValueError: ``direction`` holds other parameters than the model trains.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, packed
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> nowhere = jax.tree.map(jnp.zeros_like, theta)
    >>> directional_change(apply, theta, packed([Pair([1, 2], [3], [4])]), nowhere).tolist()
    [[0.0, 0.0]]
    """
    require_step(bind(apply, theta), direction)
    return _change(apply, theta, batch, direction)


@functools.partial(jax.jit, static_argnames="apply")
def _change(apply: Apply, theta: Theta, batch: Batch, direction: Theta) -> Array:
    model = bind(apply, theta)

    def few(some: Batch) -> Array:
        return jax.jvp(lambda t: model.logp(t, some), (model.trained,), (direction,))[1]

    return in_chunks(few, batch)


def directional_score(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    *,
    follow: Batch | None = None,
    sample: int | None = None,
    groups: int = 4,
    seed: int = 0,
) -> DirectionalScore:
    """Predict Δlog π over a run on ``batch``.

    This is :func:`run_direction`, then :func:`directional_change`.

    Args:
        apply: the model.
        theta: its parameters at the start; the policy is its own reference.
        batch: all pairs of the run.
        recipe: how it is trained.
        follow: responses to predict (None: the pairs themselves).
        sample: see only so many pairs, drawn at random, for the direction. Its error is then given
            too.
        groups: parts of the sample whose separate directions give the error: their standard
            deviation over √groups, times √(1 - sample/pairs). Under Adam the parts' own moments
            make this an estimate.
        seed: of the sample.

    Raises:
        ValueError: a sample that is larger than the data, or too small for its groups.
    """
    follow = batch if follow is None else follow
    return directions(apply, theta, batch, recipe, sample, groups, seed).score(apply, theta, follow)


@dataclass(frozen=True)
class Directions:
    """Where a run goes, seen from all pairs or from a sample.

    Attributes:
        seen: the direction.
        parts: those that parts of the sample see; none without a sample.
        share: what their standard deviation counts for in the error.
    """

    seen: Theta
    parts: tuple[Theta, ...] = ()
    share: float = 0.0

    def score(self, apply: Apply, theta: Theta, batch: Batch) -> DirectionalScore:
        """Δlog π of any responses, and its error."""
        change = directional_change(apply, theta, batch, self.seen)
        if not self.parts:
            return DirectionalScore(change, jnp.zeros_like(change))
        each = jnp.stack([directional_change(apply, theta, batch, part) for part in self.parts])
        return DirectionalScore(change, each.std(0, ddof=1) * self.share)


def directions(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    recipe: Recipe,
    sample: int | None = None,
    groups: int = 4,
    seed: int = 0,
) -> Directions:
    """The direction of a run, as :func:`directional_score` takes it, for many batches to be read.

    Raises:
        ValueError: as there.
    """
    if sample is None or sample == batch.size:
        return Directions(run_direction(apply, theta, batch, recipe))
    if not 2 <= groups <= sample <= batch.size:
        raise ValueError(
            f"sample={sample} of {batch.size} pairs in groups={groups}: 2 <= groups <= sample <= "
            "pairs"
        )

    def seen(index: np.ndarray) -> Theta:
        size = None if recipe.batch_size is None else min(recipe.batch_size, len(index))
        return run_direction(apply, theta, batch.take(index), recipe.replace(batch_size=size))

    drawn = np.random.default_rng(seed).permutation(batch.size)[:sample]
    each = sample // groups
    parts = tuple(seen(drawn[k * each : (k + 1) * each]) for k in range(groups))
    return Directions(seen(drawn), parts, float(np.sqrt((1 - sample / batch.size) / groups)))
