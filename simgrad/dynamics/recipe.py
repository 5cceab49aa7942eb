"""How to train: everything about a run but the model and the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import optax

from simgrad.errors import InputError
from simgrad.objectives import Objective, batch_coupled
from simgrad.theory.mitigation import Mitigation, SparseMask
from simgrad.theory.prediction.steps import require_training
from simgrad.typing import Int


def steps_of(epochs: int, pairs: int, batch_size: int) -> int:
    """Updates of so many epochs: ⌈pairs / batch size⌉ each, as TRL makes them.

    TRL keeps an epoch's last, smaller batch (``drop_last=False``). Every step here sees a whole
    one: the last of an epoch takes what it lacks from the next epoch's order.

    >>> steps_of(3, pairs=10, batch_size=4)
    9

    Raises:
        InputError: a number below 1.
    """
    if min(epochs, pairs, batch_size) < 1:
        raise InputError(
            f"epochs={epochs}, pairs={pairs}, batch size={batch_size}: each must be at least 1"
        )
    return epochs * -(-pairs // batch_size)


@dataclass(frozen=True)
class Recipe:
    """Preference tuning as a constant: hashable, so that one program is compiled for each.

    Attributes:
        objective: from :mod:`simgrad.objectives`; the loss is its mean over a step's pairs. SFT
            terms, DPOP, shifts and gates come in through it.
        optimizer: any optax transformation, schedules and clipping included.
        steps: updates in all.
        batch_size: pairs of each step (None: all of them).
        seed: of the order in which pairs are drawn, see :func:`batch_order`.
        accumulate: micro-batches in which a step's gradient is gathered; the step is the same up to
            rounding.
        mitigation: acts on each pair's force given its kernel
            (:mod:`simgrad.theory.mitigation`); the kernel costs a second backward pass.
        mask: learned token weights with an L1 penalty, trained by the same optimizer.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int | None = None
    seed: int = 0
    accumulate: int = 1
    mitigation: Mitigation | None = None
    mask: SparseMask | None = None

    def __post_init__(self) -> None:
        """Refuse what would only fail, or mislead, after training has begun."""
        require_training(self.objective, self.optimizer)
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        for name in ("batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.mask is not None and self.mitigation is not None:
            raise ValueError(
                "mask and mitigation do not combine: a mask learns from the loss that the other "
                "replaces"
            )
        if self.mask is not None and self.accumulate > 1 and batch_coupled(self.objective):
            raise ValueError(
                "a mask, accumulate > 1 and an objective that couples its pairs: drop one of the "
                "three"
            )

    def replace(self, **changes: object) -> Recipe:
        """This recipe with other fields.

        >>> import optax
        >>> from simgrad.objectives import DPO
        >>> Recipe(DPO(), optax.sgd(0.1), steps=10).replace(steps=20).steps
        20
        """
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def order(self, pairs: int) -> Int[np.ndarray, "E M"]:
        """Indices of the pairs in each step's batch.

        Raises:
            ValueError: more pairs a step than there are, or a batch that does not split in
                micro-batches.
        """
        size = pairs if self.batch_size is None else self.batch_size
        if pairs < 1:
            raise ValueError("no pairs to train on")
        if size > pairs:
            raise ValueError(f"batch_size={size}, but there are only {pairs} pairs")
        if size % self.accumulate:
            raise ValueError(
                f"a batch of {size} pairs does not split in accumulate={self.accumulate} equal "
                "parts"
            )
        if self.batch_size is None:
            return np.tile(np.arange(pairs, dtype=np.int32), (self.steps, 1))
        return batch_order(pairs, size, self.steps, self.seed)


def batch_order(pairs: int, batch_size: int, steps: int, seed: int = 0) -> Int[np.ndarray, "E M"]:
    """Shuffled epochs laid end to end and cut in batches.

    Every pair comes once an epoch; a batch may span two epochs when the sizes do not divide. More
    steps continue the same order.

    >>> batch_order(4, 2, 4).ravel().reshape(2, 4).tolist()
    [[2, 0, 1, 3], [3, 2, 1, 0]]
    """
    random = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // pairs)
    stream = [random.permutation(pairs) for _ in range(epochs)]
    flat = np.concatenate([*stream, np.zeros(0, int)])[: steps * batch_size]
    return flat.reshape(steps, batch_size).astype(np.int32)
