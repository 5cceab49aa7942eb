"""The directional displacement score: one update direction of the data set, one forward derivative a response."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad import tree
from simgrad.dynamics.recipe import Recipe
from simgrad.models import Apply
from simgrad.models.likelihood import in_chunks, log_probs, require_shape, responses
from simgrad.objectives import Objective
from simgrad.pairs import Batch
from simgrad.theory.prediction.steps import loss_gradient, updated
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["DirectionalScore", "directional_change", "directional_score", "run_direction"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DirectionalScore:
    """Predicted Δlog π of responses over a whole run, in nats; the axis of length 2 is (chosen, rejected).

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

    with the second moments of Adam, AdamW and RMSProp held at the mean squared minibatch gradient
    of one epoch, so that the preconditioner is P = 1/(√v + ε) as it is after the first steps; first
    moments start at ḡ. Momentum and schedules run as they do, decay acts at θ, clipping sees ḡ. It
    costs one epoch of gradients (and one batch more where batches do not divide the pairs).

    Raises:
        ValueError: what :class:`Recipe` or the batch do not allow; mitigations and masks, which
        change the
            gradient with the policy; adaptive optimizers other than these, whose moments are not
            known here.
    """
    if recipe.mitigation is not None or recipe.mask is not None:
        raise ValueError(
            "a direction of the plain objective only: drop mitigation and mask, or train"
        )
    size = batch.size if recipe.batch_size is None else recipe.batch_size
    order = jnp.asarray(recipe.replace(steps=-(-batch.size // size)).order(batch.size))
    start = _logp(apply, theta, batch) if reference is None else reference
    require_shape("reference", start, (batch.size, 2))
    trained, _ = tree.partition(theta, recipe.include, apply.frozen)
    _require_settling(recipe.optimizer, trained)
    fixed = (recipe.objective, recipe.optimizer, recipe.steps)
    return _direction(apply, theta, batch, *fixed, start, order, tree.patterns(recipe.include))


@functools.partial(jax.jit, static_argnames="apply")
def _logp(apply: Apply, theta: Theta, batch: Batch) -> Array:
    return in_chunks(lambda some: responses(apply, theta, some).logp, batch)


@functools.partial(jax.jit, static_argnames=("apply", "objective", "optimizer", "steps", "include"))
def _direction(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Array,
    order: Int[Array, "E M"],
    include: tuple[str, ...] | None,
) -> Theta:
    trained, _ = tree.partition(theta, include, apply.frozen)
    size, left = order.shape[1], batch.size % order.shape[1]

    def slope(index: Array) -> Theta:
        return loss_gradient(apply, theta, batch.take(index), objective, reference[index], include)

    def gather(
        sums: tuple[Theta, Theta], row: tuple[Array, Array]
    ) -> tuple[tuple[Theta, Theta], None]:
        index, weight = row
        g = slope(index)
        first = jax.tree.map(lambda m, x: m + weight.astype(x.dtype) * x, sums[0], g)
        return (first, jax.tree.map(lambda v, x: v + x * x / len(order), sums[1], g)), None

    # a last batch that had to be filled up counts for the second moment; its own pairs for the mean
    weights = jnp.full(len(order), size / batch.size).at[-1].multiply(0.0 if left else 1.0)
    zero = jax.tree.map(jnp.zeros_like, trained)
    (mean, square), _ = jax.lax.scan(gather, (zero, zero), (order, weights))
    if left:
        mean = jax.tree.map(lambda m, x: m + (left / batch.size) * x, mean, slope(order[-1, :left]))

    def step(_: Any, carry: tuple[Theta, Any]) -> tuple[Theta, Any]:
        total, state = carry
        update, state = updated(optimizer, mean, _settled(state, mean, square), trained)
        return jax.tree.map(jnp.add, total, update), state

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(cast(Any, trained))
    return jax.lax.fori_loop(0, steps, step, (zero, state))[0]


def _holds_moments(node: Any) -> bool:
    return hasattr(node, "_fields") and "nu" in node._fields


def _require_settling(optimizer: optax.GradientTransformation, trained: Theta) -> None:
    """Refuse second moments that are none of Adam's or RMSProp's, and Adams whose first steps do not normalise."""
    whole = jax.eval_shape(optimizer.init, trained)
    kinds = [
        node for node in jax.tree.leaves(whole, is_leaf=_holds_moments) if _holds_moments(node)
    ]
    for node in kinds:
        if not isinstance(node, optax.ScaleByAdamState | optax.ScaleByRmsState) or not _normalises(
            optimizer
        ):
            raise ValueError(
                "the direction of a run is known for SGD, momentum, Adam, AdamW and RMSProp; this "
                "optimizer keeps "
                f"second moments otherwise ({type(node).__name__}): use kernel flow "
                "(linearized_run), or train"
            )


def _normalises(optimizer: optax.GradientTransformation) -> bool:
    """Whether a gradient of twice the size gives the same first step and four times the second moment."""
    with jax.ensure_compile_time_eval():
        probe = {"w": jnp.array([0.3, -0.7])}
        try:
            with jax.numpy_dtype_promotion("standard"):
                state = optimizer.init(cast(Any, probe))
            (a, once), (b, twice) = (
                updated(optimizer, {"w": c * probe["w"]}, state, probe) for c in (1.0, 2.0)
            )
        except (
            ValueError,
            KeyError,
            TypeError,
        ):  # made for the parameters' own tree: what it holds is believed
            return True
        nodes = (jax.tree.leaves(x, is_leaf=_holds_moments) for x in (once, twice))
        moments = [
            np.concatenate([np.ravel(n.nu["w"]) for n in some if _holds_moments(n)])
            for some in nodes
        ]
        return bool(
            np.allclose(a["w"], b["w"], rtol=1e-2)
            and np.allclose(4 * moments[0], moments[1], rtol=1e-2)
        )


def _settled(state: Any, mean: Theta, square: Theta) -> Any:
    """The optimizer's state with moments at their long-run values."""

    def held(old: Any, new: Theta) -> Any:
        return jax.tree.map(lambda o, n: o if _masked(o) else n, old, new, is_leaf=_masked)

    def settle(node: Any) -> Any:
        if not _holds_moments(node):
            return node
        moments = {"mu": mean, "nu": square}
        values = {
            name: held(getattr(node, name), new)
            for name, new in moments.items()
            if name in node._fields
        }
        if "count" in node._fields:
            values["count"] = jnp.full_like(node.count, 10**6)  # no bias correction
        return node._replace(**values)

    return jax.tree.map(settle, state, is_leaf=_holds_moments)


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def directional_change(
    apply: Apply, theta: Theta, batch: Batch, direction: Theta, include: Sequence[str] | None = None
) -> Float[Array, "B 2"]:
    """⟨∇log π(y), D⟩ of both responses of every pair: one forward derivative, about two forward passes.

    Any responses will do, trained on or not, in either layout (packed computes prompts once). Unit:
    nats.

    Raises:
        ValueError: ``direction`` holds other parameters than ``include`` selects.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, packed
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> nowhere = jax.tree.map(jnp.zeros_like, theta)
    >>> directional_change(apply, theta, packed([Pair([1, 2], [3], [4])]), nowhere).tolist()
    [[0.0, 0.0]]
    """
    trained, _ = tree.partition(theta, include, apply.frozen)
    if jax.tree.structure(trained) != jax.tree.structure(direction):
        raise ValueError(
            "direction must hold the trained parameters: give the include that it was made with"
        )
    return _change(apply, theta, batch, direction, tree.patterns(include))


