"""Mitigations of displacement, as objects that theory and training share.

A mitigation acts in one of four places:

* on the loss: the objectives that keep the chosen up (DPOP, an added SFT term, DPO-Shift, gating)
  are in :mod:`simgrad.objectives`;
* on the force (d_w, -d_l) of a pair, given its kernel: :class:`PairwiseNormalized`,
  :class:`Calibrated`, :class:`RunningCalibrated`, :class:`Projected` here. Theory predicts with the
  changed force (:func:`simgrad.theory.first_order`), training steps along it
  (:func:`simgrad.theory.prediction.ascent`);
* on tokens: weights in the log-probs, :func:`contrastive_mask` and :class:`SparseMask` here, whose
  kernel is :func:`simgrad.theory.kernel.masked_kernel`;
* on the data: :func:`keep_lowest` of any score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import Responses
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
]


@runtime_checkable
class Mitigation(Protocol):
    """A change of the force that looks at the pair's geometry, in the manner of optax."""

    def init(self, dtype: Any = ...) -> Any:
        """The state before the first batch; () where nothing is kept."""
        ...

    def update(
        self, force: Float[Array, "B 2"], state: Any, kernel: PairKernel
    ) -> tuple[Float[Array, "B 2"], Any]:
        """The force to train with, and the state after this batch."""
        ...


@dataclass(frozen=True)
class Stateless:
    """A mitigation that treats every batch alike: subclasses define :meth:`changed`."""

    def init(self, dtype: Any = None) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def update(
        self, force: Float[Array, "B 2"], state: Any, kernel: PairKernel
    ) -> tuple[Float[Array, "B 2"], Any]:
        """The force to train with, and the state as it was."""
        return self.changed(force, kernel), state

    def changed(
        self, force: Float[Array, "*pairs 2"], kernel: PairKernel
    ) -> Float[Array, "*pairs 2"]:
        """The force to train with: what a subclass defines."""
        raise TypeError(f"{type(self).__name__} does not say what it changes")


@dataclass(frozen=True)
class PairwiseNormalized(Stateless):
    """Step along g_w/‖g_w‖ - g_l/‖g_l‖: d_w → d_w/‖g_w‖ and d_l → d_l/‖g_l‖.

    For d_w = d_l = d it changes log π_w by η d ‖g_w‖ (1 - ρ) ≥ 0 and log π_l by -η d ‖g_l‖ (1 - ρ)
    ≤ 0 to first order, so the pair, trained alone, is ideal whatever its geometry; for d_w ≠ d_l it
    is not always so, and in a batch other pairs add their terms.

    Source: the pairwise-normalised gradient of Yuan et al., arXiv 2410.13828.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> PairwiseNormalized().changed(jnp.array([[1.0, -1.0]]), kernel).tolist()
    [[1.0, -0.5]]
    """

    def changed(
        self, force: Float[Array, "*pairs 2"], kernel: PairKernel
    ) -> Float[Array, "*pairs 2"]:
        """Divide each component by its gradient's norm."""
        squares = jnp.stack([kernel.sq_chosen, kernel.sq_rejected], -1)
        return force / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


@dataclass(frozen=True)
class Calibrated(Stateless):
    """Reward calibration: d_w → α d_w, d_l → d_l/α with α = √(r*/r), r = d_w/d_l, r* = ‖g_l‖/‖g_w‖.

    Moves the pair to the centre of its band, hence to the ideal regime, and keeps d_w d_l. Pairs
    with a coefficient that is not positive, or a gradient that vanishes, are left as they are.

    Source: Chen et al., arXiv 2604.18239.

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> d_w, minus_d_l = Calibrated().changed(jnp.array([[1.0, -1.0]]), kernel)[0].tolist()
    >>> round(d_w / -minus_d_l, 4)
    2.0
    """

    def changed(
        self, force: Float[Array, "*pairs 2"], kernel: PairKernel
    ) -> Float[Array, "*pairs 2"]:
        """Rescale both components."""
        return _scaled(force, self.alpha(force, kernel))

    def alpha(self, force: Float[Array, "*pairs 2"], kernel: PairKernel) -> Float[Array, "*pairs"]:
        """α of each pair, 1 where it is left as it is."""
        d_w, d_l = force[..., 0], -force[..., 1]
        positive = (d_w > 0) & (d_l > 0) & (kernel.sq_chosen > 0) & (kernel.sq_rejected > 0)
        r = jnp.where(positive, d_w, 1.0) / jnp.where(positive, d_l, 1.0)
        square = jnp.where(positive, kernel.sq_rejected, 1.0) / jnp.where(
            positive, kernel.sq_chosen, 1.0
        )
        return jnp.sqrt(jnp.sqrt(square) / r)


def _scaled(force: Array, alpha: Array) -> Array:
    # one α may serve a whole batch
    alpha = jnp.broadcast_to(alpha, force.shape[:-1])
    return force * jnp.stack([alpha, 1 / alpha], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Average:
    """Exponential moving average, and the weight it has gathered (for the bias correction)."""

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
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> mitigation = RunningCalibrated()
    >>> force, average = mitigation.update(jnp.array([[1.0, -1.0]]), mitigation.init(), kernel)
    >>> round((-force[0, 0] / force[0, 1]).item(), 4)
    2.0
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        """Refuse a decay that forgets nothing or is no decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def init(self, dtype: Any = "float32") -> Average:
        """Nothing averaged yet: α = 1."""
        return Average(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def update(
        self, force: Float[Array, "B 2"], state: Average, kernel: PairKernel
    ) -> tuple[Float[Array, "B 2"], Average]:
        """The force to train with, and the average after this batch."""
        mean = jnp.log(Calibrated().alpha(force, kernel)).mean().astype(state.total.dtype)
        keep = 1 - self.decay
        state = Average(self.decay * state.total + keep * mean, self.decay * state.weight + keep)
        return _scaled(force, jnp.exp(state.total / state.weight).astype(force.dtype)), state


@dataclass(frozen=True)
class Projected(Stateless):
    """Lower the rejected only along the part of g_l that does not touch the chosen.

    Where they conflict (d_l ⟨g_w,g_l⟩ > 0), g_l is replaced by g_l - (⟨g_w,g_l⟩/‖g_w‖²) g_w, which
    is d_w → d_w + d_l ⟨g_w,g_l⟩/‖g_w‖². To first order the chosen then changes by exactly
    η d_w ‖g_w‖², as if there were no rejected response; the rejected may still rise when
    d_w ⟨g_w,g_l⟩ is large.

    Source: derived here, after gradient surgery (Yu et al., arXiv 2001.06782).

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> Projected().changed(jnp.array([[1.0, -1.0]]), kernel).tolist()
    [[2.5, -1.0]]
    """

    def changed(
        self, force: Float[Array, "*pairs 2"], kernel: PairKernel
    ) -> Float[Array, "*pairs 2"]:
        """Add what the projection gives back to the chosen."""
        square = jnp.where(kernel.sq_chosen > 0, kernel.sq_chosen, 1.0)
        conflict = -force[..., 1] * kernel.inner / square
        return force.at[..., 0].add(jnp.maximum(conflict, 0.0))


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
    >>> token_logp = jnp.array([[[-3.0, -1.0], [-3.0, -2.0]]])
    >>> result = Responses(token_logp, jnp.zeros((1, 2, 2, 4)), h, h[:, :, 0])
    >>> weights = jnp.array([[[0.0, 1.0], [0.0, 1.0]]])
    >>> result.logp.tolist(), masked_logp(result, weights).tolist()  # same margin
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
