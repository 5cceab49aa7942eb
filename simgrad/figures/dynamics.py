"""Chosen and rejected log-probs through training, for ten objectives on one world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from simgrad import objectives
from simgrad.drawing.draw import band, note, panels, ticks, zero_line
from simgrad.drawing.style import CHOSEN, REJECTED
from simgrad.dynamics import train
from simgrad.typing import Float, Int
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.tuning import recipe_for

TITLE = "Ten objectives, one world"
CAPTION = (
    "Mean Δ log π of chosen (blue) and rejected (vermilion) responses while {pairs} pairs of the "
    "world “suffix”, which share their last {suffix} tokens, are trained together: the same "
    "policies, pairs and Adam (learning rate {learning_rate:g}), only the objective differs. "
    "Bands: 95 % over {count} seeds. Objectives that differ in the shape of the loss only all "
    "lower the chosen at first; an SFT term and DPOP keep it up, DPO-Shift on some seeds only. In "
    "SLiC, CPO and ORPO d_w exceeds d_l many times at the start (SLiC's d_l is even 0), and under "
    "Adam only the ratio matters: they act as fine-tuning first, and the rejected rises too."
)
BEARS_ON = (
    "“Chosen and rejected log-probs both fall” (Yuan et al., arXiv 2410.13828; Razin et al., arXiv "
    "2410.08847; Pal et al., arXiv 2402.13228, for DPOP): it is the ratio d_w/d_l, not the loss "
    "curve of the margin, that decides."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        objectives: by name, at their defaults.
        suffix: tokens that both responses share at their end.
        pairs: trained together in full batches.
        learning_rate: of Adam.
        steps: of training.
        record: steps between two records.
        seeds: of policies and pairs.
    """

    objectives: tuple[str, ...] = (
        "dpo",
        "ipo",
        "simpo",
        "dpo_shift",
        "apo_zero",
        "dpo_sft",
        "dpop",
        "slic_hf",
        "cpo",
        "orpo",
    )
    suffix: int = 16
    pairs: int = 32
    learning_rate: float = 1e-4
    steps: int = 40
    record: int = 4
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """Mean over pairs of Δ log π in nats; the last axis is (chosen, rejected)."""

    objectives: tuple[str, ...]
    steps: Int[np.ndarray, " E"]
    change: Float[np.ndarray, "O seeds E 2"]


def compute(config: Config) -> Result:
    """Train every objective from every seed's policy."""
    starts = Suffix(n_pairs=config.pairs).starts(config.seeds, config.suffix)
    steps, change = np.zeros(0, int), []
    for name in config.objectives:
        recipe = recipe_for(objectives.get(name), "adam", config.learning_rate, config.steps)
        runs = []
        for apply, theta, batch in starts:
            seen = train(apply, theta, batch, recipe, record=config.record).trajectory
            steps = np.asarray(seen.steps)
            runs.append(np.asarray(seen.change.mean(1), float))
        change.append(runs)
    return Result(config.objectives, steps, np.array(change))


def plot(result: Result) -> Figure:
    """One panel an objective, all on the same axes."""
    rows = 2 if len(result.objectives) > 3 else 1
    columns = -(-len(result.objectives) // rows)
    figure, axes = panels(rows, columns, 1.25, sharex=True, sharey=True, squeeze=False)
    for axis, name, change in zip(axes.ravel(), result.objectives, result.change, strict=False):
        zero_line(axis)
        for side, colour in ((0, CHOSEN), (1, REJECTED)):
            band(axis, result.steps, change[:, :, side], colour)
        axis.set_title(name)
    first = axes[0, 0]
    first.set_yscale("symlog", linthresh=1.0, linscale=0.8)
    ticks(first, "y", [-100, -10, -1, 0, 1])
    for side, name, colour, shift, align in (
        (0, "chosen", CHOSEN, 3, "bottom"),
        (1, "rejected", REJECTED, -3, "top"),
    ):
        end = (float(result.steps[-1]), float(result.change[0, :, -1, side].mean()))
        note(first, name, end, (0, shift), "data", color=colour, ha="right", va=align)
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel("mean Δ log π (nats)", fontsize=8)
    return figure
