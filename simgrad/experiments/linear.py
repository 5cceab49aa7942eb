"""``linear`` measured: single tokens rise, shared endings drag down (arXiv 2410.13828)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.linearized import kernel_flow
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import Apply, ContextApply
from simgrad.pairs import Pair, padded
from simgrad.theory import head_kernel, responses
from simgrad.theory.closed_forms import linear_softmax
from simgrad.theory.groups import Group, group_kernel
from simgrad.typing import Array, Theta
from simgrad.worlds.linear import FROZEN, Linear
from simgrad.worlds.tuning import each_seed, stacked, trained

ASSUMPTIONS = ("all hold", "another pair opposes", "features learn")


def run(world: Linear, seeds: Sequence[int]) -> Findings:
    """Single tokens under three assumptions; prefixes, suffixes, alone and together (float64)."""
    with jax.enable_x64(True):
        single, shared = _single(world, seeds), _shared(world, seeds)
    claims = (*_single_claims(single), *_shared_claims(shared))
    return Findings.of(world, seeds, (single, shared), claims)


def _single(world: Linear, seeds: Sequence[int]) -> Table:
    pairs, n = (Pair([0], [0], [1]), Pair([1], [1], [0])), world.draws
    rows = []
    for assumption, data, trains in zip(
        ASSUMPTIONS, (pairs[:1], pairs, pairs[:1]), (FROZEN, FROZEN, ()), strict=True
    ):
        index = np.tile(np.arange(len(data)), (n, 1))
        run = _measuring(ContextApply(((0,), (1,)), trains), world.recipe(len(data)), data)
        for seed in seeds:
            random = np.random.default_rng([seed, 3])
            h, w = random.normal(size=(n, 2, 4)) / 2, random.normal(size=(n, 16, 4))
            h[:, 1] = world.correlation * h[:, 0] + np.sqrt(1 - world.correlation**2) * h[:, 1]
            thetas = {"features": {"table": h}, "unembedding": {"table": w}}
            found = spread(run, thetas, index, at_once=n)
            margin, change = found["rise"][:, 0], found["change"][:, 0]
            rows.append(
                {
                    "assumptions": assumption,
                    "seed": seed,
                    "least margin": margin.min(),
                    "error": np.abs(margin + found["gap"][:, 0]).max(),
                    "falls": (change[:, 0] < 0).mean(),
                    "least Δ chosen": change[:, 0].min(),
                    "Δ chosen": change[:, 0].mean(),
                    "Δ rejected": change[:, 1].mean(),
                }
            )
    return Table.of(
        "single",
        "One-token responses, random models: least exact margin ‖h‖² (1 - π_w + π_l) and its "
        "largest difference from ‖g_w‖² - ⟨g_w,g_l⟩ over W; share of chosen tokens that fall "
        "in a run, least and mean Δ log π (nats). With one pair and frozen features (the null) "
        "none can fall; the other rows drop one of these assumptions each.",
        ("assumptions",),
        rows,
    )


def _shared(world: Linear, seeds: Sequence[int]) -> Table:
    rows, n = [], world.n_pairs
    settings = [(0, k) for k in world.suffixes] + [(world.prefix, 0)]
    for (prefix, suffix), features in itertools.product(settings, ("correlated", "orthogonal")):
        policies = [world.policy(seed, prefix, suffix, features == "correlated") for seed in seeds]
        apply, pairs = policies[0][0], tuple(world.pairs(0, prefix, suffix))
        thetas = stacked([theta for _, theta in policies])
        index, total = np.tile(np.arange(n), (len(seeds), 1)), n * len(seeds)
        inputs = {
            "alone": (each_seed(thetas, n), index.reshape(-1, 1)),
            "together": (thetas, index),
        }
        found = {}
        for name, some in inputs.items():
            run = _measuring(apply, world.recipe(some[1].shape[1]), pairs)
            result = spread(run, *some, at_once=total)
            found[name] = {k: x.reshape(len(seeds), n, *x.shape[2:]) for k, x in result.items()}
        for name, (i, seed) in itertools.product(found, enumerate(seeds)):
            setting = {"features": features, "prefix": prefix, "suffix": suffix, "trained": name}
            run = {k: x[i] for k, x in found[name].items()}
            rows.append({**setting, "seed": seed, **_row(run, found["alone"]["first"][i])})
    return Table.of(
        "shared",
        "Mean cosine and gap ⟨g_w,g_l⟩ - ‖g_w‖²; Δ log π after the run (nats), of whole responses "
        "and of the sentiment token; shares of chosen and of both that fall; share of pairs whose "
        "chosen's direction the pair's own kernel, and the kernel of all trained pairs, get right "
        "to first order; R² and largest error (nats) of kernel flow, share of responses that end "
        "below it, R² of the first step times their number. Suffix 0, 1, 5 are 1t, short-suffix, "
        "long-suffix. Orthogonal features are the null: no suffix token pulls on another.",
        ("features", "prefix", "suffix", "trained"),
        rows,
    )


@functools.lru_cache
def _measuring(apply: Apply, recipe: Recipe, pairs: tuple[Pair, ...]) -> Any:
    """A run on some of the pairs, and what was known before it."""

    def run(theta: Theta, index: Array) -> dict[str, Array]:
        batch = padded(pairs).take(index)
        before, after = (
            responses(apply, t, batch) for t in (theta, trained(apply, recipe, theta, batch))
        )
        parts = (before.hidden, before.logits, batch.targets, batch.valid)
        group = Group(*(x.reshape(-1, *x.shape[2:]) for x in parts))
        flow = kernel_flow(
            group_kernel(group),
            before.logp,
            batch.lengths,
            recipe.objective,
            recipe.optimizer,
            recipe.steps,
        )
        own, (w, l) = head_kernel(before, batch), jnp.moveaxis(batch.targets, 1, 0)  # noqa: E741
        state, logits = before.hidden[:, 0, 0], before.logits[:, 0, 0]
        return {
            "rise": linear_softmax.single_token_rise(state, logits, w[:, 0], l[:, 0]),
            "cosine": own.cosine,
            "gap": own.gap,
            "change": after.logp - before.logp,
            "token": jnp.where(w != l, (after.token_logp - before.token_logp)[:, 0], 0.0).sum(-1),
            "flow": flow.logp[-1] - before.logp,
            "first": (flow.logp[1] - before.logp) * recipe.steps,
        }

    return run


def _row(found: dict[str, np.ndarray], own: np.ndarray) -> dict[str, float]:
    change, flow, first = found["change"], found["flow"], found["first"]
    if not np.isfinite(change).all():
        raise FloatingPointError(
            "a run did not stay finite: lower the learning rate, the steps or the jitter"
        )
    total = np.square(change - change.mean()).sum()
    return {
        "cosine": found["cosine"].mean(),
        "gap": found["gap"].mean(),
        "Δ chosen": change[:, 0].mean(),
        "Δ rejected": change[:, 1].mean(),
        "Δ sentiment": found["token"].mean(),
        "falls": (change[:, 0] < 0).mean(),
        "both fall": (change < 0).all(-1).mean(),
        "own right": ((own[:, 0] < 0) == (change[:, 0] < 0)).mean(),
        "kernel right": ((first[:, 0] < 0) == (change[:, 0] < 0)).mean(),
        "flow R²": 1 - np.square(flow - change).sum() / total,
        "flow error": np.abs(flow - change).max(),
        "below flow": (change < flow).mean(),
        "first-order R²": 1 - np.square(first - change).sum() / total,
    }


def _single_claims(table: Table) -> tuple[Claim, ...]:
    hold, opposed, learn = (table.where(assumptions=a) for a in ASSUMPTIONS)
    return (
        Claim.of(
            "a single chosen token never falls, and its margin is exact (1e-9)",
            (hold["falls"] == 0) & (hold["least margin"] >= 0) & (hold["error"] < 1e-9),
            f"least Δ {hold['least Δ chosen'].min():.3f}, error {hold['error'].max():.0e}",
        ),
        Claim.of(
            "it can once another pair is trained too, or features learn",
            min(opposed["falls"].max(), learn["falls"].max()) > 0,
            f"{opposed['falls'].mean():.3f} and {learn['falls'].mean():.3f} of them",
        ),
    )


def _shared_claims(table: Table) -> tuple[Claim, ...]:
    lengths, prefix = np.unique(table["suffix"]), table["prefix"].max()

    def means(trained: str, *columns: str) -> list[np.ndarray]:
        setting = {"features": "correlated", "prefix": 0, "trained": trained}
        return [table.across(c, "suffix", lengths, **setting).mean(0) for c in columns]

    null = table.where(features="orthogonal")["falls"]
    cosine, alone, right, token_alone = means(
        "alone", "cosine", "Δ chosen", "own right", "Δ sentiment"
    )
    together, own, kernel, token_together = means(
        "together", "Δ chosen", "own right", "kernel right", "Δ sentiment"
    )
    token = np.minimum(token_alone, token_together)
    flow, first = table["flow R²"], table["first-order R²"]
    without, with_prefix = (table.where(prefix=p, suffix=0, trained="alone") for p in (0, prefix))
    moved = np.abs(with_prefix["gap"] - without["gap"]).max()
    return (
        Claim.of("the cosine grows with the suffix", np.diff(cosine) > 0, cosine),
        Claim.of(
            "trained together, the chosen ends lower the longer the suffix",
            (np.diff(together) < 0) & (together[-1] < 0),
            together,
        ),
        Claim.of("trained alone too", (np.diff(alone) < 0) & (alone[-1] < 0), alone),
        Claim.of("the sentiment token itself rises at every length", token > 0, token),
        Claim.of(
            "null: with orthogonal features no chosen falls", null == 0, f"most {null.max():.2f}"
        ),
        Claim.of(
            "a prefix raises the cosine and leaves the gap as it is (1e-9)",
            (with_prefix["cosine"] > without["cosine"]) & (moved < 1e-9),
            f"cosine {without['cosine'].mean():.2f} to {with_prefix['cosine'].mean():.2f}, gap "
            f"moved by {moved:.0e}",
        ),
        Claim.of(
            "the pair's own kernel tells who falls when it is trained alone (95 %)",
            right >= 0.95,
            right,
        ),
        Claim.of(
            "together the kernel of all pairs does (95 %), the own one does not",
            (kernel >= 0.95) & (own < 0.95).any(),
            f"all {listing(kernel)}; own {listing(own)}",
        ),
        Claim.of(
            "kernel flow predicts the run in every setting (R² > .95)",
            flow > 0.95,
            f"least {flow.min():.2f}, mean {flow.mean():.2f}, largest error "
            f"{table['flow error'].max():.2f} nats",
        ),
        Claim.of(
            "kernel flow is closer than the first step extended",
            (flow > first).mean() > 0.5,
            f"in {(flow > first).mean():.2f} of the rows, mean R² {flow.mean():.2f} and "
            f"{first.mean():.2f}",
        ),
        Claim.of(
            "log π is concave in W: runs end below kernel flow (90 % of responses)",
            table["below flow"].mean() > 0.9,
            f"{table['below flow'].mean():.2f}",
        ),
    )
