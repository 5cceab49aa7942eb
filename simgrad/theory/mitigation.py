"""Remedies for displacement, as objects that theory and training share.

A remedy acts in one of four places:

* on the loss: the objectives that keep the chosen up (DPOP, an added SFT term, DPO-Shift, gating)
  are in :mod:`simgrad.objectives`;
* on the two numbers d_w, d_l of a pair, given its kernel: :class:`PairwiseNormalized`,
  :class:`Calibrated`, :class:`RunningCalibrated`, :class:`Projected` here. Theory predicts with the
  changed numbers (:func:`simgrad.theory.first_order`), training differentiates
  :func:`surrogate_loss`;
* on tokens: weights in the log-probs, :func:`contrastive_mask` and :class:`SparseMask` here, whose
  kernel is :func:`simgrad.theory.masked_kernel`;
* on the data: :func:`keep_lowest` of any score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models.likelihood import Responses
from simgrad.objectives import Coefficients
from simgrad.pairs import Batch
from simgrad.theory.closed_forms.linear_softmax import shared_lengths
from simgrad.theory.kernel.gram import PairKernel
from simgrad.typing import Array, Float, Int

__all__ = [
    "Calibrated",
    "Mitigation",
    "PairwiseNormalized",
    "Projected",
    "RunningCalibrated",
    "SparseMask",
    "contrastive_mask",
    "keep_lowest",
    "masked_logp",
    "surrogate_loss",
]


@runtime_checkable
class Mitigation(Protocol):
    """A change of d_w and d_l that looks at the pair's geometry."""

    def __call__(self, coefficients: Coefficients, kernel: PairKernel) -> Coefficients:
        """The coefficients to train with."""
        ...


@dataclass(frozen=True)
class PairwiseNormalized:
    """Step along g_w/‖g_w‖ - g_l/‖g_l‖: d_w → d_w/‖g_w‖ and d_l → d_l/‖g_l‖.

    For d_w = d_l = d it changes log π_w by η d ‖g_w‖ (1 - ρ) ≥ 0 and log π_l by -η d ‖g_l‖ (1 - ρ)
    ≤ 0 to first order, so the pair, trained alone, is ideal whatever its geometry; for d_w ≠ d_l it
    is not always so, and in a batch other pairs add their terms.

    Source: the pairwise-normalised gradient of Yuan et al., arXiv 2410.13828.

    >>> import jax.numpy as jnp
    >>> kernel, one = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0])), jnp.array([1.0])
    >>> d = PairwiseNormalized()(Coefficients(one, one), kernel)
    >>> d.chosen.item(), d.rejected.item()
    (1.0, 0.5)
    """

    def __call__(self, coefficients: Coefficients, kernel: PairKernel) -> Coefficients:
        """Divide each coefficient by its gradient's norm."""
        norms = (jnp.sqrt(jnp.where(x > 0, x, 1.0)) for x in (kernel.sq_chosen, kernel.sq_rejected))
        return Coefficients(*map(jnp.divide, (coefficients.chosen, coefficients.rejected), norms))


