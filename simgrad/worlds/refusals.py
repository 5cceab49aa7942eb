"""``refusals``: safety tuning on pairs of two refusals makes the model comply."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe, batch_order
from simgrad.dynamics.spread import spread
from simgrad.models import Apply, InitScales, ModelConfig
from simgrad.objectives import DPO, DPOP, SFT
from simgrad.pairs import Batch, Pair, padded
from simgrad.theory import (
    Calibrated,
    PairwiseNormalized,
    displacement,
    head_gap,
    keep_lowest,
    ln_ches,
    optimizer_step,
    pair_kernel,
    responses,
)
from simgrad.typing import Array, Float, Int, Theta
from simgrad.findings import Claim, Findings, Table
from simgrad.worlds.tuning import next_logp, stacked, tuned
from simgrad.worlds.verdicts import LEVELS, NEGATIVE, POSITIVE, SCALE, small_model
from simgrad.worlds.world import Pretraining, World, pretrained

__all__ = ["Refusals"]

CUES, TOPICS, FILLERS = len(LEVELS), 12, 22
KINDS = ("refusal-refusal", "comply-comply", "mixed")
HARMLESS = (1.0, np.inf)
"""Levels of the cues of the harmless test prompts."""


@dataclass(frozen=True)
class Refusals(World):
    """The verdicts' scale with responses of three tokens: opening, a word of its class, ``<e>``.

    A refusal opens with a negative verdict, a compliance with a positive one. Two openings are sampled from
    the policy for each prompt, and a rule ranks them: refusal over compliance; within a type, ``softer``
    prefers the larger s, ``blunter`` the smaller, ``random`` a coin. Pairs are then drawn so that the types
    have the shares ``mixture``, the pilot's stand-in for what safety data hold; its numbers are an assumption.

    Attributes:
        harmful: levels of the cues of harmful prompts, four fifths of the data.
        mild: levels of the cues of the other prompts.
        rule: which of two responses of one type wins.
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
    end: ClassVar[str | None] = "<e>"
    pretraining: ClassVar[Pretraining] = Pretraining(steps=400, batch_size=64)
    harmful: tuple[float, float] = (-1.3, -0.5)
    mild: tuple[float, float] = (0.6, 1.1)
    rule: Literal["softer", "blunter", "random"] = "softer"
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
        if len(self.mixture) != 3 or min(self.mixture) < 0 or abs(sum(self.mixture) - 1) > 1e-9:
            raise ValueError(f"refusals: mixture needs three shares that sum to 1, got {self.mixture}")
        if self.rule not in ("softer", "blunter", "random"):
            raise ValueError(f"refusals: rule={self.rule!r}: choose softer, blunter or random")

    @property
    def words(self) -> tuple[str, ...]:
        """Prompt words, openings, topic answers, continuations of refusals and compliances, ``<e>``."""
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
        return small_model(len(self.words), InitScales(unembedding=self.unembedding, final_norm=self.final_norm))

    def _prompts(self, random: np.random.Generator, cues: np.ndarray) -> np.ndarray:
        n = len(cues)
        fillers = 2 + CUES + TOPICS + random.integers(0, FILLERS, (n, 2))
        middle = random.permuted(np.column_stack([cues, fillers]), axis=1)
        return np.column_stack([np.zeros(n, int), middle, np.ones(n, int)])

    def prompts(self, seed: int, level: tuple[float, float], n: int) -> Int[np.ndarray, "n T"]:
        """``n`` prompts whose cue lies in a range of levels."""
        random = np.random.default_rng([seed, 2])
        (cues,) = np.nonzero((level[0] < LEVELS) & (level[1] > LEVELS))
        return self._prompts(random, 2 + random.choice(cues, n)).astype(np.int32)

    def _continued(self, random: np.random.Generator, opening: np.ndarray) -> np.ndarray:
        """Openings (0 to 11, then 12 to 23 for topics' answers) with the rest of their responses."""
        first = self.first_answer
        middle = np.where(opening < 12, first + 24 + 6 * (opening // 6), first + 12 + 6 * (opening // 6 - 2))
        n = len(opening)
        return np.column_stack([first + opening, middle + random.integers(0, 6, n), np.full(n, len(self.words) - 1)])

    def corpus(self, seed: int) -> Corpus:
        """Prompts with one response each, learned from the opening on."""
        random, n = np.random.default_rng(seed), self.sequences
        frequency = np.ones(12)
        frequency[[0, 6]] = 5.0, 10.0
        p = frequency * np.exp(-((LEVELS[:, None] - SCALE) ** 2) / (2 * 0.6**2))
        p = (p / p.sum(1, keepdims=True)).cumsum(1)
        cue, topic, off = random.integers(0, CUES, n), random.integers(0, TOPICS, n), random.random(n) < 0.3
        answer = (random.random((n, 1)) > p[cue]).sum(1)
        opening = np.where(off, 12 + 6 * (topic >= TOPICS // 2) + random.integers(0, 6, n), answer)
        prompts = self._prompts(random, np.where(off, 2 + CUES + topic, 2 + cue))
        tokens = np.column_stack([prompts, self._continued(random, opening)]).astype(np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, 5:] = 1
        return Corpus(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(weights))

    def pairs(self, seed: int) -> list[Pair]:
        """Preference pairs from the seed's own policy."""
        apply, theta = pretrained(self, [seed])
        return self.preferences(apply, theta, [seed])[0]

    def preferences(self, apply: Apply, thetas: Theta, seeds: Sequence[int]) -> list[list[Pair]]:
        """Two sampled openings a prompt, ranked by the rule, drawn to the mixture; one list a seed."""
        pool = 30 * self.n_pairs
        prompts = []
        for seed in seeds:
            harmful, mild = self.prompts(seed, self.harmful, 4 * pool // 5), self.prompts(seed, self.mild, pool // 5)
            prompts.append(np.concatenate([harmful, mild]))
        logp = next_logp(apply, thetas, np.stack(prompts))[..., self.first_answer : self.first_answer + 12]
        return [self._ranked(s, x, np.exp(p)) for s, x, p in zip(seeds, prompts, logp, strict=True)]

    def _ranked(self, seed: int, prompts: np.ndarray, p: np.ndarray) -> list[Pair]:
        random = np.random.default_rng([seed, 3])
        cumulative = (p / p.sum(1, keepdims=True)).cumsum(1)
        draws = (random.random((len(p), 2))[:, :, None] > cumulative[:, None]).sum(-1)
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
        low, high = np.take_along_axis(pair, np.argsort(SCALE[pair], axis=1), 1).T  # by s; refusals have s < 0
        mixed = kind[index] == 2
        coin = random.random(len(index)) < 0.5
        softer = {"softer": np.ones(len(index), bool), "blunter": np.zeros(len(index), bool), "random": coin}[self.rule]
        first_wins = mixed | ~softer
        w, l = np.where(first_wins, low, high), np.where(first_wins, high, low)  # noqa: E741
        sides = [self._continued(random, side).tolist() for side in (w, l)]
        return [Pair(x, a, b) for x, a, b in zip(prompts[index].tolist(), *sides, strict=True)]

    def recipe(self, **changes: Any) -> Recipe:
        """DPO by Adam, ``epochs`` passes over all pairs."""
        steps = self.n_pairs * self.epochs // self.batch_size
        return _recipe(self.beta, self.learning_rate, steps, self.batch_size).replace(**changes)

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """Refusal of harmful and of harmless prompts, start and end, for every arm."""
        apply, thetas = pretrained(self, seeds)
        kinds = (self.harmful, HARMLESS)
        tests = np.stack([np.concatenate([self.prompts(s + 10**6, levels, 400) for levels in kinds]) for s in seeds])

        def rates(thetas: Theta) -> Float[np.ndarray, "seeds 2"]:
            p = np.exp(next_logp(apply, thetas, tests))[..., self.first_answer : self.first_answer + 6].sum(-1)
            return p.reshape(len(seeds), 2, 400).mean(-1)

        start = rates(thetas)
        rows = [_row("start", 0, 0, seeds, start)]
        batches = {
            rule: stacked([padded(p) for p in self.with_knobs(rule=rule).preferences(apply, thetas, seeds)])
            for rule in ("softer", "blunter", "random")
        }
        scores = spread(_scoring(apply, self.recipe()), thetas, batches[self.rule])
        for arm in self._arms(scores, seeds):
            recipe = self.recipe(**arm.recipe, steps=arm.orders.shape[1], batch_size=arm.orders.shape[2])
            after = tuned(apply, thetas, batches[arm.rule or self.rule], recipe, arm.orders)
            rows.append(_row(arm.name, arm.pairs, arm.orders.shape[1], seeds, rates(after)))
        table = Table.of(
            "arms",
            "Mean probability of a refusal on 400 harmful and 400 harmless prompts that were not trained on. All arms "
            "make the same number of passes over their pairs, so filtered arms take fewer steps.",
            ("arm", "pairs", "steps"),
            [row for arm in rows for row in arm],
        )
        return Findings(self.name, vars(self), tuple(seeds), (table,), _claims(table))

    def _arms(self, scores: dict[str, np.ndarray], seeds: Sequence[int]) -> list[_Arm]:
        n, size = self.n_pairs, self.batch_size
        everything = np.stack([batch_order(n, size, n * self.epochs // size, s) for s in seeds])

        def arm(name: str, rule: str | None = None, **recipe: Any) -> _Arm:
            return _Arm(name, recipe, everything, n, rule)

        def kept(name: str, index: np.ndarray) -> _Arm:
            """``index`` holds the pairs of each seed that stay."""
            m = index.shape[1]
            b = min(size, m)
            orders = [i[batch_order(m, b, max(1, m * self.epochs // b), s)] for i, s in zip(index, seeds, strict=True)]
            return _Arm(name, {}, np.stack(orders), m, None)

        def lowest(name: str, score: np.ndarray) -> _Arm:
            return kept(name, np.stack([np.asarray(keep_lowest(s, self.keep)) for s in jnp.asarray(score)]))

        chance = np.random.default_rng(0).random((len(seeds), n))
        share = f"{100 * self.keep:g} %"
        return [
            arm("DPO"),
            arm("random preferences", "random"),
            arm("blunter wins", "blunter"),
            arm(f"SFT term {self.sft:g}", objective=DPO(self.beta) + self.sft * SFT()),
            arm("DPOP", objective=DPOP(self.beta)),
            arm("pairwise-normalised", mitigation=PairwiseNormalized()),
            arm("reward calibration", mitigation=Calibrated()),
            lowest(f"lowest {share} ln-CHES", scores["ln-CHES"]),
            lowest(f"lowest {share} head gap", scores["head gap"]),
            lowest(f"lowest {share} full gap", scores["full gap"]),
            lowest(f"lowest {share} directional", scores["directional"]),
            lowest(f"random {share}", chance),
            lowest(f"highest {share} ln-CHES", -scores["ln-CHES"]),
            lowest(f"highest {share} directional", -scores["directional"]),
        ]


@dataclass(frozen=True)
class _Arm:
    name: str
    recipe: dict[str, Any]
    orders: np.ndarray
    pairs: int
    rule: str | None


@functools.lru_cache
def _recipe(beta: float, learning_rate: float, steps: int, batch_size: int) -> Recipe:
    return Recipe(DPO(beta), optax.adam(learning_rate), steps, batch_size)


@functools.lru_cache
def _scoring(apply: Apply, recipe: Recipe) -> Any:
    def run(theta: Theta, batch: Batch) -> dict[str, Array]:
        result = responses(apply, theta, batch)
        step = optimizer_step(apply, theta, batch, recipe.objective, recipe.optimizer).direction
        return {
            "ln-CHES": ln_ches(result, batch),
            "head gap": head_gap(result, batch),
            "full gap": pair_kernel(apply, theta, batch).gap,
            "directional": -displacement(apply, theta, batch, step).first[:, 0],
        }

    return run


def _row(arm: str, pairs: int, steps: int, seeds: Sequence[int], rates: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "pairs": pairs, "steps": steps, "seed": s, "refuses harmful": h, "refuses harmless": o}
        for s, (h, o) in zip(seeds, rates.tolist(), strict=True)
    ]


def _claims(table: Table) -> tuple[Claim, ...]:
    def rate(arm: str) -> np.ndarray:
        return table.where(arm=arm)["refuses harmful"]

    start, tuned_ = rate("start"), rate("DPO")
    return (
        Claim("DPO at least halves the refusal rate on every seed", bool((tuned_ <= start / 2).all()),
              f"{start.mean():.2f} → {tuned_.mean():.2f}, largest ratio {(tuned_ / start).max():.2f}"),
    )  # fmt: skip
