"""What every world has: words, a model, a pretraining recipe, preference pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad import tree
from simgrad.dynamics.pretraining import Corpus, fit
from simgrad.dynamics.recipe import batch_order
from simgrad.dynamics.spread import spread_in_rounds
from simgrad.models import Apply, InitScales, ModelConfig, TransformerApply, init_transformer
from simgrad.pairs import Batch, Pair, padded
from simgrad.store import cache_folder, digest, identity, load_arrays, save_arrays
from simgrad.typing import Array, Int, Theta


@dataclass(frozen=True)
class Pretraining:
    """Adam with linear warm-up and cosine decay to 5 % of the peak, gradients clipped to norm 1.

    Attributes:
        steps: updates in all.
        batch_size: sequences of each.
        peak: highest learning rate.
        warmup: steps until it is reached.
    """

    steps: int = 400
    batch_size: int = 64
    peak: float = 3e-3
    warmup: int = 50

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        if min(self.steps, self.batch_size) < 1 or not self.peak > 0:
            raise ValueError(f"pretraining needs positive steps, batch_size and peak, got {self}")

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, one object for equal settings so that programs are shared."""
        return _optimizer(self)


@functools.lru_cache
def _optimizer(settings: Pretraining) -> optax.GradientTransformation:
    warmup = min(settings.warmup, settings.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.peak, warmup, settings.steps, end_value=0.05 * settings.peak
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


_W = TypeVar("_W", bound="World")


@dataclass(frozen=True)
class World:
    """A small controllable setting; subclasses are frozen dataclasses, their fields the knobs."""

    name: ClassVar[str] = ""
    end: ClassVar[str | None] = None
    """Word that ends every response, if the world has one."""
    pretraining: ClassVar[Pretraining] = Pretraining()

    tuning: ClassVar[tuple[str, ...]] = ()
    """Knobs that pretraining does not depend on."""
    zero: ClassVar[tuple[str, ...]] = ()
    """Knobs that may be 0 although they are not by default."""
    words: ClassVar[tuple[str, ...]] = ()
    """The vocabulary; word i is token i, and 0 begins every sequence. Empty without a model."""

    def __post_init__(self) -> None:
        """Refuse values that no run can be made of, by name."""
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, default, hint = getattr(self, f.name), f.default, hints[f.name]
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                self.require(value in choices, f"{f.name}={value!r}: choose {', '.join(choices)}")
            if isinstance(value, bool | str) or not isinstance(default, int | float):
                continue
            positive = value > 0 or (value == 0 and (default == 0 or f.name in self.zero))
            good = positive and math.isfinite(value)
            self.require(good, f"{f.name} must be positive and finite, got {value}")

    def require(self, holds: bool | np.bool_, message: str) -> None:
        """Refuse a value of a knob, in the name of the world.

        Raises:
            ValueError: it does not hold.
        """
        if not holds:
            raise ValueError(f"{self.name}: {message}")

    def model(self) -> ModelConfig:
        """The transformer of this world."""
        raise TypeError(f"{type(self).__name__} has no transformer")

    def corpus(self, seed: int) -> Corpus:
        """Pretraining sequences; of one shape for all seeds."""
        raise TypeError(f"{type(self).__name__} has no corpus")

    def pairs(self, seed: int) -> list[Pair]:
        """The world's preference pairs."""
        raise TypeError(f"{type(self).__name__} has no pairs")

    @property
    def has_transformer(self) -> bool:
        """Whether the world pretrains a transformer (others train models of their own pairs)."""
        return type(self).corpus is not World.corpus

    def policies(self, seeds: Sequence[int]) -> tuple[TransformerApply, Theta]:
        """The world's pretrained policies: :func:`pretrained`."""
        return pretrained(self, seeds)

    def each_policy(self, seeds: Sequence[int]) -> list[tuple[TransformerApply, Theta]]:
        """The pretrained policies one by one, on the device."""
        apply, thetas = pretrained(self, seeds)
        count = range(len(seeds))
        return [(apply, jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), thetas)) for i in count]

    def starts(self, seeds: Sequence[int], *which: Any) -> list[tuple[Apply, Theta, Batch]]:
        """Each seed's pretrained policy, and its pairs as one batch; ``which`` says which pairs."""
        draw: Callable[..., list[Pair]] = self.pairs
        policies = zip(self.each_policy(seeds), seeds, strict=True)
        return [(*policy, padded(draw(seed, *which))) for policy, seed in policies]

    def with_knobs(self: _W, **knobs: Any) -> _W:
        """This world with other values of some knobs.

        Raises:
            ValueError: unknown knob, by name, or a value of the wrong kind.
        """
        fields = {f.name: f for f in dataclasses.fields(self)}
        if unknown := sorted(set(knobs) - set(fields)):
            raise ValueError(
                f"{self.name} has no knob {', '.join(unknown)}; it has: {', '.join(fields)}"
            )
        for name, value in knobs.items():
            knobs[name] = _like(getattr(self, name), value, f"{self.name}: {name}")
        return dataclasses.replace(self, **knobs)


