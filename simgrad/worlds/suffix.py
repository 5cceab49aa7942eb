"""``suffix``: the longer the ending that both responses share, the more the chosen one falls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.pretraining import Corpus
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import Apply, InitScales, ModelConfig
from simgrad.objectives import DPO
from simgrad.pairs import Batch, Pair, padded
from simgrad.theory import displacement, optimizer_step, pair_kernel, responses
from simgrad.typing import Array, Theta
from simgrad.worlds.tuning import each_seed, recipe_for, stacked, trained
from simgrad.worlds.verdicts import small_model
from simgrad.worlds.world import Pretraining, World, pretrained

__all__ = ["Suffix"]

_SGD = optax.sgd(1.0)
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
        """Marks, cues, sentiment words of both polarities, and two template words a position."""
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

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """Cosine, predicted and measured changes for each length of the shared ending."""
        apply, thetas = pretrained(self, seeds)
        longest = 4 + 1 + max(self.lengths)
        batches = [
            padded(self.pairs(seed, n), longest, 1 + max(self.lengths))
            for seed in seeds
            for n in self.lengths
        ]
        copies = each_seed(thetas, len(self.lengths))
        found = spread(_measuring(apply, self.recipe()), copies, stacked(batches))
        keys = [(seed, n) for seed in seeds for n in self.lengths]
        rows = [
            _row(n, seed, jax.tree.map(lambda x, i=i: x[i], found))
            for i, (seed, n) in enumerate(keys)
        ]
        rows.sort(key=lambda row: row["L"])
        measured = Table.of(
            "lengths",
            "Mean cosine of g_w and g_l before the run; measured Δlog π after it (nats) of chosen, "
            "rejected and the "
            "chosen's sentiment word alone; shares of pairs whose chosen response falls, and where "
            "both fall.",
            ("L",),
            [{k: row[k] for k in ("L", "seed", *_MEASURED)} for row in rows],
        )
        predicted = Table.of(
            "predictions",
            "Share of pairs whose chosen response falls, as measured and as four kernels say "
            "before training: the "
            "pair's own and the whole batch's, for SGD and for the sign-like first step of Adam "
            "(the run's optimizer); "
            "then the share of pairs whose rise or fall the own (SGD) and the batch kernel (Adam) "
            "call right.",
            ("L",),
            [{k: row[k] for k in ("L", "seed", "falls", *_PREDICTED)} for row in rows],
        )
        return Findings(
            self.name,
            vars(self),
            tuple(seeds),
            (measured, predicted),
            _claims(measured, predicted, self.lengths),
        )


@functools.lru_cache
def _measuring(apply: Apply, recipe: Recipe) -> Any:
    def run(theta: Theta, batch: Batch) -> dict[str, Array]:
        order = jnp.tile(jnp.arange(batch.size, dtype=jnp.int32)[None], (recipe.steps, 1))
        after = responses(apply, trained(apply, recipe, theta, batch, order), batch).token_logp
        before = responses(apply, theta, batch).token_logp
        objective = recipe.objective

        def own(index: Array) -> tuple[Array, Array]:
            pair = batch.take(index[None])
            return along(pair, pair, _SGD), along(pair, pair, recipe.optimizer)

        def along(
            pushing: Batch, followed: Batch, optimizer: optax.GradientTransformation
        ) -> Array:
            step = optimizer_step(apply, theta, pushing, objective, optimizer).direction
            return displacement(apply, theta, followed, step).first

        own_sgd, own_adam = jax.lax.map(own, jnp.arange(batch.size))
        return {
            "cosine": pair_kernel(apply, theta, batch).cosine,
            "change": after - before,
            "own, SGD": own_sgd[:, 0],
            "own, Adam": own_adam[:, 0],
            "batch, SGD": along(batch, batch, _SGD),
            "batch, Adam": along(batch, batch, recipe.optimizer),
        }

    return run


_MEASURED = ("cosine", "Δ chosen", "Δ rejected", "Δ word", "falls", "both fall")
_PREDICTED = ("own, SGD", "own, Adam", "batch, SGD", "batch, Adam", "own right", "batch right")


def _row(length: int, seed: int, found: dict[str, np.ndarray]) -> dict[str, Any]:
    change = found["change"].sum(-1)
    falls = change[:, 0] < 0
    says = {
        name: found[name][:, 0] < 0
        for name in ("own, SGD", "own, Adam", "batch, SGD", "batch, Adam")
    }
    return {
        "L": length,
        "seed": seed,
        "cosine": float(found["cosine"].mean()),
        "Δ chosen": float(change[:, 0].mean()),
        "Δ rejected": float(change[:, 1].mean()),
        "Δ word": float(found["change"][:, 0, 0].mean()),
        "falls": float(falls.mean()),
        "both fall": float((change < 0).all(-1).mean()),
        **{name: float(x.mean()) for name, x in says.items()},
        "own right": float((says["own, SGD"] == falls).mean()),
        "batch right": float((says["batch, Adam"] == falls).mean()),
    }


def _claims(measured: Table, predicted: Table, lengths: tuple[int, ...]) -> tuple[Claim, ...]:
    def means(table: Table, column: str) -> np.ndarray:
        return np.array([table.where(L=n)[column].mean() for n in sorted(lengths)])

    cosine, change, word = (means(measured, c) for c in ("cosine", "Δ chosen", "Δ word"))
    own, batch = means(predicted, "own right"), means(predicted, "batch right")
    there = np.array(sorted(lengths)) > 0
    several, shared = len(lengths) > 1, bool(there.any())
    ending = change - word
    return (
        Claim("the cosine grows with the shared ending", bool((np.diff(cosine) > 0).all()) if several else None,
              listing(cosine)),
        Claim("the chosen falls further the longer the ending", bool((np.diff(change) < 0).all()) if several else None,
              listing(change)),
        Claim("the sentiment word itself rises at every length", bool((word > 0).all()), listing(word)),
        Claim("what falls is the shared ending", bool((ending[there] < 0).all()) if shared else None,
              listing(ending[there])),
        Claim("with a shared ending the batch's kernel calls more falls right than the pair's own, at every length",
              bool((batch > own)[there].all()) if shared else None, f"batch {listing(batch)}; own {listing(own)}"),
    )  # fmt: skip
