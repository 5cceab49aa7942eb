"""Entanglement and displacement against the length of the ending that both responses share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from simgrad.drawing.draw import band, labelled_bands, panel_letters, panels, ticks, zero_line
from simgrad.drawing.style import CHOSEN, OTHERS, REJECTED
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

    columns = (
        *((measured, name) for name in ("cosine", "Δ chosen", "Δ rejected", "Δ word", "falls")),
        *((predicted, name) for name in ("batch, Adam", "own, SGD")),
    )
    return Result(
        np.array(config.lengths),
        *(table.across(name, "L", config.lengths) for table, name in columns),
    )


def plot(result: Result) -> Figure:
    """Cosine, changes, shares."""
    figure, axes = panels(1, 3, 0.95)
    cosine, change, share = axes
    place, styles = np.arange(len(result.lengths)), ("-", "--", ":")
    band(cosine, place, result.cosine, "black", marker="o")
    zero_line(cosine)
    cosine.set(ylabel=r"$\cos(g_w, g_l)$", title="entanglement")
    change.set_yscale("symlog", linthresh=0.3, linscale=0.8)
    ticks(change, "y", [-10, -1, -0.3, 0, 0.3])
    changes = {
        "preferred word": (result.word, OTHERS[0]),
        "chosen": (result.chosen, CHOSEN),
        "rejected": (result.rejected, REJECTED),
    }
    labelled_bands(change, place, changes, 0.09, styles)
    zero_line(change)
    change.set(ylabel="Δ log π (nats)", title="displacement")
    shares = {
        "measured": (result.falls, "black"),
        "batch kernel": (result.batch_says, OTHERS[1]),
        "own kernel": (result.own_says, OTHERS[2]),
    }
    labelled_bands(share, place, shares, 0.09, styles)
    share.set(ylim=(-0.03, 1.03), ylabel="share of pairs", title="whose chosen falls")
    for axis in axes:
        axis.set_xticks(place, [str(n) for n in result.lengths])
        axis.set_xlabel("shared tokens L")
    panel_letters(axes)
    return figure
