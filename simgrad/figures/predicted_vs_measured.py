"""First-order predictions of one DPO step against the step itself, for three kinds of model."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import note, panels, ticks
from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED
from simgrad.models import Apply, ModelConfig, bind, create, linear_softmax, unconstrained_features
from simgrad.objectives import DPO
from simgrad.pairs import Batch, Pair, padded
from simgrad.theory import first_order, loss_gradient, pair_kernel
from simgrad.typing import Array, Float, Theta
from simgrad.worlds.tuning import stacked

TITLE = "Predicted against measured"

CAPTION = (
    "One SGD step of DPO on a single pair, in float64. Top: first-order prediction of Δ log π "
    "against the measured change, chosen and rejected, for {pairs} random pairs at {rates} "
    "learning rates; points leave the diagonal as the step grows. Bottom: remainder |measured − "
    "predicted| (median and quartiles over pairs). A slope of 2 says that the prediction holds "
    "every first-order term; the number is the fitted slope over rates where it is below 1 % of "
    "the change, with its standard error over pairs."
)
BEARS_ON = (
    "Gradient entanglement (Yuan et al., arXiv 2410.13828, Sec. 3): Δ log π_w = η (d_w‖g_w‖² − "
    "d_l⟨g_w,g_l⟩) + O(η²), and likewise for the rejected."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        pairs: random pairs per model.
        rates: learning rates, log-spaced over four decades up to the largest of each model.
        largest: largest learning rate of the linear-softmax model, the unconstrained-features model
            and the transformer.
        vocab_size: tokens.
        seed: of pairs and parameters.
    """

    pairs: int = 16
    rates: int = 13
    largest: tuple[float, float, float] = (100.0, 100.0, 1.0)
    vocab_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Changes in nats; axes: model, learning rate, pair, (chosen, rejected)."""

    models: tuple[str, ...]
    learning_rates: Float[np.ndarray, "M E"]
    predicted: Float[np.ndarray, "M E B 2"]
    measured: Float[np.ndarray, "M E B 2"]
    slopes: Float[np.ndarray, " M"]
    slope_errors: Float[np.ndarray, " M"]


def _random_pairs(config: Config) -> list[Pair]:
    """Prompts of 3 tokens; responses differ in 1 to 3 tokens and may share an ending of up to 4."""
    rng = np.random.default_rng(config.seed)
    pairs = []
    while len(pairs) < config.pairs:
        prompt, shared = (
            rng.integers(0, config.vocab_size, n).tolist() for n in (3, rng.integers(0, 5))
        )
        chosen, rejected = (
            rng.integers(0, config.vocab_size, rng.integers(1, 4)).tolist() for _ in range(2)
        )
        pair = Pair(prompt, chosen + shared, rejected + shared)
        if pair.problem() is None:
            pairs.append(pair)
    return pairs


def _models(config: Config, pairs: list[Pair]) -> dict[str, tuple[Apply, Theta]]:
    size, seed = config.vocab_size, config.seed
    shape = ModelConfig(size, width=32, depth=2, heads=4, max_length=16, dtype="float64")
    return {
        "Linear softmax": linear_softmax(pairs, size, 16, seed, "float64"),
        "Unconstrained features": unconstrained_features(pairs, size, 16, seed, "float64"),
        "Transformer, 2 layers": create(shape, seed),
    }


def _steps(apply: Apply, theta: Theta, batch: Batch, rates: Array) -> tuple[Array, Array]:
    """Predicted and measured change of one pair at every rate: arrays (E, 2)."""
    model = bind(apply, theta)
    start = model.logp(model.trained, batch)
    force = DPO().force(start, start, batch.lengths)
    predicted = rates[:, None] * first_order(pair_kernel(apply, theta, batch), force)
    gradient = loss_gradient(apply, theta, batch, DPO())

    def measure(rate: Array) -> Array:
        moved = jax.tree.map(lambda t, g: t - rate * g, model.trained, gradient)
        return (model.logp(moved, batch) - start)[0]

    return predicted, jax.lax.map(measure, rates)


def compute(config: Config) -> Result:
    """Predict and take the steps, in float64."""
    pairs = _random_pairs(config)
    length = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    with jax.enable_x64(True):
        batches = stacked([padded([p], length, length) for p in pairs])
        models, found = _models(config, pairs), []
        for (apply, theta), largest in zip(models.values(), config.largest, strict=True):
            rates = jnp.geomspace(1e-4 * largest, largest, config.rates)
            steps = functools.partial(_steps, apply, theta, rates=rates)
            changes = jax.jit(functools.partial(jax.lax.map, steps))(batches)
            found.append((np.asarray(rates), *(np.asarray(x).swapaxes(0, 1) for x in changes)))
    rates, predicted, measured = map(np.stack, zip(*found, strict=True))
    slopes, errors = np.array([_slope(*columns) for columns in found]).T
    return Result(tuple(models), rates, predicted, measured, slopes, errors)


def _slope(rates: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Mean over pairs of the fitted order of the remainder, and its standard error."""
    miss = np.abs(measured - predicted)
    slopes = []
    for pair in range(miss.shape[1]):
        for side in range(2):
            y, size_ = miss[:, pair, side], np.abs(measured[:, pair, side])
            use = (y < 0.01 * size_) & (y > 1e-12)
            if use.sum() >= 3:
                slopes.append(np.polyfit(np.log(rates[use]), np.log(y[use]), 1)[0])
    if not slopes:
        raise ValueError("no learning rate is small enough to fit a slope: lower Config.largest")
    return float(np.mean(slopes)), float(np.std(slopes) / np.sqrt(len(slopes)))


