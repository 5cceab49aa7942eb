"""The policies that predictions are tested on, evaluated once, and optimizers' steps from there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from simgrad import objectives, tree
from simgrad.models import (
    Apply,
    LoraApply,
    ModelConfig,
    TransformerApply,
    bind,
    init_transformer,
    linear_softmax,
    unconstrained_features,
)
from simgrad.pairs import Batch, Pair, padded
from simgrad.theory import PairKernel, pair_kernel, responses
from simgrad.theory.optimizers import updated
from simgrad.typing import Array, Float, Theta
from simgrad.validation.checks import Check
from simgrad.validation.grid import Arithmetic, Grid, optimizer
from simgrad.validation.measure import pulled

VOCAB = 32

CONTEXT_TABLES = {
    "linear-softmax": linear_softmax,
    "unconstrained-features": unconstrained_features,
}
"""How to build the models that are no transformers."""
_GATED = {"positions": "rope", "mlp": "gated", "activation": "silu", "mlp_width": 48}
_BIASED = {"qkv_bias": True, "mlp_bias": True, "attention_output_bias": True}
_SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {**_GATED, "kv_heads": 2},
    "transformer-tied": {**_BIASED, "tied": True, "norm": "layernorm"},
    "transformer-deep": {**_GATED, "depth": 6},
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
    def policy(self) -> tuple[Apply, Theta]:
        """The model and its parameters."""
        return self.apply, self.theta

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


def random_pairs(random: np.random.Generator, count: int) -> tuple[Pair, ...]:
    """Prompts of 3 tokens; responses of 1 to 3 own tokens and a shared ending of up to 4."""

    def draw(length: int) -> list[int]:
        return random.integers(0, VOCAB, length).tolist()

    pairs: list[Pair] = []
    while len(pairs) < count:
        ending = int(random.integers(0, 5))
        prompt, shared = draw(3), draw(ending)
        chosen, rejected = (draw(int(random.integers(1, 4))) + shared for _ in range(2))
        pair = Pair(prompt, chosen, rejected)
        if pair.problem() is None:
            pairs.append(pair)
    return tuple(pairs)


def subject(name: str, grid: Grid, dtype: str) -> Subject:
    """A model of the grid with parameters in ``dtype``: the same draw, rounded, in every dtype."""
    random, count = np.random.default_rng(grid.seed), grid.pairs + grid.probes
    if name == grid.model:
        policy, pairs = _checkpoint(name, grid, count, dtype)
    else:
        pairs = random_pairs(random, count)
        policy = _small(name, pairs, grid.seed, random)
    offsets = np.random.default_rng(grid.seed + 1).normal(0, 0.5, (grid.pairs, 2))
    trained, probes = pairs[: grid.pairs], pairs[grid.pairs :]
    return Subject(name, *_in_dtype(*policy, dtype), trained, probes, offsets)


def _small(
    name: str, pairs: tuple[Pair, ...], seed: int, random: np.random.Generator
) -> tuple[Apply, Theta]:
    """A context table, or a transformer with parameters away from trivial values.

    Its gains are near 1, its biases near 0, its matrices scaled by fan-in.
    """
    if name in CONTEXT_TABLES:
        return CONTEXT_TABLES[name](pairs, VOCAB, 16, seed, "float64")
    small = {"vocab_size": VOCAB, "width": 32, "depth": 2, "heads": 4, "max_length": 16}
    config = ModelConfig(**{**small, **_SHAPES[name]}, dtype="float64")
    theta = jax.eval_shape(lambda: init_transformer(config))
    leaves, shapes = jax.tree.flatten(theta)

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        leaf = path.rsplit("/", 1)[-1]
        size = 0.3 if leaf == "table" else shape[-2] ** -0.5 if leaf == "kernel" else 0.1
        return jnp.asarray(size * random.normal(size=shape) + (leaf == "scale"))

    drawn = [draw(path, x.shape) for path, x in zip(tree.names(theta), leaves, strict=True)]
    return TransformerApply(config), shapes.unflatten(drawn)


def _checkpoint(
    name: str, grid: Grid, count: int, dtype: str
) -> tuple[tuple[Apply, Theta], tuple[Pair, ...]]:
    from simgrad.bridge import encode, load, read_rows

    policy = load(name, "float64" if dtype == "float64" else "float32")
    if isinstance(policy.apply, LoraApply):
        raise ValueError("adapters are not validated: merge them first")
    rows = read_rows(str(grid.data), 4 * count)
    if policy.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which the pairs of {grid.data} need")
    config = policy.config
    longest = min(grid.max_length, config.max_length)
    pairs = tuple(encode(rows, policy.tokenizer, longest, config.vocab_size).pairs)
    if len(pairs) < count:
        raise ValueError(
            f"{grid.data} gives {len(pairs)} usable pairs in its first {len(rows)} rows, "
            f"but pairs={grid.pairs} and probes={grid.probes} are needed: lower them, or raise "
            f"max_length={grid.max_length}"
        )
    return (policy.apply, policy.theta), pairs[:count]


def _in_dtype(apply: Apply, theta: Theta, dtype: str) -> tuple[Apply, Theta]:
    if isinstance(apply, TransformerApply):
        apply = TransformerApply(dataclasses.replace(apply.config, dtype=dtype))  # type: ignore[arg-type]
    return apply, jax.tree.map(lambda x: x.astype(dtype), theta)


def twin(subject: Subject) -> Subject:
    """The same numbers in float64."""
    apply, theta = _in_dtype(*subject.policy, "float64")
    return dataclasses.replace(subject, apply=apply, theta=theta)


@dataclass(frozen=True)
class Base(Subject):
    """A subject in one arithmetic, and what all its cells share.

    Attributes:
        arithmetic: dtype and precision.
        every: batches of one pair each, trained pairs first: one compiled program serves them all.
        logp: log π of the trained pairs.
        kernel: theirs, by the library's default route.
        alone: (d_w, -d_l) of each pair trained by itself, by objective.
        together: the same of the mean loss over all pairs.
    """

    arithmetic: Arithmetic
    every: tuple[Batch, ...]
    logp: Float[Array, "B 2"]
    kernel: PairKernel
    alone: dict[str, Float[Array, "B 2"]]
    together: dict[str, Float[Array, "B 2"]]

    @property
    def trained(self) -> tuple[Batch, ...]:
        """Batches of the trained pairs alone."""
        return self.every[: len(self.pairs)]

    @property
    def device(self) -> Any:
        """Where it was computed."""
        return next(iter(self.logp.devices()))

    def check(self, group: str, name: str, error: float, limit: float | None) -> Check:
        """A :class:`Check` on this model, in this arithmetic, on this device."""
        where = str(self.arithmetic), self.device.device_kind
        return Check(group, name, self.name, *where, error=error, limit=limit)


def base_of(subject: Subject, objectives: tuple[str, ...], arithmetic: Arithmetic) -> Base:
    """Evaluate a subject, whose parameters are of the arithmetic's dtype, once."""
    followed, count = subject.followed, len(subject.pairs)
    every = tuple(followed.take(slice(i, i + 1)) for i in range(followed.size))
    logp = joined(responses(*subject.policy, pair).logp for pair in every[:count])
    kernel = joined(pair_kernel(*subject.policy, pair) for pair in every[:count])
    alone, together = _forces(logp, subject.references(logp), followed.lengths[:count], objectives)
    return Base(
        **vars(subject),
        arithmetic=arithmetic,
        every=every,
        logp=logp,
        kernel=kernel,
        alone=alone,
        together=together,
    )


