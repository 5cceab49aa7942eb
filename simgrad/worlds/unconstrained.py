"""``unconstrained``: when free features let the chosen response fall.

It follows Razin et al., arXiv 2410.08847.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.agreement import spearman
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import Apply, ContextApply
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import ches, head_gap, ln_ches, responses
from simgrad.theory.closed_forms import unconstrained
from simgrad.typing import Array, Theta
from simgrad.worlds.tuning import recipe_for, trained
from simgrad.worlds.world import World

__all__ = ["Unconstrained"]

SCORES = ("CHES", "ln-CHES", "head gap", "full gap", "length")
RESPONSES = (
    "one token",
    "long",
    "long, shared",
    "long, one error",
    "any length",
    "any length, shared",
)
"""Kinds of responses, by length, shared tokens and where the probability mass lies.

One token each; all of the longest length, or of any; every second token in common; all mass on
one wrong token.
"""


@dataclass(frozen=True)
class Unconstrained(World):
    """Random models W h(context) in which W and every h(context) learn, each trained on one pair.

    First part: both responses are one token, W₋ has a given cosine with W₊ and its own norm. Second
    part: up to ``longest`` tokens, the first ones different; a state is √a (one vector a pair) +
    √(1 - a) (its own) + c W_y, scaled, with a and c drawn for each response, so that states are
    alike and tokens certain to differing degrees.

    Attributes:
        vocabulary: tokens.
        width: D of W and h.
        rows: mean norm of the rows of W, in the first and in the second part.
        states: norm of the states in both parts.
        learning_rates: of the runs (SGD) in both parts.
        alignments: cosines of W₊ and W₋ in the first part.
        draws: models drawn for each setting and seed.
        longest: most tokens of a response in the second part.
        alike: largest a of the second part.
        certain: largest c of the second part.
        beta: of DPO.
        steps: of the runs.
    """

    name: ClassVar[str] = "unconstrained"
    zero: ClassVar[tuple[str, ...]] = ("alike", "certain")
    vocabulary: int = 24
    width: int = 12
    rows: tuple[float, float] = (2.0, 1.0)
    states: tuple[float, float] = (0.5, 3.0)
    learning_rates: tuple[float, float] = (0.5, 0.05)
    alignments: tuple[float, ...] = (-0.5, 0.0, 0.5, 0.8, 0.95)
    draws: int = 96
    longest: int = 8
    alike: float = 0.8
    certain: float = 2.0
    beta: float = 0.1
    steps: int = 30

    def __post_init__(self) -> None:
        """Refuse knobs that leave nothing to measure."""
        super().__post_init__()
        if min(self.draws, self.steps) < 1 or self.width < 2 or self.longest < 2:
            raise ValueError(
                "unconstrained: draws and steps must be at least 1, width and longest at least 2"
            )
        if self.vocabulary < 2 * self.longest + 1:
            raise ValueError(
                f"unconstrained: vocabulary must be at least {2 * self.longest + 1}, 2 longest + 1"
            )
        for name in ("rows", "states", "learning_rates"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) <= 0:
                raise ValueError(
                    f"unconstrained: {name} takes two positive numbers, got {getattr(self, name)}"
                )
        if not self.alignments or max(map(abs, self.alignments)) > 1:
            raise ValueError(f"unconstrained: alignments are cosines, got {self.alignments}")
        if not 0 <= self.alike <= 1 or self.certain < 0 or self.beta <= 0:
            raise ValueError(
                "unconstrained: alike lies in [0, 1], certain is not negative, beta positive"
            )

    def pairs(self, seed: int, shared: bool = True) -> list[Pair]:
        """The longest pair of the second part, with distinct tokens except for shared ones.

        Seeds draw models and lengths.
        """
        chosen = list(range(1, self.longest + 1))
        rejected = [y if shared and k % 2 else y + self.longest for k, y in enumerate(chosen)]
        return [Pair([0], chosen, rejected)]

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """One-token pairs against closed forms, longer ones against similarities; in float64."""
        with jax.enable_x64(True):
            single = self._single(seeds)
            longer = self._longer(seeds)
        claims = (*_single_claims(single), *_longer_claims(longer))
        return Findings(self.name, vars(self), tuple(seeds), (single, longer), claims)

    def single(self, seed: int, alignment: float) -> Theta:
        """Models with ⟨W₊, W₋⟩ = alignment ‖W₊‖ ‖W₋‖ for tokens 0 and 1, on a leading axis."""
        random = np.random.default_rng([seed, 1])
        w, h = (_normal(random, self.draws, n, self.width) for n in (self.vocabulary, 1))
        plus, minus = w[:, 0] / _norm(w[:, 0]), w[:, 1]
        across = minus - (minus * plus).sum(-1, keepdims=True) * plus
        w[:, 1] = _norm(minus) * (
            alignment * plus + np.sqrt(1 - alignment**2) * across / _norm(across)
        )
        return _theta(self.states[0] * h / _norm(h), self.rows[0] * w)

    def _single(self, seeds: Sequence[int]) -> Table:
        keys, n = [(a, seed) for a in self.alignments for seed in seeds], self.draws
        thetas = jax.tree.map(
            lambda *x: np.concatenate(x), *[self.single(seed, a) for a, seed in keys]
        )
        slope, run = (
            recipe_for(DPO(self.beta), "sgd", *x)
            for x in ((SMALL, 1), (self.learning_rates[0], self.steps))
        )
        found = spread(_single_tokens(slope, run), thetas, at_once=len(keys) * n)
        rows = []
        for i, (alignment, seed) in enumerate(keys):
            x = {name: values[i * n : (i + 1) * n] for name, values in found.items()}
            rate, slope, change, score = (
                x["rate"],
                x["slope"] / (SMALL * self.beta / 2),
                x["run"],
                x["score"][:, 2:],
            )
            orders = [spearman(*pair) for pair in zip(score, change[:, 2:], strict=True)]
            rows.append({
                "alignment": alignment, "seed": seed, "closed form": rate.mean(), "measured": slope.mean(),
                "worst error": (np.abs(slope - rate) / np.maximum(np.abs(rate), 0.01)).max(),
                "sign right": (np.sign(slope) == np.sign(rate)).mean(), "falls": (slope < 0).mean(),
                "falls, W alone": (x["frozen"] < 0).mean(), "falls in the run": (change[:, 0] < 0).mean(),
                "Δ chosen": change[:, 0].mean(), "order": np.mean(orders),
                "top agrees": (score.argmax(-1) == change[:, 2:].argmax(-1)).mean(),
            })  # fmt: skip
        return Table.of("single", (
            "One-token pairs. d/dt log π(y⁺) per unit of c (nats per unit of time) by the closed "
            "form and by one DPO "
            f"step of {SMALL:g}, worst relative error; share of models whose chosen token falls at "
            "once, with "
            f"features frozen (the null: none can), and after {self.steps} steps (Δ in nats). Of "
            "tokens outside the "
            "pair: rank correlation of ⟨W_z, W₊ - W₋⟩ at the start with Δ log π(z) of that run, "
            "and how often the "
            "top one agrees (chance: 1 in V - 2)."
        ), ("alignment",), rows)  # fmt: skip

    def longer(
        self, seed: int, kind: str, equal_norms: bool
    ) -> tuple[ContextApply, Theta, np.ndarray]:
        """Models for one of the :data:`RESPONSES`, with response lengths, on a leading axis."""
        random, n = np.random.default_rng([seed, 2]), self.draws
        contexts, targets, side = _contexts(self.pairs(seed, shared=kind.endswith("shared"))[0])
        w, common, own = (
            _normal(random, n, m, self.width) for m in (self.vocabulary, 1, len(contexts))
        )
        a, c = (top * random.random((n, 2))[:, side, None] for top in (self.alike, self.certain))
        h = np.sqrt(a) * common + np.sqrt(1 - a) * own + c * w[:, targets]
        size = np.exp(0 if equal_norms else random.normal(size=(n, len(contexts), 1)) / 2)
        lengths = random.integers(1, self.longest + 1, (n, 2))
        if not kind.startswith("any"):
            lengths[:] = 1 if kind == "one token" else self.longest
        if kind.endswith("one error"):
            w[:, 0] *= 3
            h = h + 3 * w[:, :1]
        return (
            ContextApply(contexts),
            _theta(self.states[1] * size * h / _norm(h), self.rows[1] * w),
            lengths,
        )

    def _longer(self, seeds: Sequence[int]) -> Table:
        rows, n, recipe = (
            [],
            self.draws,
            recipe_for(DPO(self.beta), "sgd", self.learning_rates[1], self.steps),
        )
        for kind, norms in itertools.product(RESPONSES, ("equal", "varied")):
            drawn = [self.longer(seed, kind, norms == "equal") for seed in seeds]
            thetas, lengths = (
                jax.tree.map(lambda *x: np.concatenate(x), *[d[k] for d in drawn]) for k in (1, 2)
            )
            pair = self.pairs(0, shared=kind.endswith("shared"))[0]
            found = spread(
                _measuring(drawn[0][0], recipe, pair), thetas, lengths, at_once=len(seeds) * n
            )
            for i, seed in enumerate(seeds):
                x = {name: values[i * n : (i + 1) * n] for name, values in found.items()}
                ranks = {name: spearman(x[name], -x["change"]) for name in SCORES}
                change = {"falls": (x["change"] < 0).mean(), "Δ chosen": x["change"].mean()}
                ranks["largest CHES"] = np.abs(x["CHES"]).max()
                rows.append(
                    {"responses": kind, "state norms": norms, "seed": seed, **ranks, **change}
                )
        return Table.of("longer", (
            f"Pairs trained alone for {self.steps} DPO steps: rank correlation, within a seed, of "
            "each score at the "
            "start with -Δ log π(y⁺) (1 is perfect; nan: the score is one number for all pairs, as "
            "CHES is for "
            "single tokens); 'length' is -|y⁺|. Different tokens have α near 0, not 1 as CHES has "
            "it, but for 'one "
            "error'. 'long', with no token in common, is the null. Share that falls; Δ in nats."
        ), ("responses", "state norms"), rows)  # fmt: skip


SMALL = 1e-4
"""Learning rate of the one step that measures a slope."""


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Vectors of norm 1, on average."""
    return random.normal(size=shape) / np.sqrt(shape[-1])


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def _theta(features: np.ndarray, unembedding: np.ndarray) -> Theta:
    return {"features": {"table": features}, "unembedding": {"table": unembedding}}


