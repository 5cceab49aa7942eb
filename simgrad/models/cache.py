"""What generation remembers of read tokens, so that each new one is one short forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad.models.output import Apply, CachedApply, Inputs, Output
from simgrad.typing import Array, Bool, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, slot = position in the sequence.

    A query at position p reads the slots ≤ p, so whatever lies in later slots (a shorter prompt's
    padding, a longer sequence's past) does not matter: it is overwritten before it can be read.
    """

    keys: Float[Array, "depth N L K E"]
    values: Float[Array, "depth N L K E"]

    def visible(self, positions: Int[Array, "N T"]) -> Bool[Array, "N T L"]:
        """True where the query at a position may read the slot.

        >>> cache = Cache(jnp.zeros((1, 1, 4, 1, 2)), jnp.zeros((1, 1, 4, 1, 2)))
        >>> cache.visible(jnp.array([[0, 2]]))[0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 1, 0]]
        """
        slots = jnp.arange(self.keys.shape[2], dtype=positions.dtype)
        return slots[None, None, :] <= positions[:, :, None]

    def repeat(self, count: int) -> Cache:
        """Each sequence ``count`` times, copies side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=1), self)


class Slots:
    """One layer's cache slots: takes keys and values of new tokens, returns those of all slots.

    The cache goes from layer to layer whole, so that a compiled loop writes into it in place.
    """

    def __init__(self, cache: Cache, layer: Int[Array, ""], positions: Int[Array, "N T"]) -> None:
        self.cache, self.layer, self.positions = cache, layer, positions

    def __call__(
        self, key: Float[Array, "N T K E"], value: Float[Array, "N T K E"]
    ) -> tuple[Float[Array, "N L K E"], Float[Array, "N L K E"]]:
        """Write at the tokens' positions and read everything."""
        row = jnp.arange(key.shape[0], dtype=self.positions.dtype)[:, None]
        keys, values = (
            old.at[self.layer, row, self.positions].set(new)
            for old, new in ((self.cache.keys, key), (self.cache.values, value))
        )
        self.cache = Cache(keys, values)
        return keys[self.layer], values[self.layer]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenCache:
    """The tokens themselves, slot = position: what :class:`Rereading` remembers."""

    tokens: Int[Array, "N L"]

    def repeat(self, count: int) -> TokenCache:
        """Each sequence ``count`` times, copies side by side."""
        return TokenCache(jnp.repeat(self.tokens, count, axis=0))


@dataclass(frozen=True)
class Rereading(CachedApply):
    """Any model as a :class:`simgrad.models.CachedApply`, rereading everything for each token.

    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair
    >>> apply, theta = linear_softmax([Pair([1], [2], [3])], vocab_size=5)
    >>> apply, at = Rereading(apply), jnp.array([[0]])
    >>> output, _ = apply.extend(theta, jnp.array([[1]]), at, apply.cache(theta, 1, 8))
    >>> output.logits.shape
    (1, 1, 5)
    """

    base: Apply

    def read(self, theta: Theta, inputs: Inputs) -> Output:
        """The model's own output."""
        return self.base.read(theta, inputs)

    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """The model's own."""
        return self.base.readout(theta, hidden)

    def cache(self, theta: Theta, sequences: int, size: int) -> TokenCache:
        """No tokens yet."""
        return TokenCache(jnp.zeros((sequences, size), jnp.int32))

    def extend(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        cache: TokenCache,
        rows: Int[Array, "N Q"] | None = None,
    ) -> tuple[Output, TokenCache]:
        """Logits at ``rows`` of the new tokens, and hidden states, from a pass over all slots."""
        n, size = cache.tokens.shape
        slots = jnp.arange(size, dtype=positions.dtype)[None]
        row = jnp.arange(n, dtype=positions.dtype)[:, None]
        read = cache.tokens.at[row, positions].set(tokens.astype(cache.tokens.dtype))
        streams = (slots <= positions.max(axis=1, keepdims=True)).astype(read.dtype)
        at = positions if rows is None else jnp.take_along_axis(positions, rows, axis=1)
        output = self.base(theta, read, jnp.broadcast_to(slots, read.shape), streams, at)
        hidden = jnp.take_along_axis(output.hidden, positions[:, :, None], axis=1)
        return Output(output.logits, hidden), TokenCache(read)


def cached(apply: Apply) -> CachedApply:
    """``apply`` itself if it keeps a cache, else :class:`Rereading` around it.

    >>> from simgrad.models import ModelConfig, create
    >>> apply, _ = create(ModelConfig(vocab_size=5, width=8, heads=2))
    >>> cached(apply) is apply
    True
    """
    return apply if isinstance(apply, CachedApply) else Rereading(apply)
