"""Every predictor of what a run does to its pairs, in one shape, and one call that compares them.

A predictor maps a :class:`Setting` to Δlog π of both responses of each pair (higher: rises more). Some give
nats, others only a ranking of the chosen responses. Costs are in addition to one forward pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.agreement import agreement
from simgrad.dynamics.directional import directional_change, run_direction
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.training import train
from simgrad.findings import Table
from simgrad.models import Apply
from simgrad.pairs import Batch
from simgrad.theory import (
    Responses,
    ches,
    embedding_cosine,
    head_gap,
    last_hidden_inner,
    linearized_run,
    ln_ches,
    normalized_edit_distance,
    pair_kernel,
    responses,
)
from simgrad.theory.likelihood import in_chunks
from simgrad.typing import Array, Float, Theta

__all__ = ["PREDICTORS", "Comparison", "Predictor", "Setting", "compare", "measured", "predictor_table"]


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
        return dataclasses.replace(self, batch=self.batch.take(slice(index, index + 1)), recipe=recipe, alone=False)


@dataclass(frozen=True)
class Predictor:
    """A named prediction.

    Attributes:
        name: as in tables.
        predict: setting to Δlog π, or to a score whose order is that of Δlog π.
        nats: whether it predicts sizes and signs, or a ranking only.
        joint: whether it depends on the other pairs of the run.
        cost: what it computes, in words.
    """

    name: str
    predict: Callable[[Setting], Float[Array, "B 2"]]
    nats: bool
    joint: bool
    cost: str

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
    return np.asarray(train(s.apply, s.theta, s.batch, s.recipe).trace.change[-1])


def _ranking(score: Callable[[Responses, Batch], Array]) -> Callable[[Setting], Array]:
    """A similarity of each pair, turned so that the more similar pair is the one predicted to fall more."""

    def predict(s: Setting) -> Array:
        value = in_chunks(lambda some: score(responses(s.apply, s.theta, some), some), s.batch)
        return jnp.stack([-value, -value], axis=-1)

    return predict


def _full_gap(s: Setting) -> Array:
    gap = in_chunks(lambda some: pair_kernel(s.apply, s.theta, some, s.recipe.include).gap, s.batch)
    return jnp.stack([-gap, -gap], axis=-1)


def _own(s: Setting) -> Array:
    """Each pair as if it were trained alone; in a joint run its share of the loss is 1/B."""
    share = 1.0 if s.alone else 1.0 / s.batch.size
    return share * jnp.concatenate([_directional(s.pair(i)) for i in range(s.batch.size)])


def _edit_similarity(s: Setting) -> Array:
    targets, lengths = np.asarray(s.batch.targets), np.asarray(s.batch.lengths)
    sides = [[row[k, : n[k]].tolist() for row, n in zip(targets, lengths, strict=True)] for k in (0, 1)]
    distance = [normalized_edit_distance(w, l) for w, l in zip(*sides, strict=True)]  # noqa: E741
    return jnp.stack([jnp.asarray(distance)] * 2, axis=-1)


def _directional(s: Setting) -> Array:
    direction = run_direction(s.apply, s.theta, s.batch, s.recipe)
    return directional_change(s.apply, s.theta, s.batch, direction, s.recipe.include)


def _moved(theta: Theta, direction: Theta, factor: float) -> Theta:
    def add(t: Array, d: Array | None) -> Array:
        return t if d is None else t + factor * d

    return jax.tree.map(add, theta, direction, is_leaf=lambda x: x is None)


def _logp(s: Setting, theta: Theta) -> Array:
    return in_chunks(lambda some: responses(s.apply, theta, some).logp, s.batch)


def _ray(s: Setting) -> Array:
    direction = run_direction(s.apply, s.theta, s.batch, s.recipe)
    return _logp(s, _moved(s.theta, direction, 1.0)) - _logp(s, s.theta)


def _two_big_steps(s: Setting) -> Array:
    start = _logp(s, s.theta)
    halfway = _moved(s.theta, run_direction(s.apply, s.theta, s.batch, s.recipe), 0.5)
    rest = run_direction(s.apply, halfway, s.batch, s.recipe, reference=start)
    return _logp(s, _moved(halfway, rest, 0.5)) - start


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
            include=recipe.include,
            refresh=max(2, epoch) if refresh else None,
            read="ray" if read == "ray" else "linear",
        )
        return run.logp[-1] - run.logp[0]

    return predict


def _rerun(s: Setting) -> Array:
    return jnp.asarray(measured(dataclasses.replace(s, recipe=s.recipe.replace(seed=s.recipe.seed + 1))))


def _length(result: Responses, batch: Batch) -> Array:
    return batch.lengths[:, 0].astype(result.token_logp.dtype)


_FORWARD, _RERUN = "no more", "rerun, other order"
PREDICTORS = {
    p.name: p
    for p in (
        Predictor("chosen length", _ranking(_length), False, False, _FORWARD),
        Predictor("edit distance", _edit_similarity, False, False, "nothing"),
        Predictor("last-hidden inner", _ranking(lambda r, b: last_hidden_inner(r)), False, False, _FORWARD),
        Predictor("embedding cosine", _ranking(embedding_cosine), False, False, _FORWARD),
        Predictor("CHES", _ranking(ches), False, False, _FORWARD),
        Predictor("ln-CHES", _ranking(ln_ches), False, False, _FORWARD),
        Predictor("head gap", _ranking(head_gap), False, False, _FORWARD),
        Predictor("full gap", _full_gap, False, False, "a backward pass"),
        Predictor("own first order", _own, True, False, "a gradient of each pair"),
        Predictor("directional", _directional, True, True, "an epoch of gradients, then a forward derivative"),
        Predictor("ray", _ray, True, True, "an epoch of gradients, then a forward pass"),
        Predictor("two big steps", _two_big_steps, True, True, "two epochs of gradients, then a forward pass"),
        Predictor("kernel flow", _linearized(False, "linear"), True, True, "about the run"),
        Predictor("kernel flow, ray", _linearized(False, "ray"), True, True, "about the run"),
        Predictor("kernel flow, refreshed", _linearized(True, "ray"), True, True, "about the run"),
        Predictor(_RERUN, _rerun, True, True, "the run"),
    )
}
"""All predictors by name. ``kernel flow`` is the run on log-probs linearised at the start with the batch order
known (:func:`simgrad.theory.linearized_run`; for SGD the kernel's own recursion); refreshed once an epoch."""


@dataclass(frozen=True)
class Comparison:
    """One setting, measured and predicted; arrays over pairs, of the chosen responses, in nats.

    Attributes:
        measured: Δlog π_w by training.
        predicted: the same, or a score with its order, by predictor.
        seconds: each prediction's time, compilation included.
        lengths: response lengths.
    """

    measured: Float[np.ndarray, " B"]
    predicted: dict[str, Float[np.ndarray, " B"]]
    seconds: dict[str, float]
    lengths: Float[np.ndarray, "B 2"]

    def rows(self, label: str, seed: int = 0) -> list[dict[str, Any]]:
        """One row of :func:`simgrad.dynamics.agreement.agreement` a predictor."""
        return [
            {
                "setting": label,
                "predictor": name,
                "seed": seed,
                **dataclasses.asdict(agreement(guess, self.measured, self.lengths, PREDICTORS[name].nats)),
                "seconds": self.seconds[name],
                "largest |Δ|": float(np.abs(self.measured).max()),
            }
            for name, guess in self.predicted.items()
        ]


def compare(setting: Setting, predictors: Sequence[str] | None = None) -> Comparison:
    """Train a setting once and predict it by each predictor (None: all).

    The rerun is left out where the order of the pairs means nothing.

    Raises:
        ValueError: unknown predictor.
        DivergedError: the run does not stay finite.
    """
    names = list(PREDICTORS if predictors is None else predictors)
    if unknown := [name for name in names if name not in PREDICTORS]:
        raise ValueError(f"no predictor {unknown[0]!r}; there are: {', '.join(PREDICTORS)}")
    change = measured(setting)[:, 0].astype(float)
    predicted, seconds = {}, {}
    for name in names:
        if name == _RERUN and (setting.alone or setting.recipe.batch_size is None):
            continue
        begin = time.perf_counter()
        predicted[name] = PREDICTORS[name](setting)[:, 0].astype(float)
        seconds[name] = time.perf_counter() - begin
    return Comparison(change, predicted, seconds, np.asarray(setting.batch.lengths, float))


CAPTION = (
    "Agreement with the measured Δlog π of the chosen responses: Spearman, the same with lengths partialled out, "
    "R² in nats, precision at the ten that fall most, share of signs."
)


def predictor_table(settings: Mapping[str, Setting], predictors: Sequence[str] | None = None) -> Table:
    """How well each predictor foretells Δlog π of the chosen responses in each setting: one call, one table.

    Raises:
        ValueError: unknown predictor.
        DivergedError: a run does not stay finite.
    """
    rows = [row for label, setting in settings.items() for row in compare(setting, predictors).rows(label)]
    return Table.of("predictors", CAPTION, ("setting", "predictor"), rows)
