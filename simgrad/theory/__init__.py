"""Pure theory: from gradients' inner products to statements about who rises and who falls.

==============================  =========================================================================
inner products                  ``pair_kernel``, ``entanglement_kernel``, ``token_kernel``, ``head_kernel``
conditions                      ``regime``, ``band``, ``ideal_range``, ``compare_objectives``
one step                        ``first_order``, ``token_changes``, ``own_steps``, ``optimizer_step`` + ``displacement``
where the mass goes             ``top_gainers``, ``token_displacement``
whole runs                      ``kernel_flow``, ``linearized_run``
similarity                      ``ches``, ``ln_ches``, ``head_gap``, ``nthr``, ``gwhes``, …
remedies                        ``PairwiseNormalized``, ``Calibrated``, ``Projected``, token masks, ``keep_lowest``
optimizers as preconditioners   module ``preconditioning``
closed forms                    modules ``linear_softmax``, ``unconstrained``, ``learning_dynamics``
==============================  =========================================================================
"""

from simgrad.models.likelihood import Responses, log_probs, responses
from simgrad.theory.closed_forms import learning_dynamics, linear_softmax, unconstrained
from simgrad.theory.conditions import (
    Band,
    Fate,
    IdealRange,
    Regime,
    band,
    compare_objectives,
    ideal_range,
    regime,
)
from simgrad.theory.groups import (
    Group,
    group_advantages,
    group_kernel,
    group_rates,
    gwhes,
    nthr,
    read_group,
    token_influence,
)
from simgrad.theory.kernel import preconditioning
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
from simgrad.theory.mitigation import (
    Calibrated,
    Mitigation,
    PairwiseNormalized,
    Projected,
    RunningCalibrated,
    SparseMask,
    contrastive_mask,
    keep_lowest,
    masked_logp,
    surrogate_loss,
)
from simgrad.theory.prediction.changes import (
    Change,
    StepChange,
    displacement,
    first_order,
    own_steps,
)
from simgrad.theory.prediction.gainers import TokenGains, token_displacement, top_gainers
from simgrad.theory.prediction.runs import Flow, Run, kernel_flow, linearized_run
from simgrad.theory.prediction.steps import OptimizerStep, loss_gradient, optimizer_step
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
    "Calibrated",
    "Change",
    "Fate",
    "Flow",
    "Group",
    "IdealRange",
    "KernelPlan",
    "Mitigation",
    "OptimizerStep",
    "PairKernel",
    "PairwiseNormalized",
    "Preconditioner",
    "Projected",
    "Regime",
    "Responses",
    "Run",
    "RunningCalibrated",
    "SparseMask",
    "StepChange",
    "TokenGains",
    "band",
    "by_layer",
    "by_matrix",
    "ches",
    "compare_objectives",
    "contrastive_mask",
    "displacement",
    "embedding_cosine",
    "entanglement_blocks",
    "entanglement_kernel",
    "first_order",
    "group_advantages",
    "group_kernel",
    "group_rates",
    "gwhes",
    "head_gap",
    "head_kernel",
    "ideal_range",
    "jacobian",
    "keep_lowest",
    "kernel_and_responses",
    "kernel_flow",
    "kernel_plan",
    "last_hidden_inner",
    "learning_dynamics",
    "linear_softmax",
    "linearized_run",
    "ln_ches",
    "log_probs",
    "loss_gradient",
    "masked_change",
    "masked_kernel",
    "masked_logp",
    "normalized_edit_distance",
    "nthr",
    "optimizer_step",
    "own_steps",
    "pair_kernel",
    "pair_kernel_blocks",
    "pair_pushes",
    "preconditioning",
    "read_group",
    "regime",
    "responses",
    "surrogate_loss",
    "token_changes",
    "token_columns",
    "token_displacement",
    "token_influence",
    "token_kernel",
    "top_gainers",
    "unconstrained",
]
