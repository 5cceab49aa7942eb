"""One cell of the grid: a step predicted to first and second order, measured at many rates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import stats

from simgrad import objectives, tree
from simgrad.models import bind
from simgrad.pairs import Batch
from simgrad.theory import PairKernel, displacement, first_order, pair_kernel, regime, responses
from simgrad.theory.optimizers import updated
from simgrad.theory.prediction import StepChange
from simgrad.typing import Array, Float, Theta
from simgrad.validation.checks import gap
from simgrad.validation.grid import Grid, optimizer
from simgrad.validation.measure import measured_along, pulled
from simgrad.validation.subjects import Subject

NOISE = 100
"""A remainder says nothing below this many roundoffs of the change itself."""
POINTS, NEAR = 3, 0.05
"""An order is fitted to the smallest usable rates within this share of the trust radius.

Usable rates are those that rounding does not spoil.
"""


@dataclass(frozen=True)
class Base:
    """What all cells of a subject share.

    Attributes:
        subject: the policy and its pairs.
        every: batches of one pair each, trained pairs first: one compiled program serves them all.
        logp: log π of the trained pairs.
        kernel: theirs, by the library's default route.
        alone: (d_w, -d_l) of each pair trained by itself, by objective.
        together: the same of the mean loss over all pairs.
        rounding: unit roundoff.
    """

    subject: Subject
    every: tuple[Batch, ...]
    logp: Float[Array, "B 2"]
    kernel: PairKernel
    alone: dict[str, Float[Array, "B 2"]]
    together: dict[str, Float[Array, "B 2"]]
    rounding: float


def base_of(subject: Subject, objectives: tuple[str, ...]) -> Base:
    """Evaluate a subject once."""
    followed, count = subject.followed, len(subject.pairs)
    every = tuple(followed.take(slice(i, i + 1)) for i in range(followed.size))
    apply, theta = subject.apply, subject.theta
    logp = jnp.concatenate([responses(apply, theta, pair).logp for pair in every[:count]])
    kernels = [pair_kernel(apply, theta, pair) for pair in every[:count]]
    kernel = jax.tree.map(lambda *xs: jnp.concatenate(xs), *kernels)
    rounding = max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(theta))
    alone, together = _forces(logp, subject.references(logp), followed.lengths[:count], objectives)
    return Base(subject, every, logp, kernel, alone, together, rounding)


@functools.partial(jax.jit, static_argnames="names")
def _forces(
    logp: Array, reference: Array, lengths: Array, names: tuple[str, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(d_w, -d_l) of every pair under every objective, for its own loss and for the mean loss."""
    losses = {name: objectives.get(name) for name in names}

    def one(loss: objectives.Objective, *x: Array) -> Array:
        return loss.force(*(y[None] for y in x))[0]

    alone = {
        n: jax.vmap(functools.partial(one, loss))(logp, reference, lengths)
        for n, loss in losses.items()
    }
    together = {n: loss.force(logp, reference, lengths) / len(logp) for n, loss in losses.items()}
    return alone, together


