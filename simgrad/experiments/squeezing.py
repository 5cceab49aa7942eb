"""``squeezing`` measured: a token pushed down feeds the likeliest, wrong answers drag right."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.agreement import spearman
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table
from simgrad.models import linear_softmax
from simgrad.objectives import DPO, SFT, Objective
from simgrad.pairs import Pair, padded
from simgrad.theory.closed_forms import learning_dynamics
from simgrad.theory.groups import Group, group_advantages, gwhes, nthr
from simgrad.typing import Array, Theta
from simgrad.worlds.squeezing import Squeezing
from simgrad.worlds.tuning import cut, next_logp, recipe_for, stacked, tuned

PUSHED = ("least likely", "median", "likeliest")

FIRST = ("nothing", "chosen", "chosen, third", "chosen, rejected")

CORRECT = np.arange(8) < 4
"""Groups of eight responses, the first four correct."""

DROPPED = ("none", "highest NTHR", "lowest NTHR", "highest exact", "random")


def run(world: Squeezing, seeds: Sequence[int]) -> Findings:
    """Pushes on logits, pushes after fine-tuning, one step on groups; in float64."""
    with jax.enable_x64(True):
        squeeze, extend = _squeeze(world, seeds), _extend(world, seeds)
        drops, scores = _drops(world, seeds)
    claims = (*_squeeze_claims(squeeze), *_extend_claims(extend), *_drop_claims(drops, scores))
    return Findings.of(world, seeds, (squeeze, extend, drops, scores), claims)


def _squeeze(world: Squeezing, seeds: Sequence[int]) -> Table:
    push = jax.jit(jax.vmap(learning_dynamics.squeeze, (0, 0, None, None)), static_argnums=3)
    rows = []
    for pushed, peak, seed in itertools.product(PUSHED, world.peaks, seeds):
        z = peak * np.random.default_rng([seed, 5]).normal(size=(world.draws, world.vocabulary))
        token = z.argsort(-1, kind="stable")[:, PUSHED.index(pushed) * (world.vocabulary - 1) // 2]
        path = np.asarray(push(jnp.asarray(z), jnp.asarray(token), world.rate, world.steps))
        setting = {"pushed": pushed, "peak": peak, "seed": seed}
        rows.append(setting | _moved(path[:, 0], path[:, -1], token))
    return Table.of(
        "squeeze",
        f"{world.steps} steps z ← z - {world.rate} (e_y - π), by what y was at the start: "
        "probability of y, and of the likeliest other token before and after; how many tokens "
        "rise; the likeliest's gain over the mass y lost, and over all gains; mass that all other "
        "tokens (bystanders) lost; its lead in Δ log π over the one that falls most (nats). Peak "
        "0, a uniform start, is the null: the others rise alike, nothing is squeezed.",
        ("pushed", "peak"),
        rows,
    )


def _extend(world: Squeezing, seeds: Sequence[int]) -> Table:
    n, rate, pairs = world.prompts, world.rate, world.pairs(0)
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    third = [Pair(p.prompt, [2 * n + p.prompt[0]], p.chosen) for p in pairs]
    size = (world.vocabulary, world.width)
    models = [linear_softmax(pairs, *size, seed, "float64") for seed in seeds]
    apply, thetas = models[0][0], stacked([theta for _, theta in models])
    thetas["unembedding"]["table"] *= world.width**0.5  # logits ~ N(0, ‖φ‖²)
    prompts = np.tile(np.arange(n, dtype=np.int32)[:, None], (len(seeds), 1, 1))

    def trained(
        start: Theta, data: list[Pair], objective: Objective, rate: float, steps: int
    ) -> Theta:
        recipe = recipe_for(objective, "sgd", rate * len(data), steps)
        batches = stacked([padded(data)] * len(seeds))
        orders = np.stack([recipe.order(len(data))] * len(seeds))
        return tuned(apply, start, batches, recipe, orders)

    learned, rows = ([], pairs, pairs + third, pairs + swapped), []
    pushes = {
        "rejected": (swapped, -1 * SFT(), rate),
        "DPO": (pairs, DPO(world.beta), 2 * rate / world.beta),
    }
    for first, data in zip(FIRST, learned, strict=True):
        start = trained(thetas, data, SFT(), 2 * rate, world.sft_steps) if data else thetas
        before = next_logp(apply, start, prompts)
        for push, steps in itertools.product(pushes, world.push_steps):
            some, objective, speed = pushes[push]
            after = next_logp(apply, trained(start, some, objective, speed, steps), prompts)
            setting = {"push": push, "first": first, "steps": steps}
            fates = map(_fates, before, after)
            rows += [setting | {"seed": s} | fate for s, fate in zip(seeds, fates, strict=True)]
    return Table.of(
        "extend",
        "Linear-softmax: supervised fine-tuning on 'first', then steps on the rejected token "
        "alone, or of DPO. Mean probability before the push, Δ log π of it (nats). 'chosen, "
        "rejected' is the fix of Ren & Sutherland, after which the other tokens should fall "
        "less than after 'chosen'. 'chosen, third' is the control: as flat a start, but the "
        "rejected token as unlikely as after 'chosen'.",
        ("push", "first", "steps"),
        rows,
    )


def _drops(world: Squeezing, seeds: Sequence[int]) -> tuple[Table, Table]:
    rows, scores, n, count = [], [], world.groups, max(1, round(world.dropped * 4 * world.length))
    for learn, overlap in itertools.product(("W and h", "W"), (0.0, world.overlap)):
        drawn = [
            world.group(np.random.default_rng([s, k]), overlap) for s in seeds for k in range(n)
        ]
        run = _stepping(world.group_rate, count, learn != "W")
        found = spread(run, stacked(drawn), at_once=len(drawn))
        for seed, x in zip(seeds, cut(found, len(seeds)), strict=True):
            score, exact, shared = (
                x[k][:, ~CORRECT].reshape(n, -1) for k in ("nthr", "exact", "shared")
            )
            top, right = np.argsort(-score, axis=-1)[:, :count], x["change"][:, :, CORRECT]
            ranks = [spearman(*pair) for pair in zip(score, exact, strict=True)]
            setting = {"learns": learn, "overlap": overlap}
            scores.append(
                {
                    **setting,
                    "seed": seed,
                    "NTHR, exact": np.mean(ranks),
                    "shared": shared.mean(),
                    "shared, highest NTHR": np.take_along_axis(shared, top, -1).mean(),
                    "GWHES, fall": spearman(x["gwhes"][:, CORRECT].ravel(), -right[:, 0].ravel()),
                    "correct that fall": (right[:, 0] < 0).mean(),
                }
            )
            rows += [
                {
                    **setting,
                    "dropped": name,
                    "seed": seed,
                    "Δ correct": right[:, k].mean(),
                    "Δ wrong": x["change"][:, k, ~CORRECT].mean(),
                    "protected": (right[:, k] - right[:, 0]).mean(),
                }
                for k, name in enumerate(DROPPED)
            ]
    drops = Table.of(
        "drops",
        "One step on a group along Σ a_j ∇ log π(y_j) / |y_j| with the penalty dropped on "
        f"{count} of the wrong tokens: mean Δ log π of correct and of wrong responses, and "
        "what the drop gained the correct ones (nats). 'exact' ranks by gradients of all that "
        "learns. Overlap 0 is the null: no wrong token is shared.",
        ("learns", "overlap", "dropped"),
        rows,
    )
    return drops, Table.of(
        "scores",
        "Of wrong tokens: rank correlation of NTHR with the exact effect on Σ log π(correct), "
        "share that the correct response has too, in all and among the highest NTHR. Of "
        "correct responses: rank correlation of GWHES with -Δ log π after the step, and share "
        "that falls. NTHR and GWHES know W only.",
        ("learns", "overlap"),
        scores,
    )


def _fates(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Of prompt x the tokens x, n + x and 2 n + x are chosen, rejected and third."""
    n, tokens = before.shape
    kind = (np.arange(tokens) - np.arange(n)[:, None]) % tokens
    sides = {"chosen": kind == 0, "rejected": kind == n, "third": kind == 2 * n}
    sides["others"] = ~(sides["chosen"] | sides["rejected"] | sides["third"])
    found = {name: np.exp(before[here]).sum() / n for name, here in sides.items()}
    return found | {f"Δ {name}": (after - before)[here].mean() for name, here in sides.items()}


