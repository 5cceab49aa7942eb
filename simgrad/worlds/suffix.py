"""``suffix``: pairs that differ in one word and share the ending after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.models import InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair
from simgrad.worlds.tuning import recipe_for
from simgrad.worlds.world import Pretraining, World, learned_from, small_model

CUES, WORDS, LONGEST = 6, 8, 16
"""Cue words and sentiment words of each polarity, and positions of the template."""
_FIRST_WORD = 2 + 2 * CUES
_TEMPLATE = _FIRST_WORD + 2 * WORDS


@dataclass(frozen=True)
class Suffix(World):
    """Prompt ``<b> cue cue :``, one sentiment word, then a template of up to 16 positions.

    The sentiment word agrees with the cues with probability .8. Position j of the template says
    ``u_j`` with probability ``regular`` after a word that agrees, with probability .5 after one
    that does not, else ``v_j``. A preference ranks an agreeing word over one that does not agree,
    both followed by the same u_0 … u_{L-1}.

    Attributes:
        agreement: probability that the sentiment word agrees with the cues.
        regular: probability of u_j after an agreeing word.
        lengths: the L of the experiment.
        n_pairs: preference pairs for each L, trained together in full batches.
        unembedding: scale of the unembedding at initialisation.
        sequences: of the pretraining corpus.
        learning_rate: of the preference tuning (Adam).
        beta: of DPO.
        steps: of the preference tuning.
    """

    name: ClassVar[str] = "suffix"
    tuning: ClassVar[tuple[str, ...]] = ("lengths", "n_pairs", "learning_rate", "beta", "steps")
    zero: ClassVar[tuple[str, ...]] = ("steps",)
    pretraining: ClassVar[Pretraining] = Pretraining(steps=300, batch_size=48)
    words: ClassVar[tuple[str, ...]] = (
        "<b>",
        ":",
        *(f"{sign}cue{i}" for sign in "+-" for i in range(CUES)),
        *(f"{sign}word{i}" for sign in "+-" for i in range(WORDS)),
        *(f"{kind}{i}" for kind in "uv" for i in range(LONGEST)),
    )
    agreement: float = 0.8
    regular: float = 0.85
    lengths: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    n_pairs: int = 32
    unembedding: float = 0.1
    sequences: int = 6000
    learning_rate: float = 1e-4
    beta: float = 0.1
    steps: int = 20

    def __post_init__(self) -> None:
        """Refuse suffixes longer than the template."""
        super().__post_init__()
        agreement, regular, lengths = self.agreement, self.regular, self.lengths
        self.require(
            max(agreement, regular) < 1,
            f"agreement={agreement} and regular={regular} must lie inside (0, 1)",
        )
        there = len(lengths) > 0 and min(lengths) >= 0 and max(lengths) <= LONGEST
        self.require(there, f"lengths must lie between 0 and {LONGEST}, got {lengths}")

    def model(self) -> ModelConfig:
        """Two layers of width 64 in the architecture of Llama."""
        return small_model(len(self.words), InitScales(unembedding=self.unembedding))

    def _prompts(self, random: np.random.Generator, polarity: np.ndarray) -> np.ndarray:
        n = len(polarity)
        cues = 2 + CUES * polarity[:, None] + random.integers(0, CUES, (n, 2))
        return np.column_stack([np.zeros(n, int), cues, np.ones(n, int)])

    def corpus(self, seed: int) -> Corpus:
        """Whole sequences, learned from the sentiment word on."""
        random, n = np.random.default_rng(seed), self.sequences
        polarity = random.integers(0, 2, n)
        agrees = random.random(n) < self.agreement
        word = _FIRST_WORD + WORDS * (polarity == agrees) + random.integers(0, WORDS, n)
        irregular = random.random((n, LONGEST)) > np.where(agrees, self.regular, 0.5)[:, None]
        template = _TEMPLATE + np.arange(LONGEST) + LONGEST * irregular
        return learned_from(np.column_stack([self._prompts(random, polarity), word, template]), 4)

    def pairs(self, seed: int, length: int = 8) -> list[Pair]:
        """Agreeing word over disagreeing word, both with the same ``length`` regular positions."""
        random, n = np.random.default_rng([seed, 1]), self.n_pairs
        polarity = random.integers(0, 2, n)
        prompts = self._prompts(random, polarity)
        chosen, rejected = (
            _FIRST_WORD + WORDS * p + random.integers(0, WORDS, n) for p in (polarity, 1 - polarity)
        )
        ending = range(_TEMPLATE, _TEMPLATE + length)
        rows = zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
        return [Pair(x, [w, *ending], [l, *ending]) for x, w, l in rows]  # noqa: E741

    def recipe(self, **changes: Any) -> Recipe:
        """DPO on all pairs of one L together, by Adam."""
        return recipe_for(DPO(self.beta), "adam", self.learning_rate, self.steps).replace(**changes)
