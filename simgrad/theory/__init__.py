"""Pure theory: from gradients' inner products to statements about who rises and who falls."""

from simgrad.theory.conditions import Band, Regime, band, regime
from simgrad.theory.gram import PairKernel
from simgrad.theory.kernel import head_kernel, kernel_and_responses, pair_kernel, pair_kernel_blocks
from simgrad.theory.likelihood import Responses, responses
from simgrad.theory.prediction import Change, first_order
from simgrad.theory.similarity import (
    ches,
    embedding_cosine,
    head_gap,
    last_hidden_inner,
    ln_ches,
    normalized_edit_distance,
)

__all__ = [
    "Band",
    "Change",
    "PairKernel",
    "Regime",
    "Responses",
    "band",
    "ches",
    "embedding_cosine",
    "first_order",
    "head_gap",
    "head_kernel",
    "kernel_and_responses",
    "last_hidden_inner",
    "ln_ches",
    "normalized_edit_distance",
    "pair_kernel",
    "pair_kernel_blocks",
    "regime",
    "responses",
]
