"""Training: preference tuning, pretraining and sampling as compiled loops; whole sweeps at once."""

from simgrad.dynamics.agreement import Agreement, agreement, percentile_means, spearman
from simgrad.dynamics.configs import RunConfig, grid
from simgrad.dynamics.directional import (
    DirectionalScore,
    directional_change,
    directional_score,
    run_direction,
)
from simgrad.dynamics.enumeration import Enumeration, enumerate_responses
from simgrad.dynamics.linearized import kernel_flow, linearized_run
from simgrad.dynamics.predictors import PREDICTORS, Predictor, Setting, measured
from simgrad.dynamics.pretraining import Corpus, corpus, pretrain
from simgrad.dynamics.prompts import next_token_logp
from simgrad.dynamics.recipe import Recipe, batch_order
from simgrad.dynamics.run import DivergedError, State, Training
from simgrad.dynamics.sampling import Samples, sample
from simgrad.dynamics.spread import spread
from simgrad.dynamics.sweep import sweep
from simgrad.dynamics.sweep_table import SweepTable
from simgrad.dynamics.training import train
from simgrad.dynamics.trajectory import Trajectory

__all__ = [
    "PREDICTORS",
    "Agreement",
    "Corpus",
    "DirectionalScore",
    "DivergedError",
    "Enumeration",
    "Predictor",
    "Recipe",
    "RunConfig",
    "Samples",
    "Setting",
    "State",
    "SweepTable",
    "Training",
    "Trajectory",
    "agreement",
    "batch_order",
    "corpus",
    "directional_change",
    "directional_score",
    "enumerate_responses",
    "grid",
    "kernel_flow",
    "linearized_run",
    "measured",
    "next_token_logp",
    "percentile_means",
    "pretrain",
    "run_direction",
    "sample",
    "spearman",
    "spread",
    "sweep",
    "train",
]
