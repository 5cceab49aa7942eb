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
from simgrad.worlds.tuning import cut, each_seed, stacked, trained
from simgrad.worlds.world import pretrained

_SGD = optax.sgd(1.0)

KERNELS = ("own, SGD", "own, Adam", "batch, SGD", "batch, Adam")


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
    keys = [{"L": n, "seed": seed} for seed in seeds for n in world.lengths]
    each = sorted(zip(keys, cut(found, len(keys)), strict=True), key=lambda run: run[0]["L"])
    measured = Table.of(
        "lengths",
        "Mean cosine of g_w and g_l before the run; measured Δlog π after it (nats) of chosen, "
        "rejected and the chosen's sentiment word alone; shares of pairs whose chosen response "
        "falls, and where both fall.",
        ("L",),
        [key | _measured(run) for key, run in each],
    )
    predicted = Table.of(
        "predictions",
        "Share of pairs whose chosen response falls, as measured and as four kernels say before "
        "training: the pair's own and the whole batch's, for SGD and for the sign-like first step "
        "of Adam (the run's optimizer); then the share of pairs whose rise or fall the own (SGD) "
        "and the batch kernel (Adam) call right.",
        ("L",),
        [key | _predicted(run) for key, run in each],
    )
    claims = _claims(measured, predicted, sorted(world.lengths))
    return Findings.of(world, seeds, (measured, predicted), claims)


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


def _measured(run: dict[str, np.ndarray]) -> dict[str, float]:
    tokens, change = run["change"][0], run["change"][0].sum(-1)
    found = {
        "cosine": run["cosine"],
        "Δ chosen": change[:, 0],
        "Δ rejected": change[:, 1],
        "Δ word": tokens[:, 0, 0],
        "falls": change[:, 0] < 0,
        "both fall": (change < 0).all(-1),
    }
    return {name: float(x.mean()) for name, x in found.items()}


def _predicted(run: dict[str, np.ndarray]) -> dict[str, float]:
    falls = run["change"][0].sum(-1)[:, 0] < 0
    says = {name: run[name][0, :, 0] < 0 for name in KERNELS}
    right = {"own right": says["own, SGD"] == falls, "batch right": says["batch, Adam"] == falls}
    return {name: float(x.mean()) for name, x in ({"falls": falls} | says | right).items()}


def _claims(measured: Table, predicted: Table, lengths: Sequence[int]) -> tuple[Claim, ...]:
    cosine, change, word = (
        measured.across(name, "L", lengths).mean(0) for name in ("cosine", "Δ chosen", "Δ word")
    )
    own, batch = (
        predicted.across(name, "L", lengths).mean(0) for name in ("own right", "batch right")
    )
    there = np.array(lengths) > 0
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
