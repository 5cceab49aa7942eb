"""Pure theory: from gradients' inner products to statements about who rises and who falls.

===================  =======================================================================
``kernel``           inner products of gradients: of a pair, a data set, tokens, parameter blocks
``conditions``       regimes, the disentanglement band, which objective keeps which pair ideal
``prediction``       one step of any optimizer to first and second order, and where the mass goes
``similarity``       CHES and its relatives
``mitigation``       changed forces, token masks, filters
``groups``           many responses to one prompt: NTHR, GWHES
``closed_forms``     linear softmax, unconstrained features, one step on logits
===================  =======================================================================

What is used most can be had from here; everything by the name of its group. Whole runs are in
:mod:`simgrad.dynamics`.
"""

from simgrad.models import Responses, responses
from simgrad.theory import closed_forms, groups, mitigation
from simgrad.theory.conditions import Regime, band, compare_objectives, ideal_range, regime
from simgrad.theory.kernel import (
    PairKernel,
    entanglement_kernel,
    head_kernel,
    pair_kernel,
    token_kernel,
)
from simgrad.theory.prediction import (
    displacement,
    first_order,
    loss_gradient,
    optimizer_step,
    own_steps,
    top_gainers,
)
from simgrad.theory.similarity import ches, head_gap, ln_ches

__all__ = [
    "PairKernel",
    "Regime",
    "Responses",
    "band",
    "ches",
    "closed_forms",
    "compare_objectives",
    "displacement",
    "entanglement_kernel",
    "first_order",
    "groups",
    "head_gap",
    "head_kernel",
    "ideal_range",
    "ln_ches",
    "loss_gradient",
    "mitigation",
    "optimizer_step",
    "own_steps",
    "pair_kernel",
    "regime",
    "responses",
    "token_kernel",
    "top_gainers",
]