def _moved(before: np.ndarray, after: np.ndarray, pushed: np.ndarray) -> dict[str, float]:
    """Where the mass of the pushed tokens went; means over rows of log-probs."""
    row, p, q = np.arange(len(pushed)), np.exp(before), np.exp(after)
    others = np.arange(before.shape[1]) != pushed[:, None]
    top = np.where(others, p, -1.0).argmax(-1)
    gain, freed = (q - p)[row, top], (p - q)[row, pushed]
    found = {
        "pushed before": p[row, pushed],
        "top before": p[row, top],
        "top after": q[row, top],
        "gain": gain,
        "rise": (after > before).sum(-1),
        "gain / freed": np.array(gain.mean() / freed.mean()),
        "share of gains": gain / np.maximum(q - p, 0).sum(-1),
        "bystanders lost": gain - freed,
        "lead": np.ptp((after - before)[others].reshape(len(p), -1), axis=-1),
    }
    return {name: float(x.mean()) for name, x in found.items()}


@functools.lru_cache
def _stepping(rate: float, count: int, features: bool) -> Any:
    """One step on a group under each rule of :data:`DROPPED`: Δ log π, and the tokens' scores."""

    def run(group: dict[str, Array]) -> dict[str, Array]:
        index, targets = group["index"], group["targets"]
        start = (group["unembedding"], group["states"])
        correct, hidden = jnp.asarray(CORRECT), group["states"][index]

        def logits(theta: tuple[Array, Array]) -> Array:
            states = theta[1] if features else jax.lax.stop_gradient(theta[1])
            return jnp.einsum("grd,vd->grv", states[index], theta[0])

        def token_logp(theta: tuple[Array, Array]) -> Array:
            logp = jax.nn.log_softmax(logits(theta), axis=-1)
            return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

        read = Group(hidden, logits(start), targets, jnp.ones(targets.shape, bool))
        weights = group_advantages(correct.astype(hidden.dtype)) / targets.shape[1]
        before, pullback = jax.vjp(token_logp, start)
        (toward,) = pullback(jnp.broadcast_to(correct[:, None], targets.shape).astype(hidden.dtype))
        exact, score = jax.jvp(token_logp, (start,), (toward,))[1], nthr(read, correct)

        def changed(order: Array) -> Array:
            first = jnp.argsort(jnp.where(correct[:, None], jnp.inf, order).reshape(-1))
            keep = jnp.ones(targets.size, hidden.dtype).at[first[:count]].set(0.0)
            keep = jnp.where(jnp.isnan(order), 1.0, keep.reshape(targets.shape))
            (ascent,) = pullback(weights[:, None] * keep)
            moved = jax.tree.map(lambda x, g: x + rate * g, start, ascent)
            return (token_logp(moved) - before).sum(-1)

        scores = {
            "nthr": score,
            "exact": exact,
            "gwhes": gwhes(read, correct, weights),
            "shared": group["shared"],
        }
        orders = (jnp.full_like(score, jnp.nan), -score, score, -exact, group["random"])
        return {**scores, "change": jnp.stack([changed(order) for order in orders])}

    return run


