"""In which layers and matrices of a real checkpoint the entanglement of real pairs sits."""

from __future__ import annotations

from dataclasses import dataclass

from simgrad.figures.checkpoint import Source, inputs, loaded
from simgrad.figures.layers import Result, blocks_of, plot, summary
from simgrad.pairs import padded

__all__ = ["BEARS_ON", "CAPTION", "TITLE", "Config", "Result", "compute", "inputs", "plot"]

TITLE = "Which layers carry it in a real checkpoint"
CAPTION = (
    "Each block's share of ‖g_w‖² (blue) and of ⟨g_w,g_l⟩/‖g_w‖² (black), medians over pairs with "
    "quartiles, before training, for {model} on at most {limit} pairs of {data}, those of at most "
    "{max_length} tokens. Top: by layer; bottom: by kind of matrix. Where embeddings are tied, the "
    "head is part of the embedding's bar."
)
BEARS_ON = (
    "Whether the head suffices: in a real model most of the entanglement may sit below what CHES "
    "(Razin et al., arXiv 2410.08847) reads."
)


@dataclass(frozen=True)
class Config(Source):
    """What is computed: the checkpoint and the pairs."""


def compute(config: Config) -> Result:
    """Block kernels of the checkpoint's pairs."""
    policy, _, pairs, _ = loaded(config)
    name = str(config.model).rstrip("/").split("/")[-1]
    return summary({name: blocks_of(policy.apply, policy.theta, padded(pairs))})
