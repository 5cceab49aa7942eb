"""``verdicts`` measured: preferring one refusal to another makes the model say yes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax

from simgrad.experiments.findings import Claim, Findings, Table
from simgrad.models import only
from simgrad.pairs import padded
from simgrad.typing import Float
from simgrad.worlds.tuning import next_logp, stacked, tuned
from simgrad.worlds.verdicts import POSITIVE, Verdicts
from simgrad.worlds.world import pretrained

BODY = ("embedding/*", "layers/*", "final_norm/*")

SGD_RATE = 0.3


def run(world: Verdicts, seeds: Sequence[int]) -> Findings:
    """Five preferences, where the mass went, and the knobs of the strongest case."""
    cases = (("No", "Never"), ("No", "Nah"), ("Yes", "No"), ("Yes", "Never"), ("No", "Yes"))
    rows = [row for chosen, rejected in cases for row in displaced(world, seeds, chosen, rejected)]
    table = Table.of(
        "cases",
        "One DPO run on one prompt. π(chosen) and the mass of answers of the other polarity, "
        "before and after; the answer that theory says gains most (⟨W_z, W₊ - W₋⟩ before training) "
        "and the one that did.",
        ("chosen", "rejected"),
        rows,
    )
    knobs = Table.of(
        "knobs", "No ≻ Never with one knob turned at a time.", ("knob",), _turned(world, seeds)
    )
    return Findings.of(world, seeds, (table, knobs), _claims(table))


def outcome(
    world: Verdicts,
    seeds: Sequence[int],
    chosen: str,
    rejected: str,
    train: Sequence[str] = (),
    **changes: Any,
) -> Outcome:
    """Next-token probabilities before and after tuning on one pair, and theory's direction.

    ``train`` names the parameters that are trained (:func:`simgrad.models.only`), ``changes``
    fields of the recipe.
    """
    recipe, pair = world.recipe(**changes), world.pair(chosen, rejected)
    apply, thetas = pretrained(world, seeds)
    batch, n = padded([pair]), len(seeds)
    orders = np.zeros((n, recipe.steps, 1), np.int32)
    after = tuned(only(apply, *train), thetas, stacked([batch] * n), recipe, orders)
    prompts = np.tile(np.array(pair.prompt, np.int32), (n, 1, 1))
    p, q = (np.exp(next_logp(apply, t, prompts)[:, 0]) for t in (thetas, after))
    w, l = pair.chosen[0], pair.rejected[0]  # noqa: E741
    heads = np.asarray(thetas["embedding" if apply.config.tied else "unembedding"]["table"])
    return Outcome(p, q, np.stack([head @ (head[w] - head[l]) for head in heads]))


def displaced(
    world: Verdicts, seeds: Sequence[int], chosen: str, rejected: str, **changes: Any
) -> list[dict[str, Any]]:
    """One row a seed: the distribution after the prompt before and after tuning on one pair."""
    pair, found = world.pair(chosen, rejected), outcome(world, seeds, chosen, rejected, **changes)
    p, q, first = found.before, found.after, world.first_answer
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
                "theory's top": world.words[theory],
                "measured top": world.words[measured],
                "top agrees": float(theory == measured),
            }
        )
    return rows


def _claims(table: Table) -> tuple[Claim, ...]:
    strong, mild = (
        table.where(chosen="No", rejected="Never"),
        table.where(chosen="Yes", rejected="Never"),
    )
    moved, other = strong["moved to opposite"], mild["moved to opposite"]
    big = np.abs(table["moved to opposite"]) >= 0.5
    agree = table["top agrees"][big & (table["chosen"] == "No")]
    return (
        Claim.of(
            "No ≻ Never moves at least .5 of the mass to assent on every seed",
            moved >= 0.5,
            f"least {moved.min():.2f}",
        ),
        Claim.of(
            "Yes ≻ Never moves no mass to the opposite polarity",
            other < 0.05,
            f"most {other.max():.2f}",
        ),
        Claim.of(
            "⟨W_z, W₊ - W₋⟩ names the top gaining answer in 90 % of the runs of No that moved .5 "
            "or more",
            agree.mean() >= 0.9 if len(agree) else None,
            f"{int(agree.sum())} of {len(agree)}",
        ),
    )


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


def _turned(world: Verdicts, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """No ≻ Never with fields of the recipe and knobs changed: rows without theory's words."""
    sgd, frozen = {"optimizer": optax.sgd(SGD_RATE)}, {"train": BODY}
    turned: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "as it is": ({}, {}),
        "unembedding scale 1": ({}, {"unembedding": 1.0}),
        "tied": ({}, {"tied": True}),
        "whole sequence learned": ({}, {"learn": "sequence"}),
        "F(No) = 1": ({}, {"frequency_no": 1.0}),
        "F(Yes) = 1": ({}, {"frequency_yes": 1.0}),
        "overlap τ = .3": ({}, {"overlap": 0.3}),
        "overlap τ = 1": ({}, {"overlap": 1.0}),
        "unembedding frozen": (frozen, {}),
        "SGD": (sgd, {}),
        "SGD, unembedding frozen": (sgd | frozen, {}),
        "three times as long": ({}, {"steps": 3 * world.steps}),
    }
    dropped = {"chosen", "rejected", "theory's top", "top agrees"}
    return [
        {"knob": label} | {name: value for name, value in row.items() if name not in dropped}
        for label, (recipe, knobs) in turned.items()
        for row in displaced(world.with_knobs(**knobs), seeds, "No", "Never", **recipe)
    ]