def _squeeze_claims(table: Table) -> tuple[Claim, ...]:
    cost, _, other = (
        table["bystanders lost"][(table["peak"] > 0) & (table["pushed"] == p)] for p in PUSHED
    )
    peaks = np.unique(table["peak"])
    rise, lead, gain = (
        table.across(name, "peak", peaks, pushed=PUSHED[0]).mean(0)
        for name in ("rise", "lead", "gain")
    )
    return (
        Claim.of(
            "null: from a uniform start the others rise alike",
            lead[0] < 1e-06,
            f"{lead[0]:.1e} nats",
        ),
        Claim.of("the more peaked the start, the fewer tokens rise", np.diff(rise) < 0, rise),
        Claim.of("the likeliest token's lead grows with the peak", np.diff(lead) > 0, lead),
        Claim.of("so does its gain in probability", np.diff(gain) > 0, gain),
        Claim.of(
            "it gains more than the least likely token lost, at every peak above 0 and seed",
            cost > 0,
            f"least {cost.min():.3f}",
        ),
        Claim.of(
            "bystanders lose more when the least likely than when the likeliest token is pushed",
            cost > other,
            f"{cost.mean():.3f} against {other.mean():.3f}",
        ),
    )


def _extend_claims(table: Table) -> tuple[Claim, ...]:
    claims = []
    for push, steps in dict.fromkeys((x["push"], x["steps"]) for x in table.settings()):
        found = table.across("Δ others", "first", FIRST[1:], push=push, steps=steps).T
        only, control, both = found
        numbers = "Δ others {:.2f}, {:.2f} in the control, {:.2f} after both".format(*found.mean(1))
        text = f"{steps} steps of {push}: others fall less after fine-tuning on both "
        claims += [
            Claim.of(text + "responses than on chosen alone", both > only, numbers),
            Claim.of(text + "responses than in the equally flat control", both > control, numbers),
        ]
    return tuple(claims)


def _drop_claims(drops: Table, scores: Table) -> tuple[Claim, ...]:
    overlap, claims = drops["overlap"].max(), []
    for learn in ("W", "W and h"):
        setting = {"learns": learn, "overlap": overlap}
        gain = drops.across("protected", "dropped", DROPPED, **setting).T
        _, high, low, exact, random = gain
        null = drops.where(learns=learn, overlap=0.0, dropped="highest NTHR")["protected"]
        means = zip(DROPPED, gain.mean(1), strict=True)
        shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means)
        rows = scores.where(**setting)
        both = (rows["NTHR, exact"], rows["GWHES, fall"])
        tests = {
            "dropping the highest NTHR protects the correct more than random drops": high > random,
            "and 90 % as much as exact gradients do": high.mean() >= 0.9 * exact.mean(),
            "dropping the lowest NTHR costs the correct, on every seed": low < 0,
        }
        claims += [
            *(Claim.of(f"learning {learn}: {text}", x, shown) for text, x in tests.items()),
            Claim.of(
                f"learning {learn}: NTHR orders wrong tokens, GWHES correct responses, as measured "
                "(ρ > .9)",
                np.min(both) > 0.9,
                "NTHR {:.2f}, GWHES {:.2f}".format(*np.mean(both, axis=1)),
            ),
            Claim.of(
                f"learning {learn}, null: without overlap the highest NTHR costs nothing (.01 nat)",
                null.mean() < 0.01,
                f"dropping it protects {null.mean():.4f}",
            ),
        ]
    return tuple(claims)
