"""Who rises and who falls: the regime of a pair under an objective, and the band that keeps it ideal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp

from simgrad.objectives import Coefficients
from simgrad.theory.gram import PairKernel
from simgrad.theory.prediction import first_order
from simgrad.typing import Array, Bool, Float, Int

__all__ = ["Band", "Regime", "band", "regime"]


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


def regime(kernel: PairKernel, coefficients: Coefficients) -> Int[Array, "*pairs"]:
    """Regime of each pair as the value of :class:`Regime`.

    The chosen rises when d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩ ≥ 0 and the rejected falls when
    d_w ⟨g_w,g_l⟩ - d_l ‖g_l‖² ≤ 0; for d_w, d_l > 0 these read ⟨g_w,g_l⟩ ≤ (d_w/d_l) ‖g_w‖² and
    ⟨g_w,g_l⟩ ≤ (d_l/d_w) ‖g_l‖². REVERSED (chosen falls, rejected rises) is then impossible to first
    order, because the weighted margin d_w Δ_w - d_l Δ_l = ‖d_w g_w - d_l g_l‖² cannot shrink.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3, for equal d; stated here for any signs.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> Regime(int(regime(kernel, Coefficients(jnp.array([1.0]), jnp.array([1.0])))[0])).label
    'both_fall'
    """
    change = first_order(kernel, coefficients)
    falls = change.chosen < 0
    rises = change.rejected > 0
    return jnp.where(
        falls,
        jnp.where(rises, int(Regime.REVERSED), int(Regime.BOTH_FALL)),
        jnp.where(rises, int(Regime.BOTH_RISE), int(Regime.IDEAL)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Band:
    """Disentanglement band of each pair in the logarithm of r = d_w / d_l.

    Attributes:
        log_ratio: log r.
        centre: log r* = log(‖g_l‖ / ‖g_w‖).
        half_width: -log ρ with ρ = cos(g_w, g_l); infinite for ρ ≤ 0.
        inside: |log r - log r*| ≤ -log ρ, which is the ideal regime.
        calibration: α = sqrt(r*/r): scaling d_w by α and d_l by 1/α moves the pair to the centre.
    """

    log_ratio: Float[Array, "*pairs"]
    centre: Float[Array, "*pairs"]
    half_width: Float[Array, "*pairs"]
    inside: Bool[Array, "*pairs"]
    calibration: Float[Array, "*pairs"]


def band(kernel: PairKernel, coefficients: Coefficients) -> Band:
    """How far each pair stands from losing its chosen (or raising its rejected) response.

    Needs d_w, d_l > 0 (else log r is nan and ``inside`` False; use :func:`regime`). Both log r and
    the half-width are dimensionless.

    Source: Chen et al., arXiv 2604.18239 (disentanglement band, reward calibration).

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> one = jnp.array([1.0])
    >>> bool(band(kernel, Coefficients(one, one)).inside[0]), bool(band(kernel, Coefficients(2 * one, one)).inside[0])
    (False, True)
    """
    log_ratio = jnp.log(coefficients.chosen / coefficients.rejected)
    positive = (coefficients.chosen > 0) & (coefficients.rejected > 0)
    log_ratio = jnp.where(positive, log_ratio, jnp.nan)
    centre = 0.5 * (jnp.log(kernel.sq_rejected) - jnp.log(kernel.sq_chosen))
    cosine = jnp.minimum(kernel.cosine, 1.0)
    half_width = jnp.where(cosine > 0, -jnp.log(jnp.where(cosine > 0, cosine, 1.0)), jnp.inf)
    inside = jnp.abs(log_ratio - centre) <= half_width
    return Band(log_ratio, centre, half_width, inside, jnp.exp(0.5 * (centre - log_ratio)))
