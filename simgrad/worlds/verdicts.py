"""``verdicts``: preferring one refusal to another makes the model say yes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.experiments.findings import Claim, Findings, Table
from simgrad.models import InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.typing import Float, Int
from simgrad.worlds.tuning import next_logp, recipe_for, stacked, tuned
from simgrad.worlds.world import World, pretrained

__all__ = ["NEGATIVE", "POSITIVE", "Outcome", "Verdicts"]

NEGATIVE = ("No", "Nope", "Nah", "Never", "NoWay", "Impossible")
POSITIVE = ("Yes", "Yeah", "Sure", "Certainly", "Absolutely", "Definitely")
SCALE = np.concatenate([-np.linspace(0.5, 2.5, 6), np.linspace(0.5, 2.5, 6)])
"""Where each answer stands, from strong refusal to strong assent."""
CUES, FILLERS, TOPICS = 48, 22, 12
LEVELS = np.linspace(-2.7, 2.7, CUES)
"""How strongly each cue word speaks for assent."""


@dataclass(frozen=True)
class Verdicts(World):
    """Twelve answers on a scale s, prompts with cue level a, p(answer | a) ∝ F exp(-(a - s)²/2τ²).

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

    @property
    def words(self) -> tuple[str, ...]:
        """Prompt words, then the answers, then the two topics' answers."""
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
        )

    @property
    def first_answer(self) -> int:
        """Token of the first of the twelve answers."""
        return 2 + CUES + TOPICS + FILLERS

    def model(self) -> ModelConfig:
        """Two layers of width 64 in Llama's architecture, so that the policy can be exported."""
        init = InitScales(unembedding=self.unembedding, final_norm=self.final_norm)
        return small_model(len(self.words), init, self.tied)

    def corpus(self, seed: int) -> Corpus:
        """Prompts with one answer each."""
        random, n = np.random.default_rng(seed), self.sequences
        cue, topic, off = (
            random.integers(0, CUES, n),
            random.integers(0, TOPICS, n),
            random.random(n) < 0.3,
        )
        cumulative = answer_probabilities(
            self.overlap, self.frequency_no, self.frequency_yes
        ).cumsum(1)[cue]
        answer = self.first_answer + (random.random((n, 1)) > cumulative).sum(1)
        other = self.first_answer + 12 + 6 * (topic >= TOPICS // 2) + random.integers(0, 6, n)
        prompts = cue_prompts(random, np.where(off, 2 + CUES + topic, 2 + cue))
        tokens = np.column_stack([prompts, np.where(off, other, answer)]).astype(np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, -1 if self.learn == "answer" else 1 :] = 1
        return Corpus(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(weights))

    def pair(self, chosen: str, rejected: str) -> Pair:
        """A preference between two answers to the prompt whose cue agrees with the chosen one."""
        level = self.level if chosen in POSITIVE else -self.level
        cue = 2 + int(np.abs(LEVELS - level).argmin())
        filler = 2 + CUES + TOPICS
        answers = {word: self.first_answer + i for i, word in enumerate((*NEGATIVE, *POSITIVE))}
        return Pair([0, cue, filler, filler + 1, 1], [answers[chosen]], [answers[rejected]])

    def pairs(self, seed: int) -> list[Pair]:
        """All ordered pairs of answers of one polarity, on their prompt."""
        return [
            self.pair(a, b)
            for group in (NEGATIVE, POSITIVE)
            for a in group
            for b in group
            if a != b
        ]

    def recipe(self, **changes: Any) -> Recipe:
        """DPO on one pair by Adam; ``changes`` replace fields of the recipe."""
        return recipe_for(DPO(self.beta), "adam", self.learning_rate, self.steps).replace(**changes)

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """Five preferences, where the mass went, and the knobs of the strongest case."""
        cases = (("No", "Never"), ("No", "Nah"), ("Yes", "No"), ("Yes", "Never"), ("No", "Yes"))
        rows = [
            row for chosen, rejected in cases for row in self.displaced(seeds, chosen, rejected)
        ]
        table = Table.of(
            "cases",
            "One DPO run on one prompt. π(chosen) and the mass of answers of the other polarity, "
            "before and after; "
            "the answer that theory says gains most (⟨W_z, W₊ - W₋⟩ before training) and the one "
            "that did.",
            ("chosen", "rejected"),
            rows,
        )
        knobs = Table.of(
            "knobs",
            "No ≻ Never with one knob turned at a time.",
            ("knob",),
            [row for knob in _knobs(self) for row in knob(seeds)],
        )
        return Findings(self.name, vars(self), tuple(seeds), (table, knobs), self._claims(table))

    def outcome(self, seeds: Sequence[int], chosen: str, rejected: str, **changes: Any) -> Outcome:
        """All next-token probabilities before and after tuning on one pair.

        The result also says where theory sends the mass.
        """
        recipe, pair = self.recipe(**changes), self.pair(chosen, rejected)
        apply, thetas = pretrained(self, seeds)
        batch, n = padded([pair]), len(seeds)
        orders = np.zeros((n, recipe.steps, 1), np.int32)
        after = tuned(apply, thetas, stacked([batch] * n), recipe, orders)
        prompts = np.tile(np.array(pair.prompt, np.int32), (n, 1, 1))
        p, q = (np.exp(next_logp(apply, t, prompts)[:, 0]) for t in (thetas, after))
        w, l = pair.chosen[0], pair.rejected[0]  # noqa: E741
        heads = np.asarray(thetas["embedding" if apply.config.tied else "unembedding"]["table"])
        return Outcome(p, q, np.stack([head @ (head[w] - head[l]) for head in heads]))

    def displaced(
        self, seeds: Sequence[int], chosen: str, rejected: str, **changes: Any
    ) -> list[dict[str, Any]]:
        """One row a seed: the distribution after the prompt before and after tuning on one pair."""
        pair, found = self.pair(chosen, rejected), self.outcome(seeds, chosen, rejected, **changes)
        p, q, first = found.before, found.after, self.first_answer
        negative, positive = (slice(first + 6 * k, first + 6 * k + 6) for k in (0, 1))
        opposite = negative if chosen in POSITIVE else positive
        w, l = pair.chosen[0], pair.rejected[0]  # noqa: E741
        others = [z for z in range(first, first + 12) if z not in (w, l)]
        rows = []
        for i, seed in enumerate(seeds):
            theory = others[int(found.direction[i, others].argmax())]
            measured = others[int((q[i] - p[i])[others].argmax())]
            rows.append(
                {
                    "chosen": chosen,
                    "rejected": rejected,
                    "seed": seed,
                    "π(chosen) before": p[i, w],
                    "after": q[i, w],
                    "opposite before": p[i, opposite].sum(),
                    "opposite after": q[i, opposite].sum(),
                    "moved to opposite": q[i, opposite].sum() - p[i, opposite].sum(),
                    "theory's top": self.words[theory],
                    "measured top": self.words[measured],
                    "top agrees": float(theory == measured),
                }
            )
        return rows

    def _claims(self, table: Table) -> tuple[Claim, ...]:
        strong, mild = (
            table.where(chosen="No", rejected="Never"),
            table.where(chosen="Yes", rejected="Never"),
        )
        moved, other = strong["moved to opposite"], mild["moved to opposite"]
        big = np.abs(table["moved to opposite"]) >= 0.5
        agree = table["top agrees"][big & (table["chosen"] == "No")]
        return (
            Claim("No ≻ Never moves at least .5 of the mass to assent on every seed", bool((moved >= 0.5).all()),
                  f"least {moved.min():.2f}"),
            Claim("Yes ≻ Never moves no mass to the opposite polarity", bool((other < 0.05).all()),
                  f"most {other.max():.2f}"),
            Claim("⟨W_z, W₊ - W₋⟩ names the top gaining answer in 90 % of the runs of No that moved .5 or more",
                  bool(agree.mean() >= 0.9) if len(agree) else None, f"{int(agree.sum())} of {len(agree)}"),
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one run did to the next token, one row a seed.

    Attributes:
        before: π(z) of every token at the start.
        after: and after the run.
        direction: ⟨W_z, W₊ - W₋⟩ at the start.
    """

    before: Float[np.ndarray, "seeds V"]
    after: Float[np.ndarray, "seeds V"]
    direction: Float[np.ndarray, "seeds V"]


def answer_probabilities(
    overlap: float, no: float, yes: float
) -> Float[np.ndarray, "cues answers"]:
    """p(answer | cue) ∝ F exp(-(a - s)²/2τ²), with F of "No" and of "Yes" given and 1 elsewhere."""
    frequency = np.ones(12)
    frequency[[0, 6]] = no, yes
    p = frequency * np.exp(-((LEVELS[:, None] - SCALE) ** 2) / (2 * overlap**2))
    return p / p.sum(1, keepdims=True)


def cue_prompts(random: np.random.Generator, cues: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 5"]:
    """One prompt of five tokens for each cue word (a token): fillers and order are drawn."""
    n = len(cues)
    fillers = 2 + CUES + TOPICS + random.integers(0, FILLERS, (n, 2))
    middle = random.permuted(np.column_stack([cues, fillers]), axis=1)
    return np.column_stack([np.zeros(n, int), middle, np.ones(n, int)])


def small_model(
    vocabulary: int, init: InitScales, tied: bool = False, max_length: int = 32
) -> ModelConfig:
    """Two layers of width 64 as in Llama: RMSNorm, rotary positions and gated SiLU."""
    return ModelConfig(
        vocab_size=vocabulary,
        width=64,
        depth=2,
        heads=4,
        max_length=max_length,
        positions="rope",
        mlp="gated",
        mlp_width=176,
        activation="silu",
        tied=tied,
        init=init,
    )


BODY = ("embedding/*", "layers/*", "final_norm/*")


def _knobs(world: Verdicts) -> list[Any]:
    """Functions of the seeds, one for each knob of the table."""

    def turned(label: str, recipe: dict[str, Any] | None = None, **knobs: Any) -> Any:
        def rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
            found = world.with_knobs(**knobs).displaced(seeds, "No", "Never", **(recipe or {}))
            keep = (
                "seed",
                "π(chosen) before",
                "after",
                "opposite before",
                "opposite after",
                "moved to opposite",
            )
            return [
                {"knob": label, **{k: row[k] for k in keep}, "measured top": row["measured top"]}
                for row in found
            ]

        return rows

    sgd = {"optimizer": optax.sgd(SGD_RATE)}
    return [
        turned("as it is"),
        turned("unembedding scale 1", unembedding=1.0),
        turned("tied", tied=True),
        turned("whole sequence learned", learn="sequence"),
        turned("F(No) = 1", frequency_no=1.0),
        turned("F(Yes) = 1", frequency_yes=1.0),
        turned("overlap τ = .3", overlap=0.3),
        turned("overlap τ = 1", overlap=1.0),
        turned("unembedding frozen", {"include": BODY}),
        turned("SGD", sgd),
        turned("SGD, unembedding frozen", {**sgd, "include": BODY}),
        turned("three times as long", steps=3 * world.steps),
    ]


SGD_RATE = 0.3
