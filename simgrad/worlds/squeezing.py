"""``squeezing``: pushing a token down feeds the likeliest; wrong answers drag right ones along."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.dynamics.agreement import spearman
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import linear_softmax
from simgrad.objectives import DPO, SFT, Objective
from simgrad.pairs import Pair, padded
from simgrad.theory.closed_forms import learning_dynamics
from simgrad.theory.groups import Group, group_advantages, gwhes, nthr
from simgrad.typing import Array, Theta
from simgrad.worlds.tuning import next_logp, recipe_for, stacked, tuned
from simgrad.worlds.world import World

__all__ = ["Squeezing"]

PUSHED = ("least likely", "median", "likeliest")
FIRST = ("nothing", "chosen", "chosen, third", "chosen, rejected")
CORRECT = np.arange(8) < 4
"""Groups of eight responses, the first four correct."""
DROPPED = ("none", "highest NTHR", "lowest NTHR", "highest exact", "random")


@dataclass(frozen=True)
class Squeezing(World):
    """Bare logits, a linear-softmax model with one-token responses, groups of long responses.

    A group's wrong response i has, at each position but the last, the token of the correct one i
    with probability ``overlap``, else a wrong one. States at one position have the cosine .8, and
    W_y leans to those of y's position. Sources: Ren & Sutherland, arXiv 2407.10490 (squeezing,
    extend); Deng et al., arXiv 2505.18830 (NTHR, GWHES).

    Attributes:
        vocabulary: tokens of the logits and of the linear-softmax model.
        peaks: standard deviations of the logits at the start; 0 is the null.
        draws: logits drawn for each peak and seed.
        rate: of gradient descent on log π(y) in the logits.
        steps: of it.
        prompts: of the linear-softmax model, each with a chosen, a rejected and a third token of
            its own.
        width: of all features.
        sft_steps: of supervised fine-tuning, at twice the rate.
        push_steps: of the pushes after it.
        beta: of DPO, whose rate makes it begin as strong as the push on the rejected token alone.
        groups: drawn for each overlap and seed.
        length: tokens of their responses.
        overlap: of wrong with correct responses; the null, 0, is always shown too.
        dropped: share of the wrong tokens whose penalty is dropped.
        group_rate: of the one step on a group.
    """

    name: ClassVar[str] = "squeezing"
    vocabulary: int = 50
    peaks: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    draws: int = 64
    rate: float = 0.5
    steps: int = 20
    prompts: int = 12
    width: int = 32
    sft_steps: int = 10
    push_steps: tuple[int, ...] = (5, 20)
    beta: float = 0.1
    groups: int = 24
    length: int = 8
    overlap: float = 0.5
    dropped: float = 0.25
    group_rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse knobs that leave nothing to measure."""
        super().__post_init__()
        for name in (
            "draws",
            "rate",
            "steps",
            "prompts",
            "width",
            "sft_steps",
            "beta",
            "groups",
            "group_rate",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"squeezing: {name} must be positive, got {getattr(self, name)}")
        if (
            len(set(self.peaks)) < 2
            or min(self.peaks) != 0
            or not self.push_steps
            or min(self.push_steps) < 1
        ):
            raise ValueError(
                "squeezing: peaks takes 0, the null, and standard deviations, push_steps counts "
                "from 1 on"
            )
        if self.vocabulary <= 3 * self.prompts or self.length < 2:
            raise ValueError(
                f"squeezing: vocabulary must exceed {3 * self.prompts} (3 tokens a prompt), length "
                "1"
            )
        if not (0 < self.overlap <= 1 and 0 < self.dropped < 1):
            raise ValueError("squeezing: overlap must lie in (0, 1], dropped in (0, 1)")

    def pairs(self, seed: int) -> list[Pair]:
        """One pair of one-token responses a prompt; the seed draws the linear-softmax weights."""
        return [Pair([p], [p], [self.prompts + p]) for p in range(self.prompts)]

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """Pushes on logits, pushes after fine-tuning, one step on groups; in float64."""
        with jax.enable_x64(True):
            squeeze, extend, (drops, scores) = (
                self._squeeze(seeds),
                self._extend(seeds),
                self._drops(seeds),
            )
        claims = (*_squeeze_claims(squeeze), *_extend_claims(extend), *_drop_claims(drops, scores))
        return Findings(
            self.name, vars(self), tuple(seeds), (squeeze, extend, drops, scores), claims
        )

    def _squeeze(self, seeds: Sequence[int]) -> Table:
        rows, push = (
            [],
            jax.jit(jax.vmap(learning_dynamics.squeeze, (0, 0, None, None)), static_argnums=3),
        )
        for pushed, peak, seed in ((t, p, s) for t in PUSHED for p in self.peaks for s in seeds):
            z = peak * np.random.default_rng([seed, 5]).normal(size=(self.draws, self.vocabulary))
            token = z.argsort(-1, kind="stable")[
                :, PUSHED.index(pushed) * (self.vocabulary - 1) // 2
            ]
            path = np.asarray(push(jnp.asarray(z), jnp.asarray(token), self.rate, self.steps))
            rows.append(
                {
                    "pushed": pushed,
                    "peak": peak,
                    "seed": seed,
                    **_moved(path[:, 0], path[:, -1], token),
                }
            )
        return Table.of("squeeze", (
            f"{self.steps} steps z ← z - {self.rate} (e_y - π), by what y was at the start: "
            "probability of y, and of "
            "the likeliest other token before and after; how many tokens rise; the likeliest's "
            "gain over the mass y "
            "lost, and over all gains; mass that all other tokens (bystanders) lost; its lead in Δ "
            "log π over the "
            "one that falls most (nats). Peak 0, a uniform start, is the null: the others rise "
            "alike, nothing is "
            "squeezed."
        ), ("pushed", "peak"), rows)  # fmt: skip

    def _extend(self, seeds: Sequence[int]) -> Table:
        n, rate, pairs = self.prompts, self.rate, self.pairs(0)
        swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
        third = [Pair(p.prompt, [2 * n + p.prompt[0]], p.chosen) for p in pairs]
        models = [
            linear_softmax(pairs, self.vocabulary, self.width, seed, "float64") for seed in seeds
        ]
        apply, thetas = models[0][0], stacked([theta for _, theta in models])
        thetas["unembedding"]["table"] *= self.width**0.5  # logits ~ N(0, ‖φ‖²)
        prompts = np.tile(np.arange(n, dtype=np.int32)[:, None], (len(seeds), 1, 1))

        def trained(
            start: Theta, data: list[Pair], objective: Objective, rate: float, steps: int
        ) -> Theta:
            recipe = recipe_for(objective, "sgd", rate * len(data), steps)
            batches = jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), padded(data))
            return tuned(
                apply, start, batches, recipe, np.stack([recipe.order(len(data))] * len(seeds))
            )

        learned, rows = (pairs, pairs, pairs + third, pairs + swapped), []
        pushes = {
            "rejected": (swapped, -1 * SFT(), rate),
            "DPO": (pairs, DPO(self.beta), 2 * rate / self.beta),
        }
        for name, data in zip(FIRST, learned, strict=True):
            start = (
                thetas
                if name == "nothing"
                else trained(thetas, data, SFT(), 2 * rate, self.sft_steps)
            )
            before = next_logp(apply, start, prompts)
            for (push, (some, objective, speed)), steps in itertools.product(
                pushes.items(), self.push_steps
            ):
                after = next_logp(apply, trained(start, some, objective, speed, steps), prompts)
                key = {"push": push, "first": name, "steps": steps}
                rows += [
                    {**key, "seed": s, **_fates(before[i], after[i])} for i, s in enumerate(seeds)
                ]
        return Table.of("extend", (
            "Linear-softmax: supervised fine-tuning on 'first', then steps on the rejected token "
            "alone, or of DPO. "
            "Mean probability before the push, Δ log π of it (nats). 'chosen, rejected' is the fix "
            "of Ren & "
            "Sutherland, after which the other tokens should fall less than after 'chosen'. "
            "'chosen, third' is the "
            "control: as flat a start, but the rejected token as unlikely as after 'chosen'."
        ), ("push", "first", "steps"), rows)  # fmt: skip

    def _drops(self, seeds: Sequence[int]) -> tuple[Table, Table]:
        rows, scores, n, count = [], [], self.groups, max(1, round(self.dropped * 4 * self.length))
        for learn, overlap in itertools.product(("W and h", "W"), (0.0, self.overlap)):
            drawn = [
                self._group(np.random.default_rng([s, k]), overlap) for s in seeds for k in range(n)
            ]
            found = spread(
                _stepping(self.group_rate, count, learn != "W"), stacked(drawn), at_once=len(drawn)
            )
            for i, seed in enumerate(seeds):
                key = {"learns": learn, "overlap": overlap}
                x = {k: v[i * n : (i + 1) * n] for k, v in found.items()}
                score, exact, shared = (
                    x[k][:, ~CORRECT].reshape(n, -1) for k in ("nthr", "exact", "shared")
                )
                top, right = np.argsort(-score, axis=-1)[:, :count], x["change"][:, :, CORRECT]
                scores.append({
                    **key, "seed": seed,
                    "NTHR, exact": np.mean([spearman(*pair) for pair in zip(score, exact, strict=True)]),
                    "shared": shared.mean(), "shared, highest NTHR": np.take_along_axis(shared, top, -1).mean(),
                    "GWHES, fall": spearman(x["gwhes"][:, CORRECT].ravel(), -right[:, 0].ravel()),
                    "correct that fall": (right[:, 0] < 0).mean(),
                })  # fmt: skip
                for k, name in enumerate(DROPPED):
                    both = {
                        "Δ correct": right[:, k].mean(),
                        "Δ wrong": x["change"][:, k, ~CORRECT].mean(),
                    }
                    both["protected"] = (right[:, k] - right[:, 0]).mean()
                    rows.append({**key, "dropped": name, "seed": seed, **both})
        drops = Table.of("drops", (
            "One step on a group along Σ a_j ∇ log π(y_j) / |y_j| with the penalty dropped on "
            f"{count} of the wrong "
            "tokens: mean Δ log π of correct and of wrong responses, and what the drop gained the "
            "correct ones "
            "(nats). 'exact' ranks by gradients of all that learns. Overlap 0 is the null: no "
            "wrong token is shared."
        ), ("learns", "overlap", "dropped"), rows)  # fmt: skip
        return drops, Table.of("scores", (
            "Of wrong tokens: rank correlation of NTHR with the exact effect on Σ log π(correct), "
            "share that the "
            "correct response has too, in all and among the highest NTHR. Of correct responses: "
            "rank correlation of "
            "GWHES with -Δ log π after the step, and share that falls. NTHR and GWHES know W only."
        ), ("learns", "overlap"), scores)  # fmt: skip

    def _group(self, random: np.random.Generator, overlap: float) -> dict[str, np.ndarray]:
        n, place = self.length, np.arange(self.length)
        correct, wrong = (4 * place + random.integers(low, low + 2, (4, n)) for low in (0, 2))
        shared = (random.random((4, n)) < overlap) & (place < n - 1)
        targets = np.concatenate([correct, np.where(shared, correct, wrong)])
        ids: dict[tuple[int, ...], int] = {}
        index = np.array(
            [[ids.setdefault((*y[:k],), len(ids)) for k in place] for y in targets.tolist()]
        )
        center, own, table = (
            random.normal(size=(m, self.width)) / self.width**0.5 for m in (n, 8 * n, 4 * n)
        )
        position = np.zeros(8 * n, int)
        position[index] = place
        return {"unembedding": table + 2 * np.repeat(center, 4, axis=0), "targets": targets, "index": index,
                "states": np.sqrt(0.8) * center[position] + np.sqrt(0.2) * own, "random": random.random((8, n)),
                "shared": np.concatenate([np.zeros((4, n)), shared])}  # fmt: skip


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
    row, p, q, others = (
        np.arange(len(pushed)),
        np.exp(before),
        np.exp(after),
        np.ones(before.shape, bool),
    )
    others[row, pushed] = False
    top = np.where(others, p, -1.0).argmax(-1)
    gain, freed = (q - p)[row, top], (p - q)[row, pushed]
    found = {"pushed before": p[row, pushed], "top before": p[row, top], "top after": q[row, top], "gain": gain,
             "rise": (after > before).sum(-1), "gain / freed": np.array(gain.mean() / freed.mean()),
             "share of gains": gain / np.maximum(q - p, 0).sum(-1), "bystanders lost": gain - freed,
             "lead": np.ptp((after - before)[others].reshape(len(p), -1), axis=-1)}  # fmt: skip
    return {name: float(x.mean()) for name, x in found.items()}


