"""Catastrophic displacement: where the mass goes, and the direction that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import mass_bars, note, panel_letters, panels, zero_line
from simgrad.drawing.style import CHOSEN, OTHERS, REJECTED
from simgrad.experiments.verdicts import SGD_RATE, outcome
from simgrad.typing import Float
from simgrad.worlds.verdicts import NEGATIVE, POSITIVE, Verdicts

TITLE = "Where the mass goes"
CAPTION = (
    "World “verdicts”: DPO on one prompt, one-word answers on a scale from refusal to assent. Top: "
    "probability of every answer before (grey) and after (chosen blue, rejected vermilion, others "
    "green), means with 95 % over {count} seeds. Bottom: change of each other answer against ⟨W_z, "
    "W₊ − W₋⟩ before training, one point an answer and seed. Preferring No to Never hands the mass "
    "to Yes, the answer furthest along W₊ − W₋, when Adam trains everything; not for Yes over "
    "Never; and not under SGD."
)
BEARS_ON = (
    "Razin et al. (arXiv 2410.08847, Secs. 3 and 4): catastrophic likelihood displacement, and "
    "mass that flows along the projection on W₊ − W₋. That the optimizer decides whether it "
    "happens here is this figure's own finding."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        seeds: of the policies.
        steps: of the preference tuning.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 100


@dataclass(frozen=True)
class Result:
    """Probabilities of the twelve answers and their projections on W₊ − W₋, for each case."""

    cases: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    before: Float[np.ndarray, "C seeds A"]
    after: Float[np.ndarray, "C seeds A"]
    direction: Float[np.ndarray, "C seeds A"]


def compute(config: Config) -> Result:
    """Three runs from every seed's policy."""
    world = Verdicts(steps=config.steps)
    sgd: dict[str, Any] = {"optimizer": optax.sgd(SGD_RATE)}
    no, yes = ("No", "Never"), ("Yes", "Never")
    cases = {"No ≻ Never": (no, {}), "Yes ≻ Never": (yes, {}), "No ≻ Never, SGD": (no, sgd)}
    answers = slice(world.first_answer, world.first_answer + 12)
    found = [outcome(world, config.seeds, *pair, **changes) for pair, changes in cases.values()]
    parts = (
        np.stack([getattr(o, name)[:, answers] for o in found]).astype(float)
        for name in ("before", "after", "direction")
    )
    pairs = tuple(pair for pair, _ in cases.values())
    return Result(tuple(cases), pairs, (*NEGATIVE, *POSITIVE), *parts)


def plot(result: Result) -> Figure:
    """Bars above, geometry below; one column a case."""
    columns = len(result.cases)
    figure, axes = panels(2, columns, 0.98)
    for i, (case, (chosen, rejected)) in enumerate(zip(result.cases, result.pairs, strict=True)):
        mass_bars(axes[0, i], result.answers, result.before[i], result.after[i], chosen, rejected)
        axes[0, i].tick_params(axis="x", labelsize=6)
        axes[0, i].set_ylim(0, 1.05)
        axes[0, i].set_title(case)
        _geometry(axes[1, i], result, i)
    for axis in axes[:, 1:].ravel():
        axis.set_ylabel("")
    axes[1, 0].set_ylabel("Δ probability")
    panel_letters(axes[0])
    return figure


def _geometry(axis: Axes, result: Result, i: int) -> None:
    direction, moved = result.direction[i], result.after[i] - result.before[i]
    others = [k for k, answer in enumerate(result.answers) if answer not in result.pairs[i]]
    for group, colour, label in (
        (NEGATIVE, OTHERS[1], "refusals"),
        (POSITIVE, OTHERS[0], "assents"),
    ):
        mine = [k for k in others if result.answers[k] in group]
        style = {"s": 8, "alpha": 0.7, "linewidths": 0}
        axis.scatter(direction[:, mine], moved[:, mine], color=colour, label=label, **style)
    zero_line(axis)
    axis.set(ylim=(-0.3, 0.85), xlabel=r"$\langle W_z, W_+ - W_-\rangle$")
    mean = moved.mean(0)
    top = max(others, key=lambda k: mean[k])
    if mean[top] > 0.02:
        place = (float(direction[:, top].max()), float(mean[top]))
        note(axis, result.answers[top], place, (2, 4), "data", color=OTHERS[0])
    if i == 0:
        tight = {"fontsize": 6, "handletextpad": 0.1, "borderaxespad": 0}
        axis.legend(loc="center left", bbox_to_anchor=(0, 0.62), **tight)
    for answer, sign, height, colour in zip(
        result.pairs[i], "+-", (0.97, 0.88), (CHOSEN, REJECTED), strict=True
    ):
        note(axis, f"$W_{sign}$ {answer}", (0.03, height), color=colour, va="top", fontsize=6)
