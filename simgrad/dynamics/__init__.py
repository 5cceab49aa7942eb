"""Training: preference tuning, pretraining and sampling as compiled loops; whole sweeps at once."""

from simgrad.dynamics.loop import State
from simgrad.dynamics.pretraining import Corpus, corpus, pretrain
from simgrad.dynamics.recipe import Recipe, batch_order
from simgrad.dynamics.sampling import Enumeration, Samples, enumerate_responses, next_token_logp, sample
from simgrad.dynamics.spread import spread
from simgrad.dynamics.trace import Trace
from simgrad.dynamics.training import DivergedError, Training, train

__all__ = [
    "Corpus",
    "DivergedError",
    "Enumeration",
    "Recipe",
    "Samples",
    "State",
    "Trace",
    "Training",
    "batch_order",
    "corpus",
    "enumerate_responses",
    "next_token_logp",
    "pretrain",
    "sample",
    "spread",
    "train",
]
