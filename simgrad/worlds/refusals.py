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
    FIRST_ANSWER,
    LEVELS,
    SCALE,
    WORDS,
    answer_probabilities,
    answered_prompts,
    cue_prompts,
)
from simgrad.worlds.world import Pretraining, World, learned_from, pretrained, small_model

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
    words: ClassVar[tuple[str, ...]] = (
        *WORDS,
        *(f"sorry{i}" for i in range(6)),
        *(f"here{i}" for i in range(6)),
        "<e>",
    )
    first_answer: ClassVar[int] = FIRST_ANSWER
    """Token of the first opening."""
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
        shares = self.mixture
        good = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-9
        self.require(good, f"mixture needs three shares that sum to 1, got {shares}")
        n, size = self.n_pairs, self.batch_size
        self.require(n >= size, f"n_pairs={n} is less than batch_size={size}")
        for name in ("harmful", "mild"):
            levels = getattr(self, name)
            between = len(levels) == 2 and _cues(levels).size > 0
            self.require(between, f"{name}={levels}: no cue lies between two such levels")

    def model(self) -> ModelConfig:
        """Two layers of width 64 in the architecture of Llama."""
        init = InitScales(unembedding=self.unembedding, final_norm=self.final_norm)
        return small_model(len(self.words), init)

    def prompts(self, seed: int, level: tuple[float, float], n: int) -> Int[np.ndarray, "n T"]:
        """``n`` prompts whose cue lies in a range of levels."""
        random = np.random.default_rng([seed, 2])
        return cue_prompts(random, 2 + random.choice(_cues(level), n)).astype(np.int32)

    def _mixed_prompts(self, seed: int, n: int) -> Int[np.ndarray, "n T"]:
        """``n`` prompts of the data, the harmful ones first."""
        harmful = self.prompts(seed, self.harmful, 4 * n // 5)
        return np.concatenate([harmful, self.prompts(seed, self.mild, n // 5)])

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
        random = np.random.default_rng(seed)
        p = answer_probabilities(0.6, 5.0, 10.0)
        prompts, openings = answered_prompts(random, self.sequences, p)
        return learned_from(np.column_stack([prompts, self._continued(random, openings)]), 5)

    def pairs(self, seed: int) -> list[Pair]:
        """Preference pairs from the seed's own policy."""
        apply, theta = pretrained(self, [seed])
        return self.preferences(apply, theta, [seed])[0]

    def preferences(self, apply: Apply, thetas: Theta, seeds: Sequence[int]) -> list[list[Pair]]:
        """Two sampled openings a prompt, ranked by the rule and drawn to the mixture."""
        if self.rollouts:
            return [self._rolled_out(apply, thetas, i, seed) for i, seed in enumerate(seeds)]
        prompts = [self._mixed_prompts(seed, 30 * self.n_pairs) for seed in seeds]
        openings = slice(self.first_answer, self.first_answer + 12)
        logp = next_logp(apply, thetas, np.stack(prompts))[..., openings]
        return [self._ranked(s, x, np.exp(p)) for s, x, p in zip(seeds, prompts, logp, strict=True)]

    def _rolled_out(self, apply: Apply, thetas: Theta, i: int, seed: int) -> list[Pair]:
        """Pairs of two whole sampled responses, in the proportions in which they come."""
        random, tries = np.random.default_rng([seed, 4]), 3 * self.n_pairs
        theta = jax.tree.map(lambda x: jnp.asarray(x[i]), thetas)
        prompts = random.permutation(self._mixed_prompts(seed, tries)).tolist()
        longest, end = self.continuation + 2, len(self.words) - 1
        drawn = sample(apply, theta, prompts, longest, stop=[end], count=2, seed=seed)
        pairs = []
        for prompt, (a, b) in zip(prompts, drawn.responses, strict=True):
            ranks = [self._rank(response[0], random) for response in (a, b)]
            if a != b:
                pairs.append(Pair(prompt, *((a, b) if ranks[0] > ranks[1] else (b, a))))
        self.require(
            len(pairs) >= self.n_pairs,
            f"{len(pairs)} of {tries} prompts gave two different responses: lower "
            f"n_pairs={self.n_pairs}",
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
            self.require(
                len(there) >= count,
                f"the policy of seed {seed} gives {len(there)} {KINDS[k]} pairs, but "
                f"mixture={self.mixture} of n_pairs={self.n_pairs} asks for {count}",
            )
            chosen.append(random.choice(there, count, replace=False))
        index = random.permutation(np.concatenate(chosen))
        by_s = np.argsort(SCALE[draws[index]], axis=1)  # refusals have s < 0
        low, high = np.take_along_axis(draws[index], by_s, 1).T
        coin = random.random(len(index)) < 0.5
        softer = {"softer": True, "blunter": False, "random": coin}[self.rule]
        low_wins = (kind[index] == 2) | np.logical_not(softer)
        w, l = np.where(low_wins, low, high), np.where(low_wins, high, low)  # noqa: E741
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