def plot(result: Result) -> Figure:
    """Two rows of panels, one column a model."""
    figure, axes = panels(2, len(result.models), 1.0)
    for column, name in enumerate(result.models):
        top, bottom = axes[:, column]
        _scatter(top, result.predicted[column], result.measured[column])
        top.set_title(name)
        _remainder(bottom, result, column)
    axes[0, 0].set_ylabel("measured Δ log π (nats)")
    axes[1, 0].set_ylabel("remainder (nats)")
    return figure


_SIDES = (("chosen", CHOSEN, "o"), ("rejected", REJECTED, "^"))
"""Name, colour and marker of each response."""


def _scatter(axis: Axes, predicted: np.ndarray, measured: np.ndarray) -> None:
    reach = 2 * max(np.abs(predicted).max(), np.abs(measured).max())
    axis.plot([-reach, reach], [-reach, reach], color=GUIDE, lw=0.8, zorder=0)
    for side, (name, colour, marker) in enumerate(_SIDES):
        x, y = predicted[..., side].ravel(), measured[..., side].ravel()
        axis.scatter(x, y, s=7, color=colour, marker=marker, alpha=0.6, linewidths=0)
        note(axis, name, (0.04, 0.96 - 0.1 * side), color=colour, va="top")
    for side, scale in (("x", axis.set_xscale), ("y", axis.set_yscale)):
        scale("symlog", linthresh=1e-2, linscale=0.6)
        ticks(axis, side, [-10.0, -0.1, 0.0, 0.1, 10.0])
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="predicted Δ log π (nats)")


def _remainder(axis: Axes, result: Result, column: int) -> None:
    rates = result.learning_rates[column]
    miss = np.abs(result.measured[column] - result.predicted[column])
    for side, (_, colour, marker) in enumerate(_SIDES):
        low, middle, high = np.quantile(miss[..., side], [0.25, 0.5, 0.75], axis=1)
        axis.fill_between(rates, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(rates, middle, color=colour, marker=marker)
    guide = np.median(miss[0]) * (rates / rates[0]) ** 2 / 8
    axis.plot(rates, guide, color=GUIDE, ls="--", lw=0.8)
    slope, error = result.slopes[column], result.slope_errors[column]
    text = f"fitted slope\n{slope:.3f} ± {error:.3f}\n(dashed: 2)"
    note(axis, text, (0.97, 0.04), va="bottom", ha="right")
    axis.set(xscale="log", yscale="log", xlabel="learning rate η")