def _contexts(pair: Pair) -> tuple[tuple[tuple[int, ...], ...], np.ndarray, np.ndarray]:
    """Contexts that predict tokens (the prompt first), the token after each, and its response."""
    found = [(tuple(pair.prompt), pair.chosen[0], 0)]
    for side, y in enumerate((pair.chosen, pair.rejected)):
        found += [((*pair.prompt, *y[:k]), y[k], side) for k in range(1, len(y))]
    contexts, targets, sides = zip(*found, strict=True)
    return contexts, np.array(targets), np.array(sides)


@functools.lru_cache
def _single_tokens(slope: Recipe, run: Recipe) -> Any:
    """Closed forms for the token pair 0 ≻ 1, and Δ log π of all tokens (token 0 for the slope)."""
    apply, pair = ContextApply(((0,),)), Pair([0], [0], [1])

    def logp(theta: Theta) -> Array:
        return jax.nn.log_softmax(theta["unembedding"]["table"] @ theta["features"]["table"][0])

    def measure(theta: Theta) -> dict[str, Array]:
        w, h, tokens = (
            theta["unembedding"]["table"],
            theta["features"]["table"][0],
            (jnp.array(0), jnp.array(1)),
        )
        rate, before, batch = (
            unconstrained.single_token_rate(w, h, *tokens),
            logp(theta),
            padded([pair]),
        )
        small, long = (
            logp(trained(apply, recipe, theta, batch)) - before for recipe in (slope, run)
        )
        score = unconstrained.mass_direction(w, *tokens)
        return {
            "rate": rate.total,
            "frozen": rate.state,
            "score": score,
            "slope": small[0],
            "run": long,
        }

    return measure


