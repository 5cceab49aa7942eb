"""``unconstrained`` measured: free features let the chosen response fall (arXiv 2410.08847)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from simgrad.worlds.tuning import cut, joined, recipe_for, trained
from simgrad.worlds.unconstrained import RESPONSES, Unconstrained

SCORES = ("CHES", "ln-CHES", "head gap", "full gap", "length")

SMALL = 1e-4
"""Learning rate of the one step that measures a slope."""


def run(world: Unconstrained, seeds: Sequence[int]) -> Findings:
    """One-token pairs against closed forms, longer pairs against scores of similarity (float64)."""
    with jax.enable_x64(True):
        single = _single(world, seeds)
        longer = _longer(world, seeds)
    claims = (*_single_claims(single), *_longer_claims(longer))
    return Findings.of(world, seeds, (single, longer), claims)


def _single(world: Unconstrained, seeds: Sequence[int]) -> Table:
    keys = [(a, seed) for a in world.alignments for seed in seeds]
    thetas = joined([world.single(seed, a) for a, seed in keys])
    slope, run = (
        recipe_for(DPO(world.beta), "sgd", *x)
        for x in ((SMALL, 1), (world.learning_rates[0], world.steps))
    )
    found = spread(_single_tokens(slope, run), thetas, at_once=len(keys) * world.draws)
    rows = []
    for (alignment, seed), x in zip(keys, cut(found, len(keys)), strict=True):
        rate, slope, change = x["rate"], x["slope"] / (SMALL * world.beta / 2), x["run"]
        score, others = x["score"][:, 2:], change[:, 2:]
        orders = [spearman(*pair) for pair in zip(score, others, strict=True)]
        rows.append(
            {
                "alignment": alignment,
                "seed": seed,
                "closed form": rate.mean(),
                "measured": slope.mean(),
                "worst error": (np.abs(slope - rate) / np.maximum(np.abs(rate), 0.01)).max(),
                "sign right": (np.sign(slope) == np.sign(rate)).mean(),
                "falls": (slope < 0).mean(),
                "falls, W alone": (x["frozen"] < 0).mean(),
                "falls in the run": (change[:, 0] < 0).mean(),
                "Δ chosen": change[:, 0].mean(),
                "order": np.mean(orders),
                "top agrees": (score.argmax(-1) == others.argmax(-1)).mean(),
            }
        )
    return Table.of(
        "single",
        "One-token pairs. d/dt log π(y⁺) per unit of c (nats per unit of time) by the closed form "
        f"and by one DPO step of {SMALL:g}, worst relative error; share of models whose chosen "
        f"token falls at once, with features frozen (the null: none can), and after {world.steps} "
        "steps (Δ in nats). Of tokens outside the pair: rank correlation of ⟨W_z, W₊ - W₋⟩ at the "
        "start with Δ log π(z) of that run, and how often the top one agrees (chance: 1 in V - 2).",
        ("alignment",),
        rows,
    )


def _longer(world: Unconstrained, seeds: Sequence[int]) -> Table:
    recipe = recipe_for(DPO(world.beta), "sgd", world.learning_rates[1], world.steps)
    rows, total = [], len(seeds) * world.draws
    for kind, norms in itertools.product(RESPONSES, ("equal", "varied")):
        drawn = [world.longer(seed, kind, norms == "equal") for seed in seeds]
        (apply, *_), (pair,) = drawn[0], world.pairs(0, shared=kind.endswith("shared"))
        thetas, lengths = joined([tuple(x) for _, *x in drawn])
        found = spread(_measuring(apply, recipe, pair), thetas, lengths, at_once=total)
        for seed, x in zip(seeds, cut(found, len(seeds)), strict=True):
            change = x["change"]
            rows.append(
                {
                    "responses": kind,
                    "state norms": norms,
                    "seed": seed,
                    **{name: spearman(x[name], -change) for name in SCORES},
                    "largest CHES": np.abs(x["CHES"]).max(),
                    "falls": (change < 0).mean(),
                    "Δ chosen": change.mean(),
                }
            )
    return Table.of(
        "longer",
        f"Pairs trained alone for {world.steps} DPO steps: rank correlation, within a seed, of "
        "each score at the start with -Δ log π(y⁺) (1 is perfect; nan: the score is one number "
        "for all pairs, as CHES is for single tokens); 'length' is -|y⁺|. Different tokens "
        "have α near 0, not 1 as CHES has it, but for 'one error'. 'long', with no token in "
        "common, is the null. Share that falls; Δ in nats.",
        ("responses", "state norms"),
        rows,
    )


@functools.lru_cache
def _single_tokens(slope: Recipe, run: Recipe) -> Any:
    """Closed forms for the tokens 0 ≻ 1, and Δ log π of all tokens (of token 0 for the slope)."""
    apply, pair = ContextApply(((0,),)), Pair([0], [0], [1])

    def logp(theta: Theta) -> Array:
        return jax.nn.log_softmax(theta["unembedding"]["table"] @ theta["features"]["table"][0])

    def measure(theta: Theta) -> dict[str, Array]:
        w, h = theta["unembedding"]["table"], theta["features"]["table"][0]
        tokens, batch = (jnp.array(0), jnp.array(1)), padded([pair])
        rate = unconstrained.single_token_rate(w, h, *tokens)
        small, long = (
            logp(trained(apply, recipe, theta, batch)) - logp(theta) for recipe in (slope, run)
        )
        return {
            "rate": rate.total,
            "frozen": rate.state,
            "score": unconstrained.mass_direction(w, *tokens),
            "slope": small[0],
            "run": long,
        }

    return measure


@functools.lru_cache
def _measuring(apply: Apply, recipe: Recipe, pair: Pair) -> Any:
    """A run on a pair cut to two lengths, and the scores before it."""

    def run(theta: Theta, lengths: Array) -> dict[str, Array]:
        whole = padded([pair])
        there = jnp.arange(whole.valid.shape[-1])[None, None] < lengths[None, :, None]
        batch = replace(whole, valid=there)
        before, after = (
            responses(apply, x, batch) for x in (theta, trained(apply, recipe, theta, batch))
        )
        kernel = unconstrained.unconstrained_kernel(theta["unembedding"]["table"], before, batch)
        scores = {
            "CHES": ches(before, batch),
            "ln-CHES": ln_ches(before, batch),
            "head gap": head_gap(before, batch),
            "full gap": kernel.gap,
            "length": -batch.lengths[:, 0].astype(kernel.gap.dtype),
            "change": (after.logp - before.logp)[:, 0],
        }
        return {name: x[0] for name, x in scores.items()}

    return run


def _single_claims(table: Table) -> tuple[Claim, ...]:
    alignments = np.unique(table["alignment"])
    falls, order, top = (
        table.across(name, "alignment", alignments).mean(0)
        for name in ("falls", "order", "top agrees")
    )
    return (
        Claim.of(
            "the closed form is the measured slope, within 1 %, and has its sign (99 %)",
            (table["worst error"] < 0.01) & (table["sign right"] >= 0.99),
            f"worst {table['worst error'].max():.1e}",
        ),
        Claim.of(
            "the more W₊ and W₋ are aligned, the more models lose the chosen token",
            (np.diff(falls) >= 0) & (falls[-1] > falls[0]),
            falls,
        ),
        Claim.of(
            "null: with frozen features no chosen token falls",
            table["falls, W alone"] == 0,
            f"most {table['falls, W alone'].max():.2f}",
        ),
        Claim.of(
            "outside the pair tokens gain in the order of ⟨W_z, W₊ - W₋⟩, over a run and at every "
            "alignment (ρ > .9)",
            order > 0.9,
            f"ρ {listing(order)}",
        ),
        Claim.of("its top token is the top gainer in 90 % of the models", top > 0.9, top),
    )


def _longer_claims(table: Table) -> tuple[Claim, ...]:
    many = [x for x in table.settings() if x["responses"] != "one token"]
    mean = {score: np.array([table.where(**x)[score].mean() for x in many]) for score in SCORES}
    ches, ln, head, full, length = (f"{score} {listing(values)}" for score, values in mean.items())
    varied = np.array([x["responses"].startswith("any") for x in many])
    norms = ("equal", "varied")
    equal, free = table.across("CHES", "state norms", norms, responses="long, one error").T
    single = table.where(responses="one token")
    return (
        Claim.of(
            "CHES is 0 for single tokens: no rank information",
            single["largest CHES"] < 1e-09,
            f"ρ of the full gap {single['full gap'].mean():.2f}",
        ),
        Claim.of(
            "CHES orders longer pairs by how far the chosen falls (ρ > .3) in every setting",
            mean["CHES"] > 0.3,
            ches,
        ),
        Claim.of(
            "CHES orders them well (ρ > .8) where all errors agree (α about 1), with states of "
            "varied norm",
            free > 0.8,
            free,
        ),
        Claim.of("also with states that start at one norm", equal > 0.8, equal),
        Claim.of(
            "CHES orders better than the length alone where lengths vary",
            (mean["CHES"] > mean["length"])[varied],
            f"{ches}; {length}",
        ),
        Claim.of("ln-CHES orders where lengths vary (ρ > .3)", (mean["ln-CHES"] > 0.3)[varied], ln),
        Claim.of(
            "the exact head gap beats CHES in every setting",
            mean["head gap"] > mean["CHES"],
            f"{head}; {ches}",
        ),
        Claim.of(
            "the full gap orders well (ρ > .9) in every setting", mean["full gap"] > 0.9, full
        ),
    )
