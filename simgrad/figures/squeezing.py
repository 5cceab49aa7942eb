"""Squeezing: pushing an unlikely token down feeds the likeliest one."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, direct_labels, panel_letters
from simgrad.drawing.style import GUIDE, OTHERS, size
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
    rows = [squeeze.where(pushed="least likely", peak=peak) for peak in config.peaks]
    top_before, top_after, rise = (
        np.stack([row[name] for row in rows], 1).astype(float)
        for name in ("top before", "top after", "rise")
    )
    steps, pushes = max(world.push_steps), ("rejected", "DPO")
    others = [
        [extend.where(push=p, first=f, steps=steps)["Δ others"] for f in FIRST] for p in pushes
    ]
    return Result(
        np.array(config.peaks), top_before, top_after, rise, FIRST, pushes, np.array(others, float)
    )


def plot(result: Result) -> Figure:
    """Likeliest token, tokens that rise, bystanders."""
    figure, axes = plt.subplots(1, 3, figsize=size(1, 3, 1.0), layout="constrained")
    band(axes[0], result.peaks, result.before, GUIDE, marker="o")
    band(axes[0], result.peaks, result.after, OTHERS[0], marker="o")
    axes[0].text(
        result.peaks[-1],
        result.before[:, -1].mean() - 0.12,
        "before",
        color=GUIDE,
        ha="right",
        va="top",
        fontsize=7,
    )
    axes[0].text(
        result.peaks[-2],
        result.after[:, -2].mean() + 0.03,
        "after",
        color=OTHERS[0],
        ha="right",
        fontsize=7,
    )
    axes[0].set(ylim=(0, 1.03), ylabel="probability", xlabel="peak (std of logits)")
    axes[0].set_title("likeliest token")
    band(axes[1], result.peaks, result.rise, "black", marker="o")
    axes[1].set(yscale="log", ylabel="tokens that rise", xlabel="peak (std of logits)")
    axes[1].set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes[1].minorticks_off()
    axes[1].set_title("who gains at all")
    _bystanders(axes[2], result)
    panel_letters(list(axes))
    return figure


def _bystanders(axis: Axes, result: Result) -> None:
    x = np.arange(len(result.first))
    ends = {}
    for k, colour in enumerate((OTHERS[1], "black")):
        band(axis, x, result.others[k].T, colour, marker="o")
        label = "push rejected" if result.pushes[k] == "rejected" else result.pushes[k]
        ends[label] = (float(result.others[k, -1].mean()), colour)
    direct_labels(axis, float(x[-1]), ends, gap=0.1)
    axis.axhline(0, color=GUIDE, lw=0.6)
    axis.set_xticks(x, result.first, rotation=35, ha="right", rotation_mode="anchor", fontsize=6)
    axis.set_ylabel("bystanders' Δ log π (nats)")
    axis.set_title("fine-tuned first on")
