"""Every predictor of what a run does to its pairs, in one shape, and one call that compares them.

A predictor maps a :class:`Setting` to Δlog π of both responses of each pair (higher: rises more).
Some give nats, others only a ranking of the chosen responses. Costs are in addition to one forward
pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.directional import directional_change, run_direction
from simgrad.dynamics.linearized import linearized_run
from simgrad.dynamics.moments import adapts
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.training import train
from simgrad.models import Apply, Responses, bind, responses, sequence_logp
from simgrad.pairs import Batch, in_chunks
from simgrad.theory import pair_kernel
from simgrad.theory.similarity import (
    ches,
    embedding_cosine,
    head_gap,
    last_hidden_inner,
    ln_ches,
    normalized_edit_distance,
)
from simgrad.typing import Array, Float, Theta


@dataclass(frozen=True)
class Setting:
    """A run to be predicted.

    Attributes:
        apply: the model.
        theta: its parameters at the start; the policy is its own reference.
        batch: the pairs.
        recipe: how they are trained.
        alone: each pair is trained by itself for ``recipe.steps`` steps, from the same start.
    """

    apply: Apply
    theta: Theta
    batch: Batch
    recipe: Recipe
    alone: bool = False

    def pair(self, index: int) -> Setting:
        """The run on one pair."""
        recipe = self.recipe.replace(batch_size=None)
        return dataclasses.replace(
            self, batch=self.batch.take(slice(index, index + 1)), recipe=recipe, alone=False
        )


@dataclass(frozen=True)
class Predictor:
    """A named prediction.

    Attributes:
        name: as in tables.
        predict: setting to Δlog π, or to a score whose order is that of Δlog π.
        nats: whether it predicts sizes and signs, or a ranking only; see :meth:`in_nats`.
        joint: whether it depends on the other pairs of the run.
        cost: what it computes, in words.
    """

    name: str
    predict: Callable[[Setting], Float[Array, "B 2"]]
    nats: bool
    joint: bool
    cost: str
    own: bool = False
    """Whether it takes a pair's share of the loss for its share of the step."""

    def in_nats(self, setting: Setting) -> bool:
        """Whether it predicts sizes and signs here.

        What a pair's own gradient does is 1/B of a joint step only where steps are linear in the
        gradient; an optimizer that divides by its size (Adam, RMSProp) leaves a ranking.
        """
        optimizer, trained = setting.recipe.optimizer, bind(setting.apply, setting.theta).trained
        return self.nats and (setting.alone or not self.own or not adapts(optimizer, trained))

    def __call__(self, setting: Setting) -> Float[np.ndarray, "B 2"]:
        """The prediction for every pair."""
        if setting.alone and self.joint:
            pairs = [self.predict(setting.pair(i)) for i in range(setting.batch.size)]
            return np.concatenate([np.asarray(p) for p in pairs])
        return np.asarray(self.predict(setting))


def measured(setting: Setting) -> Float[np.ndarray, "B 2"]:
    """Δlog π of every pair by training, in nats.

    Raises:
        DivergedError: the run does not stay finite.
    """
    if setting.alone:
        return np.concatenate([measured(setting.pair(i)) for i in range(setting.batch.size)])
    s = setting
    return np.asarray(train(s.apply, s.theta, s.batch, s.recipe).trajectory.change[-1])


def _ranking(score: Callable[[Responses, Batch], Array]) -> Callable[[Setting], Array]:
    """A similarity of each pair, signed so that more similar pairs are predicted to fall more."""

    def predict(s: Setting) -> Array:
        value = in_chunks(lambda some: score(responses(s.apply, s.theta, some), some), s.batch)
        return jnp.stack([-value, -value], axis=-1)

    return predict


def _full_gap(s: Setting) -> Array:
    gap = in_chunks(lambda some: pair_kernel(s.apply, s.theta, some).gap, s.batch)
    return jnp.stack([-gap, -gap], axis=-1)


def _own(s: Setting) -> Array:
    """Each pair as if it were trained alone; in a joint run its share of the loss is 1/B."""
    share = 1.0 if s.alone else 1.0 / s.batch.size
    return share * jnp.concatenate([_directional(s.pair(i)) for i in range(s.batch.size)])


