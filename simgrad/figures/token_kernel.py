"""The entanglement kernel of two pairs, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import panel_letters, panels, ticks, token_heatmap, zero_line
from simgrad.drawing.style import CHOSEN, REJECTED
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import responses, token_kernel
from simgrad.theory.mitigation import contrastive_mask
from simgrad.typing import Float
from simgrad.worlds.percentiles import Percentiles
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.world import World

TITLE = "Which tokens are entangled"
CAPTION = (
    "⟨∇log π(chosen token i), ∇log π(rejected token j)⟩ of two pairs before training. (a) World "
    "“suffix”: one word differs, {suffix} tokens are shared. (b) World “percentiles”: a response "
    "and its edited copy. Tokens from the first difference to the last have coloured, bold names, "
    "shared ones grey. Blue: raising one raises the other; red: raising one lowers the other. "
    "Below: what one DPO step on this pair alone does to each token of the chosen (blue) and of "
    "the rejected (vermilion), to first order per unit learning rate. In (a) the words that differ "
    "repel each other and move apart while everything shared is dragged down; the diagonal of (b) "
    "shows that most of an edited copy is pulled as one."
)
BEARS_ON = (
    "Yuan et al. (arXiv 2410.13828, Sec. 4): the inner product of a pair is the sum over this "
    "matrix, positive on shared and negative on contrastive tokens."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        suffix: tokens that both responses of (a) share.
        seed: of policies and pairs.
    """

    suffix: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Two pairs; kernels in nats² per unit of θ², changes in nats per unit learning rate."""

    words_chosen: tuple[tuple[str, ...], ...]
    words_rejected: tuple[tuple[str, ...], ...]
    shared_chosen: tuple[tuple[bool, ...], ...]
    shared_rejected: tuple[tuple[bool, ...], ...]
    first: Float[np.ndarray, "W L"]
    second: Float[np.ndarray, "W2 L2"]
    first_change: Float[np.ndarray, "2 R"]
    second_change: Float[np.ndarray, "2 R2"]
    cosines: Float[np.ndarray, " 2"]


def _edited(pairs: list[Pair]) -> Pair:
    """The first pair of equal lengths in which one to three tokens differ, of at least six."""
    for pair in pairs:
        differ = sum(a != b for a, b in zip(pair.chosen, pair.rejected, strict=False))
        if len(pair.chosen) == len(pair.rejected) >= 6 and 1 <= differ <= 3:
            return pair
    raise ValueError("no pair of the world is an edited copy: take another seed")


def compute(config: Config) -> Result:
    """Token kernels under the worlds' policies, and what one DPO step does to each token."""
    suffix, percentiles = Suffix(), Percentiles()
    cases = (
        _case(suffix, suffix.pairs(config.seed, config.suffix)[0], config.seed),
        _case(percentiles, _edited(percentiles.pairs(config.seed)), config.seed),
    )
    words, shared, kernels, changes, cosines = zip(*cases, strict=True)
    parts: tuple[Any, ...] = (
        *zip(*words, strict=True),
        *zip(*shared, strict=True),
        *kernels,
        *changes,
    )
    return Result(*parts, cosines=np.array(cosines))


def _case(world: World, pair: Pair, seed: int) -> tuple[Any, ...]:
    """Words and what is shared of both responses, kernel, changes and cosine of a pair."""
    ((apply, theta),) = world.each_policy([seed])
    batch = padded([pair])
    kernel = token_kernel(apply, theta, batch)[0]
    logp = responses(apply, theta, batch).logp
    force = DPO().force(logp, logp, batch.lengths)[0]
    sides = (pair.chosen, pair.rejected)
    alike = np.asarray(contrastive_mask(batch))[0] == 0
    whole = np.asarray(kernel.sum((1, 3)), float)
    return (
        tuple(tuple(world.words[token] for token in side) for side in sides),
        tuple(tuple(alike[k, : len(side)].tolist()) for k, side in enumerate(sides)),
        np.asarray(kernel[0, : len(pair.chosen), 1, : len(pair.rejected)], float),
        np.asarray(jnp.einsum("sitj,t->si", kernel, force), float),
        whole[0, 1] / np.sqrt(whole[0, 0] * whole[1, 1]),
    )


def plot(result: Result) -> Figure:
    """Heat maps above, changes of the tokens below."""
    figure, axes = panels(2, 2, 0.78, height_ratios=(1.5, 1))
    cases = (
        (result.first, result.first_change, "shared ending"),
        (result.second, result.second_change, "edited copy"),
    )
    for i, (kernel, change, name) in enumerate(cases):
        top, words = axes[0, i], (result.words_chosen[i], result.words_rejected[i])
        shared = (np.array(result.shared_chosen[i]), np.array(result.shared_rejected[i]))
        token_heatmap(top, kernel, *words, shared, linear=float(np.abs(kernel).max()) / 100)
        title = f"{name}, cosine {result.cosines[i]:.2f}".replace("-", "−")
        top.set(title=title, xlabel="rejected tokens", ylabel="chosen tokens")
        _changes(axes[1, i], change, words)
    panel_letters(axes[0])
    axes[1, 0].set_ylabel("Δ log π of each token\n(nats per unit rate)")
    return figure


def _changes(axis: Axes, change: np.ndarray, words: tuple[tuple[str, ...], ...]) -> None:
    for side, (colour, shift) in enumerate(((CHOSEN, -0.2), (REJECTED, 0.2))):
        values = change[side, : len(words[side])]
        axis.bar(np.arange(len(values)) + shift, values, 0.4, color=colour)
    zero_line(axis)
    longest = max(map(len, words))
    shown = range(0, longest, 1 if longest < 10 else 3)
    axis.set_xticks(shown, [str(k + 1) for k in shown])
    top = 10.0 ** np.floor(np.log10(np.abs(change).max()))
    axis.set_yscale("symlog", linthresh=top / 10, linscale=0.7)
    ticks(axis, "y", np.array([-1, -0.1, 0, 0.1, 1]) * top)
    axis.set_xlabel("position in the response")
    totals = change.sum(1)
    text = f"sum: chosen {totals[0]:+.1f}, rejected {totals[1]:+.1f}".replace("-", "−")
    axis.set_title(text, fontsize=7)
