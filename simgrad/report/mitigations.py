"""What other objectives, a stronger pull on the chosen, or a filter would do to scored pairs.

All of it is the first-order own-pair theory at the start of training, where the policy is its own
reference: no model is needed, only the log-probs, lengths and gradient scalars that the table
holds. In joint training other pairs add terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import objectives
from simgrad.bridge.engine.table import ScoreTable
from simgrad.theory import PairKernel, Regime, compare_objectives, first_order, regime
from simgrad.theory.mitigation import Calibrated, PairwiseNormalized, Projected, keep_lowest
from simgrad.typing import Array, Float, Int

__all__ = [
    "Filtered",
    "Needed",
    "ObjectiveFate",
    "Strength",
    "filtered",
    "needed",
    "objective_fates",
    "strength",
]

FRACTIONS = (0.5, 0.25, 0.1)
_SIDES = ("chosen", "rejected")
_KERNEL = ("grad_sq_chosen", "grad_inner", "grad_sq_rejected")
MITIGATIONS = {
    "as scored + pairwise normalisation": PairwiseNormalized(),
    "as scored + calibration": Calibrated(),
    "as scored + projection": Projected(),
}


@dataclass(frozen=True)
class ObjectiveFate:
    """Regimes under objectives that give every pair the same one.

    Attributes:
        names: objectives at their defaults, or mitigations applied to the scored one.
        ratio: smallest and largest d_w/d_l over pairs and these objectives (infinite where d_l = 0,
            nan where both are 0).
        pushed_down: pairs whose chosen the loss itself pushes down, d_w < 0 (most of any of these
            objectives).
        regimes: label to number of pairs.
    """

    names: tuple[str, ...]
    ratio: tuple[float, float]
    pushed_down: int
    regimes: Mapping[str, int]


@dataclass(frozen=True)
class Strength:
    """Shares of pairs when d_w/d_l is multiplied.

    This is what an SFT term on the chosen, or a weaker push on the rejected, does.

    Attributes:
        multiplier: m, the factor on d_w/d_l, log-spaced.
        ideal: share with chosen rising and rejected falling.
        chosen_falls: share that loses its chosen response.
        rejected_rises: share whose rejected response rises.
        best: the m nearest 1 (in logarithms) of those with the largest ideal share.
        pull: median and 90th percentile of d_w, where it is positive for all pairs, else None. An
            SFT term on the summed log-prob multiplies d_w/d_l of a pair by m with the weight
            λ = (m - 1) d_w; a push on the rejected of 1/m does so for all pairs.
    """

    multiplier: Float[np.ndarray, " M"]
    ideal: Float[np.ndarray, " M"]
    chosen_falls: Float[np.ndarray, " M"]
    rejected_rises: Float[np.ndarray, " M"]
    best: float
    pull: tuple[float, float] | None

    def at(self, multiplier: float) -> tuple[float, float, float]:
        """Shares (ideal, chosen falls, rejected rises) at the grid's nearest multiplier."""
        k = int(np.abs(np.log(self.multiplier / multiplier)).argmin())
        return float(self.ideal[k]), float(self.chosen_falls[k]), float(self.rejected_rises[k])


@dataclass(frozen=True)
class Needed:
    """What keeps a chosen response from falling: (at the median, for 90 %) of falling pairs.

    The chosen of a pair does not fall where d_w ‖g_w‖² ≥ d_l ⟨g_w,g_l⟩. With ρ = ⟨g_w,g_l⟩/‖g_w‖²:

    Attributes:
        ratio: the least d_w/d_l, which is ρ; None where the rejected of a falling pair is pulled
            up (d_l < 0), since the inequality then turns round.
        sft: the least weight λ of an SFT term on the summed log-prob of the chosen, which adds λ to
            d_w: λ = ρ d_l - d_w.
        shift: the largest factor on the push d_l: d_w / (ρ d_l). From DPO, where d_w = d_l, this is
            DPO-Shift's λ. It is not positive where no factor is enough, because d_w ≤ 0.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3, solved for each mitigation.
    """

    ratio: tuple[float, float] | None
    sft: tuple[float, float]
    shift: tuple[float, float]


def needed(table: ScoreTable) -> Needed | None:
    """What the falling pairs of a score table need; None where the chosen of none falls."""
    column = _finite(table)
    d_w, d_l, square = column["d_chosen"], column["d_rejected"], column["grad_sq_chosen"]
    falls = d_w * square - d_l * column["grad_inner"] < 0
    if not falls.any():
        return None
    d_w, d_l = d_w[falls], d_l[falls]
    ratio = column["grad_inner"][falls] / square[falls]
    against = ratio * d_l  # what d_w has to make up for
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(against > 0, d_w / against, -np.inf)

    # quantiles of pairs that are there: what is said then holds, also where some are infinite
    def least(values: np.ndarray) -> tuple[float, float]:
        half, most = np.quantile(values, [0.5, 0.9], method="higher")
        return float(half), float(most)

    half, most = least(-shift)
    pushed = (d_l > 0).all()
    return Needed(least(ratio) if pushed else None, least(against - d_w), (-half, -most))


