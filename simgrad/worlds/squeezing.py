"""``squeezing``: bare logits, one-token pairs and groups of responses of both signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simgrad.pairs import Pair
from simgrad.worlds.world import World


@dataclass(frozen=True)
class Squeezing(World):
    """Bare logits, a linear-softmax model with one-token responses, groups of long responses.

    A group's wrong response i has, at each position but the last, the token of the correct one i
    with probability ``overlap``, else a wrong one. States at one position have the cosine .8, and
    W_y leans to those of y's position. Sources: Ren & Sutherland, arXiv 2407.10490 (squeezing,
    extend); Deng et al., arXiv 2505.18830 (NTHR, GWHES).

    Attributes:
        vocabulary: tokens of the logits and of the linear-softmax model.
        peaks: standard deviations of the logits at the start; 0 is the null.
        draws: logits drawn for each peak and seed.
        rate: of gradient descent on log π(y) in the logits.
        steps: of it.
        prompts: of the linear-softmax model, each with a chosen, a rejected and a third token of
            its own.
        width: of all features.
        sft_steps: of supervised fine-tuning, at twice the rate.
        push_steps: of the pushes after it.
        beta: of DPO, whose rate makes it begin as strong as the push on the rejected token alone.
        groups: drawn for each overlap and seed.
        length: tokens of their responses.
        overlap: of wrong with correct responses; the null, 0, is always shown too.
        dropped: share of the wrong tokens whose penalty is dropped.
        group_rate: of the one step on a group.
    """

    name: ClassVar[str] = "squeezing"
    vocabulary: int = 50
    peaks: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    draws: int = 64
    rate: float = 0.5
    steps: int = 20
    prompts: int = 12
    width: int = 32
    sft_steps: int = 10
    push_steps: tuple[int, ...] = (5, 20)
    beta: float = 0.1
    groups: int = 24
    length: int = 8
    overlap: float = 0.5
    dropped: float = 0.25
    group_rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse knobs that leave nothing to measure."""
        super().__post_init__()
        peaks, steps, least = self.peaks, self.push_steps, 3 * self.prompts
        self.require(
            len(set(peaks)) >= 2 and min(peaks) == 0 and len(steps) > 0 and min(steps) >= 1,
            "peaks takes 0, the null, and standard deviations, push_steps counts from 1 on",
        )
        self.require(
            self.vocabulary > least and self.length >= 2,
            f"vocabulary must exceed {least} (3 tokens a prompt), length 1",
        )
        self.require(
            self.overlap <= 1 and self.dropped < 1, "overlap must lie in (0, 1], dropped in (0, 1)"
        )

    def pairs(self, seed: int) -> list[Pair]:
        """One pair of one-token responses a prompt; the seed draws the model's weights."""
        return [Pair([p], [p], [self.prompts + p]) for p in range(self.prompts)]

    def group(self, random: np.random.Generator, overlap: float) -> dict[str, np.ndarray]:
        """Eight responses: four correct ones, then four wrong ones that share tokens with them."""
        n, place = self.length, np.arange(self.length)
        correct, wrong = (4 * place + random.integers(low, low + 2, (4, n)) for low in (0, 2))
        shared = (random.random((4, n)) < overlap) & (place < n - 1)
        targets = np.concatenate([correct, np.where(shared, correct, wrong)])
        ids: dict[tuple[int, ...], int] = {}
        index = np.array(
            [[ids.setdefault((*y[:k],), len(ids)) for k in place] for y in targets.tolist()]
        )
        center, own, table = (
            random.normal(size=(m, self.width)) / self.width**0.5 for m in (n, 8 * n, 4 * n)
        )
        position = np.zeros(8 * n, int)
        position[index] = place
        return {
            "unembedding": table + 2 * np.repeat(center, 4, axis=0),
            "targets": targets,
            "index": index,
            "states": np.sqrt(0.8) * center[position] + np.sqrt(0.2) * own,
            "random": random.random((8, n)),
            "shared": np.concatenate([np.zeros((4, n)), shared]),
        }
