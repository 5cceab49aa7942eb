"""Unintentional unalignment: the refusals each remedy leaves, and whether it over-refuses."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import panel_letters
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS
from simgrad.experiments.findings import interval
from simgrad.typing import Float, Int
from simgrad.worlds.refusals import Refusals

__all__ = ["BEARS_ON", "CAPTION", "TITLE", "Config", "Result", "compute", "plot"]

TITLE = "Safety tuning that unlearns refusing, and what prevents it"
CAPTION = (
    "World “refusals”: {n_pairs} pairs, 80 % of them refusal against refusal, the softer one "
    "preferred. Mean "
    "probability of refusing held-out harmful prompts (blue; higher is safer) and harmless ones "
    "(orange; lower is "
    "better): means with 95 % over {count} seeds, small dots are seeds. (a) DPO on all pairs, with "
    "other "
    "preferences, other objectives and corrected gradients. (b) DPO on 15 % of the pairs, kept by "
    "a score, with as "
    "many passes (filled) and with as many steps (open) as DPO on all of them: with equal passes "
    "even random "
    "filtering looks like a remedy, because it takes fewer steps."
)
BEARS_ON = (
    "Razin et al. (arXiv 2410.08847, Sec. 6): preference tuning for safety can lower refusal, and "
    "filtering by "
    "length-normalised CHES prevents it. Here the preference for the softer refusal supplies the "
    "direction (random "
    "preferences lose nothing), and the exact full gap filters at least as well."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        seeds: of policies and pairs.
        n_pairs: preference pairs.
        epochs: passes over them.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_pairs: int = 400
    epochs: int = 8


@dataclass(frozen=True)
class Result:
    """Mean probability of a refusal for every arm and seed."""

    arms: tuple[str, ...]
    pairs: Int[np.ndarray, " arms"]
    steps: Int[np.ndarray, " arms"]
    harmful: Float[np.ndarray, "arms seeds"]
    harmless: Float[np.ndarray, "arms seeds"]


def compute(config: Config) -> Result:
    """The world's arms."""
    table = Refusals(n_pairs=config.n_pairs, epochs=config.epochs).arms(config.seeds)
    settings = table.settings()
    rows = [table.where(**setting) for setting in settings]
    rates = (
        np.stack([row[name] for row in rows]).astype(float)
        for name in ("refuses harmful", "refuses harmless")
    )
    counts = (np.array([setting[name] for setting in settings]) for name in ("pairs", "steps"))
    return Result(tuple(setting["arm"] for setting in settings), *counts, *rates)


_MORE = ", as many steps"


def plot(result: Result) -> Figure:
    """Two panels of arms."""
    width = plt.rcParams["figure.figsize"][0]
    figure, axes = plt.subplots(1, 2, figsize=(width, 0.44 * width), layout="constrained")
    place = {arm: i for i, arm in enumerate(result.arms)}
    filtered = [arm for arm in result.arms if arm + _MORE in place]
    whole = [arm for arm in result.arms if arm not in filtered and not arm.endswith(_MORE)]
    _arms(axes[0], whole, {arm: [(place[arm], True)] for arm in whole}, result)
    short = {
        arm.replace("15 % ", ""): [(place[arm], True), (place[arm + _MORE], False)]
        for arm in filtered
    }
    _arms(axes[1], list(short), short, result)
    axes[0].set_title("all pairs")
    share = result.pairs[place[filtered[0]]] / result.pairs.max() if filtered else 0
    axes[1].set_title(f"{100 * share:.0f} % of the pairs")
    for axis in axes:
        top = axis.get_ylim()[1]
        axis.text(0.0, top, "harmless", color=OTHERS[2], va="top", fontsize=7)
        axis.text(1.0, top, "harmful", color=CHOSEN, va="top", ha="right", fontsize=7)
    panel_letters(list(axes))
    figure.supxlabel("mean probability of a refusal", fontsize=8)
    return figure


def _arms(
    axis: Axes, names: list[str], rows: dict[str, list[tuple[int, bool]]], result: Result
) -> None:
    for height, name in enumerate(reversed(names)):
        for index, filled in rows[name]:
            shift = 0.0 if len(rows[name]) == 1 else 0.17 if filled else -0.17
            for rates, colour in ((result.harmful, CHOSEN), (result.harmless, OTHERS[2])):
                found = interval(rates[index])
                axis.plot(
                    [max(found.low, 0), min(found.high, 1)],
                    [height + shift] * 2,
                    color=colour,
                    lw=1,
                )
                axis.plot(
                    rates[index],
                    np.full(rates.shape[1], height + shift),
                    ".",
                    ms=2,
                    color=colour,
                    alpha=0.5,
                )
                axis.plot(
                    found.mean,
                    height + shift,
                    "o",
                    ms=4,
                    mec=colour,
                    mfc=colour if filled else "white",
                    mew=1,
                )
    start = result.harmful[0].mean()
    axis.plot([start, start], [-0.6, len(names) - 0.4], color=GUIDE, lw=0.7, ls=":")
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(names) + 0.25))
