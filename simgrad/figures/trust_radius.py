"""Where predictions break: first order, second order and kernel flow against the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import direct_labels, panel_letters, panels
from simgrad.drawing.style import GUIDE, OTHERS
from simgrad.dynamics.linearized import kernel_flow, linearized_run
from simgrad.models import Apply
from simgrad.objectives import DPO
from simgrad.pairs import Batch, padded
from simgrad.theory import displacement, entanglement_kernel, loss_gradient, responses
from simgrad.typing import Array, Float, Theta
from simgrad.worlds.percentiles import Percentiles

TITLE = "Trust radius"
CAPTION = (
    "{pairs} pairs of the world “percentiles”, DPO by SGD on all of them, float64; errors are "
    "‖predicted − measured‖ / ‖measured‖ over all responses. (a) One step, first and second order: "
    "sizes are lost well before η* = ‖first‖/‖second‖ (dashed). (b) Signs last longer: share of "
    "responses that go the other way than the first order says. (c) Runs of {steps} steps, by how "
    "far they move the response that moves most: {steps} first-order steps with the force of the "
    "start; the kernel flow, frozen at the start; the same read off at the predicted parameters "
    "(“ray”); and refreshed every {refresh} steps."
)
BEARS_ON = (
    "First-order statements (Yuan et al., arXiv 2410.13828; Razin et al., arXiv 2410.08847) and "
    "kernel (NTK) dynamics (Jacot et al., arXiv 1806.07572) are limits of small steps; this is how "
    "small."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        pairs: trained together in full batches, a multiple of 4.
        smallest: learning rate.
        largest: learning rate.
        rates: how many, log-spaced.
        steps: of the runs.
        refresh: steps between two linearisations.
        seed: of policy and pairs.
    """

    pairs: int = 16
    smallest: float = 1e-4
    largest: float = 3.0
    rates: int = 14
    steps: int = 20
    refresh: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Relative errors by learning rate; trust radii as learning rates; largest |Δ log π| (nats)."""

    learning_rates: Float[np.ndarray, " E"]
    first: Float[np.ndarray, " E"]
    second: Float[np.ndarray, " E"]
    wrong_signs: Float[np.ndarray, " E"]
    trust_radius: float
    steps: int
    run_first: Float[np.ndarray, " E"]
    flow: Float[np.ndarray, " E"]
    ray: Float[np.ndarray, " E"]
    refreshed: Float[np.ndarray, " E"]
    largest_change: Float[np.ndarray, " E"]


def compute(config: Config) -> Result:
    """Steps, runs and their predictions in float64."""
    world = Percentiles(n_pairs=config.pairs)
    apply, thetas = world.policies([config.seed])
    with jax.enable_x64(True):
        theta = jax.tree.map(lambda x: jnp.asarray(x[0], jnp.float64), thetas)
        batch = padded(world.pairs(config.seed))
        rates = np.geomspace(config.smallest, config.largest, config.rates)
        start = responses(apply, theta, batch).logp
        gradient = loss_gradient(apply, theta, batch, DPO())
        change = displacement(apply, theta, batch, jax.tree.map(jnp.negative, gradient))
        after = jax.jit(lambda rate, steps: _trained(apply, theta, batch, start, rate, steps))
        one, many = (
            np.stack([np.asarray(after(rate, n) - start) for rate in rates])
            for n in (1, config.steps)
        )
        eta = rates[:, None, None]
        first, second = np.asarray(change.first), np.asarray(change.second)
        kernel = entanglement_kernel(apply, theta, batch)
        flow, ray, refreshed = np.stack(
            [_runs(apply, theta, batch, start, kernel, rate, config) for rate in rates], 1
        )
    norms = np.linalg.norm(first), np.linalg.norm(second)
    return Result(
        learning_rates=rates,
        first=_errors(eta * first, one),
        second=_errors(eta * first + eta**2 * second, one),
        wrong_signs=(np.sign(first) != np.sign(one)).mean((1, 2)),
        trust_radius=float(norms[0] / norms[1]),
        steps=config.steps,
        run_first=_errors(config.steps * eta * first, many),
        flow=_errors(flow, many),
        ray=_errors(ray, many),
        refreshed=_errors(refreshed, many),
        largest_change=np.abs(many).max((1, 2)),
    )


def _trained(
    apply: Apply, theta: Theta, batch: Batch, start: Array, rate: Array, steps: Array
) -> Array:
    """Log-probs after plain gradient descent."""

    def step(_: Array, theta: Theta) -> Theta:
        gradient = loss_gradient(apply, theta, batch, DPO(), start)
        return jax.tree.map(lambda t, g: t - rate * g, theta, gradient)

    return responses(apply, jax.lax.fori_loop(0, steps, step, theta), batch).logp


_SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)


def _runs(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    start: Array,
    kernel: Array,
    rate: float,
    config: Config,
) -> np.ndarray:
    """Changes that the frozen flow, its ray and the refreshed flow predict."""

    def state(for_what: Theta) -> Any:
        fresh: Any = _SGD.init(for_what)
        fresh.hyperparams["learning_rate"] = jnp.asarray(rate)
        return fresh

    run, zero = (DPO(), _SGD, config.steps), state(jnp.zeros(2 * batch.size))
    flow = kernel_flow(kernel, start, batch.lengths, *run, state=zero)
    ray, refreshed = (
        linearized_run(
            apply, theta, batch, *run, refresh=refresh, read="ray", state=state(theta)
        ).trajectory
        for refresh in (None, config.refresh)
    )
    return np.stack([np.asarray(path.logp[-1] - start) for path in (flow, ray, refreshed)])


def _errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        miss = np.linalg.norm((predicted - measured).reshape(len(measured), -1), axis=1)
        return miss / np.linalg.norm(measured.reshape(len(measured), -1), axis=1)


def plot(result: Result) -> Figure:
    """Errors of one step, its signs, errors of a run."""
    figure, axes = panels(1, 3, 1.05)
    step, signs, run = axes
    rates = result.learning_rates
    lines = {"first": (result.first, "black"), "second": (result.second, OTHERS[1])}
    _errors_of(step, rates, lines, 1e-6)
    step.set(title="one step: error", ylabel="relative error", xlabel="learning rate η")
    signs.plot(rates, result.wrong_signs, color="black")
    signs.set(xscale="log", xlim=(rates[0], rates[-1]), ylim=(0, 0.55), title="one step: signs")
    signs.set(xlabel="learning rate η", ylabel="share of wrong signs")
    for axis in (step, signs):
        axis.axvline(result.trust_radius, color=GUIDE, lw=0.8, ls="--")
    signs.text(result.trust_radius * 0.8, 0.5, "η*", color=GUIDE, ha="right")
    lines = {
        "first order": (result.run_first, "black"),
        "flow": (result.flow, OTHERS[2]),
        "ray": (result.ray, OTHERS[0]),
        "refreshed": (result.refreshed, OTHERS[1]),
    }
    _errors_of(run, result.largest_change, lines, 1e-4)
    run.set(title=f"{result.steps} steps: error", xlabel="largest |Δ log π| (nats)")
    run.set_ylabel("relative error")
    panel_letters(axes)
    return figure


def _errors_of(
    axis: Axes, x: np.ndarray, lines: dict[str, tuple[np.ndarray, str]], least: float
) -> None:
    axis.set(xscale="log", yscale="log", ylim=(least, 30), xlim=(x.min(), x.max()))
    ends = {}
    for (name, (errors, colour)), style in zip(lines.items(), ("-", "--", "-.", ":"), strict=False):
        axis.plot(x, errors, style, color=colour)
        ends[name] = (float(np.clip(np.nan_to_num(errors[-1], nan=30), least, 29)), colour)
    axis.axhline(1, color=GUIDE, lw=0.6)
    direct_labels(axis, float(x[-1]), ends, gap=0.09)
