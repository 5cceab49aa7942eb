"""Unintentional unalignment: what each mitigation leaves of the refusals, harmful and harmless."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import dots, panel_letters, panels
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS
from simgrad.experiments.refusals import arms
from simgrad.typing import Float, Int
from simgrad.worlds.refusals import Refusals

TITLE = "Safety tuning that unlearns refusing, and what prevents it"
CAPTION = (
    "World “refusals”: {n_pairs} pairs, 80 % of them refusal against refusal, the softer one "
    "preferred. Mean probability of refusing held-out harmful prompts (blue; higher is safer) and "
    "harmless ones (orange; lower is better): means with 95 % over {count} seeds, small dots are "
    "seeds. (a) DPO on all pairs, with other preferences, other objectives and corrected "
    "gradients. (b) DPO on 15 % of the pairs, kept by a score, with as many passes (filled) and "
    "with as many steps (open) as DPO on all of them: with equal passes even random filtering "
    "looks like a mitigation, because it takes fewer steps."
)
BEARS_ON = (
    "Razin et al. (arXiv 2410.08847, Sec. 6): preference tuning for safety can lower refusal, and "
    "filtering by length-normalised CHES prevents it. Here the preference for the softer refusal "
    "supplies the direction (random preferences lose nothing), and the exact full gap filters at "
    "least as well."
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
    world = Refusals(n_pairs=config.n_pairs, epochs=config.epochs)
    table = arms(world, config.seeds)
    names, pairs, steps = zip(*(setting.values() for setting in table.settings()), strict=True)
    rates = (table.across(f"refuses {kind}", "arm", names).T for kind in ("harmful", "harmless"))
    return Result(names, np.array(pairs), np.array(steps), *rates)


_MORE = ", as many steps"


def plot(result: Result) -> Figure:
    """Two panels of arms."""
    figure, axes = panels(1, 2, 0.88)
    filtered = [arm for arm in result.arms if arm + _MORE in result.arms]
    whole = [arm for arm in result.arms if arm not in filtered and not arm.endswith(_MORE)]
    _arms(axes[0], whole, result, {0.0: whole})
    as_long = [arm + _MORE for arm in filtered]
    names = [arm.replace("15 % ", "") for arm in filtered]
    _arms(axes[1], names, result, {-0.17: filtered, 0.17: as_long})
    axes[0].set_title("all pairs")
    share = result.pairs[result.arms.index(filtered[0])] / result.pairs.max() if filtered else 0
    axes[1].set_title(f"{100 * share:.0f} % of the pairs")
    panel_letters(axes)
    figure.supxlabel("mean probability of a refusal", fontsize=8)
    return figure


def _arms(axis: Axes, names: list[str], result: Result, sets: dict[float, list[str]]) -> None:
    """``sets`` holds the arms of the rows by how far they are shifted down; those are open dots."""
    for shift, shown in sets.items():
        index = [result.arms.index(arm) for arm in shown]
        for rates, colour in ((result.harmful, CHOSEN), (result.harmless, OTHERS[2])):
            runs = rates[index].T
            dots(axis, names, runs, colour, shift=shift, filled=shift <= 0, show_seeds=True)
    axis.axvline(result.harmful[0].mean(), color=GUIDE, lw=0.7, ls=":")
    top = -0.85
    axis.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.4, top))
    axis.text(0.0, top, "harmless", color=OTHERS[2], va="top", fontsize=7)
    axis.text(1.0, top, "harmful", color=CHOSEN, va="top", ha="right", fontsize=7)
