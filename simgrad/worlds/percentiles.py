"""``percentiles``: pairs of varied kinds and lengths, preferred for many reasons."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from simgrad.dynamics import Corpus
from simgrad.dynamics.predictors import Setting
from simgrad.dynamics.recipe import steps_of
from simgrad.models import InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.worlds.tuning import recipe_for
from simgrad.worlds.world import Pretraining, World, small_model

TOPICS, STATES, SHOWN = 6, 8, 6
"""Topics, hidden states of a topic, and words that a state shows."""
FILLERS, SPOKEN = 8, 64
"""Filler words of prompts, and words of responses."""
_FIRST_WORD = 3 + TOPICS + FILLERS


@dataclass(frozen=True)
class Percentiles(World):
    """Responses of 2 to 16 words from a hidden Markov chain of the prompt's topic.

    Each topic has its own chain over eight states; a state shows one of six words, most of which it
    shares with states of other topics. A prompt names a topic (``<b> topic filler filler :``).
    Pairs are of four kinds, a quarter each: two samples of the right topic; one of the right and
    one of another topic; a sample and an edited copy (a few words replaced); a sample and its
    beginning, cut short. Which side wins is a coin, so that no rule of thumb about kinds or lengths
    is built in.

    Attributes:
        n_pairs: preference pairs.
        learning_rate: of Adam, pairs trained together.
        sgd_rate: of SGD, pairs trained together.
        alone_rate: of SGD, each pair trained alone.
        alone_steps: steps of each pair alone.
        batch_size: pairs a step when trained together.
        epochs: passes over the pairs when trained together.
        beta: of DPO.
        sequences: of the pretraining corpus.
    """

    name: ClassVar[str] = "percentiles"
    tuning: ClassVar[tuple[str, ...]] = tuple(
        "n_pairs learning_rate sgd_rate alone_rate alone_steps batch_size epochs beta".split()
    )
    end: ClassVar[str | None] = "<e>"
    pretraining: ClassVar[Pretraining] = Pretraining(steps=400, batch_size=48)
    words: ClassVar[tuple[str, ...]] = (
        "<b>",
        ":",
        "<e>",
        *(f"topic{i}" for i in range(TOPICS)),
        *(f"filler{i}" for i in range(FILLERS)),
        *(f"word{i}" for i in range(SPOKEN)),
    )
    n_pairs: int = 96
    learning_rate: float = 1e-4
    sgd_rate: float = 0.02
    alone_rate: float = 0.02
    alone_steps: int = 10
    batch_size: int = 8
    epochs: int = 3
    beta: float = 0.1
    sequences: int = 6000

    def __post_init__(self) -> None:
        """Refuse numbers of pairs that make no quarters."""
        super().__post_init__()
        good = self.n_pairs >= 8 and self.n_pairs % 4 == 0
        self.require(good, f"n_pairs must be a multiple of 4 and at least 8, got {self.n_pairs}")

    def model(self) -> ModelConfig:
        """Two layers of width 64 in the architecture of Llama."""
        return small_model(len(self.words), InitScales(unembedding=0.3))

    def _response(self, random: np.random.Generator, topic: int, length: int) -> list[int]:
        moves, shown = _chains()
        state, words = int(random.integers(STATES)), []
        for _ in range(length):
            words.append(int(random.choice(shown[topic, state], p=_FALLING)))
            state = int(random.choice(STATES, p=moves[topic, state]))
        return words

    def _prompt(self, random: np.random.Generator, topic: int) -> list[int]:
        return [0, 3 + topic, *(3 + TOPICS + random.integers(0, FILLERS, 2)).tolist(), 1]

    def corpus(self, seed: int) -> Corpus:
        """Prompts with one response each, learned from its first word on."""
        random, n = np.random.default_rng(seed), self.sequences
        tokens, streams = np.zeros((n, 22), np.int32), np.zeros((n, 22), np.int32)
        for i in range(n):
            topic, length = int(random.integers(TOPICS)), int(random.integers(2, 17))
            row = [*self._prompt(random, topic), *self._response(random, topic, length), 2]
            tokens[i, : len(row)], streams[i, : len(row)] = row, 1
        weights = streams.astype(np.float32)
        weights[:, :5] = 0
        return Corpus(jnp.asarray(tokens), jnp.asarray(streams), jnp.asarray(weights))

    def pairs(self, seed: int) -> list[Pair]:
        """A quarter of each kind, in random order."""
        random = np.random.default_rng([seed, 1])
        kinds = random.permutation(np.repeat(np.arange(4), self.n_pairs // 4))
        return [self._pair(random, int(kind)) for kind in kinds]

    def _pair(self, random: np.random.Generator, kind: int) -> Pair:
        while True:
            topic, length = int(random.integers(TOPICS)), int(random.integers(2, 17))
            first = self._response(random, topic, length)
            if kind == 0:
                second = self._response(random, topic, int(random.integers(2, 17)))
            elif kind == 1:
                other = (topic + int(random.integers(1, TOPICS))) % TOPICS
                second = self._response(random, other, length)
            elif kind == 2:
                second = [
                    w if random.random() > 0.3 else _FIRST_WORD + int(random.integers(SPOKEN))
                    for w in first
                ]
            else:
                second = first[: max(1, length // 2)]
            sides = [[*first, 2], [*second, 2]]
            if random.random() < 0.5:
                sides.reverse()
            pair = Pair(self._prompt(random, topic), *sides)
            if pair.problem() is None:
                return pair

    def settings(self, apply: Any, theta: Any, seed: int) -> dict[str, Setting]:
        """Pairs alone (SGD) and together (SGD and Adam), from one policy."""
        batch = padded(self.pairs(seed), 22, 17)
        steps = steps_of(self.epochs, self.n_pairs, self.batch_size)
        return {
            label: Setting(
                apply,
                theta,
                batch,
                recipe_for(DPO(self.beta), kind, rate, n, size).replace(seed=seed),
                alone=size is None,
            )
            for label, kind, rate, n, size in (
                ("alone, SGD", "sgd", self.alone_rate, self.alone_steps, None),
                ("together, SGD", "sgd", self.sgd_rate, steps, self.batch_size),
                ("together, Adam", "adam", self.learning_rate, steps, self.batch_size),
            )
        }


_FALLING = np.array([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])


@functools.lru_cache
def _chains() -> tuple[np.ndarray, np.ndarray]:
    """Transition probabilities of each topic and the words of each state, equal for all seeds."""
    random = np.random.default_rng(0)
    moves = random.dirichlet(np.full(STATES, 0.4), (TOPICS, STATES))
    shown = np.stack(
        [
            [random.choice(SPOKEN, SHOWN, replace=False) for _ in range(STATES)]
            for _ in range(TOPICS)
        ]
    )
    return moves, _FIRST_WORD + shown