@functools.lru_cache
def _measuring(apply: Apply, recipe: Recipe, pair: Pair) -> Any:
    """A run on a pair cut to two lengths, and the scores before it."""

    def run(theta: Theta, lengths: Array) -> dict[str, Array]:
        whole = padded([pair])
        batch = replace(
            whole, valid=jnp.arange(whole.valid.shape[-1])[None, None] < lengths[None, :, None]
        )
        before, after = (
            responses(apply, x, batch) for x in (theta, trained(apply, recipe, theta, batch))
        )
        kernel = unconstrained.unconstrained_kernel(theta["unembedding"]["table"], before, batch)
        scores = {"CHES": ches(before, batch), "ln-CHES": ln_ches(before, batch), "head gap": head_gap(before, batch),
                  "full gap": kernel.gap, "length": -batch.lengths[:, 0].astype(kernel.gap.dtype),
                  "change": (after.logp - before.logp)[:, 0]}  # fmt: skip
        return {name: x[0] for name, x in scores.items()}

    return run


def _single_claims(table: Table) -> tuple[Claim, ...]:
    rows = [table.where(alignment=a) for a in np.unique(table["alignment"])]
    falls, order, top = (
        np.array([x[k].mean() for x in rows]) for k in ("falls", "order", "top agrees")
    )
    return (
        Claim("the closed form is the measured slope, within 1 %, and has its sign (99 %)",
              bool((table["worst error"] < 0.01).all() and (table["sign right"] >= 0.99).all()),
              f"worst {table['worst error'].max():.1e}"),
        Claim("the more W₊ and W₋ are aligned, the more models lose the chosen token",
              bool((np.diff(falls) >= 0).all() and falls[-1] > falls[0]), listing(falls)),
        Claim("null: with frozen features no chosen token falls", bool((table["falls, W alone"] == 0).all()),
              f"most {table['falls, W alone'].max():.2f}"),
        Claim("outside the pair tokens gain in the order of ⟨W_z, W₊ - W₋⟩, over a run and at every alignment (ρ > .9)",
              bool((order > 0.9).all()), f"ρ {listing(order)}"),
        Claim("its top token is the top gainer in 90 % of the models", bool((top > 0.9).all()), listing(top)),
    )  # fmt: skip