@functools.partial(jax.jit, static_argnames=("apply", "include"))
def _change(
    apply: Apply, theta: Theta, batch: Batch, direction: Theta, include: tuple[str, ...] | None
) -> Array:
    def few(some: Batch) -> Array:
        logp, trained = log_probs(apply, theta, some, include)
        return jax.jvp(logp, (trained,), (direction,))[1]

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
    """Predicted Δlog π over a run on ``batch``: :func:`run_direction`, then :func:`directional_change`.

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
    if sample is None or sample == batch.size:
        direction = run_direction(apply, theta, batch, recipe)
        change = directional_change(apply, theta, follow, direction, recipe.include)
        return DirectionalScore(change, jnp.zeros_like(change))
    if not 2 <= groups <= sample <= batch.size:
        raise ValueError(
            f"sample={sample} of {batch.size} pairs in groups={groups}: 2 <= groups <= sample <= "
            "pairs"
        )
    drawn = np.random.default_rng(seed).permutation(batch.size)[:sample]
    size = batch.size if recipe.batch_size is None else recipe.batch_size

    def seen(index: np.ndarray) -> Array:
        part = recipe.replace(
            batch_size=None if recipe.batch_size is None else min(size, len(index))
        )
        direction = run_direction(apply, theta, batch.take(index), part)
        return directional_change(apply, theta, follow, direction, recipe.include)

    each = sample // groups
    parts = jnp.stack([seen(drawn[k * each : (k + 1) * each]) for k in range(groups)])
    error = parts.std(0, ddof=1) * float(np.sqrt((1 - sample / batch.size) / groups))
    return DirectionalScore(seen(drawn), error)