@dataclass(frozen=True)
class Cell:
    """What one setting gave. Relative errors are relative to the first-order change.

    Attributes:
        kind: ``alone`` (each pair by itself, SGD, the pair kernel's prediction) or ``together``
            (one step on all pairs, the optimizer's own direction; probes are followed too).
        model: of the grid.
        arithmetic: dtype and precision.
        device: where it ran.
        objective: by name.
        optimizer: by name.
        finite: whether every prediction and measurement is.
        trust_radius: ‖first‖/‖second‖ over all responses, in learning rates.
        order_first: fitted order of ‖measured - first order‖ in η, with a 95 % jackknife interval
            over pairs (None: too few rates at which rounding does not hide it).
        order_second: the same for the second-order prediction.
        error_first: largest relative error of the first-order prediction inside the safe radius.
        error_second: of the second-order prediction.
        signs: share of responses and rates inside the safe radius whose change has the predicted
            sign.
        signs_own: the same inside each response's own η* = |first|/|second|.
        signs_count: of how many.
        regimes: share of pairs and rates with both responses inside whose regime is the predicted
            one.
        regimes_count: of how many.
        r2_first: R² of the first-order prediction over responses, at the rate next to a tenth of
            the trust radius.
        r2_second: the same for the second order.
        holds_to: largest multiple of the trust radius up to which R² of the second-order prediction
            is above .9.
        holds_to_nats: the largest |Δ log π| there.
        reference_error: of the first-order prediction against float64 on the CPU with the same d_w
            and d_l, relative to the largest in the cell (None: this is that reference).
        multiples: the learning rates as multiples of the trust radius.
        curve_first: relative error of the first order at each rate: norm over all responses.
        curve_second: of the second order.
        curve_signs: share of all responses with the predicted sign at each rate.
    """

    kind: str
    model: str
    arithmetic: str
    device: str
    objective: str
    optimizer: str
    finite: bool
    trust_radius: float
    order_first: tuple[float, float, float] | None
    order_second: tuple[float, float, float] | None
    error_first: float
    error_second: float
    signs: float
    signs_count: int
    signs_own: float
    regimes: float
    regimes_count: int
    r2_first: float
    r2_second: float
    holds_to: float
    holds_to_nats: float
    reference_error: float | None
    multiples: Sequence[float] = field(repr=False)
    curve_first: Sequence[float] = field(repr=False)
    curve_second: Sequence[float] = field(repr=False)
    curve_signs: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class Ray:
    """A step v = factor · direction of about unit norm, so that low precision cannot overflow."""

    direction: Theta
    factor: float


def _ray(step: Theta) -> Ray:
    direction, factor = _scaled(step)
    return Ray(direction, float(factor))


@jax.jit
def _scaled(step: Theta) -> tuple[Theta, Array]:
    """Divided by the power of two next to the norm, which rounds nothing."""
    norm = jnp.sqrt(tree.inner(step, step))
    factor = jnp.where((norm > 0) & jnp.isfinite(norm), jnp.exp2(jnp.round(jnp.log2(norm))), 1.0)
    return jax.tree.map(
        lambda x: (tree.widen(x) / factor.astype(tree.widen(x).dtype)).astype(x.dtype), step
    ), factor


def _predicted(base: Base, rays: Sequence[Ray]) -> tuple[np.ndarray, np.ndarray]:
    """First and second order of each pair's change along its ray, in float64."""
    s = base.subject
    changes = [
        displacement(s.apply, s.theta, pair, ray.direction)
        for pair, ray in zip(base.every, rays, strict=False)
    ]
    first = [np.asarray(c.first, float) * ray.factor for c, ray in zip(changes, rays, strict=True)]
    second = [
        np.asarray(c.second, float) * ray.factor**2 for c, ray in zip(changes, rays, strict=True)
    ]
    return np.concatenate(first), np.concatenate(second)


def alone(
    base: Base, reference: Base, objective: str, grid: Grid, where: dict[str, str]
) -> Cell | None:
    """Judge the regime of every pair by itself under SGD; None if the objective moves no pair."""
    s, force = base.subject, base.alone[objective]
    first = _first_alone(base, force)
    rays = [
        _ray(pulled(s.apply, s.theta, pair, f[None]))
        for pair, f in zip(base.every, force, strict=False)
    ]
    exact = (
        None if reference is base else _first_alone(reference, force.astype(reference.logp.dtype))
    )
    regimes = np.asarray(regime(first_order(base.kernel, force)))
    where = {**where, "kind": "alone", "objective": objective, "optimizer": "sgd"}
    return _judged(base, where, first, _predicted(base, rays)[1], rays, regimes, grid, exact)


