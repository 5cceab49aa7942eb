"""The policies that predictions are tested on, with preference pairs and probes to follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import (
    Apply,
    LoraApply,
    ModelConfig,
    TransformerApply,
    init_transformer,
    linear_softmax,
)
from simgrad.models import unconstrained_features as unconstrained
from simgrad.pairs import Batch, Pair, padded
from simgrad.typing import Array, Float, Theta
from simgrad.validation.grid import Grid

VOCAB = 32

_SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {
        "positions": "rope",
        "kv_heads": 2,
        "mlp": "gated",
        "activation": "silu",
        "mlp_width": 48,
    },
    "transformer-tied": {
        "tied": True,
        "norm": "layernorm",
        "qkv_bias": True,
        "mlp_bias": True,
        "attention_output_bias": True,
    },
    "transformer-deep": {
        "positions": "rope",
        "depth": 6,
        "mlp": "gated",
        "activation": "silu",
        "mlp_width": 48,
    },
}


@dataclass(frozen=True)
class Subject:
    """A policy and the pairs that are trained on, then those that are only followed.

    Attributes:
        name: of the grid.
        apply: the model.
        theta: its parameters.
        pairs: trained on.
        probes: followed.
        reference: log π_ref minus log π of the trained pairs: the policy has left its reference.
    """

    name: str
    apply: Apply
    theta: Theta
    pairs: tuple[Pair, ...]
    probes: tuple[Pair, ...]
    reference: Float[np.ndarray, "B 2"]

    @property
    def batch(self) -> Batch:
        """The pairs that are trained on, of the same array shapes as :attr:`followed`."""
        return self.followed.take(np.arange(len(self.pairs)))

    @property
    def followed(self) -> Batch:
        """All pairs, the probes last."""
        return padded([*self.pairs, *self.probes])

    def references(self, logp: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
        """Log π_ref of the trained pairs, given log π."""
        return logp + jnp.asarray(self.reference, logp.dtype)


def random_pairs(
    random: np.random.Generator, count: int, vocab_size: int = VOCAB
) -> tuple[Pair, ...]:
    """Prompts of 3 tokens; responses of 1 to 3 own tokens and a shared ending of up to 4."""
    pairs: list[Pair] = []
    while len(pairs) < count:
        prompt, shared = (
            random.integers(0, vocab_size, n).tolist() for n in (3, random.integers(0, 5))
        )
        chosen, rejected = (
            random.integers(0, vocab_size, random.integers(1, 4)).tolist() for _ in range(2)
        )
        pair = Pair(prompt, chosen + shared, rejected + shared)
        if pair.problem() is None:
            pairs.append(pair)
    return tuple(pairs)


def subject(name: str, grid: Grid, dtype: str) -> Subject:
    """A model of the grid with parameters in ``dtype``: the same draw, rounded, in every dtype."""
    random = np.random.default_rng(grid.seed)
    if name == grid.model:
        return _checkpoint(name, grid, dtype)
    every = random_pairs(random, grid.pairs + grid.probes)
    if name == "linear-softmax":
        apply, theta = linear_softmax(every, VOCAB, 16, grid.seed, "float64")
    elif name == "unconstrained-features":
        apply, theta = unconstrained(every, VOCAB, 16, grid.seed, "float64")
    else:
        shape = {
            "vocab_size": VOCAB,
            "width": 32,
            "depth": 2,
            "heads": 4,
            "max_length": 16,
            **_SHAPES[name],
        }
        apply = TransformerApply(ModelConfig(**shape, dtype="float64"))
        theta = _random(apply, random)
    return _subject(name, apply, theta, every, grid, dtype)


def _random(apply: TransformerApply, random: np.random.Generator) -> Theta:
    """Parameters away from trivial values: gains near 1, biases near 0, matrices by fan-in."""
    abstract = jax.eval_shape(lambda: init_transformer(apply.config))
    size = {"table": lambda shape: 0.3, "kernel": lambda shape: shape[-2] ** -0.5}

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        leaf = path.rsplit("/", 1)[-1]
        noise = size.get(leaf, lambda shape: 0.1)(shape) * random.normal(size=shape)
        return jnp.asarray(noise + (leaf == "scale"))

    leaves = [
        draw(path, x.shape)
        for path, x in zip(tree.names(abstract), jax.tree.leaves(abstract), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _checkpoint(name: str, grid: Grid, dtype: str) -> Subject:
    from simgrad.bridge import encode, load, read_rows

    policy = load(name, "float64" if dtype == "float64" else "float32")
    rows = read_rows(str(grid.data), 4 * (grid.pairs + grid.probes))
    if policy.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which the pairs of {grid.data} need")
    encoded = encode(
        rows,
        policy.tokenizer,
        min(grid.max_length, policy.config.max_length),
        policy.config.vocab_size,
    )
    if len(encoded.pairs) < grid.pairs + grid.probes:
        raise ValueError(
            f"{grid.data} gives {len(encoded.pairs)} usable pairs in its first {len(rows)} rows, "
            f"but pairs={grid.pairs} and probes={grid.probes} are needed: lower them, or raise "
            f"max_length={grid.max_length}"
        )
    return _subject(
        name,
        policy.apply,
        policy.theta,
        tuple(encoded.pairs[: grid.pairs + grid.probes]),
        grid,
        dtype,
    )


def _subject(
    name: str, apply: Apply, theta: Theta, every: tuple[Pair, ...], grid: Grid, dtype: str
) -> Subject:
    offsets = np.random.default_rng(grid.seed + 1).normal(0, 0.5, (grid.pairs, 2))
    cast = jax.tree.map(lambda x: x.astype(dtype), theta)
    return Subject(
        name, _in_dtype(apply, dtype), cast, every[: grid.pairs], every[grid.pairs :], offsets
    )


def _in_dtype(apply: Apply, dtype: str) -> Apply:
    if isinstance(apply, TransformerApply):
        return TransformerApply(dataclasses.replace(apply.config, dtype=dtype))  # type: ignore[arg-type]
    if isinstance(apply, LoraApply):
        raise ValueError("adapters are not validated: merge them first")
    return apply


def twin(subject: Subject) -> Subject:
    """The same numbers in float64."""
    wide = jax.tree.map(lambda x: x.astype("float64"), subject.theta)
    return dataclasses.replace(subject, apply=_in_dtype(subject.apply, "float64"), theta=wide)