def _edit_similarity(s: Setting) -> Array:
    targets, lengths = np.asarray(s.batch.targets), np.asarray(s.batch.lengths)
    sides = [
        [row[k, : n[k]].tolist() for row, n in zip(targets, lengths, strict=True)] for k in (0, 1)
    ]
    distance = [normalized_edit_distance(w, l) for w, l in zip(*sides, strict=True)]  # noqa: E741
    return jnp.stack([jnp.asarray(distance)] * 2, axis=-1)


def _directional(s: Setting) -> Array:
    direction = run_direction(s.apply, s.theta, s.batch, s.recipe)
    return directional_change(s.apply, s.theta, s.batch, direction)


def _moved(theta: Theta, direction: Theta, factor: float) -> Theta:
    def add(t: Array, d: Array | None) -> Array:
        return t if d is None else t + factor * d

    return jax.tree.map(add, theta, direction, is_leaf=lambda x: x is None)


def _ray(s: Setting) -> Array:
    direction = run_direction(s.apply, s.theta, s.batch, s.recipe)
    return sequence_logp(s.apply, _moved(s.theta, direction, 1.0), s.batch) - sequence_logp(
        s.apply, s.theta, s.batch
    )


def _two_big_steps(s: Setting) -> Array:
    start = sequence_logp(s.apply, s.theta, s.batch)
    halfway = _moved(s.theta, run_direction(s.apply, s.theta, s.batch, s.recipe), 0.5)
    rest = run_direction(s.apply, halfway, s.batch, s.recipe, reference=start)
    return sequence_logp(s.apply, _moved(halfway, rest, 0.5), s.batch) - start


def _linearized(refresh: bool, read: str) -> Callable[[Setting], Array]:
    def predict(s: Setting) -> Array:
        recipe, size = s.recipe, s.recipe.batch_size or s.batch.size
        epoch = s.batch.size // size if size < s.batch.size else recipe.steps // 4
        run = linearized_run(
            s.apply,
            s.theta,
            s.batch,
            recipe.objective,
            recipe.optimizer,
            recipe.steps,
            order=jnp.asarray(recipe.order(s.batch.size)),
            refresh=max(2, epoch) if refresh else None,
            read="ray" if read == "ray" else "linear",
        )
        return run.trajectory.change[-1]

    return predict


def _rerun(s: Setting) -> Array:
    return jnp.asarray(
        measured(dataclasses.replace(s, recipe=s.recipe.replace(seed=s.recipe.seed + 1)))
    )


def _length(result: Responses, batch: Batch) -> Array:
    return batch.lengths[:, 0].astype(result.token_logp.dtype)


_FORWARD, RERUN = "no more", "rerun, other order"
PREDICTORS = {
    p.name: p
    for p in (
        Predictor("chosen length", _ranking(_length), False, False, _FORWARD),
        Predictor("edit distance", _edit_similarity, False, False, "nothing"),
        Predictor(
            "last-hidden inner", _ranking(lambda r, b: last_hidden_inner(r)), False, False, _FORWARD
        ),
        Predictor("embedding cosine", _ranking(embedding_cosine), False, False, _FORWARD),
        Predictor("CHES", _ranking(ches), False, False, _FORWARD),
        Predictor("ln-CHES", _ranking(ln_ches), False, False, _FORWARD),
        Predictor("head gap", _ranking(head_gap), False, False, _FORWARD),
        Predictor("full gap", _full_gap, False, False, "a backward pass"),
        Predictor("own first order", _own, True, False, "a gradient of each pair", own=True),
        Predictor(
            "directional",
            _directional,
            True,
            True,
            "an epoch of gradients, then a forward derivative",
        ),
        Predictor("ray", _ray, True, True, "an epoch of gradients, then a forward pass"),
        Predictor(
            "two big steps",
            _two_big_steps,
            True,
            True,
            "two epochs of gradients, then a forward pass",
        ),
        Predictor("kernel flow", _linearized(False, "linear"), True, True, "about the run"),
        Predictor("kernel flow, ray", _linearized(False, "ray"), True, True, "about the run"),
        Predictor("kernel flow, refreshed", _linearized(True, "ray"), True, True, "about the run"),
        Predictor(RERUN, _rerun, True, True, "the run"),
    )
}
"""All predictors by name.

``kernel flow`` is the run on log-probs linearised at the start with the batch order known
(:func:`simgrad.dynamics.linearized_run`; for SGD the kernel's own recursion); refreshed once an
epoch."""