@functools.lru_cache
def _stepping(rate: float, count: int, features: bool) -> Any:
    """One step on a group under each :data:`DROPPED` rule: changes of log π and token scores."""

    def run(group: dict[str, Array]) -> dict[str, Array]:
        index, targets, start = (
            group["index"],
            group["targets"],
            (group["unembedding"], group["states"]),
        )
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
            keep = (
                jnp.ones(targets.size, hidden.dtype)
                .at[first[:count]]
                .set(0.0)
                .reshape(targets.shape)
            )
            (ascent,) = pullback(weights[:, None] * jnp.where(jnp.isnan(order), 1.0, keep))
            return (
                token_logp(jax.tree.map(lambda x, g: x + rate * g, start, ascent)) - before
            ).sum(-1)

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
    at = [table.where(pushed=PUSHED[0], peak=p) for p in np.unique(table["peak"])]
    rise, lead, gain = (np.array([x[k].mean() for x in at]) for k in ("rise", "lead", "gain"))
    return (
        Claim("null: from a uniform start the others rise alike", bool(lead[0] < 1e-6), f"{lead[0]:.1e} nats"),
        Claim("the more peaked the start, the fewer tokens rise", bool((np.diff(rise) < 0).all()), listing(rise)),
        Claim("the likeliest token's lead grows with the peak", bool((np.diff(lead) > 0).all()), listing(lead)),
        Claim("so does its gain in probability", bool((np.diff(gain) > 0).all()), listing(gain)),
        Claim("it gains more than the least likely token lost, at every peak above 0 and seed", bool((cost > 0).all()),
              f"least {cost.min():.3f}"),
        Claim("bystanders lose more when the least likely than when the likeliest token is pushed",
              bool((cost > other).all()), f"{cost.mean():.3f} against {other.mean():.3f}"),
    )  # fmt: skip


