"""The question and the answer in one picture: both fall, as predicted, and the knob."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, note, panel_letters, panels, zero_line
from simgrad.drawing.style import CHOSEN, GUIDE, REJECTED
from simgrad.dynamics import PREDICTORS, Setting, train
from simgrad.objectives import DPO, SFT, Objective
from simgrad.typing import Float, Int
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.tuning import recipe_for

TITLE = "Both fall: predicted, and stopped"
CAPTION = (
    "{pairs} preference pairs that share their last {suffix} tokens (world “suffix”), trained "
    "together by DPO and Adam, {count} seeds; bands are 95 %. (a) Mean Δ log π of chosen and "
    "rejected responses: both fall. (b) Every chosen response of every seed, with all weights λ of "
    "an SFT term as in (c): the run as predicted by two big steps, two passes of gradients before "
    "any training, against what {steps} steps did. (c) The knob: the more an SFT term adds to the "
    "pull on the chosen, d_w/d_l, the fewer chosen responses fall, as read off the prediction "
    "before any run (line: mean of the seeds, which are the thin lines; dots: measured mean)."
)
BEARS_ON = (
    "Both central results, gradient entanglement (Yuan et al., arXiv 2410.13828) and likelihood "
    "displacement (Razin et al., arXiv 2410.08847), as the question that practitioners ask."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        suffix: tokens that both responses share.
        pairs: trained together in full batches.
        learning_rate: of Adam.
        steps: of training.
        weights: λ of the SFT term; the first is 0.
        seeds: of policies and pairs.
    """

    suffix: int = 16
    pairs: int = 32
    learning_rate: float = 1e-4
    steps: int = 15
    weights: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """Δ log π in nats; axes of length 2 are (chosen, rejected)."""

    steps: Int[np.ndarray, " E"]
    path: Float[np.ndarray, "seeds E 2"]
    weights: Float[np.ndarray, " L"]
    predicted: Float[np.ndarray, "L seeds B 2"]
    measured: Float[np.ndarray, "L seeds B 2"]


def compute(config: Config) -> Result:
    """Predict, then train, for every weight and seed."""
    starts = Suffix(n_pairs=config.pairs).starts(config.seeds, config.suffix)
    paths, predicted, measured, steps = [], [], [], np.zeros(0, int)
    for weight in config.weights:
        objective: Objective = DPO() + weight * SFT() if weight else DPO()
        recipe = recipe_for(objective, "adam", config.learning_rate, config.steps)
        says, does = [], []
        for start in starts:
            says.append(PREDICTORS["two big steps"](Setting(*start, recipe)).astype(float))
            seen = train(*start, recipe, record=1 if not weight else None).trajectory
            does.append(np.asarray(seen.change[-1], float))
            if not weight:
                steps = np.asarray(seen.steps)
                paths.append(np.asarray(seen.change.mean(1), float))
        predicted.append(says)
        measured.append(does)
    return Result(
        steps, np.array(paths), np.array(config.weights), np.array(predicted), np.array(measured)
    )


def plot(result: Result) -> Figure:
    """The problem, the prediction, the knob."""
    figure, axes = panels(1, 3, 1.0)
    _problem(axes[0], result)
    _prediction(axes[1], result)
    _knob(axes[2], result)
    panel_letters(axes)
    return figure


def _problem(axis: Axes, result: Result) -> None:
    middle = len(result.steps) // 2
    for side, name, colour, shift, align in (
        (0, "chosen", CHOSEN, 6, "bottom"),
        (1, "rejected", REJECTED, -6, "top"),
    ):
        band(axis, result.steps, result.path[:, :, side], colour)
        place = (float(result.steps[middle]), float(result.path[:, middle, side].mean()))
        style = {"color": colour, "ha": "right", "va": align, "fontsize": 8}
        note(axis, name, place, (-4, shift), "data", **style)
    axis.set_ylim(top=0.3 * float(np.abs(result.path.mean(0)).max()))
    zero_line(axis)
    axis.set(xlabel="training step", ylabel="mean Δ log π (nats)", title="both fall")


def _prediction(axis: Axes, result: Result) -> None:
    says, does = result.predicted[..., 0], result.measured[..., 0]
    reach = [float(min(says.min(), does.min())), float(max(says.max(), does.max()))]
    axis.plot(reach, reach, color=GUIDE, lw=0.7)
    axis.scatter(says, does, s=6, color=CHOSEN, alpha=0.5, linewidths=0)
    zero_line(axis)
    axis.axvline(0, color=GUIDE, lw=0.6)
    right = (np.sign(says) == np.sign(does)).mean()
    note(axis, f"signs right: {100 * right:.0f} %", (0.04, 0.96), va="top")
    axis.set(xlabel="predicted Δ log π (nats)", ylabel="measured (nats)", title="predicted")


def _knob(axis: Axes, result: Result) -> None:
    places = np.arange(len(result.weights))
    says = (result.predicted[..., 0] < 0).mean(2)
    axis.plot(places, says, color=CHOSEN, lw=0.6, alpha=0.4)
    axis.plot(places, says.mean(1), color=CHOSEN)
    axis.plot(places, (result.measured[..., 0] < 0).mean((1, 2)), "o", color="black")
    axis.set_xticks(places, [f"{w:g}" for w in result.weights])
    axis.set(
        xlabel="weight λ of an SFT term",
        ylabel="share of chosen that fall",
        title="the knob",
        ylim=(-0.03, 1.05),
    )
