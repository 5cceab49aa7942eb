"""Inner products of gradients of log-probs: of a pair, a data set, tokens, blocks of parameters."""

from simgrad.theory.kernel.blocks import by_layer, by_matrix
from simgrad.theory.kernel.dataset import (
    KernelPlan,
    entanglement_blocks,
    entanglement_kernel,
    jacobian,
    kernel_plan,
    pair_pushes,
)
from simgrad.theory.kernel.gram import PairKernel
from simgrad.theory.kernel.pair import (
    head_kernel,
    kernel_and_responses,
    pair_kernel,
    pair_kernel_blocks,
)
from simgrad.theory.kernel.preconditioning import Preconditioner
from simgrad.theory.kernel.tokens import (
    masked_change,
    masked_kernel,
    token_changes,
    token_columns,
    token_kernel,
)

__all__ = [
    "KernelPlan",
    "PairKernel",
    "Preconditioner",
    "by_layer",
    "by_matrix",
    "entanglement_blocks",
    "entanglement_kernel",
    "head_kernel",
    "jacobian",
    "kernel_and_responses",
    "kernel_plan",
    "masked_change",
    "masked_kernel",
    "pair_kernel",
    "pair_kernel_blocks",
    "pair_pushes",
    "token_changes",
    "token_columns",
    "token_kernel",
]
