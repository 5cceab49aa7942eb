"""The kernel that decides depends on the optimizer: SGD against Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simgrad.drawing.draw import note, panel_letters, panels, zero_line
from simgrad.drawing.style import CHOSEN, GUIDE, OTHERS, REJECTED
from simgrad.dynamics import Recipe, train
from simgrad.dynamics.agreement import spearman
from simgrad.models import Apply
from simgrad.objectives import DPO
from simgrad.pairs import Batch
from simgrad.theory import entanglement_kernel, loss_gradient, responses
from simgrad.theory.kernel import preconditioning
from simgrad.typing import Float, Theta
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.tuning import recipe_for

TITLE = "Every optimizer has its own kernel"
CAPTION = (
    "{pairs} pairs of the world “suffix” (shared ending of {suffix} tokens). (a) J Jᵀ, the kernel "
    "that rules SGD, and (b) J P Jᵀ with Adam's preconditioner at its first step, both as cosines "
    "between responses (chosen first, then rejected), first seed. Adam, whose first step is a "
    "sign, gives small gradients as much weight as large ones and so entangles every response with "
    "every other. (c) What {steps} steps of Adam did to each chosen response of the first seed "
    "against the first order of either kernel (divided by its largest); in words the rank "
    "correlation ρ within a seed and the share of right signs, lowest and highest of {count} seeds."
)
BEARS_ON = (
    "The entanglement of Yuan et al. (arXiv 2410.13828) is stated for SGD; with Adam (Kingma & Ba, "
    "arXiv 1412.6980) the same theory needs K_P = J P Jᵀ."
)


@dataclass(frozen=True)
class Config:
    """What is computed.

    Attributes:
        pairs: trained together in full batches.
        suffix: tokens that both responses share.
        learning_rate: of Adam.
        steps: of the measured run.
        seeds: of policies and pairs; the first is drawn.
    """

    pairs: int = 24
    suffix: int = 8
    learning_rate: float = 1e-4
    steps: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Result:
    """Kernels in nats² per unit of θ² (times that of P) and changes in nats of the first seed.

    Rows are chosen responses, then rejected ones.
    The last two have one row a kernel (SGD's, Adam's) and one column a seed, of the chosen
    responses only.
    """

    pairs: int
    sgd: Float[np.ndarray, "U U"]
    adam: Float[np.ndarray, "U U"]
    sgd_says: Float[np.ndarray, " U"]
    adam_says: Float[np.ndarray, " U"]
    measured: Float[np.ndarray, " U"]
    correlations: Float[np.ndarray, "2 seeds"]
    signs: Float[np.ndarray, "2 seeds"]


def compute(config: Config) -> Result:
    """Both kernels at the start, and a run of Adam, for every seed."""
    world = Suffix(n_pairs=config.pairs)
    recipe = recipe_for(DPO(), "adam", config.learning_rate, config.steps)
    found = [_seed(*start, recipe) for start in world.starts(config.seeds, config.suffix)]
    n = config.pairs
    of_chosen = [[(says[k][:n], change[:n]) for _, says, change in found] for k in (0, 1)]
    ranks = [[spearman(*both) for both in seeds] for seeds in of_chosen]
    signs = [[(np.sign(x) == np.sign(y)).mean() for x, y in seeds] for seeds in of_chosen]
    (sgd, adam), (sgd_says, adam_says), change = found[0]
    agreement = (np.array(ranks), np.array(signs))
    return Result(n, sgd, adam, sgd_says, adam_says, change, *agreement)


def _seed(
    apply: Apply, theta: Theta, batch: Batch, recipe: Recipe
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Both kernels, what each says of every response, and what the run did; chosen ones first."""
    gradient = loss_gradient(apply, theta, batch, DPO())
    scale = preconditioning.adam(optax.adam(1.0).init(theta), gradient).scale
    logp = responses(apply, theta, batch).logp
    force = np.asarray(DPO().force(logp, logp, batch.lengths), float).ravel() / batch.size
    order = np.arange(2 * batch.size).reshape(-1, 2).T.ravel()
    kernels = [
        np.asarray(entanglement_kernel(apply, theta, batch, scale=s), float) for s in (None, scale)
    ]
    change = np.asarray(train(apply, theta, batch, recipe).trajectory.change[-1], float).ravel()
    in_order = [kernel[np.ix_(order, order)] for kernel in kernels]
    return in_order, [(kernel @ force)[order] for kernel in kernels], change[order]


def plot(result: Result) -> Figure:
    """Two heat maps and one scatter."""
    figure, axes = panels(1, 3, 1.2, width_ratios=(1, 1, 1.15))
    _heatmap(axes[0], result.sgd, "SGD")
    image = _heatmap(axes[1], result.adam, "Adam, first step")
    bar = figure.colorbar(image, ax=axes[:2], orientation="horizontal", shrink=0.6, pad=0.03)
    bar.set_label("cosine of gradients")
    bar.outline.set_visible(False)
    _scatter(axes[2], result)
    panel_letters(axes)
    return figure


def _heatmap(axis: Axes, kernel: np.ndarray, name: str) -> Any:
    norm, n = np.sqrt(np.diag(kernel)), len(kernel) / 2
    image = axis.imshow(kernel / np.outer(norm, norm), cmap="RdBu", vmin=-1, vmax=1)
    axis.set_xticks([n / 2, 1.5 * n], ["chosen", "rejected"])
    axis.set_yticks([n / 2, 1.5 * n], ["chosen", "rejected"], rotation=90, va="center")
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        labels[0].set_color(CHOSEN)
        labels[1].set_color(REJECTED)
    for line in (axis.axhline, axis.axvline):
        line(n - 0.5, color="white", lw=1)
    axis.tick_params(length=0)
    axis.set_title(name)
    return image


def _scatter(axis: Axes, result: Result) -> None:
    n = result.pairs
    measured = result.measured[:n]
    for k, (says, name, colour, marker) in enumerate(
        ((result.sgd_says, "SGD", OTHERS[2], "s"), (result.adam_says, "Adam", OTHERS[0], "o"))
    ):
        mine = says[:n] / np.abs(says[:n]).max()
        axis.scatter(mine, measured, s=9, color=colour, marker=marker, alpha=0.8, linewidths=0)
        ranks, signs = result.correlations[k], 100 * result.signs[k]
        text = (
            f"{name}'s: ρ {ranks.min():.2f} to {ranks.max():.2f}, "
            f"signs {signs.min():.0f} to {signs.max():.0f} %"
        )
        text = text.replace("-", "−")
        note(axis, text, (0.0, 1.0 - 0.09 * k), color=colour, va="top", fontsize=6.5)
    zero_line(axis)
    axis.axvline(0, color=GUIDE, lw=0.6)
    low, high = axis.get_ylim()
    axis.set(xlabel="predicted (relative)", ylabel="measured Δ log π (nats)")
    axis.set(ylim=(low, high + 0.25 * (high - low)), title="chosen, in a run of Adam")