@dataclass(frozen=True)
class Filtered:
    """What remains when the pairs with the lowest score are kept.

    Attributes:
        score: its name.
        label: for people; the least alike responses are kept where similarity is a risk.
        kept: fraction to (pairs kept, pairs among them whose chosen falls).
    """

    score: str
    label: str
    kept: Mapping[float, tuple[int, int]]


def _finite(table: ScoreTable) -> dict[str, np.ndarray]:
    """Columns that the theory needs, of the pairs where all of them are numbers."""
    names = [*_KERNEL, *(f"{what}_{side}" for what in ("logp", "d") for side in _SIDES)]
    columns = {name: np.asarray(table[name], np.float64) for name in names}
    use = np.isfinite(np.stack(list(columns.values()))).all(0)
    lengths = {f"n_{side}": np.asarray(table[f"n_{side}"]) for side in _SIDES}
    return {name: column[use] for name, column in {**columns, **lengths}.items()}


def objective_fates(table: ScoreTable) -> tuple[ObjectiveFate, ...]:
    """Regimes under every objective that treats each pair by itself, most ideal pairs first.

    Hyperparameters are the defaults. Objectives without any difference on these pairs share an
    entry, as do mitigations.
    """
    with jax.enable_x64(True):
        column = _finite(table)
        if not len(column["d_chosen"]):
            return ()
        kernel = PairKernel(*(jnp.asarray(column[name]) for name in _KERNEL))
        logp, lengths = (
            jnp.asarray(np.stack([column[f"{kind}_{side}"] for side in _SIDES], -1))
            for kind in ("logp", "n")
        )
        scored = jnp.asarray(np.stack([column["d_chosen"], -column["d_rejected"]], -1))
        plain = {
            d.name: objectives.get(d.name) for d in objectives.catalog() if not d.batch_coupled
        }
        fates = compare_objectives(kernel, logp, logp, lengths, list(plain.values()))
        found = {name: (fates[o].force, fates[o].regime) for name, o in plain.items()}
        for name, mitigation in MITIGATIONS.items():
            force, _ = mitigation.update(scored, mitigation.init(), kernel)
            found[name] = force, regime(first_order(kernel, force))
        groups: dict[tuple[bool, bytes], list[str]] = {}
        for name, (_, labels) in found.items():
            groups.setdefault((name in MITIGATIONS, np.asarray(labels).tobytes()), []).append(name)
        alike = [
            _fate(tuple(names), found[names[0]][1], np.stack([found[name][0] for name in names]))
            for names in groups.values()
        ]
    return tuple(sorted(alike, key=lambda fate: -fate.regimes["ideal"]))


def _fate(
    names: tuple[str, ...], labels: Int[Array, " B"], forces: Float[np.ndarray, "O B 2"]
) -> ObjectiveFate:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = -forces[..., 0] / forces[..., 1]
    ratios = ratios[~np.isnan(ratios)]
    bounds = (float(ratios.min()), float(ratios.max())) if len(ratios) else (np.nan, np.nan)
    counts = np.bincount(np.asarray(labels), minlength=len(Regime))
    down = int((forces[..., 0] < 0).sum(1).max())
    return ObjectiveFate(names, bounds, down, {r.label: int(counts[r]) for r in Regime})


def strength(table: ScoreTable) -> Strength | None:
    """Shares of pairs by factor on the scored objective's d_w/d_l, any signs (None: no pair)."""
    column = _finite(table)
    if not len(column["d_chosen"]):
        return None
    d_w, d_l, inner = column["d_chosen"], column["d_rejected"], column["grad_inner"]
    with np.errstate(divide="ignore", invalid="ignore"):
        need = d_l * inner / (d_w * column["grad_sq_chosen"])
    need = need[np.isfinite(need) & (need > 0)]
    reach = float(np.clip(2 * np.quantile(need, 0.98) if len(need) else 4.0, 4.0, 64.0))
    grid = np.concatenate([np.geomspace(1 / reach, 1, 81), np.geomspace(1, reach, 81)[1:]])
    falls = (grid[:, None] * d_w * column["grad_sq_chosen"] - d_l * inner) < 0
    rises = (grid[:, None] * d_w * inner - d_l * column["grad_sq_rejected"]) > 0
    ideal = (~falls & ~rises).mean(1)
    top = np.flatnonzero(ideal == ideal.max())
    best = float(grid[top[np.abs(np.log(grid[top])).argmin()]])
    median, most = np.quantile(d_w, [0.5, 0.9]).tolist()
    pull = (median, most) if d_w.min() > 0 else None
    return Strength(grid, ideal, falls.mean(1), rises.mean(1), best, pull)


def filtered(
    risks: Iterable[tuple[str, str, Float[np.ndarray, " B"]]], change: Float[np.ndarray, " B"]
) -> tuple[Filtered, ...]:
    """Pairs kept and falling for each (label, name, risk), keeping the lowest risk."""
    found = []
    for label, name, risk in risks:
        use = np.isfinite(risk) & np.isfinite(change)
        if not use.any():
            continue
        falls = change[use] < 0
        with jax.enable_x64(True):
            values = jnp.asarray(risk[use])
            index = {share: np.asarray(keep_lowest(values, share)) for share in FRACTIONS}
        kept = {share: (len(i), int(falls[i].sum())) for share, i in index.items()}
        found.append(Filtered(name, label, kept))
    return tuple(found)
