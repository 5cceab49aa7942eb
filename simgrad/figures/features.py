"""Frozen or free features: one pair of tokens, in closed form and by training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, labelled_bands, panel_letters, panels
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS
from simgrad.experiments import unconstrained
from simgrad.typing import Float
from simgrad.worlds.unconstrained import Unconstrained

TITLE = "Frozen or free features"
CAPTION = (
    "World “unconstrained”, one-token pairs, float64, {draws} random models for each seed and "
    "alignment, 95 % over {count} seeds. (a) d log π(y⁺)/dt at the start by the closed form (line) "
    "and by one small DPO step (dots), mean over models. (b) Share of models whose chosen token "
    "falls at once: with free features it grows with the cosine of W₊ and W₋; with frozen features "
    "(the linear-softmax model) it cannot fall. (c) Rank correlation over the other tokens of "
    "⟨W_z, W₊ − W₋⟩ with their Δ log π after a run, and how often the two agree on the token that "
    "gains most."
)
BEARS_ON = (
    "Razin et al. (arXiv 2410.08847, Sec. 4.2.1) for free features; Yuan et al. (arXiv 2410.13828, "
    "Sec. 4) for frozen ones, where a single chosen token never falls."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        alignments: cosines of W₊ and W₋.
        draws: random models for each.
        seeds: of the models.
    """

    alignments: tuple[float, ...] = (-0.5, 0.0, 0.5, 0.8, 0.95)
    draws: int = 96
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """One row a seed, one column an alignment; rates in nats per unit of time and of d_w."""

    alignments: Float[np.ndarray, " A"]
    closed_form: Float[np.ndarray, "seeds A"]
    measured: Float[np.ndarray, "seeds A"]
    falls: Float[np.ndarray, "seeds A"]
    falls_frozen: Float[np.ndarray, "seeds A"]
    order: Float[np.ndarray, "seeds A"]
    top_agrees: Float[np.ndarray, "seeds A"]


COLUMNS = ("closed form", "measured", "falls", "falls, W alone", "order", "top agrees")


def compute(config: Config) -> Result:
    """The world's experiment with one-token pairs."""
    world = Unconstrained(alignments=config.alignments, draws=config.draws)
    table = unconstrained.run(world, config.seeds)["single"]
    return Result(
        np.array(config.alignments),
        *(table.across(column, "alignment", config.alignments) for column in COLUMNS),
    )


def plot(result: Result) -> Figure:
    """Rates, falls, order of the bystanders."""
    figure, axes = panels(1, 3, 1.0)
    rate, falls, mass = axes
    x = result.alignments
    band(rate, x, result.closed_form, CHOSEN)
    rate.plot(x, result.measured.mean(0), "o", color="black", ms=3)
    rate.set(ylabel="d log π(y⁺)/dt (nats / time)", ylim=(0, None), title="rate of the chosen")
    falls.set(ylabel="share of models", ylim=(-0.02, 0.5), title="chosen falls")
    lines = {"free": (result.falls, CHOSEN), "frozen": (result.falls_frozen, GUIDE)}
    labelled_bands(falls, x, lines, gap=0.1)
    mass.set(ylim=(0, 1.03), title="where the mass goes")
    lines = {"rank corr.": (result.order, OTHERS[0]), "top agrees": (result.top_agrees, OTHERS[1])}
    labelled_bands(mass, x, lines, gap=0.1)
    for axis in axes:
        axis.set_xlabel(r"$\cos(W_+, W_-)$")
    panel_letters(axes)
    return figure