def together(
    base: Base, reference: Base, objective: str, name: str, grid: Grid, where: dict[str, str]
) -> Cell | None:
    """One step of an optimizer on all pairs: what it does to them, and to the probes.

    None where the objective moves no pair.
    """
    rays = [_ray(step_of(base, objective, name))] * len(base.every)
    first, second = _predicted(base, rays)
    exact = None
    if reference is not base:
        force = base.together[objective].astype(reference.logp.dtype)
        exact, _ = _predicted(
            reference, [_ray(_step(reference, force, name))] * len(reference.every)
        )
    where = {**where, "kind": "together", "objective": objective, "optimizer": name}
    return _judged(base, where, first, second, rays, regimes_of(first), grid, exact)


def step_of(base: Base, objective: str, name: str) -> Theta:
    """The optimizer's update at learning rate 1, its moments fed by two earlier gradients."""
    return _step(base, base.together[objective], name)


def first_update(base: Base, objective: str, name: str) -> Theta:
    """The same with fresh moments."""
    return _step(base, base.together[objective], name, settled=False)


def _step(base: Base, force: Array, name: str, settled: bool = True) -> Theta:
    s = base.subject
    trained = bind(s.apply, s.theta).trained

    def gradient(force: Array) -> Array:
        return _minus_sum(
            [
                pulled(s.apply, s.theta, pair, f[None])
                for pair, f in zip(base.every, force, strict=False)
            ]
        )

    forces = (0.7 * force, jnp.roll(force, 1, 0), force) if settled else (force,)
    return _whole(_last_update(name, [gradient(f) for f in forces], _flat(trained)), trained)


@jax.jit
def _minus_sum(ascents: list[Theta]) -> Array:
    total = ravel_pytree([tree.widen(x) for x in jax.tree.leaves(ascents[0])])[0] * 0
    for ascent in ascents:
        total -= ravel_pytree([tree.widen(x) for x in jax.tree.leaves(ascent)])[0]
    return total.astype(jax.tree.leaves(ascents[0])[0].dtype)


@jax.jit
def _flat(trained: Theta) -> Array:
    return ravel_pytree(trained)[0]


@jax.jit
def _whole(vector: Array, trained: Theta) -> Theta:
    return ravel_pytree(trained)[1](vector)


