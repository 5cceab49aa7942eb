"""``refusals`` measured: safety tuning on pairs of two refusals makes the model comply."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.recipe import Recipe, batch_order
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, interval
from simgrad.models import Apply
from simgrad.objectives import DPO, DPOP, SFT
from simgrad.pairs import Batch, padded
from simgrad.theory import displacement, head_gap, ln_ches, optimizer_step, pair_kernel, responses
from simgrad.theory.mitigation import Calibrated, PairwiseNormalized, keep_lowest
from simgrad.typing import Array, Theta
from simgrad.worlds.refusals import Refusals
from simgrad.worlds.tuning import next_logp, stacked, tuned
from simgrad.worlds.world import pretrained

SCORES = ("ln-CHES", "head gap", "full gap", "directional")

_AS_MANY = ", as many steps"

HARMLESS = (1.0, np.inf)
"""Levels of the cues of the harmless test prompts."""

ROLLOUTS: dict[str, Any] = {
    "harmful": (-2.0, -1.0),
    "mild": (1.2, 2.0),
    "continuation": 2,
    "n_pairs": 1000,
}
"""Knobs of the table of whole rollouts, where the world leaves them as they are."""


def run(world: Refusals, seeds: Sequence[int]) -> Findings:
    """Refusal of harmful and of harmless prompts before and after every arm, then on rollouts."""
    found = arms(world, seeds)
    usual = type(world)()
    others = {k: v for k, v in ROLLOUTS.items() if getattr(world, k) == getattr(usual, k)}
    whole = world.with_knobs(rollouts=True, **others)
    rollouts = Table.of(
        "rollouts",
        "The same when both responses of a pair are sampled whole from the policy and every pair "
        "counts, in the proportions in which they come "
        f"({', '.join(f'{k}={getattr(whole, k)}' for k in ROLLOUTS)}).",
        ("arm", "pairs", "steps"),
        measured(whole, seeds, unfiltered),
    )
    return Findings.of(world, seeds, (found, rollouts), _claims(found, rollouts))


def arms(world: Refusals, seeds: Sequence[int]) -> Table:
    """DPO, its controls and its mitigations: refusal of harmful and of harmless prompts."""
    return Table.of(
        "arms",
        "Mean probability of a refusal on 400 harmful and 400 harmless prompts drawn afresh. "
        "Filtered arms make the same passes over their pairs as DPO over all (fewer steps), or, "
        "below, the same steps.",
        ("arm", "pairs", "steps"),
        measured(world, seeds, _all_arms),
    )


def measured(
    world: Refusals, seeds: Sequence[int], choose: Callable[..., list[Arm]]
) -> list[dict[str, Any]]:
    """Refusal rates of the start and of each arm that ``choose`` makes: one row an arm and seed."""
    apply, thetas = pretrained(world, seeds)
    kinds = (world.harmful, HARMLESS)
    drawn = [[world.prompts(seed + 10**6, levels, 400) for levels in kinds] for seed in seeds]
    tests, refusals = np.array(drawn), slice(world.first_answer, world.first_answer + 6)

    def measure(name: str, pairs: int, steps: int, thetas: Theta) -> list[dict[str, Any]]:
        logp = next_logp(apply, thetas, tests.reshape(len(seeds), 800, -1))[..., refusals]
        rates = np.exp(logp).sum(-1).reshape(len(seeds), 2, 400).mean(-1).tolist()
        key = {"arm": name, "pairs": pairs, "steps": steps}
        return [
            {**key, "seed": s, "refuses harmful": harmful, "refuses harmless": harmless}
            for s, (harmful, harmless) in zip(seeds, rates, strict=True)
        ]

    rows = measure("start", 0, 0, thetas)
    batches = {world.rule: _batches(world, world.rule, apply, thetas, seeds)}
    for arm in choose(world, apply, thetas, batches[world.rule], seeds):
        rule = arm.rule or world.rule
        if rule not in batches:
            batches[rule] = _batches(world, rule, apply, thetas, seeds)
        steps, size = arm.orders.shape[1:]
        recipe = world.recipe(**arm.recipe, steps=steps, batch_size=size)
        after = tuned(apply, thetas, batches[rule], recipe, arm.orders)
        rows += measure(arm.name, arm.pairs, steps, after)
    return rows


def _batches(
    world: Refusals, rule: str, apply: Apply, thetas: Theta, seeds: Sequence[int]
) -> Batch:
    pairs = world.with_knobs(rule=rule).preferences(apply, thetas, seeds)
    rows = world.continuation + 2
    return stacked([padded(p, 5 + rows, rows) for p in pairs])


def unfiltered(
    world: Refusals, apply: Apply, thetas: Theta, batches: Batch, seeds: Sequence[int]
) -> list[Arm]:
    """The arms that train on all pairs: DPO, other rules, other objectives and mitigations."""
    n, size = world.n_pairs, world.batch_size
    everything = np.stack([batch_order(n, size, n * world.epochs // size, s) for s in seeds])

    def arm(name: str, rule: str | None = None, **recipe: Any) -> Arm:
        return Arm(name, recipe, everything, n, rule)

    return [
        arm("DPO"),
        arm("random preferences", "random"),
        arm("blunter wins", "blunter"),
        arm(f"SFT term {world.sft:g}", objective=DPO(world.beta) + world.sft * SFT()),
        arm("DPOP", objective=DPOP(world.beta)),
        arm("pairwise-normalised", mitigation=PairwiseNormalized()),
        arm("reward calibration", mitigation=Calibrated()),
    ]


def _all_arms(
    world: Refusals, apply: Apply, thetas: Theta, batches: Batch, seeds: Sequence[int]
) -> list[Arm]:
    scores = spread(_scoring(apply, world.recipe()), thetas, batches)
    scores["random"] = np.stack(
        [np.random.default_rng([s, 5]).random(world.n_pairs) for s in seeds]
    )
    keep = [("lowest", name) for name in SCORES]
    keep += [("", "random"), ("highest", "ln-CHES"), ("highest", "directional")]
    arms = unfiltered(world, apply, thetas, batches, seeds)
    most = arms[0].orders.shape[1]
    for (steps, more), (side, name) in itertools.product(((None, ""), (most, _AS_MANY)), keep):
        score = jnp.asarray(-scores[name] if side == "highest" else scores[name])
        index = np.stack([np.asarray(keep_lowest(s, world.keep)) for s in score])
        label = f"{side} {100 * world.keep:g} % {name}{more}".strip()
        arms.append(_kept(world, label, index, seeds, steps))
    return arms


def _kept(
    world: Refusals, name: str, index: np.ndarray, seeds: Sequence[int], steps: int | None
) -> Arm:
    """``index`` holds the pairs of each seed that stay."""
    m = index.shape[1]
    b = min(world.batch_size, m)
    steps = max(1, m * world.epochs // b) if steps is None else steps
    orders = [i[batch_order(m, b, steps, s)] for i, s in zip(index, seeds, strict=True)]
    return Arm(name, {}, np.stack(orders), m, None)


@dataclass(frozen=True)
class Arm:
    """One way of tuning: its name, what it changes of the recipe, the order of its pairs."""

    name: str
    recipe: dict[str, Any]
    orders: np.ndarray
    pairs: int
    rule: str | None


@functools.lru_cache
def _scoring(apply: Apply, recipe: Recipe) -> Any:
    def run(theta: Theta, batch: Batch) -> dict[str, Array]:
        result = responses(apply, theta, batch)
        step = optimizer_step(apply, theta, batch, recipe.objective, recipe.optimizer).direction
        return {
            "ln-CHES": ln_ches(result, batch),
            "head gap": head_gap(result, batch),
            "full gap": pair_kernel(apply, theta, batch).gap,
            "directional": -displacement(apply, theta, batch, step).first[:, 0],
        }

    return run


def _claims(arms: Table, rollouts: Table) -> tuple[Claim, ...]:
    def rate(start: str, table: Table = arms) -> np.ndarray:
        name = next(s["arm"] for s in table.settings() if s["arm"].startswith(start))
        return table.where(arm=name)["refuses harmful"]

    def kept(score: str) -> np.ndarray:
        """With as many passes, with as many steps."""
        names = [s["arm"] for s in arms.settings() if f"% {score}" in s["arm"]]
        names = [name for name in names if not name.startswith("highest")]
        return arms.across("refuses harmful", "arm", names).T

    def says(values: np.ndarray) -> str:
        return str(interval(values))

    start, dpo, flipped, sft = map(rate, ("start", "DPO", "random preferences", "SFT term"))
    begin, rolled = rate("start", rollouts), rate("DPO", rollouts)
    chance, filters = kept("random"), {name: kept(name) for name in SCORES}

    def better(which: int) -> tuple[bool | None, str]:
        won = {name: interval(values[which] - chance[which]) for name, values in filters.items()}
        text = "; ".join(f"{name} {x}" for name, x in won.items())
        return all(x.low > 0 for x in won.values()) if len(start) > 1 else None, text

    return (
        Claim.of(
            "DPO at least halves the refusal rate on every seed",
            dpo <= start / 2,
            f"{says(start)} → {says(dpo)}, largest ratio {(dpo / start).max():.2f}",
        ),
        Claim.of(
            "the rule gives the direction: with random preferences refusal does not fall",
            flipped >= 0.9 * start,
            says(flipped),
        ),
        Claim.of(
            "an SFT term keeps the refusal rate within a tenth", sft >= 0.9 * start, says(sft)
        ),
        Claim(
            "every filter keeps more refusals than as many random pairs, at equal passes",
            *better(0),
        ),
        Claim("and at equal steps", *better(1)),
        Claim.of(
            "DPO on whole rollouts in natural proportions lowers refusal on every seed",
            rolled < begin,
            f"{says(begin)} → {says(rolled)}",
        ),
        Claim.of(
            "and halves it", rolled <= begin / 2, f"largest ratio {(rolled / begin).max():.2f}"
        ),
    )