def _longer_claims(table: Table) -> tuple[Claim, ...]:
    many = [x for x in table.settings() if x["responses"] != "one token"]
    mean = {score: np.array([table.where(**x)[score].mean() for x in many]) for score in SCORES}
    ches, ln, head, full, length = (f"{score} {listing(values)}" for score, values in mean.items())
    varied = np.array([x["responses"].startswith("any") for x in many])
    equal, free = (
        table.where(responses="long, one error", **{"state norms": x})["CHES"]
        for x in ("equal", "varied")
    )
    single = table.where(responses="one token")
    return (
        Claim("CHES is 0 for single tokens: no rank information", bool((single["largest CHES"] < 1e-9).all()),
              f"ρ of the full gap {single['full gap'].mean():.2f}"),
        Claim("CHES orders longer pairs by how far the chosen falls (ρ > .3) in every setting",
              bool((mean["CHES"] > 0.3).all()), ches),
        Claim("CHES orders them well (ρ > .8) where all errors agree (α about 1), with states of varied norm",
              bool((free > 0.8).all()), listing(free)),
        Claim("also with states that start at one norm", bool((equal > 0.8).all()), listing(equal)),
        Claim("CHES orders better than the length alone where lengths vary",
              bool((mean["CHES"] > mean["length"])[varied].all()), f"{ches}; {length}"),
        Claim("ln-CHES orders where lengths vary (ρ > .3)", bool((mean["ln-CHES"] > 0.3)[varied].all()), ln),
        Claim("the exact head gap beats CHES in every setting", bool((mean["head gap"] > mean["CHES"]).all()),
              f"{head}; {ches}"),
        Claim("the full gap orders well (ρ > .9) in every setting", bool((mean["full gap"] > 0.9).all()), full),
    )  # fmt: skip
