"""What every model returns, and how a model is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from simgrad.typing import Array, Float, Int, Theta


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input", "outputs"],
    meta_fields=["kind", "sites"],
)
@dataclass(frozen=True)
class Use:
    """One array that parameters acted on during a forward pass.

    ``sites`` are the paths of the parameters that read it (query, key and value share one input),
    and ``kind`` says how: ``linear`` y = x W + b, ``affine`` y = x * gain + b, ``lookup`` y =
    table[x], ``readout`` y = table @ x; ``state`` is what a layer or the final norm received, which
    no parameter reads. ``outputs`` are those of linear maps, which a backward pass needs again.
    """

    kind: Literal["linear", "affine", "lookup", "readout", "state"]
    sites: tuple[str, ...]
    input: Array
    outputs: tuple[Array, ...] = ()


Visit = Callable[[Use, tuple[Array, ...]], dict[str, Any]]
"""What a backward pass calls for each :class:`Use` and its signals: results by name.

Signals are (J N T O), one array a site.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of a forward pass.

    Attributes:
        logits: at the requested rows, or at every position.
        hidden: the state that multiplies the unembedding, at every position.
        uses: what parameterised operations acted on (only of :meth:`TappedApply.record`), else
            empty.
    """

    logits: Float[Array, "N Q V"]
    hidden: Float[Array, "N T D"]
    uses: dict[str, Use] = field(default_factory=dict)


def plain(
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"] | None,
    streams: Int[Array, "N T"] | None,
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """Positions and streams; those of plain sequences where they are not given."""
    if positions is None:
        here = jnp.arange(tokens.shape[1], dtype=tokens.dtype)
        positions = jnp.broadcast_to(here[None], tokens.shape)
    return positions, jnp.ones_like(tokens) if streams is None else streams


@runtime_checkable
class Apply(Protocol):
    """A model as a pure, hashable function of parameters and tokens.

    ``positions`` restart at each response of a packed sequence. ``streams`` are bit sets: a token
    sees another when it stands no earlier and all its streams are also the other's, so a prompt
    (streams 1 and 2) is read by both responses and neither reads the other; 0 is padding. ``rows``
    are the positions that need logits. Missing arguments mean one plain sequence.
    """

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of the parameters that are trained (:func:`simgrad.tree.selected`); (): all."""
        ...

    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of hidden states, in float32 or better."""
        ...

    def __call__(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"] | None = None,
        streams: Int[Array, "N T"] | None = None,
        rows: Int[Array, "N Q"] | None = None,
    ) -> Output:
        """Logits and hidden states."""
        ...


@runtime_checkable
class TappedApply(Apply, Protocol):
    """A model that can also report what its parameters acted on, and send signals back to them."""

    def record(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        streams: Int[Array, "N T"],
        rows: Int[Array, "N Q"],
    ) -> Output:
        """The forward pass, with ``Output.uses`` filled in."""
        ...

    def backward(
        self,
        theta: Theta,
        positions: Int[Array, "N T"],
        streams: Int[Array, "N T"],
        uses: dict[str, Use],
        cotangents: Float[Array, "J N T D"],
        visit: Visit,
    ) -> dict[str, Any]:
        """Send cotangents of ``Output.hidden`` back and collect what ``visit`` makes of signals.

        Results of operations under ``layers/`` are stacked on a leading depth axis. Signals of one
        layer are there at a time. The readout is the caller's: it reads no more than the hidden
        states.
        """
        ...


@runtime_checkable
class Memory(Protocol):
    """A pytree that remembers the tokens read so far."""

    def repeat(self, count: int) -> Memory:
        """Each sequence ``count`` times, copies side by side."""
        ...


@runtime_checkable
class CachedApply(Apply, Protocol):
    """A model that can go on from the tokens that it has read."""

    def cache(self, theta: Theta, sequences: int, size: int) -> Memory:
        """Memory for ``sequences`` sequences of at most ``size`` tokens, none of them read."""
        ...

    def extend(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        cache: Any,
        rows: Int[Array, "N Q"] | None = None,
    ) -> tuple[Output, Any]:
        """Output at the new tokens, and the memory with them added.

        Each new token reads everything up to its own position.

        ``rows`` index the new tokens (None: logits at all of them). Writing at a position again
        replaces what was there, so a right-padded prompt is read whole and its row goes on at its
        own length.
        """
        ...
