"""``suffix`` measured: the longer the shared ending, the more the chosen response falls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import Apply
from simgrad.pairs import Batch, padded
from simgrad.theory import displacement, optimizer_step, pair_kernel, responses
from simgrad.typing import Array, Theta
from simgrad.worlds.suffix import Suffix
from simgrad.worlds.tuning import each_seed, stacked, trained
from simgrad.worlds.world import pretrained

_SGD = optax.sgd(1.0)

_MEASURED = ("cosine", "Δ chosen", "Δ rejected", "Δ word", "falls", "both fall")

_PREDICTED = ("own, SGD", "own, Adam", "batch, SGD", "batch, Adam", "own right", "batch right")


def run(world: Suffix, seeds: Sequence[int]) -> Findings:
    """Cosine, predicted and measured changes for each length of the shared ending."""
    apply, thetas = pretrained(world, seeds)
    longest = 4 + 1 + max(world.lengths)
    batches = [
        padded(world.pairs(seed, n), longest, 1 + max(world.lengths))
        for seed in seeds
        for n in world.lengths
    ]
    copies = each_seed(thetas, len(world.lengths))
    found = spread(_measuring(apply, world.recipe()), copies, stacked(batches))
    keys = [(seed, n) for seed in seeds for n in world.lengths]
    rows = [
        _row(n, seed, jax.tree.map(lambda x, i=i: x[i], found)) for i, (seed, n) in enumerate(keys)
    ]
    rows.sort(key=lambda row: row["L"])
    measured = Table.of(
        "lengths",
        "Mean cosine of g_w and g_l before the run; measured Δlog π after it (nats) of chosen, "
        "rejected and the chosen's sentiment word alone; shares of pairs whose chosen response "
        "falls, and where both fall.",
        ("L",),
        [{k: row[k] for k in ("L", "seed", *_MEASURED)} for row in rows],
    )
    predicted = Table.of(
        "predictions",
        "Share of pairs whose chosen response falls, as measured and as four kernels say before "
        "training: the pair's own and the whole batch's, for SGD and for the sign-like first step "
        "of Adam (the run's optimizer); then the share of pairs whose rise or fall the own (SGD) "
        "and the batch kernel (Adam) call right.",
        ("L",),
        [{k: row[k] for k in ("L", "seed", "falls", *_PREDICTED)} for row in rows],
    )
    return Findings(
        world.name,
        vars(world),
        tuple(seeds),
        (measured, predicted),
        _claims(measured, predicted, world.lengths),
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
        Claim.of(
            "the cosine grows with the shared ending",
            np.diff(cosine) > 0 if several else None,
            cosine,
        ),
        Claim.of(
            "the chosen falls further the longer the ending",
            np.diff(change) < 0 if several else None,
            change,
        ),
        Claim.of("the sentiment word itself rises at every length", word > 0, word),
        Claim.of(
            "what falls is the shared ending", ending[there] < 0 if shared else None, ending[there]
        ),
        Claim.of(
            "with a shared ending the batch's kernel calls more falls right than the pair's own, "
            "at every length",
            (batch > own)[there] if shared else None,
            f"batch {listing(batch)}; own {listing(own)}",
        ),
    )