def joined(parts: Iterable[Any]) -> Any:
    """What was found pair by pair as one tree over all pairs."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


@functools.partial(jax.jit, static_argnames="names")
def _forces(
    logp: Array, reference: Array, lengths: Array, names: tuple[str, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(d_w, -d_l) of every pair under every objective, for its own loss and for the mean loss."""
    alone, together = {}, {}
    for name in names:
        force = objectives.get(name).force
        single = jax.vmap(lambda *x, f=force: f(*(y[None] for y in x))[0])
        alone[name] = single(logp, reference, lengths)
        together[name] = force(logp, reference, lengths) / len(logp)
    return alone, together


def step_of(base: Base, force: Float[Array, "B 2"], name: str, settled: bool = True) -> Theta:
    """The update of an optimizer at learning rate 1, when the mean loss has this force.

    Its moments are fed by two earlier gradients, unless they are to be fresh.
    """
    forces = (0.7 * force, jnp.roll(force, 1, 0), force) if settled else (force,)
    gradients = [_minus_sum(pulls(base, f)) for f in forces]
    return _last_update(name, gradients, bind(*base.policy).trained)


def pulls(base: Base, force: Array) -> list[Theta]:
    """Jᵀ c of each trained pair by itself."""
    each = zip(base.trained, force, strict=True)
    return [pulled(*base.policy, pair, c[None]) for pair, c in each]


@jax.jit
def _minus_sum(ascents: list[Theta]) -> Float[Array, " n"]:
    vectors = (ravel_pytree(jax.tree.map(tree.widen, ascent))[0] for ascent in ascents)
    total = functools.reduce(jnp.add, vectors)
    return -total.astype(jax.tree.leaves(ascents)[0].dtype)


@functools.partial(jax.jit, static_argnames="name")
def _last_update(name: str, gradients: list[Float[Array, " n"]], trained: Theta) -> Theta:
    """The update after these gradients, computed on all parameters in one vector."""
    transform = optimizer(name)
    point, whole = ravel_pytree(trained)
    state, step = transform.init(point), point
    for gradient in gradients:
        step, state = updated(transform, gradient, state, point)
    return whole(step.astype(point.dtype))
