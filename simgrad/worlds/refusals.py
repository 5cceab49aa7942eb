"""``refusals``: safety tuning on pairs of two refusals makes the model comply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.sampling import sample
from simgrad.models import Apply, InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair
from simgrad.typing import Int, Theta
from simgrad.worlds.tuning import next_logp, recipe_for
from simgrad.worlds.verdicts import (
    CUES,
    FILLERS,
    LEVELS,
    NEGATIVE,
    POSITIVE,
    SCALE,
    TOPICS,
    answer_probabilities,
    cue_prompts,
    small_model,
)
from simgrad.worlds.world import Pretraining, World, pretrained

KINDS = ("refusal-refusal", "comply-comply", "mixed")


@dataclass(frozen=True)
class Refusals(World):
    """The verdicts' scale with responses of three tokens: opening, a word of its class, ``<e>``.

    A refusal opens with a negative verdict, a compliance with a positive one. Two openings are
    sampled from the policy for each prompt, and a rule ranks them: refusal over compliance; within
    a type, ``softer`` prefers the larger s, ``blunter`` the smaller, ``random`` a coin. Pairs are
    then drawn so that the types have the shares ``mixture``, the pilot's stand-in for what safety
    data hold; its numbers are an assumption.

    Attributes:
        harmful: levels of the cues of harmful prompts, four fifths of the data.
        mild: levels of the cues of the other prompts.
        rule: which of two responses of one type wins.
        rollouts: sample whole responses from the policy and keep every pair of two different ones,
            whatever its type; two responses with the same opening are ranked by a coin. ``mixture``
            is then without effect.
        continuation: words between the opening and ``<e>``.
        mixture: shares of refusal-refusal, comply-comply and mixed pairs.
        n_pairs: preference pairs.
        learning_rate: of the preference tuning (Adam).
        beta: of DPO.
        batch_size: pairs a step.
        epochs: passes over the (kept) pairs; equal for all arms.
        keep: share of the pairs that a filter keeps.
        sft: weight of the SFT term in its arm.
        sequences: of the pretraining corpus.
        unembedding: scale of the unembedding at initialisation.
        final_norm: gain of the last norm at initialisation.
    """

    name: ClassVar[str] = "refusals"
    tuning: ClassVar[tuple[str, ...]] = tuple(
        "harmful mild rule rollouts mixture n_pairs learning_rate beta batch_size epochs keep "
        "sft".split()
    )
    zero: ClassVar[tuple[str, ...]] = ("sft",)
    end: ClassVar[str | None] = "<e>"
    pretraining: ClassVar[Pretraining] = Pretraining(steps=400, batch_size=64)
    harmful: tuple[float, float] = (-1.3, -0.5)
    mild: tuple[float, float] = (0.6, 1.1)
    rule: Literal["softer", "blunter", "random"] = "softer"
    rollouts: bool = False
    continuation: int = 1
    mixture: tuple[float, float, float] = (0.8, 0.15, 0.05)
    n_pairs: int = 400
    learning_rate: float = 1e-4
    beta: float = 0.1
    batch_size: int = 32
    epochs: int = 8
    keep: float = 0.15
    sft: float = 0.1
    sequences: int = 16000
    unembedding: float = 0.05
    final_norm: float = 0.3

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        super().__post_init__()
        if len(self.mixture) != 3 or min(self.mixture) < 0 or abs(sum(self.mixture) - 1) > 1e-9:
            raise ValueError(
                f"refusals: mixture needs three shares that sum to 1, got {self.mixture}"
            )
        if self.n_pairs < self.batch_size:
            raise ValueError(
                f"refusals: n_pairs={self.n_pairs} is less than batch_size={self.batch_size}"
            )
        for name in ("harmful", "mild"):
            if len(getattr(self, name)) != 2 or not _cues(getattr(self, name)).size:
                raise ValueError(
                    f"refusals: {name}={getattr(self, name)}: no cue lies between two such levels"
                )

    @property
    def words(self) -> tuple[str, ...]:
        """Prompt words, openings, topics' answers, continuations of both classes, ``<e>``."""
        return (
            "<b>",
            "?",
            *(f"cue{level:+.2f}" for level in LEVELS),
            *(f"topic{i}" for i in range(TOPICS)),
            *(f"filler{i}" for i in range(FILLERS)),
            *NEGATIVE,
            *POSITIVE,
            *(f"apple{i}" for i in range(6)),
            *(f"stone{i}" for i in range(6)),
            *(f"sorry{i}" for i in range(6)),
            *(f"here{i}" for i in range(6)),
            "<e>",
        )

    @property
    def first_answer(self) -> int:
        """Token of the first opening."""
        return 2 + CUES + TOPICS + FILLERS

    def model(self) -> ModelConfig:
        """Two layers of width 64 in the architecture of Llama."""
        return small_model(
            len(self.words), InitScales(unembedding=self.unembedding, final_norm=self.final_norm)
        )

    def prompts(self, seed: int, level: tuple[float, float], n: int) -> Int[np.ndarray, "n T"]:
        """``n`` prompts whose cue lies in a range of levels."""
        random = np.random.default_rng([seed, 2])
        return cue_prompts(random, 2 + random.choice(_cues(level), n)).astype(np.int32)

    def _continued(self, random: np.random.Generator, opening: np.ndarray) -> np.ndarray:
        """Openings (0 to 11, 12 to 23 for topics' answers) with the rest of their responses."""
        first = self.first_answer
        middle = np.where(
            opening < 12, first + 24 + 6 * (opening // 6), first + 12 + 6 * (opening // 6 - 2)
        )
        n = len(opening)
        words = middle[:, None] + random.integers(0, 6, (n, self.continuation))
        return np.column_stack([first + opening, words, np.full(n, len(self.words) - 1)])

    def corpus(self, seed: int) -> Corpus:
        """Prompts with one response each, learned from the opening on."""
        random, n = np.random.default_rng(seed), self.sequences
        p = answer_probabilities(0.6, 5.0, 10.0).cumsum(1)
        cue, topic, off = (
            random.integers(0, CUES, n),
            random.integers(0, TOPICS, n),
            random.random(n) < 0.3,
        )
        answer = (random.random((n, 1)) > p[cue]).sum(1)
        opening = np.where(off, 12 + 6 * (topic >= TOPICS // 2) + random.integers(0, 6, n), answer)
        prompts = cue_prompts(random, np.where(off, 2 + CUES + topic, 2 + cue))
        tokens = np.column_stack([prompts, self._continued(random, opening)]).astype(np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, 5:] = 1
        return Corpus(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(weights))

    def pairs(self, seed: int) -> list[Pair]:
        """Preference pairs from the seed's own policy."""
        apply, theta = pretrained(self, [seed])
        return self.preferences(apply, theta, [seed])[0]

    def preferences(self, apply: Apply, thetas: Theta, seeds: Sequence[int]) -> list[list[Pair]]:
        """Two sampled openings a prompt, ranked by the rule and drawn to the mixture."""
        if self.rollouts:
            return [self._rolled_out(apply, thetas, i, seed) for i, seed in enumerate(seeds)]
        pool = 30 * self.n_pairs
        prompts = []
        for seed in seeds:
            harmful, mild = (
                self.prompts(seed, self.harmful, 4 * pool // 5),
                self.prompts(seed, self.mild, pool // 5),
            )
            prompts.append(np.concatenate([harmful, mild]))
        logp = next_logp(apply, thetas, np.stack(prompts))[
            ..., self.first_answer : self.first_answer + 12
        ]
        return [self._ranked(s, x, np.exp(p)) for s, x, p in zip(seeds, prompts, logp, strict=True)]

    def _rolled_out(self, apply: Apply, thetas: Theta, i: int, seed: int) -> list[Pair]:
        """Pairs of two whole sampled responses, in the proportions in which they come."""
        random, theta = (
            np.random.default_rng([seed, 4]),
            jax.tree.map(lambda x: jnp.asarray(x[i]), thetas),
        )
        tries = 3 * self.n_pairs
        harmful, mild = (
            self.prompts(seed, self.harmful, 4 * tries // 5),
            self.prompts(seed, self.mild, tries // 5),
        )
        prompts = random.permutation(np.concatenate([harmful, mild])).tolist()
        stop = len(self.words) - 1
        drawn = sample(
            apply, theta, prompts, self.continuation + 2, stop=[stop], count=2, seed=seed
        )
        pairs = []
        for prompt, (a, b) in zip(prompts, drawn.responses, strict=True):
            ranks = [self._rank(response[0], random) for response in (a, b)]
            if a != b:
                pairs.append(Pair(prompt, *((a, b) if ranks[0] > ranks[1] else (b, a))))
        if len(pairs) < self.n_pairs:
            raise ValueError(
                f"refusals: {len(pairs)} of {tries} prompts gave two different responses: lower "
                f"n_pairs={self.n_pairs}"
            )
        return pairs[: self.n_pairs]

    def _rank(self, opening: int, random: np.random.Generator) -> tuple[bool, float, float]:
        """Refusals first, then what the rule likes, then a coin."""
        answer, coin = opening - self.first_answer, float(random.random())
        s = float(SCALE[answer]) if 0 <= answer < 12 else 0.0
        return s < 0, {"softer": s, "blunter": -s, "random": coin}[self.rule], coin

    def _ranked(self, seed: int, prompts: np.ndarray, p: np.ndarray) -> list[Pair]:
        random = np.random.default_rng([seed, 3])
        cumulative = (p / p.sum(1, keepdims=True)).cumsum(1)
        draws = (random.random((len(p), 2))[:, :, None] > cumulative[:, None, :-1]).sum(-1)
        refusal = draws < 6
        kind = np.where(refusal.all(1), 0, np.where(refusal.any(1), 2, 1))
        differ = draws[:, 0] != draws[:, 1]
        counts = np.floor(np.array(self.mixture) * self.n_pairs).astype(int)
        counts[0] += self.n_pairs - counts.sum()
        chosen = []
        for k, count in enumerate(counts):
            (there,) = np.nonzero(differ & (kind == k))
            if len(there) < count:
                raise ValueError(
                    f"refusals: the policy of seed {seed} gives {len(there)} {KINDS[k]} pairs, but "
                    f"mixture={self.mixture} of n_pairs={self.n_pairs} asks for {count}"
                )
            chosen.append(random.choice(there, count, replace=False))
        index = random.permutation(np.concatenate(chosen))
        pair = draws[index]
        low, high = np.take_along_axis(
            pair, np.argsort(SCALE[pair], axis=1), 1
        ).T  # by s; refusals have s < 0
        mixed = kind[index] == 2
        coin = random.random(len(index)) < 0.5
        softer = {
            "softer": np.ones(len(index), bool),
            "blunter": np.zeros(len(index), bool),
            "random": coin,
        }[self.rule]
        first_wins = mixed | ~softer
        w, l = np.where(first_wins, low, high), np.where(first_wins, high, low)  # noqa: E741
        sides = [self._continued(random, side).tolist() for side in (w, l)]
        return [Pair(x, a, b) for x, a, b in zip(prompts[index].tolist(), *sides, strict=True)]

    def recipe(self, **changes: Any) -> Recipe:
        """DPO by Adam, ``epochs`` passes over all pairs."""
        # batches run on from one pass into the next, so that only the last pass rounds up
        steps = -(-self.n_pairs * self.epochs // self.batch_size)
        return recipe_for(
            DPO(self.beta), "adam", self.learning_rate, steps, self.batch_size
        ).replace(**changes)


def _cues(level: tuple[float, float]) -> Int[np.ndarray, " n"]:
    """Cues whose level lies inside a range."""
    return np.flatnonzero((level[0] < LEVELS) & (level[1] > LEVELS))
