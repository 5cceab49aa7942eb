"""One decoder-only transformer for the toy models and for every checkpoint family."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simgrad.models.backward import backward
from simgrad.models.cache import Cache, Slots
from simgrad.models.config import ModelConfig
from simgrad.models.layers import Block, Lookup, Norm, Tape, unembedded, visible
from simgrad.models.output import CachedApply, Inputs, Output, TappedApply, Use, Visit
from simgrad.typing import Array, Bool, Float, Int, Theta


class Transformer(nnx.Module):
    """Embedding, ``depth`` stacked blocks run as one scan, final norm, unembedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        init, dtype = config.init, config.dtype
        self.embedding = Lookup(config.vocab_size, config.width, init.embedding, dtype, rngs)
        if config.positions == "learned":
            self.positions = Lookup(config.max_length, config.width, init.positions, dtype, rngs)
        if config.depth:
            stack = nnx.split_rngs(splits=config.depth)(nnx.vmap(functools.partial(Block, config)))
            self.layers = stack(rngs)
        if config.norm != "none" and config.norm_placement == "pre":
            self.final_norm = Norm(config, gain=init.final_norm)
        if not config.tied:
            std = init.unembedding / math.sqrt(config.width)
            self.unembedding = Lookup(config.vocab_size, config.width, std, dtype, rngs)

    def __call__(
        self, inputs: Inputs, mask: Bool[Array, "N T L"], tape: Tape, cache: Cache | None = None
    ) -> tuple[Output, Any]:
        """Logits where they are asked for, hidden states everywhere, the extended cache."""
        tokens, positions = inputs.tokens, inputs.positions
        (x,) = tape("lookup", tokens, {"embedding": self.embedding.table[...][tokens]})
        if self.config.positions == "learned":
            (p,) = tape("lookup", positions, {"positions": self.positions.table[...][positions]})
            x = x + p
        if self.config.depth:
            x, cache = self._blocks(x, positions, mask, tape, cache)
        if tape.record:
            tape.uses["state"] = Use("state", (), x)
        hidden = self.final_norm(x, "final_norm", tape) if hasattr(self, "final_norm") else x
        read = inputs.wanted(hidden)
        (logits,) = tape("readout", read, {self.head: self.readout(read)})
        return Output(logits, hidden, tape.uses), cache

    @property
    def head(self) -> str:
        """The table that reads logits off hidden states: the embedding's own where it is tied."""
        return "embedding" if self.config.tied else "unembedding"

    def readout(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of hidden states."""
        return unembedded(hidden, getattr(self, self.head).table[...])

    def _blocks(
        self, x: Array, positions: Array, mask: Array, tape: Tape, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        graph, stacked = nnx.split(self.layers)
        layers = None if cache is None else jnp.arange(self.config.depth)

        def step(
            carry: tuple[Array, Cache | None], layer: tuple
        ) -> tuple[tuple[Array, Cache | None], dict[str, Use]]:
            (x, kept), (state, number) = carry, layer
            block_tape = Tape(tape.record)
            slots = None if kept is None else Slots(kept, number, positions)
            if tape.record:
                block_tape.uses["state"] = Use("state", (), x)
            x = nnx.merge(graph, state)(x, positions, mask, block_tape, slots)
            return (x, None if slots is None else slots.cache), block_tape.uses

        (x, cache), uses = jax.lax.scan(
            step, (x, cache), (stacked, layers), length=self.config.depth
        )
        for site, use in uses.items():
            sites = tuple(f"layers/{s}" for s in use.sites)
            tape.uses[f"layers/{site}"] = Use(use.kind, sites, use.input, use.outputs)
        return x, cache


@functools.lru_cache
def _graph(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]


@dataclass(frozen=True)
class TransformerApply(TappedApply, CachedApply):
    """The transformer of a configuration as a pure function: ``apply(theta, tokens, ...)``.

    See :class:`simgrad.models.Apply` for the arguments. ``theta`` is a nested dictionary whose
    leaves under ``layers/`` carry a leading axis of length ``depth``.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=11, width=8, depth=1, heads=2))
    >>> out = apply(theta, jnp.array([[1, 2, 3]]))
    >>> out.logits.shape, out.hidden.shape
    ((1, 3, 11), (1, 3, 8))
    """

    config: ModelConfig
    trainable: tuple[str, ...] = ()

    def read(self, theta: Theta, inputs: Inputs) -> Output:
        """Logits and hidden states."""
        return self._read(theta, inputs, Tape())

    def record(self, theta: Theta, inputs: Inputs) -> Output:
        """The forward pass, and what the parameters acted on."""
        return self._read(theta, inputs, Tape(record=True))

    def _read(self, theta: Theta, inputs: Inputs, tape: Tape) -> Output:
        return self._model(theta)(inputs, visible(inputs.positions, inputs.streams), tape)[0]

    def _model(self, theta: Theta) -> Any:
        return nnx.merge(_graph(self.config), theta)

    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of hidden states."""
        return self._model(theta).readout(hidden)

    def cache(self, theta: Theta, sequences: int, size: int) -> Cache:
        """Empty key and value slots for ``sequences`` sequences of at most ``size`` tokens."""
        c = self.config
        shape = (c.depth, sequences, size, c.n_kv_heads, c.head_features)
        keys, values = (jnp.zeros(shape, theta["embedding"]["table"].dtype) for _ in range(2))
        return Cache(keys, values)

    def extend(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        cache: Cache,
        rows: Int[Array, "N Q"] | None = None,
    ) -> tuple[Output, Cache]:
        """Read new tokens after those in the cache; see :class:`simgrad.models.CachedApply`.

        >>> import jax.numpy as jnp
        >>> from simgrad.models import ModelConfig, create
        >>> apply, theta = create(ModelConfig(vocab_size=11, width=8, depth=1, heads=2))
        >>> cache = apply.cache(theta, 1, 4)
        >>> _, cache = apply.extend(theta, jnp.array([[1, 2]]), jnp.array([[0, 1]]), cache)
        >>> output, cache = apply.extend(theta, jnp.array([[3]]), jnp.array([[2]]), cache)
        >>> whole = apply(theta, jnp.array([[1, 2, 3]])).logits
        >>> bool(jnp.allclose(output.logits[0, 0], whole[0, 2], atol=1e-5))
        True
        """
        inputs = Inputs.of(tokens, positions, rows=rows)
        return self._model(theta)(inputs, cache.visible(positions), Tape(), cache)

    def backward(
        self,
        theta: Theta,
        inputs: Inputs,
        uses: dict[str, Use],
        cotangents: Float[Array, "J N T D"],
        visit: Visit,
    ) -> dict[str, Any]:
        """Signals at every operation with parameters: :class:`simgrad.models.TappedApply`.

        They come layer by layer.
        """
        return backward(self._model(theta), inputs, uses, cotangents, visit)


def init_transformer(config: ModelConfig, seed: int = 0) -> Theta:
    """Random parameters with the standard deviations of ``config.init``, as a nested dictionary."""
    model = Transformer(config, nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