@functools.partial(jax.jit, static_argnames="name")
def _last_update(
    name: str, gradients: list[Float[Array, " n"]], point: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The next update, on parameters in one vector: a program that all models can share."""
    transform = optimizer(name)
    state, step = transform.init(point), point
    for gradient in gradients:
        step, state = updated(transform, gradient, state, point)
    return step.astype(point.dtype)


def _first_alone(base: Base, force: Array) -> np.ndarray:
    return np.asarray(first_order(base.kernel, force), float)


def regimes_of(change: np.ndarray) -> np.ndarray:
    """Values of :class:`simgrad.theory.Regime` of measured changes, an oracle for ``regime``."""
    falls, rises = change[..., 0] < 0, change[..., 1] > 0
    return np.where(falls, np.where(rises, 3, 1), np.where(rises, 2, 0))


def _judged(
    base: Base,
    where: dict[str, str],
    first: np.ndarray,
    second: np.ndarray,
    rays: Sequence[Ray],
    regimes: np.ndarray,
    grid: Grid,
    exact: np.ndarray | None,
) -> Cell | None:
    """Take the steps and compare, leaving out pairs that the objective does not move.

    A saturated hinge, for example, does not move its pair.
    """
    reference_error = None if exact is None else gap(first, exact)
    moves = np.flatnonzero(~(np.abs(first).max(-1) == 0)).tolist()
    if not len(moves):
        return None
    first, second, regimes = first[moves], second[moves], regimes[moves]
    moved = StepChange(jnp.asarray(first), jnp.asarray(second))
    unit = float(np.linalg.norm(first) / max(np.linalg.norm(second), 1e-300))
    rates = np.array(grid.learning_rates or [m * unit for m in grid.rates])
    s, dtype = base.subject, base.logp.dtype
    pieces = [
        measured_along(
            s.apply,
            s.theta,
            base.every[i],
            rays[i].direction,
            jnp.asarray(rates * rays[i].factor, dtype),
        )
        for i in moves
    ]
    measured = np.concatenate([np.asarray(x, float) for x in pieces], 1)

    eta, multiple = rates[:, None, None], rates / unit
    one, two = eta * first, eta * first + eta**2 * second
    misses, size = [np.abs(measured - x) for x in (one, two)], np.abs(eta * first)
    relative = [np.where(size > 0, miss / np.where(size > 0, size, 1), 0.0) for miss in misses]
    inside, own = (
        np.asarray(eta <= np.asarray(r, float)) for r in (moved.safe_radius, moved.trust_radius)
    )
    right = np.sign(measured) == np.sign(one)
    norms = [np.linalg.norm(x, axis=(1, 2)) for x in (*misses, one)]
    r2 = [np.array([_r2(m, p) for m, p in zip(measured, x, strict=True)]) for x in (one, two)]
    middle, holds = int(np.argmin(np.abs(np.log(multiple / 0.1)))), _leading(r2[1] > 0.9)
    return Cell(
        **where,
        model=s.name,
        finite=bool(np.isfinite(measured).all() and np.isfinite([*first, *second]).all()),
        trust_radius=unit,
        order_first=_order(rates, multiple, misses[0], measured, base.rounding),
        order_second=_order(rates, multiple, misses[1], measured, base.rounding),
        error_first=_largest(relative[0], inside),
        error_second=_largest(relative[1], inside),
        signs=_share(right, inside),
        signs_count=int(inside.sum()),
        signs_own=_share(right, own),
        regimes=_share(regimes_of(measured) == regimes[None], inside.all(-1)),
        regimes_count=int(inside.all(-1).sum()),
        r2_first=float(r2[0][middle]),
        r2_second=float(r2[1][middle]),
        holds_to=float(multiple[holds - 1]) if holds else 0.0,
        holds_to_nats=float(np.abs(measured[:holds]).max()) if holds else 0.0,
        reference_error=reference_error,
        multiples=multiple.tolist(),
        curve_first=(norms[0] / norms[2]).tolist(),
        curve_second=(norms[1] / norms[2]).tolist(),
        curve_signs=right.mean((1, 2)).tolist(),
    )


def _largest(values: Any, where: Any) -> float:
    return float(values[where].max()) if where.any() else float("nan")


def _share(right: Any, where: Any) -> float:
    return float(right[where].mean()) if where.any() else float("nan")


def _leading(good: np.ndarray) -> int:
    return len(good) if good.all() else int(np.argmin(good))


def _r2(measured: np.ndarray, predicted: np.ndarray) -> float:
    spread = np.square(measured - measured.mean()).sum()
    return float(1 - np.square(measured - predicted).sum() / spread) if spread > 0 else float("nan")


def _order(
    rates: np.ndarray, multiple: np.ndarray, miss: np.ndarray, measured: np.ndarray, rounding: float
) -> tuple[float, float, float] | None:
    """Slope of log ‖miss‖ over log η, norms over all responses; jackknife interval over pairs."""
    clear = np.linalg.norm(miss, axis=(1, 2)) > NOISE * rounding * np.linalg.norm(
        measured, axis=(1, 2)
    )
    use = np.flatnonzero(clear & (multiple <= NEAR))[:POINTS]
    if len(use) < 3:
        return None

    def slope(keep: np.ndarray) -> float:
        return float(
            np.polyfit(
                np.log(rates[use]), np.log(np.linalg.norm(miss[use][:, keep], axis=(1, 2))), 1
            )[0]
        )

    count = miss.shape[1]
    whole = slope(np.arange(count))
    if count < 3:
        return whole, float("nan"), float("nan")
    parts = np.array([slope(np.delete(np.arange(count), i)) for i in range(count)])
    half = float(stats.t.ppf(0.975, count - 1)) * float(
        np.sqrt((count - 1) / count * np.square(parts - parts.mean()).sum())
    )
    return whole, whole - half, whole + half
