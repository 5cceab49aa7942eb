"""One cell of the grid: a step predicted to first and second order, measured at many rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from simgrad import tree
from simgrad.theory import displacement, first_order, regime
from simgrad.theory.prediction import StepChange
from simgrad.typing import Array, Float, Theta
from simgrad.validation.checks import gap
from simgrad.validation.grid import Grid
from simgrad.validation.measure import measured_along
from simgrad.validation.subjects import Base, joined, pulls, step_of

NOISE = 100
"""A remainder says nothing below this many roundoffs of the change itself."""
POINTS, NEAR = 3, 0.05
"""An order is fitted to the smallest usable rates within this share of the trust radius.

Usable rates are those that rounding does not spoil.
"""


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


class Ray(NamedTuple):
    """A step v = factor · direction of about unit norm, so that low precision cannot overflow."""

    direction: Theta
    factor: Float[Array, ""]


@jax.jit
def _ray(step: Theta) -> Ray:
    """Divide by the power of two next to the norm, which rounds nothing."""
    norm = jnp.sqrt(tree.inner(step, step))
    factor = jnp.where((norm > 0) & jnp.isfinite(norm), jnp.exp2(jnp.round(jnp.log2(norm))), 1.0)

    def divided(x: Array) -> Array:
        wide = tree.widen(x)
        return (wide / factor.astype(wide.dtype)).astype(x.dtype)

    return Ray(jax.tree.map(divided, step), factor)


def _predicted(base: Base, rays: Sequence[Ray]) -> StepChange:
    """First and second order of each pair's change along its ray, in float64."""
    changes = []
    for pair, ray in zip(base.every, rays, strict=False):
        change = displacement(*base.policy, pair, ray.direction)
        wide = jax.tree.map(lambda x: x.astype("float64"), change)
        changes.append(wide.scaled(float(ray.factor)))
    return joined(changes)


def alone(base: Base, reference: Base, objective: str, grid: Grid) -> Cell | None:
    """Judge the regime of every pair by itself under SGD; None if the objective moves no pair."""
    force = base.alone[objective]
    first = first_order(base.kernel, force)
    exact = None
    if reference is not base:
        exact = first_order(reference.kernel, force.astype(reference.logp.dtype))
    rays = [_ray(step) for step in pulls(base, force)]
    change = StepChange(first.astype("float64"), _predicted(base, rays).second)
    setting = {"kind": "alone", "objective": objective, "optimizer": "sgd"}
    return _judged(base, setting, change, rays, np.asarray(regime(first)), grid, exact)


def together(base: Base, reference: Base, objective: str, name: str, grid: Grid) -> Cell | None:
    """One step of an optimizer on all pairs: what it does to them, and to the probes.

    None where the objective moves no pair.
    """
    force = base.together[objective]
    rays = [_ray(step_of(base, force, name))] * len(base.every)
    change, exact = _predicted(base, rays), None
    if reference is not base:
        step = _ray(step_of(reference, force.astype(reference.logp.dtype), name))
        exact = _predicted(reference, [step] * len(rays)).first
    setting = {"kind": "together", "objective": objective, "optimizer": name}
    regimes = regimes_of(np.asarray(change.first))
    return _judged(base, setting, change, rays, regimes, grid, exact)


def regimes_of(change: Any) -> Any:
    """Values of :class:`simgrad.theory.Regime` of changes, an oracle for ``regime``."""
    return (change[..., 0] < 0).astype(int) + 2 * (change[..., 1] > 0).astype(int)


