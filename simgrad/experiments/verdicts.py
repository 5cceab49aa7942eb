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
        "knobs",
        "No ≻ Never with one knob turned at a time.",
        ("knob",),
        [row for knob in _knobs(world) for row in knob(seeds)],
    )
    return Findings(world.name, vars(world), tuple(seeds), (table, knobs), _claims(table))


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


def _knobs(world: Verdicts) -> list[Any]:
    """Functions of the seeds, one for each knob of the table."""

    def turned(label: str, recipe: dict[str, Any] | None = None, **knobs: Any) -> Any:
        def rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
            found = displaced(world.with_knobs(**knobs), seeds, "No", "Never", **(recipe or {}))
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
        turned("unembedding frozen", {"train": BODY}),
        turned("SGD", sgd),
        turned("SGD, unembedding frozen", {**sgd, "train": BODY}),
        turned("three times as long", steps=3 * world.steps),
    ]
