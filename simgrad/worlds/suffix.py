"""``suffix``: pairs that differ in one word and share the ending after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.models import InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair
from simgrad.worlds.tuning import recipe_for
from simgrad.worlds.verdicts import small_model
from simgrad.worlds.world import Pretraining, World

CUES, WORDS, LONGEST = 6, 8, 16
"""Cue words and sentiment words of each polarity, and positions of the template."""


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
        if not (0 < self.agreement < 1 and 0 < self.regular < 1):
            raise ValueError(
                f"suffix: agreement={self.agreement} and regular={self.regular} must lie inside "
                "(0, 1)"
            )
        if not self.lengths or not all(0 <= n <= LONGEST for n in self.lengths):
            raise ValueError(
                f"suffix: lengths must lie between 0 and {LONGEST}, got {self.lengths}"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """Marks, cues and sentiment words of both polarities, two template words a position."""
        return (
            "<b>",
            ":",
            *(f"{sign}cue{i}" for sign in "+-" for i in range(CUES)),
            *(f"{sign}word{i}" for sign in "+-" for i in range(WORDS)),
            *(f"{kind}{i}" for kind in "uv" for i in range(LONGEST)),
        )

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
        word = (
            2
            + 2 * CUES
            + WORDS * np.where(agrees, polarity, 1 - polarity)
            + random.integers(0, WORDS, n)
        )
        irregular = random.random((n, LONGEST)) > np.where(agrees, self.regular, 0.5)[:, None]
        template = 2 + 2 * CUES + 2 * WORDS + np.arange(LONGEST) + LONGEST * irregular
        tokens = np.column_stack([self._prompts(random, polarity), word, template]).astype(np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, 4:] = 1
        return Corpus(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(weights))

    def pairs(self, seed: int, length: int = 8) -> list[Pair]:
        """Agreeing word over disagreeing word, both with the same ``length`` regular positions."""
        random, n = np.random.default_rng([seed, 1]), self.n_pairs
        polarity = random.integers(0, 2, n)
        prompts = self._prompts(random, polarity)
        first = 2 + 2 * CUES
        chosen, rejected = (
            first + WORDS * p + random.integers(0, WORDS, n) for p in (polarity, 1 - polarity)
        )
        ending = list(range(first + 2 * WORDS, first + 2 * WORDS + length))
        rows = zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
        return [Pair(x, [w, *ending], [l, *ending]) for x, w, l in rows]  # noqa: E741

    def recipe(self, **changes: Any) -> Recipe:
        """DPO on all pairs of one L together, by Adam."""
        return recipe_for(DPO(self.beta), "adam", self.learning_rate, self.steps).replace(**changes)
