"""One step of any optimizer to first and second order, and where the mass goes."""

from simgrad.theory.prediction.changes import StepChange, displacement, first_order, own_steps
from simgrad.theory.prediction.gainers import TokenGains, token_displacement, top_gainers
from simgrad.theory.prediction.steps import OptimizerStep, ascent, loss_gradient, optimizer_step

__all__ = [
    "OptimizerStep",
    "StepChange",
    "TokenGains",
    "ascent",
    "displacement",
    "first_order",
    "loss_gradient",
    "optimizer_step",
    "own_steps",
    "token_displacement",
    "top_gainers",
]
