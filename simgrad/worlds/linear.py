"""``linear``: linear-softmax models with frozen features (Yuan et al., arXiv 2410.13828)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import expit, log_softmax, logit

from simgrad.dynamics.recipe import Recipe
from simgrad.models import ContextApply
from simgrad.objectives import DPO
from simgrad.pairs import Pair
from simgrad.typing import Theta
from simgrad.worlds.tuning import recipe_for
from simgrad.worlds.world import World

FROZEN = ("!features/*",)


@dataclass(frozen=True)
class Linear(World):
    """Linear-softmax models: prompt, shared prefix, one of two sentiment tokens, shared suffix.

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
        lengths, across, within = self.suffixes, self.across, self.correlation
        self.require(
            len(lengths) >= 2 and min(lengths) == 0,
            f"suffixes takes lengths, 0 and at least one more, got {lengths}",
        )
        self.require(
            across <= within < 1, f"0 ≤ across ≤ correlation < 1, got {across} and {within}"
        )
        shares = (self.chosen + self.rejected, self.sure_chosen, self.sure_rejected)
        self.require(max(shares) < 1, "probabilities must lie in (0, 1), chosen + rejected below 1")

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
