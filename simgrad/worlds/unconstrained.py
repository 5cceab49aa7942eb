"""``unconstrained``: models whose features learn freely (Razin et al., arXiv 2410.08847)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simgrad.models import ContextApply
from simgrad.pairs import Pair
from simgrad.typing import Theta
from simgrad.worlds.world import World

RESPONSES = (
    "one token",
    "long",
    "long, shared",
    "long, one error",
    "any length",
    "any length, shared",
)
"""One token each; the longest length or any; every second token in common; one error for all."""


@dataclass(frozen=True)
class Unconstrained(World):
    """Models W h(context) in which W and every h(context) learn, drawn at random, one pair each.

    First part: both responses are one token, W₋ has a given cosine with W₊ and its own norm. Second
    part: up to ``longest`` tokens, the first ones different; a state is √a (one vector a pair) +
    √(1 - a) (its own) + c W_y, scaled, with a and c drawn for each response, so that states are
    alike and tokens certain to differing degrees.

    Attributes:
        vocabulary: tokens.
        width: D of W and h.
        rows: mean norm of the rows of W, in the first and in the second part.
        states: norm of the states in both parts.
        learning_rates: of the runs (SGD) in both parts.
        alignments: cosines of W₊ and W₋ in the first part.
        draws: models drawn for each setting and seed.
        longest: most tokens of a response in the second part.
        alike: largest a of the second part.
        certain: largest c of the second part.
        beta: of DPO.
        steps: of the runs.
    """

    name: ClassVar[str] = "unconstrained"
    zero: ClassVar[tuple[str, ...]] = ("alike", "certain")
    vocabulary: int = 24
    width: int = 12
    rows: tuple[float, float] = (2.0, 1.0)
    states: tuple[float, float] = (0.5, 3.0)
    learning_rates: tuple[float, float] = (0.5, 0.05)
    alignments: tuple[float, ...] = (-0.5, 0.0, 0.5, 0.8, 0.95)
    draws: int = 96
    longest: int = 8
    alike: float = 0.8
    certain: float = 2.0
    beta: float = 0.1
    steps: int = 30

    def __post_init__(self) -> None:
        """Refuse knobs that leave nothing to measure."""
        super().__post_init__()
        self.require(min(self.width, self.longest) >= 2, "width and longest must be at least 2")
        least = 2 * self.longest + 1
        self.require(
            self.vocabulary >= least, f"vocabulary must be at least {least}, 2 longest + 1"
        )
        for name in ("rows", "states", "learning_rates"):
            both = getattr(self, name)
            good = len(both) == 2 and min(both) > 0
            self.require(good, f"{name} takes two positive numbers, got {both}")
        cosines = self.alignments
        good = len(cosines) > 0 and max(map(abs, cosines)) <= 1
        self.require(good, f"alignments are cosines, got {cosines}")
        self.require(self.alike <= 1, f"alike lies in [0, 1], got {self.alike}")

    def pairs(self, seed: int, shared: bool = True) -> list[Pair]:
        """The longest pair of the second part; seeds draw models and lengths."""
        chosen = list(range(1, self.longest + 1))
        rejected = [y if shared and k % 2 else y + self.longest for k, y in enumerate(chosen)]
        return [Pair([0], chosen, rejected)]

    def single(self, seed: int, alignment: float) -> Theta:
        """Models with ⟨W₊, W₋⟩ = alignment ‖W₊‖ ‖W₋‖ for tokens 0 and 1, on a leading axis."""
        random = np.random.default_rng([seed, 1])
        w, h = (_normal(random, self.draws, n, self.width) for n in (self.vocabulary, 1))
        plus, minus = w[:, 0] / _norm(w[:, 0]), w[:, 1]
        across = minus - (minus * plus).sum(-1, keepdims=True) * plus
        w[:, 1] = _norm(minus) * (
            alignment * plus + np.sqrt(1 - alignment**2) * across / _norm(across)
        )
        return _theta(self.states[0] * h / _norm(h), self.rows[0] * w)

    def longer(
        self, seed: int, kind: str, equal_norms: bool
    ) -> tuple[ContextApply, Theta, np.ndarray]:
        """Models for one of the :data:`RESPONSES`, and response lengths, on a leading axis."""
        random, n = np.random.default_rng([seed, 2]), self.draws
        contexts, targets, side = _contexts(self.pairs(seed, shared=kind.endswith("shared"))[0])
        w, common, own = (
            _normal(random, n, m, self.width) for m in (self.vocabulary, 1, len(contexts))
        )
        a, c = (top * random.random((n, 2))[:, side, None] for top in (self.alike, self.certain))
        h = np.sqrt(a) * common + np.sqrt(1 - a) * own + c * w[:, targets]
        size = np.exp(0 if equal_norms else random.normal(size=(n, len(contexts), 1)) / 2)
        lengths = random.integers(1, self.longest + 1, (n, 2))
        if not kind.startswith("any"):
            lengths[:] = 1 if kind == "one token" else self.longest
        if kind.endswith("one error"):
            w[:, 0] *= 3
            h = h + 3 * w[:, :1]
        return (
            ContextApply(contexts),
            _theta(self.states[1] * size * h / _norm(h), self.rows[1] * w),
            lengths,
        )


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Vectors of norm 1, on average."""
    return random.normal(size=shape) / np.sqrt(shape[-1])


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def _theta(features: np.ndarray, unembedding: np.ndarray) -> Theta:
    return {"features": {"table": features}, "unembedding": {"table": unembedding}}


def _contexts(pair: Pair) -> tuple[tuple[tuple[int, ...], ...], np.ndarray, np.ndarray]:
    """Contexts that predict tokens, the prompt first; the token after each, and whose it is."""
    found = [(tuple(pair.prompt), pair.chosen[0], 0)]
    for side, y in enumerate((pair.chosen, pair.rejected)):
        found += [((*pair.prompt, *y[:k]), y[k], side) for k in range(1, len(y))]
    contexts, targets, sides = zip(*found, strict=True)
    return contexts, np.array(targets), np.array(sides)
