"""Squeezing: pushing an unlikely token down feeds the likeliest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, labelled_bands, note, panel_letters, panels, ticks, zero_line
from simgrad.drawing.style import GUIDE, OTHERS
from simgrad.experiments import squeezing
from simgrad.experiments.squeezing import FIRST
from simgrad.typing import Float
from simgrad.worlds.squeezing import Squeezing

TITLE = "Squeezing"
CAPTION = (
    "World “squeezing”, float64, 95 % over {count} seeds. Logits z drawn from N(0, peak²) over 50 "
    "tokens; 20 steps push the least likely token down. (a) Probability of the likeliest token "
    "before and after: the peakier the start, the more of the freed mass it takes; a uniform start "
    "(peak 0) is the null. (b) How many of the 49 other tokens rise. (c) Linear-softmax model "
    "fine-tuned first on what the axis says, then pushed for 20 steps: Δ log π of tokens that are "
    "in no pair. After fine-tuning on the rejected too (“chosen, rejected”) they fall less than "
    "after the chosen alone, but after an equally flat start that never saw it (“chosen, third”) "
    "they fall no more."
)
BEARS_ON = (
    "Ren & Sutherland (arXiv 2407.10490, Sec. 4): the squeezing effect, and their fix of "
    "fine-tuning on both responses first, against a control for the flatness of the start."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        peaks: standard deviations of the logits.
        draws: logits for each peak and seed.
        seeds: of the draws.
    """

    peaks: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    draws: int = 64
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """Probabilities and counts by peak; changes in nats by what was fine-tuned on first."""

    peaks: Float[np.ndarray, " P"]
    before: Float[np.ndarray, "seeds P"]
    after: Float[np.ndarray, "seeds P"]
    rise: Float[np.ndarray, "seeds P"]
    first: tuple[str, ...]
    pushes: tuple[str, ...]
    others: Float[np.ndarray, "pushes first seeds"]


def compute(config: Config) -> Result:
    """The world's experiment."""
    world = Squeezing(peaks=config.peaks, draws=config.draws)
    found = squeezing.run(world, config.seeds)
    squeeze, extend = found["squeeze"], found["extend"]
    before, after, rise = (
        squeeze.across(column, "peak", config.peaks, pushed="least likely")
        for column in ("top before", "top after", "rise")
    )
    steps, pushes = max(world.push_steps), ("rejected", "DPO")
    others = [extend.across("Δ others", "first", FIRST, push=p, steps=steps).T for p in pushes]
    peaks = np.array(config.peaks)
    return Result(peaks, before, after, rise, FIRST, pushes, np.array(others))


def plot(result: Result) -> Figure:
    """Likeliest token, tokens that rise, bystanders."""
    figure, axes = panels(1, 3, 1.0)
    likeliest, rise, bystanders = axes
    for name, runs, colour, shift, align in (
        ("before", result.before, GUIDE, (4, -4), {"ha": "left", "va": "top"}),
        ("after", result.after, OTHERS[0], (-4, 3), {"ha": "right", "va": "bottom"}),
    ):
        band(likeliest, result.peaks, runs, colour, marker="o")
        place = (float(result.peaks[-2]), float(runs[:, -2].mean()))
        note(likeliest, name, place, shift, "data", color=colour, **align)
    likeliest.set(ylim=(0, 1.03), ylabel="probability", title="likeliest token")
    band(rise, result.peaks, result.rise, "black", marker="o")
    rise.set(yscale="log", ylabel="tokens that rise", title="who gains at all")
    ticks(rise, "y", [1, 3, 10, 30])
    for axis in (likeliest, rise):
        axis.set_xlabel("peak (std of logits)")
    x = np.arange(len(result.first))
    names = {"rejected": "push rejected"}
    lines = {
        names.get(push, push): (runs.T, colour)
        for push, runs, colour in zip(
            result.pushes, result.others, (OTHERS[1], "black"), strict=True
        )
    }
    labelled_bands(bystanders, x, lines, gap=0.1)
    zero_line(bystanders)
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 6}
    bystanders.set_xticks(x, result.first, **slanted)
    bystanders.set(ylabel="bystanders' Δ log π (nats)", title="fine-tuned first on")
    panel_letters(axes)
    return figure