def _judged(
    base: Base,
    setting: dict[str, str],
    change: StepChange,
    rays: Sequence[Ray],
    regimes: np.ndarray,
    grid: Grid,
    exact: Array | None,
) -> Cell | None:
    """Take the steps and compare, leaving out pairs that the objective does not move.

    A saturated hinge, for example, does not move its pair.
    """
    reference_error = None if exact is None else gap(change.first, exact)
    moves = np.flatnonzero(~(np.abs(change.first).max(-1) == 0))
    if not len(moves):
        return None
    change, regimes = jax.tree.map(lambda x: x[moves], change), regimes[moves]
    first, second = np.asarray(change.first), np.asarray(change.second)
    unit = float(np.linalg.norm(first) / max(np.linalg.norm(second), 1e-300))
    rates = np.array(grid.learning_rates or [m * unit for m in grid.rates])
    measured = np.concatenate([_measured(base, i, rays[i], rates) for i in moves.tolist()], 1)

    eta, multiple = rates[:, None, None], rates / unit
    one, two = eta * first, eta * first + eta**2 * second
    inside = eta <= np.asarray(change.safe_radius)
    right, both = np.sign(measured) == np.sign(one), inside.all(-1)
    middle = int(np.argmin(np.abs(np.log(multiple / 0.1))))
    found: dict[str, Any] = {}
    r2: dict[str, np.ndarray] = {}
    for name, predicted in (("first", one), ("second", two)):
        miss, size = np.abs(measured - predicted), np.abs(one)
        relative = np.divide(miss, size, out=np.zeros_like(miss), where=size > 0)
        r2[name] = np.array([_r2(m, p) for m, p in zip(measured, predicted, strict=True)])
        found |= {
            f"order_{name}": _order(rates, multiple, miss, measured, base.arithmetic.rounding),
            f"error_{name}": _over(np.max, relative[inside]),
            f"r2_{name}": float(r2[name][middle]),
            f"curve_{name}": (_norms(miss) / _norms(one)).tolist(),
        }
    good = int(np.logical_and.accumulate(r2["second"] > 0.9).sum())
    return Cell(
        **setting,
        **found,
        model=base.name,
        arithmetic=str(base.arithmetic),
        device=base.device.device_kind,
        finite=bool(np.isfinite(measured).all() and np.isfinite([*first, *second]).all()),
        trust_radius=unit,
        signs=_over(np.mean, right[inside]),
        signs_count=int(inside.sum()),
        signs_own=_over(np.mean, right[eta <= np.asarray(change.trust_radius)]),
        regimes=_over(np.mean, (regimes_of(measured) == regimes)[both]),
        regimes_count=int(both.sum()),
        holds_to=float(multiple[good - 1]) if good else 0.0,
        holds_to_nats=float(np.abs(measured[:good]).max(initial=0.0)),
        reference_error=reference_error,
        multiples=multiple.tolist(),
        curve_signs=right.mean((1, 2)).tolist(),
    )


def _measured(base: Base, i: int, ray: Ray, rates: np.ndarray) -> np.ndarray:
    """What a pair's ray really does to it at each rate, in float64."""
    along = jnp.asarray(rates * float(ray.factor), base.logp.dtype)
    return np.asarray(measured_along(*base.policy, base.every[i], ray.direction, along), float)


def _over(statistic: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    return float(statistic(values)) if values.size else float("nan")


def _norms(x: np.ndarray) -> np.ndarray:
    """Norm over all responses, at each rate."""
    return np.linalg.norm(x, axis=(1, 2))


def _r2(measured: np.ndarray, predicted: np.ndarray) -> float:
    spread = np.square(measured - measured.mean()).sum()
    return float(1 - np.square(measured - predicted).sum() / spread) if spread > 0 else float("nan")


def _order(
    rates: np.ndarray, multiple: np.ndarray, miss: np.ndarray, measured: np.ndarray, rounding: float
) -> tuple[float, float, float] | None:
    """Slope of log ‖miss‖ over log η, norms over all responses; jackknife interval over pairs."""
    clear = _norms(miss) > NOISE * rounding * _norms(measured)
    use = np.flatnonzero(clear & (multiple <= NEAR))[:POINTS]
    if len(use) < POINTS:
        return None

    def slope(miss: np.ndarray) -> float:
        return float(np.polyfit(np.log(rates[use]), np.log(_norms(miss[use])), 1)[0])

    whole, count = slope(miss), miss.shape[1]
    if count < 3:
        return whole, float("nan"), float("nan")
    parts = np.array([slope(np.delete(miss, i, 1)) for i in range(count)])
    error = np.sqrt((count - 1) / count * np.square(parts - parts.mean()).sum())
    half = float(stats.t.ppf(0.975, count - 1) * error)
    return whole, whole - half, whole + half