@dataclass(frozen=True)
class Calibrated:
    """Reward calibration: d_w → α d_w and d_l → d_l/α with α = √(r*/r), r = d_w/d_l, r* = ‖g_l‖/‖g_w‖.

    Moves the pair to the centre of its band, hence to the ideal regime, and keeps d_w d_l. Pairs
    with a coefficient that is not positive, or a gradient that vanishes, are left as they are.

    Source: Chen et al., arXiv 2604.18239.

    >>> import jax.numpy as jnp
    >>> kernel, one = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0])), jnp.array([1.0])
    >>> d = Calibrated()(Coefficients(one, one), kernel)
    >>> round((d.chosen / d.rejected).item(), 4)
    2.0
    """

    def __call__(self, coefficients: Coefficients, kernel: PairKernel) -> Coefficients:
        """Rescale both coefficients."""
        d_w, d_l = coefficients.chosen, coefficients.rejected
        positive = (d_w > 0) & (d_l > 0) & (kernel.sq_chosen > 0) & (kernel.sq_rejected > 0)
        r = jnp.where(positive, d_w / jnp.where(positive, d_l, 1.0), 1.0)
        square = jnp.where(
            positive, kernel.sq_rejected / jnp.where(positive, kernel.sq_chosen, 1.0), 1.0
        )
        alpha = jnp.where(positive, jnp.sqrt(jnp.sqrt(square) / r), 1.0)
        return Coefficients(alpha * d_w, d_l / alpha)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Average:
    """Exponential moving average of a number, and the weight it has gathered (for the bias correction)."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


@dataclass(frozen=True)
class RunningCalibrated:
    """Reward calibration with one α for all pairs, from a moving average over steps.

    d_w → α d_w and d_l → d_l/α with log α = ½ EMA[mean over the batch of log(r*/r)], r and r* as in
    :class:`Calibrated`. Single pairs are only ideal as far as they resemble the average; in return
    the relative weight of the pairs stays the objective's.

    Source: the calibration of Chen et al., arXiv 2604.18239; the average over steps and its default
    decay are our choice.

    >>> import jax.numpy as jnp
    >>> kernel, one = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0])), jnp.array([1.0])
    >>> remedy = RunningCalibrated()
    >>> d, average = remedy.update(remedy.init(), Coefficients(one, one), kernel)
    >>> round((d.chosen / d.rejected).item(), 4)
    2.0
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        """Refuse a decay that forgets nothing or is no decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def init(self, dtype: str = "float32") -> Average:
        """Nothing averaged yet: α = 1."""
        return Average(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def update(
        self, average: Average, coefficients: Coefficients, kernel: PairKernel
    ) -> tuple[Coefficients, Average]:
        """The coefficients to train with, and the average after this batch."""
        per_pair = Calibrated()(coefficients, kernel)
        d_w = coefficients.chosen
        there = d_w != 0
        alpha = jnp.where(there, per_pair.chosen / jnp.where(there, d_w, 1.0), 1.0)
        mean = jnp.log(alpha).mean().astype(average.total.dtype)
        keep = 1 - self.decay
        average = Average(
            self.decay * average.total + keep * mean, self.decay * average.weight + keep
        )
        alpha = jnp.exp(average.total / average.weight).astype(d_w.dtype)
        return Coefficients(alpha * d_w, coefficients.rejected / alpha), average


@dataclass(frozen=True)
class Projected:
    """Push the rejected only along the part of g_l that does not touch the chosen.

    Where they conflict (d_l ⟨g_w,g_l⟩ > 0), g_l is replaced by g_l - (⟨g_w,g_l⟩/‖g_w‖²) g_w, which
    is d_w → d_w + d_l ⟨g_w,g_l⟩/‖g_w‖². To first order the chosen then changes by exactly η d_w
    ‖g_w‖², as if there were no rejected response; the rejected may still rise when d_w ⟨g_w,g_l⟩ is
    large.

    Source: derived here, after gradient surgery (Yu et al., arXiv 2001.06782).

    >>> import jax.numpy as jnp
    >>> kernel, one = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0])), jnp.array([1.0])
    >>> Projected()(Coefficients(one, one), kernel).chosen.item()
    2.5
    """

    def __call__(self, coefficients: Coefficients, kernel: PairKernel) -> Coefficients:
        """Add what the projection gives back to the chosen."""
        conflict = (
            coefficients.rejected
            * kernel.inner
            / jnp.where(kernel.sq_chosen > 0, kernel.sq_chosen, 1.0)
        )
        return Coefficients(coefficients.chosen + jnp.maximum(conflict, 0.0), coefficients.rejected)


def surrogate_loss(
    logp: Float[Array, "*pairs 2"], coefficients: Coefficients
) -> Float[Array, "*pairs"]:
    """Loss of each pair whose gradient is -(d_w g_w - d_l g_l) with d_w, d_l held constant.

    Its value means nothing; differentiate it in a training step after a :class:`Mitigation` has set
    the coefficients.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> d = Coefficients(jnp.array([2.0]), jnp.array([3.0]))
    >>> jax.grad(lambda logp: surrogate_loss(logp, d).sum())(jnp.zeros((1, 2))).tolist()
    [[-2.0, 3.0]]
    """
    d = jax.tree.map(jax.lax.stop_gradient, coefficients)
    return d.rejected * logp[..., 1] - d.chosen * logp[..., 0]


def contrastive_mask(batch: Batch) -> Float[Array, "B 2 R"]:
    """Weight 1 on the tokens where the responses differ, 0 on their common beginning and ending.

    The shared tokens are what entangles responses that differ in a few words (Yuan et al., arXiv
    2410.13828, Sec. 4); the mask leaves only the contrast. Beginnings are matched before endings;
    a response that is the other one cut short keeps no token.

    >>> from simgrad.pairs import Pair, padded
    >>> contrastive_mask(padded([Pair([1], [4, 5, 9], [4, 6, 7, 9])])).tolist()
    [[[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]]
    """
    shared, lengths = shared_lengths(batch), batch.lengths
    row = jnp.arange(batch.targets.shape[-1], dtype=lengths.dtype)[None, None]
    middle = (row >= shared.prefix[:, None, None]) & (
        row < (lengths - shared.suffix[:, None])[..., None]
    )
    return (batch.valid & middle).astype(jnp.float32)


def masked_logp(result: Responses, weights: Float[Array, "B 2 R"]) -> Float[Array, "B 2"]:
    """Σ_k a_k log π(y_k | x, y_<k): log-probs with token weights, to be given to any objective.

    Use the same weights on the reference's log-probs. Objectives that divide by lengths still
    divide by the number of tokens, weighted or not.

    >>> import jax.numpy as jnp
    >>> h = jnp.ones((1, 2, 2, 1))
    >>> result = Responses(jnp.array([[[-3.0, -1.0], [-3.0, -2.0]]]), jnp.zeros((1, 2, 2, 4)), h, h[:, :, 0])
    >>> result.logp.tolist(), masked_logp(result, jnp.array([[[0.0, 1.0], [0.0, 1.0]]])).tolist()  # same margin
    ([[-4.0, -5.0]], [[-1.0, -2.0]])
    """
    return (weights.astype(result.token_logp.dtype) * result.token_logp).sum(-1)


@dataclass(frozen=True)
class SparseMask:
    """Learned token weights a = σ(⟨v, h⟩ + b) ∈ (0, 1) with an L1 penalty, trained with the policy.

    ``strength`` is the penalty's λ: loss = objective(masked log-probs) + λ Σ_k a_k. The idea is the
    sparsity-regularised token mask of Yuan et al. (arXiv 2410.13828); the form (one linear map of
    the state that predicts the token, v and b trained, the state itself not differentiated) and the
    defaults λ = 0.01 and b = 2 at the start, weights near 0.9, are our choice.

    >>> import jax.numpy as jnp
    >>> mask = SparseMask()
    >>> parameters = mask.init(4)
    >>> mask.weights(parameters, jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3), bool)).shape
    (1, 2, 3)
    """

    strength: float = 0.01
    bias: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a negative penalty."""
        if not self.strength >= 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")

    def init(self, width: int, dtype: str = "float32") -> dict[str, Array]:
        """V = 0 and b = ``bias``: every token starts with the same weight σ(bias)."""
        return {"v": jnp.zeros(width, dtype), "b": jnp.full((), self.bias, dtype)}

    def weights(
        self, parameters: dict[str, Array], hidden: Float[Array, "B 2 R D"], valid: Array
    ) -> Float[Array, "B 2 R"]:
        """σ(⟨v, h_k⟩ + b) for each response token, 0 where padded."""
        h = jax.lax.stop_gradient(tree.widen(hidden))
        score = jnp.einsum("bsrd,d->bsr", h, parameters["v"].astype(h.dtype)) + parameters[
            "b"
        ].astype(h.dtype)
        return jnp.where(valid, jax.nn.sigmoid(score), 0.0)

    def penalty(self, weights: Float[Array, "B 2 R"]) -> Float[Array, " B"]:
        """λ Σ_k a_k over both responses of each pair."""
        return self.strength * weights.sum((-1, -2))


def keep_lowest(scores: Float[Array, " B"], fraction: float) -> Int[Array, " K"]:
    """Indices of the ⌈fraction · B⌉ pairs with the lowest score, in input order.

    Any score serves: length-normalised CHES (Razin et al., arXiv 2410.08847, Sec. 6, who keep 5 %),
    the gap ⟨g_w,g_l⟩ - ‖g_w‖², or minus a predicted Δlog π_w. Ties go to the earlier pair.

    Raises:
        ValueError: fraction outside (0, 1], or a score that is not a number (it has no rank).

    >>> import jax.numpy as jnp
    >>> keep_lowest(jnp.array([3.0, -1.0, 2.0, 0.0]), 0.5).tolist()
    [1, 3]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    values = np.asarray(scores)
    if np.isnan(values).any():
        raise ValueError(
            f"score of pair {int(np.isnan(values).argmax())} is not a number: drop such pairs first"
        )
    count = math.ceil(round(fraction * len(values), 9))
    return jnp.asarray(np.sort(np.argsort(values, kind="stable")[:count]))