def _extend_claims(table: Table) -> tuple[Claim, ...]:
    claims = []
    for x in (x for x in table.settings() if x["first"] == "chosen"):
        only, control, both = (table.where(**x | {"first": y})["Δ others"] for y in FIRST[1:])
        numbers = f"Δ others {only.mean():.2f}, {control.mean():.2f} in the control, {both.mean():.2f} after both"
        text = f"{x['steps']} steps of {x['push']}: others fall less after fine-tuning on both responses than "
        claims += [Claim(text + "on chosen alone", bool((both > only).all()), numbers)]
        claims += [
            Claim(text + "in the equally flat control", bool((both > control).all()), numbers)
        ]
    return tuple(claims)


def _drop_claims(drops: Table, scores: Table) -> tuple[Claim, ...]:
    overlap, claims = drops["overlap"].max(), []
    for learn in ("W", "W and h"):
        gain = {
            name: drops.where(learns=learn, overlap=overlap, dropped=name)["protected"]
            for name in DROPPED
        }
        null = drops.where(learns=learn, overlap=0.0, dropped="highest NTHR")["protected"]
        shown = ", ".join(f"{name} {x.mean():.3f}" for name, x in gain.items())
        high, rows = gain["highest NTHR"], scores.where(learns=learn, overlap=overlap)
        both = (rows["NTHR, exact"], rows["GWHES, fall"])
        tests = {
            "dropping the highest NTHR protects the correct more than random drops": (
                high > gain["random"]
            ).all(),
            "and 90 % as much as exact gradients do": high.mean()
            >= 0.9 * gain["highest exact"].mean(),
            "dropping the lowest NTHR costs the correct, on every seed": (
                gain["lowest NTHR"] < 0
            ).all(),
        }
        claims += [
            Claim(f"learning {learn}: {text}", bool(holds), shown) for text, holds in tests.items()
        ]
        claims += [
            Claim(f"learning {learn}: NTHR orders wrong tokens, GWHES correct responses, as measured (ρ > .9)",
                  bool(np.min(both) > 0.9), "NTHR {:.2f}, GWHES {:.2f}".format(*np.mean(both, axis=1))),
            Claim(f"learning {learn}, null: without overlap the highest NTHR costs nothing (.01 nat)",
                  bool(null.mean() < 0.01), f"dropping it protects {null.mean():.4f}"),
        ]  # fmt: skip
    return tuple(claims)