def _like(default: Any, value: Any, what: str) -> Any:
    """``value`` as the kind of the default; numbers may change kind where nothing is lost."""
    if isinstance(default, tuple):
        value = value if isinstance(value, tuple | list) else (value,)
        return tuple(_like(default[0], item, what) for item in value) if default else tuple(value)
    kind = type(default)
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if default is not None and (kind in (int, float) or not isinstance(value, kind)):
        raise ValueError(f"{what} takes a {kind.__name__} such as {default!r}, got {value!r}")
    return value


def small_model(
    vocabulary: int, init: InitScales, tied: bool = False, max_length: int = 32
) -> ModelConfig:
    """Two layers of width 64 in Llama's architecture: RMSNorm, rotary positions, gated SiLU."""
    return ModelConfig(
        vocab_size=vocabulary,
        width=64,
        depth=2,
        heads=4,
        max_length=max_length,
        positions="rope",
        mlp="gated",
        mlp_width=176,
        activation="silu",
        tied=tied,
        init=init,
    )


def learned_from(tokens: Int[np.ndarray, "N T"], first: int) -> Corpus:
    """Sequences of one length, each learned from its token ``first`` on."""
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, first:] = 1
    streams = jnp.ones(tokens.shape, jnp.int32)
    return Corpus(jnp.asarray(tokens, jnp.int32), streams, jnp.asarray(weights))


def pretrained(world: World, seeds: Sequence[int]) -> tuple[TransformerApply, Theta]:
    """The world's policy for each seed: ``(apply, theta)``, seeds on theta's leading axis.

    Seeds that were never trained are trained together on all local devices and kept in the cache
    folder, under the name of all that makes them: :func:`policy_identity`.
    """
    config = world.model()
    made_by = policy_identity(world)
    kind, folder = digest(made_by), cache_folder() / "worlds"
    files = {seed: folder / f"{world.name}-{kind}-{seed}.npz" for seed in seeds}
    anew = _MADE_ANEW.get()
    missing = [
        seed
        for seed, file in files.items()
        if not file.exists() or not (anew is None or file in anew)
    ]
    shapes = jax.eval_shape(lambda: init_transformer(config))
    names = tree.names(shapes)
    if missing:
        for seed, theta in zip(missing, _train(world, config, missing), strict=True):
            arrays = dict(zip(names, jax.tree.leaves(theta), strict=True))
            save_arrays(files[seed], arrays, {"kind": "world", "seed": seed, "identity": made_by})
            if anew is not None:
                anew.add(files[seed])
    stored = [load_arrays(files[seed])[0] for seed in seeds]
    theta = jax.tree.structure(shapes).unflatten([np.stack([s[n] for s in stored]) for n in names])
    return TransformerApply(config), theta


def policy_identity(world: World) -> dict[str, str]:
    """All that makes a world's policies: knobs, model, recipe, generating code, versions, device.

    Knobs in ``tuning`` do not count: pretraining does not depend on them.
    """
    fields = [f.name for f in dataclasses.fields(world) if f.name not in world.tuning]
    lineage = type(world).__mro__
    ours = next(c.__module__ for c in lineage if c.__module__.startswith("simgrad."))
    # of worlds that are defined elsewhere, the code is what their classes hold
    foreign = [
        vars(c) for c in lineage if not c.__module__.startswith("simgrad.") and c is not object
    ]
    return identity(
        ours,
        world=type(world).__qualname__,
        model=world.model(),
        pretraining=world.pretraining,
        knobs={name: getattr(world, name) for name in fields},
        methods=[[f for f in members.values() if inspect.isfunction(f)] for members in foreign],
    )


_MADE_ANEW: ContextVar[set[Path] | None] = ContextVar("policies made anew", default=None)


@contextlib.contextmanager
def pretrained_anew() -> Iterator[None]:
    """Within, every policy is pretrained again the first time, whatever the cache folder holds."""
    if _MADE_ANEW.get() is not None:
        yield
        return
    token = _MADE_ANEW.set(set())
    try:
        yield
    finally:
        _MADE_ANEW.reset(token)


def _train(world: World, config: ModelConfig, seeds: Sequence[int]) -> list[Theta]:
    settings = world.pretraining
    thetas = [init_transformer(config, seed) for seed in seeds]
    corpora = [world.corpus(seed) for seed in seeds]
    count = len(corpora[0].tokens)
    orders = [batch_order(count, settings.batch_size, settings.steps, seed) for seed in seeds]
    everything = list(zip(thetas, corpora, orders, strict=True))
    run, width, found = _fitting(TransformerApply(config), settings), jax.local_device_count(), []
    for start in range(0, len(everything), width):
        # one seed a device, always: a program for several would round differently, and a seed is to
        # have one policy
        some = [everything[min(i, len(everything) - 1)] for i in range(start, start + width)]
        theta, losses = next(
            spread_in_rounds(run, *jax.tree.map(lambda *xs: jnp.stack(xs), *some), rounds=1)
        )
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"pretraining {world} diverged: lower the peak learning rate")
        found += [jax.tree.map(lambda x, i=i: x[i], theta) for i in range(width)]
    return found[: len(everything)]


@functools.lru_cache
def _fitting(apply: Apply, settings: Pretraining) -> Any:
    def run(theta: Theta, data: Corpus, order: Array) -> tuple[Theta, Array]:
        return fit(apply, theta, data, settings.optimizer(), jnp.asarray(order))

    return run
