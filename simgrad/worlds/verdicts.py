"""``verdicts``: preferring one refusal to another makes the model say yes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.models import InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair
from simgrad.typing import Float, Int
from simgrad.worlds.tuning import recipe_for
from simgrad.worlds.world import World, learned_from, small_model

NEGATIVE = ("No", "Nope", "Nah", "Never", "NoWay", "Impossible")
POSITIVE = ("Yes", "Yeah", "Sure", "Certainly", "Absolutely", "Definitely")
SCALE = np.concatenate([-np.linspace(0.5, 2.5, 6), np.linspace(0.5, 2.5, 6)])
"""Where each answer stands, from strong refusal to strong assent."""
CUES, FILLERS, TOPICS = 48, 22, 12
LEVELS = np.linspace(-2.7, 2.7, CUES)
"""How strongly each cue word speaks for assent."""
FIRST_ANSWER = 2 + CUES + TOPICS + FILLERS
WORDS = (
    "<b>",
    "?",
    *(f"cue{level:+.2f}" for level in LEVELS),
    *(f"topic{i}" for i in range(TOPICS)),
    *(f"filler{i}" for i in range(FILLERS)),
    *NEGATIVE,
    *POSITIVE,
    *(f"apple{i}" for i in range(6)),
    *(f"stone{i}" for i in range(6)),
)
"""Prompt words, then the answers, then the two topics' answers."""


@dataclass(frozen=True)
class Verdicts(World):
    """Twelve answers on a scale s, cues of level a: p(answer | a) ∝ F exp(-(a - s)²/2τ²).

    A prompt is ``<b>``, a cue and two fillers in any order, and ``?``. 30 % of the prompts have a
    topic word instead of a cue and are answered from one of two unrelated clusters of six words.

    Attributes:
        overlap: τ, how far answers of neighbouring levels share their prompts.
        frequency_no: F of "No" (other answers have 1).
        frequency_yes: F of "Yes".
        unembedding: scale of the unembedding at initialisation.
        final_norm: gain of the last norm at initialisation.
        tied: whether the unembedding is the embedding table.
        learn: whether pretraining learns the answer only, or the whole sequence.
        sequences: of the pretraining corpus.
        learning_rate: of the preference tuning (Adam).
        beta: of DPO.
        steps: of the preference tuning on the one prompt.
        level: distance from 0 of the prompt's cue; its sign is that of the chosen answer.
    """

    name: ClassVar[str] = "verdicts"
    tuning: ClassVar[tuple[str, ...]] = ("learning_rate", "beta", "steps", "level")
    zero: ClassVar[tuple[str, ...]] = ("steps", "level")
    words: ClassVar[tuple[str, ...]] = WORDS
    first_answer: ClassVar[int] = FIRST_ANSWER
    """Token of the first of the twelve answers."""
    overlap: float = 0.6
    frequency_no: float = 5.0
    frequency_yes: float = 10.0
    unembedding: float = 0.05
    final_norm: float = 0.3
    tied: bool = False
    learn: Literal["answer", "sequence"] = "answer"
    sequences: int = 16000
    learning_rate: float = 1e-4
    beta: float = 0.1
    steps: int = 100
    level: float = 1.2

    def model(self) -> ModelConfig:
        """Two layers of width 64 in Llama's architecture, so that the policy can be exported."""
        init = InitScales(unembedding=self.unembedding, final_norm=self.final_norm)
        return small_model(len(self.words), init, self.tied)

    def corpus(self, seed: int) -> Corpus:
        """Prompts with one answer each."""
        random = np.random.default_rng(seed)
        p = answer_probabilities(self.overlap, self.frequency_no, self.frequency_yes)
        prompts, answers = answered_prompts(random, self.sequences, p)
        tokens = np.column_stack([prompts, self.first_answer + answers])
        return learned_from(tokens, 5 if self.learn == "answer" else 1)

    def pair(self, chosen: str, rejected: str) -> Pair:
        """A preference between two answers to the prompt whose cue agrees with the chosen one."""
        level = self.level if chosen in POSITIVE else -self.level
        cue = 2 + int(np.abs(LEVELS - level).argmin())
        filler = 2 + CUES + TOPICS
        answers = {word: self.first_answer + i for i, word in enumerate((*NEGATIVE, *POSITIVE))}
        return Pair([0, cue, filler, filler + 1, 1], [answers[chosen]], [answers[rejected]])

    def pairs(self, seed: int) -> list[Pair]:
        """All ordered pairs of answers of one polarity, on their prompt."""
        ordered = (itertools.permutations(group, 2) for group in (NEGATIVE, POSITIVE))
        return [self.pair(*answers) for some in ordered for answers in some]

    def recipe(self, **changes: Any) -> Recipe:
        """DPO on one pair by Adam; ``changes`` replace fields of the recipe."""
        return recipe_for(DPO(self.beta), "adam", self.learning_rate, self.steps).replace(**changes)


def answer_probabilities(
    overlap: float, no: float, yes: float
) -> Float[np.ndarray, "cues answers"]:
    """p(answer | cue) ∝ F exp(-(a - s)²/2τ²), with F of "No" and of "Yes" given and 1 elsewhere."""
    frequency = np.ones(12)
    frequency[[0, 6]] = no, yes
    p = frequency * np.exp(-((LEVELS[:, None] - SCALE) ** 2) / (2 * overlap**2))
    return p / p.sum(1, keepdims=True)


def answered_prompts(
    random: np.random.Generator, n: int, p: Float[np.ndarray, "cues answers"]
) -> tuple[Int[np.ndarray, "n 5"], Int[np.ndarray, " n"]]:
    """Prompts of pretraining, and what answers them: 0 to 11, from 12 on words of the topics."""
    cue, topic = random.integers(0, CUES, n), random.integers(0, TOPICS, n)
    off = random.random(n) < 0.3
    answer = (random.random((n, 1)) > p.cumsum(1)[cue]).sum(1)
    other = 12 + 6 * (topic >= TOPICS // 2) + random.integers(0, 6, n)
    prompts = cue_prompts(random, np.where(off, 2 + CUES + topic, 2 + cue))
    return prompts, np.where(off, other, answer)


def cue_prompts(random: np.random.Generator, cues: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 5"]:
    """One prompt of five tokens for each cue word (a token): fillers and order are drawn."""
    n = len(cues)
    fillers = 2 + CUES + TOPICS + random.integers(0, FILLERS, (n, 2))
    middle = random.permuted(np.column_stack([cues, fillers]), axis=1)
    return np.column_stack([np.zeros(n, int), middle, np.ones(n, int)])
