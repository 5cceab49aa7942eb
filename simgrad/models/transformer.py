"""One decoder-only transformer for the toy models and for every checkpoint family."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from simgrad.models.config import ModelConfig
from simgrad.models.layers import Block, Norm, Table, Tape, visible
from simgrad.models.output import Output, Use
from simgrad.tree import accumulator
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["Transformer", "TransformerApply", "init_transformer"]


class Transformer(nnx.Module):
    """Embedding, ``depth`` stacked blocks run as one scan, final norm, unembedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        init, dtype = config.init, config.dtype
        self.embedding = Table(config.vocab_size, config.width, init.embedding, dtype, rngs)
        if config.positions == "learned":
            self.positions = Table(config.max_length, config.width, init.positions, dtype, rngs)
        if config.depth:
            stack = nnx.split_rngs(splits=config.depth)(nnx.vmap(functools.partial(Block, config)))
            self.layers = stack(rngs)
        if config.norm != "none" and config.norm_placement == "pre":
            self.final_norm = Norm(config, gain=init.final_norm)
        if not config.tied:
            std = init.unembedding / math.sqrt(config.width)
            self.unembedding = Table(config.vocab_size, config.width, std, dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"] | None = None,
        streams: Int[Array, "N T"] | None = None,
        rows: Int[Array, "N Q"] | None = None,
        taps: dict[str, Array] | None = None,
    ) -> Output:
        """Logits at ``rows`` (everywhere if None) and hidden states everywhere."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None], tokens.shape)
        if streams is None:
            streams = jnp.ones_like(tokens)
        tape = Tape(taps)
        (x,) = tape("lookup", tokens, {"embedding": self.embedding.table[...][tokens]})
        if self.config.positions == "learned":
            (p,) = tape("lookup", positions, {"positions": self.positions.table[...][positions]})
            x = x + p
        if self.config.depth:
            x = self._blocks(x, positions, streams, tape)
        hidden = self.final_norm(x, "final_norm", tape) if hasattr(self, "final_norm") else x
        read = hidden if rows is None else jnp.take_along_axis(hidden, rows[:, :, None], axis=1)
        table = (self.embedding if self.config.tied else self.unembedding).table[...]
        logits = jnp.einsum("nqd,vd->nqv", read, table, preferred_element_type=accumulator(table.dtype))
        (logits,) = tape("readout", read, {"unembedding": logits})
        return Output(logits, hidden, tape.uses)

    def _blocks(self, x: Array, positions: Array, streams: Array, tape: Tape) -> Array:
        mask = visible(positions, streams)
        graph, stacked = nnx.split(self.layers)
        inner = (
            None
            if tape.taps is None
            else {site.removeprefix("layers/"): tap for site, tap in tape.taps.items() if site.startswith("layers/")}
        )

        def step(x: Array, layer: tuple) -> tuple[Array, dict[str, Use]]:
            state, taps = layer
            block_tape = Tape(taps)
            return nnx.merge(graph, state)(x, positions, mask, block_tape), block_tape.uses

        x, uses = jax.lax.scan(step, x, (stacked, inner), length=self.config.depth)
        for site, use in uses.items():
            sites = tuple(f"layers/{s}" for s in use.sites)
            tape.uses[f"layers/{site}"] = Use(use.kind, sites, use.input, use.outputs)
        return x


@functools.lru_cache
def _graph(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]


@dataclass(frozen=True)
class TransformerApply:
    """The transformer of a configuration as a pure function: ``apply(theta, tokens, ...)``.

    See :class:`simgrad.models.Apply` for the arguments. ``theta`` is a nested dictionary whose leaves
    under ``layers/`` carry a leading axis of length ``depth``.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=11, width=8, depth=1, heads=2))
    >>> out = apply(theta, jnp.array([[1, 2, 3]]))
    >>> out.logits.shape, out.hidden.shape
    ((1, 3, 11), (1, 3, 8))
    """

    config: ModelConfig

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the parameters that are never trained."""
        return self.config.frozen

    def __call__(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"] | None = None,
        streams: Int[Array, "N T"] | None = None,
        rows: Int[Array, "N Q"] | None = None,
        taps: dict[str, Array] | None = None,
    ) -> Output:
        """Logits and hidden states; with ``taps`` also what the parameters acted on."""
        return nnx.merge(_graph(self.config), theta)(tokens, positions, streams, rows, taps)

    def taps(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        rows: Int[Array, "N Q"],
    ) -> dict[str, Float[Array, "..."]]:
        """Zeros shaped like the output of every parameterised operation."""

        def outputs(theta: Theta) -> dict[str, Array]:
            uses = self(theta, tokens, rows=rows, taps={}).uses.values()
            return {site: y for use in uses for site, y in zip(use.sites, use.outputs, strict=True)}

        return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(outputs, theta))


def init_transformer(config: ModelConfig, seed: int = 0) -> Theta:
    """Random parameters with the standard deviations of ``config.init``, as a nested dictionary."""
    model = Transformer(config, nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
