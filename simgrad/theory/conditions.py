"""Who rises and who falls: a pair's regime under an objective, and the band that keeps it ideal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp

from simgrad.objectives import Objective
from simgrad.theory.kernel.gram import PairKernel
from simgrad.theory.prediction.changes import first_order
from simgrad.typing import Array, Bool, Float, Int

__all__ = [
    "Band",
    "Fate",
    "IdealRange",
    "Regime",
    "band",
    "compare_objectives",
    "ideal_range",
    "regime",
]


class Regime(IntEnum):
    """First-order fate of (chosen, rejected) log-probs after one gradient step."""

    IDEAL = 0
    BOTH_FALL = 1
    BOTH_RISE = 2
    REVERSED = 3

    @property
    def label(self) -> str:
        """Lower-case name, as in the score table."""
        return self.name.lower()


def regime(change: Float[Array, "*pairs 2"]) -> Int[Array, "*pairs"]:
    """Regime of each pair, as the value of :class:`Regime`: the signs of its two changes.

    With first-order changes Δu = η K c (:func:`simgrad.theory.first_order`) the chosen rises when
    d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩ ≥ 0 and the rejected falls when d_w ⟨g_w,g_l⟩ - d_l ‖g_l‖² ≤ 0; for
    d_w, d_l > 0 these read ⟨g_w,g_l⟩ ≤ (d_w/d_l) ‖g_w‖² and ⟨g_w,g_l⟩ ≤ (d_l/d_w) ‖g_l‖².
    REVERSED (chosen falls, rejected rises) is then impossible to first order, because the weighted
    margin d_w Δ_w - d_l Δ_l = ‖d_w g_w - d_l g_l‖² cannot shrink.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3, for d_w, d_l > 0; stated here for any signs.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> Regime(int(regime(first_order(kernel, jnp.array([[1.0, -1.0]])))[0])).label
    'both_fall'
    """
    falls, rises = change[..., 0] < 0, change[..., 1] > 0
    return jnp.where(
        falls,
        jnp.where(rises, int(Regime.REVERSED), int(Regime.BOTH_FALL)),
        jnp.where(rises, int(Regime.BOTH_RISE), int(Regime.IDEAL)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Band:
    """Each pair's disentanglement band, in logarithms of r = d_w/d_l and as an angle for any signs.

    Attributes:
        log_ratio: log r; nan unless d_w, d_l > 0.
        centre: log r* = log(‖g_l‖ / ‖g_w‖).
        half_width: -log ρ with ρ = cos(g_w, g_l); infinite for ρ ≤ 0.
        angle: ψ = atan2(d_w ‖g_w‖, d_l ‖g_l‖) - π/4 in radians; 0 is the centre.
        half_angle: π/4 - arctan ρ.
        inside: |ψ| ≤ π/4 - arctan ρ, which is the ideal regime; for d_w, d_l > 0 the same as
            |log r - log r*| ≤ -log ρ.
        calibration: α = sqrt(r*/r): scaling d_w by α and d_l by 1/α moves the pair to the centre.
    """

    log_ratio: Float[Array, "*pairs"]
    centre: Float[Array, "*pairs"]
    half_width: Float[Array, "*pairs"]
    angle: Float[Array, "*pairs"]
    half_angle: Float[Array, "*pairs"]
    inside: Bool[Array, "*pairs"]
    calibration: Float[Array, "*pairs"]


def band(kernel: PairKernel, force: Float[Array, "*pairs 2"]) -> Band:
    """How far each pair stands from losing its chosen (or raising its rejected) response.

    With p = d_w ‖g_w‖ and q = d_l ‖g_l‖ the ideal regime is the cone p ≥ ρ q, q ≥ ρ p. For positive
    coefficients it is an interval in log r; in the angle of (q, p) it is one for any signs, π/2
    wide at ρ = 0, a half-plane at ρ = -1, and closed at ρ = 1.

    Source: Chen et al., arXiv 2604.18239 (disentanglement band, reward calibration) for d_w, d_l >
    0; the angular form is derived here.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> [bool(band(kernel, jnp.array([[d_w, -1.0]])).inside[0]) for d_w in (1.0, 2.0)]
    [False, True]
    """
    d_w, d_l = force[..., 0], -force[..., 1]
    positive = (d_w > 0) & (d_l > 0)
    log_ratio = jnp.where(positive, jnp.log(jnp.where(positive, d_w / d_l, 1.0)), jnp.nan)
    centre = 0.5 * (jnp.log(kernel.sq_rejected) - jnp.log(kernel.sq_chosen))
    cosine = jnp.clip(kernel.cosine, -1.0, 1.0)
    half_width = jnp.where(cosine > 0, -jnp.log(jnp.where(cosine > 0, cosine, 1.0)), jnp.inf)
    angle = (
        jnp.arctan2(d_w * jnp.sqrt(kernel.sq_chosen), d_l * jnp.sqrt(kernel.sq_rejected))
        - jnp.pi / 4
    )
    angle = jnp.where(angle < -jnp.pi, angle + 2 * jnp.pi, angle)
    half_angle = jnp.pi / 4 - jnp.arctan(cosine)
    inside = (jnp.abs(angle) <= half_angle) | ((d_w == 0) & (d_l == 0))
    return Band(
        log_ratio,
        centre,
        half_width,
        angle,
        half_angle,
        inside,
        jnp.exp(0.5 * (centre - log_ratio)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IdealRange:
    """Values of r = d_w/d_l that keep each pair ideal.

    Attributes:
        lower: for d_l > 0 the pair is ideal when lower ≤ r ≤ upper; below, the chosen falls. -inf
            if g_w vanishes.
        upper: above, the rejected rises; infinite when the gradients do not point the same way.
        negative: for d_l < 0 (the rejected is pulled up) it is ideal when r ≤ negative; -inf is
            never.
    """

    lower: Float[Array, "*pairs"]
    upper: Float[Array, "*pairs"]
    negative: Float[Array, "*pairs"]


def ideal_range(kernel: PairKernel) -> IdealRange:
    """How much more weight the chosen needs, and may have, to rise while the rejected falls.

        ⟨g_w,g_l⟩/‖g_w‖² ≤ d_w/d_l ≤ ‖g_l‖²/⟨g_w,g_l⟩        (d_l > 0)

    and there is no upper bound for ⟨g_w,g_l⟩ ≤ 0. The range is never empty, by Cauchy-Schwarz. An
    objective whose d_w/d_l is below ``lower`` loses the chosen (both fall); DPO, IPO and the like
    have d_w/d_l = 1, SimPO |y_l|/|y_w|.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3, solved for d_w/d_l; the case d_l < 0 is derived
    here.

    >>> import jax.numpy as jnp
    >>> r = ideal_range(PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0])))
    >>> r.lower.item(), round(r.upper.item(), 4)
    (1.5, 2.6667)
    """
    inner = kernel.inner
    away, alike = inner < 0, inner > 0
    ratio = kernel.sq_rejected / jnp.where(inner == 0, 1.0, inner)
    moves = kernel.sq_chosen > 0
    lower = jnp.where(moves, inner / jnp.where(moves, kernel.sq_chosen, 1.0), -jnp.inf)
    return IdealRange(lower, jnp.where(alike, ratio, jnp.inf), jnp.where(away, ratio, -jnp.inf))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fate:
    """What an objective does to each pair, trained alone, to first order.

    Attributes:
        force: (d_w, -d_l).
        change: Δlog π of both, per unit learning rate.
    """

    force: Float[Array, "*pairs 2"]
    change: Float[Array, "*pairs 2"]

    @property
    def regime(self) -> Int[Array, "*pairs"]:
        """Values of :class:`Regime`."""
        return regime(self.change)


def compare_objectives(
    kernel: PairKernel,
    logp: Float[Array, "*pairs 2"],
    reference: Float[Array, "*pairs 2"],
    lengths: Int[Array, "*pairs 2"],
    candidates: Sequence[Objective],
) -> dict[Objective, Fate]:
    """Which objectives keep which pairs ideal: one kernel serves them all.

    >>> import jax.numpy as jnp
    >>> from simgrad.objectives import DPO, SimPO
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> logp, lengths = jnp.array([[-3.0, -5.0]]), jnp.array([[2, 4]])
    >>> fates = compare_objectives(kernel, logp, logp, lengths, [DPO(), SimPO()])
    >>> [Regime(int(fate.regime[0])).label for fate in fates.values()]
    ['both_fall', 'ideal']
    """
    forces = {o: o.force(logp, reference, lengths) for o in candidates}
    return {o: Fate(c, first_order(kernel, c)) for o, c in forces.items()}
