"""``linear``: frozen features, where single tokens rise and shared endings drag down.

It follows Yuan et al., arXiv 2410.13828.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_softmax, logit

from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread
from simgrad.experiments.findings import Claim, Findings, Table, listing
from simgrad.models import Apply, ContextApply
from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.dynamics.linearized import kernel_flow
from simgrad.theory import head_kernel, responses
from simgrad.theory.closed_forms import linear_softmax
from simgrad.theory.groups import Group, group_kernel
from simgrad.typing import Array, Theta
from simgrad.worlds.tuning import recipe_for, stacked, trained
from simgrad.worlds.world import World

__all__ = ["Linear"]

FROZEN = ("features/*",)
ASSUMPTIONS = ("all hold", "another pair opposes", "features learn")


@dataclass(frozen=True)
class Linear(World):
    """Linear-softmax models: a prompt, shared prefix, one of two sentiment tokens, shared suffix.

    Even prompts prefer the first sentiment token, odd ones the second. Features have norm 1; those
    of both responses of a pair at one position have the cosine ``correlation``, those of different
    pairs ``across``, those of different positions are orthogonal. W is such that the policy's
    probabilities are the ones asked for.

    Attributes:
        n_pairs: preference pairs, one a prompt.
        suffixes: tokens after the sentiment token; 0, 1 and 5 are 1t, short-suffix and long-suffix.
        prefix: tokens before it in the setting that has some.
        correlation: cosine of the two responses' features at one position.
        across: cosine of different pairs' features at one position, at most ``correlation``.
        chosen: probability of the chosen sentiment token at the start.
        rejected: of the rejected one.
        sure_chosen: of each suffix token after the chosen sentiment token.
        sure_rejected: after the rejected one.
        jitter: standard deviation of these probabilities' logits.
        draws: models of the table on single tokens, for each seed.
        beta: of DPO.
        learning_rate: of SGD on a pair alone; n_pairs times that on all together, where the loss is
            a mean.
        steps: of a run.
    """

    name: ClassVar[str] = "linear"
    zero: ClassVar[tuple[str, ...]] = ("correlation", "across", "jitter")
    n_pairs: int = 6
    suffixes: tuple[int, ...] = (0, 1, 5, 15)
    prefix: int = 5
    correlation: float = 0.8
    across: float = 0.4
    chosen: float = 0.7
    rejected: float = 0.2
    sure_chosen: float = 0.9
    sure_rejected: float = 0.4
    jitter: float = 0.3
    draws: int = 64
    beta: float = 0.1
    learning_rate: float = 0.5
    steps: int = 40

    def __post_init__(self) -> None:
        """Refuse knobs that no model can have."""
        super().__post_init__()
        for name in ("n_pairs", "prefix", "draws", "steps", "beta", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"linear: {name} must be positive, got {getattr(self, name)}")
        if len(self.suffixes) < 2 or min(self.suffixes) != 0:
            raise ValueError(
                f"linear: suffixes takes lengths, 0 and at least one more, got {self.suffixes}"
            )
        if not 0 <= self.across <= self.correlation < 1:
            raise ValueError(
                f"linear: 0 ≤ across ≤ correlation < 1, got {self.across} and {self.correlation}"
            )
        shares = (
            self.chosen,
            self.rejected,
            1 - self.chosen - self.rejected,
            self.sure_chosen,
            self.sure_rejected,
        )
        if min(shares) <= 0 or max(shares) >= 1 or self.jitter < 0:
            raise ValueError(
                "linear: probabilities must lie in (0, 1), chosen + rejected below 1, jitter be at "
                "least 0"
            )

    @property
    def vocabulary(self) -> int:
        """Two sentiment tokens, the prefix, the longest suffix and a few that never come."""
        return 2 + self.prefix + max(self.suffixes) + 8

    def pairs(self, seed: int, prefix: int = 0, suffix: int = 5) -> list[Pair]:
        """One pair a prompt; the seed draws the policy."""
        before, after = range(2, 2 + prefix), range(2 + self.prefix, 2 + self.prefix + suffix)
        return [
            Pair([i], [*before, i % 2, *after], [*before, 1 - i % 2, *after])
            for i in range(self.n_pairs)
        ]

    def policy(
        self, seed: int, prefix: int, suffix: int, correlated: bool = True
    ) -> tuple[ContextApply, Theta]:
        """The model and its parameters; uncorrelated, all features are orthogonal."""
        rows: dict[tuple[int, ...], tuple[int, int, np.ndarray]] = {}
        for i, pair in enumerate(self.pairs(seed, prefix, suffix)):
            for side, k in itertools.product((0, 1), range(prefix + 1 + suffix)):
                y = (pair.chosen, pair.rejected)[side]
                wanted = {y[k]: (self.sure_chosen, self.sure_rejected)[side] if k > prefix else 0.8}
                if k == prefix:
                    wanted = {pair.chosen[k]: self.chosen, pair.rejected[k]: self.rejected}
                random = np.random.default_rng([seed, i, side, 1000 + k - prefix])
                rows.setdefault((*pair.prompt, *y[:k]), (k, i, self._distribution(random, wanted)))
        position, pair_of, logp = map(np.array, zip(*rows.values(), strict=True))
        across, within = (self.across, self.correlation - self.across) if correlated else (0.0, 0.0)
        common, shared = np.eye(position.max() + 1)[position], np.eye(self.n_pairs)[pair_of]
        shared = (common[:, :, None] * shared[:, None]).reshape(len(rows), -1)
        parts = ((across, common), (within, shared), (1 - across - within, np.eye(len(rows))))
        phi = np.concatenate([np.sqrt(square) * part for square, part in parts], axis=1)
        w = logp.T @ np.linalg.pinv(phi).T
        return ContextApply(tuple(rows), FROZEN), {
            "features": {"table": phi},
            "unembedding": {"table": w},
        }

    def _distribution(self, random: np.random.Generator, wanted: dict[int, float]) -> np.ndarray:
        """Log-probs with about the ``wanted`` probabilities, the rest divided at random."""
        others = random.normal(size=self.vocabulary)
        others[list(wanted)] = -np.inf
        total = sum(wanted.values())
        given = expit(logit(total) + self.jitter * random.normal())
        logp = np.log(1 - given) + log_softmax(others)
        logp[list(wanted)] = np.log(np.array(list(wanted.values())) * given / total)
        return logp

    def recipe(self, pairs: int) -> Recipe:
        """DPO by SGD on one pair, or on several together at the same rate for each."""
        return recipe_for(DPO(self.beta), "sgd", self.learning_rate * pairs, self.steps)

    def experiment(self, seeds: Sequence[int]) -> Findings:
        """Single tokens under three assumptions; prefixes and suffixes, alone or both; float64."""
        with jax.enable_x64(True):
            single, shared = self._single(seeds), self._shared(seeds)
        claims = (*_single_claims(single), *_shared_claims(shared))
        return Findings(self.name, vars(self), tuple(seeds), (single, shared), claims)

    def _single(self, seeds: Sequence[int]) -> Table:
        pairs, n = [Pair([0], [0], [1]), Pair([1], [1], [0])], self.draws
        rows = []
        for assumption in ASSUMPTIONS:
            data = tuple(pairs if assumption == ASSUMPTIONS[1] else pairs[:1])
            index = np.tile(np.arange(len(data)), (n, 1))
            apply = ContextApply(((0,), (1,)), () if assumption == ASSUMPTIONS[2] else FROZEN)
            for seed in seeds:
                random = np.random.default_rng([seed, 3])
                h, w = random.normal(size=(n, 2, 4)) / 2, random.normal(size=(n, 16, 4))
                h[:, 1] = self.correlation * h[:, 0] + np.sqrt(1 - self.correlation**2) * h[:, 1]
                thetas = {"features": {"table": h}, "unembedding": {"table": w}}
                found = spread(
                    _measuring(apply, self.recipe(len(data)), data), thetas, index, at_once=n
                )
                margin, change = found["rise"][:, 0], found["change"][:, 0]
                rows.append({
                    "assumptions": assumption, "seed": seed, "least margin": margin.min(),
                    "error": np.abs(margin + found["gap"][:, 0]).max(), "falls": (change[:, 0] < 0).mean(),
                    "least Δ chosen": change[:, 0].min(), "Δ chosen": change[:, 0].mean(),
                    "Δ rejected": change[:, 1].mean(),
                })  # fmt: skip
        return Table.of("single", (
            "One-token responses, random models: least exact margin ‖h‖² (1 - π_w + π_l) and its "
            "largest difference "
            "from ‖g_w‖² - ⟨g_w,g_l⟩ over W; share of chosen tokens that fall in a run, least and "
            "mean Δ log π "
            "(nats). With one pair and frozen features (the null) none can fall; the other rows "
            "drop one of these "
            "assumptions each."
        ), ("assumptions",), rows)  # fmt: skip

    def _shared(self, seeds: Sequence[int]) -> Table:
        rows, n = [], self.n_pairs
        settings = [(0, k) for k in self.suffixes] + [(self.prefix, 0)]
        for (prefix, suffix), features in itertools.product(settings, ("correlated", "orthogonal")):
            policies = [
                self.policy(seed, prefix, suffix, features == "correlated") for seed in seeds
            ]
            apply, pairs = policies[0][0], tuple(self.pairs(0, prefix, suffix))
            thetas = stacked([theta for _, theta in policies])
            every = jax.tree.map(lambda x: np.repeat(x, n, axis=0), thetas)
            index, total = np.tile(np.arange(n), (len(seeds), 1)), n * len(seeds)
            together = spread(
                _measuring(apply, self.recipe(n), pairs), thetas, index, at_once=total
            )
            alone = spread(
                _measuring(apply, self.recipe(1), pairs), every, index.reshape(-1, 1), at_once=total
            )
            alone = {k: x.reshape(len(seeds), n, *x.shape[2:]) for k, x in alone.items()}
            for (name, found), (i, seed) in itertools.product(
                (("alone", alone), ("together", together)), enumerate(seeds)
            ):
                key = {
                    "features": features,
                    "prefix": prefix,
                    "suffix": suffix,
                    "trained": name,
                    "seed": seed,
                }
                rows.append({**key, **_row({k: x[i] for k, x in found.items()}, alone["first"][i])})
        return Table.of("shared", (
            "Mean cosine and gap ⟨g_w,g_l⟩ - ‖g_w‖²; Δ log π after the run (nats), of whole "
            "responses and of the "
            "sentiment token; shares of chosen and of both that fall; share of pairs whose "
            "chosen's direction the "
            "pair's own kernel, and the kernel of all trained pairs, get right to first order; R² "
            "and largest error "
            "(nats) of kernel flow, share of responses that end below it, R² of the first step "
            "times their number. "
            "Suffix 0, 1, 5 are 1t, short-suffix, long-suffix. Orthogonal features are the null: "
            "no suffix token "
            "pulls on another."
        ), ("features", "prefix", "suffix", "trained"), rows)  # fmt: skip


@functools.lru_cache
def _measuring(apply: Apply, recipe: Recipe, pairs: tuple[Pair, ...]) -> Any:
    """A run on some of the pairs, and what was known before it."""

    def run(theta: Theta, index: Array) -> dict[str, Array]:
        batch = padded(pairs).take(index)
        before, after = (
            responses(apply, t, batch) for t in (theta, trained(apply, recipe, theta, batch))
        )
        flat = (
            x.reshape(-1, *x.shape[2:])
            for x in (before.hidden, before.logits, batch.targets, batch.valid)
        )
        kernel, own = group_kernel(Group(*flat)), head_kernel(before, batch)
        flow = kernel_flow(
            kernel, before.logp, batch.lengths, recipe.objective, recipe.optimizer, recipe.steps
        )
        differs = batch.targets[:, 0] != batch.targets[:, 1]
        start = (
            before.hidden[:, 0, 0],
            before.logits[:, 0, 0],
            batch.targets[:, 0, 0],
            batch.targets[:, 1, 0],
        )
        return {
            "rise": linear_softmax.single_token_rise(*start),
            "cosine": own.cosine,
            "gap": own.gap,
            "change": after.logp - before.logp,
            "token": jnp.where(differs, (after.token_logp - before.token_logp)[:, 0], 0.0).sum(-1),
            "flow": flow.logp[-1] - before.logp,
            "first": (flow.logp[1] - before.logp) * recipe.steps,
        }

    return run


def _row(found: dict[str, np.ndarray], own: np.ndarray) -> dict[str, float]:
    change, flow, first = found["change"], found["flow"], found["first"]
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
        Claim("a single chosen token never falls, and its margin is exact (1e-9)",
              bool((hold["falls"] == 0).all() and (hold["least margin"] >= 0).all() and (hold["error"] < 1e-9).all()),
              f"least Δ {hold['least Δ chosen'].min():.3f}, error {hold['error'].max():.0e}"),
        Claim("it can once another pair is trained too, or features learn",
              bool(min(opposed["falls"].max(), learn["falls"].max()) > 0),
              f"{opposed['falls'].mean():.3f} and {learn['falls'].mean():.3f} of them"),
    )  # fmt: skip


def _shared_claims(table: Table) -> tuple[Claim, ...]:
    lengths, prefix = np.unique(table["suffix"]), table["prefix"].max()

    def mean(column: str, trained: str) -> np.ndarray:
        rows = (
            table.where(features="correlated", prefix=0, suffix=k, trained=trained) for k in lengths
        )
        return np.array([x[column].mean() for x in rows])

    null = table.where(features="orthogonal")["falls"]
    cosine, alone, together = (
        mean("cosine", "alone"),
        mean("Δ chosen", "alone"),
        mean("Δ chosen", "together"),
    )
    token = np.minimum(mean("Δ sentiment", "alone"), mean("Δ sentiment", "together"))
    right, own, kernel = (
        mean("own right", "alone"),
        mean("own right", "together"),
        mean("kernel right", "together"),
    )
    flow, first = table["flow R²"], table["first-order R²"]
    without, with_prefix = (table.where(prefix=p, suffix=0, trained="alone") for p in (0, prefix))
    moved = np.abs(with_prefix["gap"] - without["gap"]).max()
    return (
        Claim("the cosine grows with the suffix", bool((np.diff(cosine) > 0).all()), listing(cosine)),
        Claim("trained together, the chosen ends lower the longer the suffix",
              bool((np.diff(together) < 0).all() and together[-1] < 0), listing(together)),
        Claim("trained alone too", bool((np.diff(alone) < 0).all() and alone[-1] < 0), listing(alone)),
        Claim("the sentiment token itself rises at every length", bool((token > 0).all()), listing(token)),
        Claim("null: with orthogonal features no chosen falls", bool((null == 0).all()), f"most {null.max():.2f}"),
        Claim("a prefix raises the cosine and leaves the gap as it is (1e-9)",
              bool((with_prefix["cosine"] > without["cosine"]).all() and moved < 1e-9),
              f"cosine {without['cosine'].mean():.2f} to {with_prefix['cosine'].mean():.2f}, gap moved by {moved:.0e}"),
        Claim("the pair's own kernel tells who falls when it is trained alone (95 %)", bool((right >= 0.95).all()),
              listing(right)),
        Claim("together the kernel of all pairs does (95 %), the own one does not",
              bool((kernel >= 0.95).all() and (own < 0.95).any()), f"all {listing(kernel)}; own {listing(own)}"),
        Claim("kernel flow predicts the run in every setting (R² > .95)", bool((flow > 0.95).all()),
              f"least {flow.min():.2f}, mean {flow.mean():.2f}, largest error {table['flow error'].max():.2f} nats"),
        Claim("kernel flow is closer than the first step extended", bool((flow > first).mean() > 0.5),
              f"in {(flow > first).mean():.2f} of the rows, mean R² {flow.mean():.2f} and {first.mean():.2f}"),
        Claim("log π is concave in W: runs end below kernel flow (90 % of responses)",
              bool(table["below flow"].mean() > 0.9), f"{table['below flow'].mean():.2f}"),
    )  # fmt: skip
