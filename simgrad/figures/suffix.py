"""Entanglement and displacement against the length of the ending that both responses share."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, direct_labels, panel_letters
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS, REJECTED, size
from simgrad.experiments import suffix
from simgrad.typing import Float, Int
from simgrad.worlds.suffix import Suffix

TITLE = "A shared ending drags the chosen response down"
CAPTION = (
    "World “suffix”: 32 pairs that differ in one word and share the L tokens after it, trained "
    "together by DPO and Adam; bands are 95 % over {count} seeds. (a) The cosine of the pair's "
    "gradients grows with L. (b) The longer the ending, the further the chosen falls, although the "
    "one word that was preferred rises: what falls is the shared ending. (c) Share of pairs whose "
    "chosen falls: measured; as the kernel of the whole batch says before training (first step of "
    "Adam); and as each pair's own condition says, which misses it, because here pairs are dragged "
    "down by each other."
)
BEARS_ON = (
    "The 1t, short-suffix and long-suffix settings of Yuan et al. (arXiv 2410.13828), and that the "
    "condition of a pair alone is not that of a batch."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        lengths: L of the shared ending.
        seeds: of policies and pairs.
    """

    lengths: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """One row a seed, one column a length; changes in nats."""

    lengths: Int[np.ndarray, " L"]
    cosine: Float[np.ndarray, "seeds L"]
    chosen: Float[np.ndarray, "seeds L"]
    rejected: Float[np.ndarray, "seeds L"]
    word: Float[np.ndarray, "seeds L"]
    falls: Float[np.ndarray, "seeds L"]
    batch_says: Float[np.ndarray, "seeds L"]
    own_says: Float[np.ndarray, "seeds L"]


def compute(config: Config) -> Result:
    """The world's experiment."""
    found = suffix.run(Suffix(lengths=config.lengths), config.seeds)
    measured, predicted = found["lengths"], found["predictions"]

    def column(table, name: str) -> np.ndarray:
        return np.stack([table.where(L=length)[name] for length in config.lengths], axis=1).astype(
            float
        )

    return Result(
        lengths=np.array(config.lengths),
        cosine=column(measured, "cosine"),
        chosen=column(measured, "Δ chosen"),
        rejected=column(measured, "Δ rejected"),
        word=column(measured, "Δ word"),
        falls=column(measured, "falls"),
        batch_says=column(predicted, "batch, Adam"),
        own_says=column(predicted, "own, SGD"),
    )


def plot(result: Result) -> Figure:
    """Cosine, changes, shares."""
    figure, axes = plt.subplots(1, 3, figsize=size(1, 3, 0.95), layout="constrained")
    place = np.arange(len(result.lengths))
    band(axes[0], place, result.cosine, "black", marker="o")
    axes[0].axhline(0, color=GUIDE, lw=0.6)
    axes[0].set_ylabel(r"$\cos(g_w, g_l)$")
    axes[0].set_title("entanglement")
    axes[1].set_yscale("symlog", linthresh=0.3, linscale=0.8)
    axes[1].set_yticks([-10, -1, -0.3, 0, 0.3], ["−10", "−1", "−0.3", "0", "0.3"])
    axes[1].minorticks_off()
    _lines(
        axes[1],
        place,
        {
            "preferred word": (result.word, OTHERS[0]),
            "chosen": (result.chosen, CHOSEN),
            "rejected": (result.rejected, REJECTED),
        },
    )
    axes[1].axhline(0, color=GUIDE, lw=0.6)
    axes[1].set_ylabel("Δ log π (nats)")
    axes[1].set_title("displacement")
    _lines(
        axes[2],
        place,
        {
            "measured": (result.falls, "black"),
            "batch kernel": (result.batch_says, OTHERS[1]),
            "own kernel": (result.own_says, OTHERS[2]),
        },
    )
    axes[2].set_ylim(-0.03, 1.03)
    axes[2].set_ylabel("share of pairs")
    axes[2].set_title("whose chosen falls")
    for axis in axes:
        axis.set_xticks(place, [str(n) for n in result.lengths])
        axis.set_xlabel("shared tokens L")
    panel_letters(list(axes))
    return figure


def _lines(axis: Axes, x: np.ndarray, lines: dict[str, tuple[np.ndarray, str]]) -> None:
    styles = ("-", "--", ":")
    for (runs, colour), style in zip(lines.values(), styles, strict=False):
        band(axis, x, runs, colour, style=style, marker="o")
    ends = {name: (float(runs[:, -1].mean()), colour) for name, (runs, colour) in lines.items()}
    direct_labels(axis, float(x[-1]), ends, gap=0.09)
