"""Array aliases and the one glossary of axis letters used in every annotation.

======  =====================================================================
letter  meaning
======  =====================================================================
B       preference pairs in a batch
S       sequences that hold one pair: 1 when packed, 2 when padded
N       sequences given to a model (N = B * S when they come from a batch)
T       token positions of a sequence
L       positions that can be read: T, or the slots of a cache
R       rows of a response: the most response tokens in the batch
Q       positions at which a model is asked for logits
V       vocabulary
D       width: size of the hidden state that multiplies the unembedding
I, O    input and output features of one linear map
C       contexts of a context table
U       responses of a data set in one row: chosen 1, rejected 1, chosen 2, ... (2 B)
E       steps of a run
K       entries of a ranking
J       cotangents that are sent back at once
G       responses of a group to one prompt
M       tokens of a second response; pairs of a minibatch
======  =====================================================================

The axis of length two in ``B 2 R`` is always (chosen, rejected), in that order.
"""

from __future__ import annotations

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int", "Theta"]

Theta = Any
"""Parameters: a plain pytree of arrays (nested dictionaries)."""
