"""What every model returns, and how a model is called."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """N sequences of T tokens as a model reads them.

    Attributes:
        tokens: ids.
        positions: of each token; they restart at each response of a packed sequence.
        streams: bit sets. A token sees another when it stands no earlier and all its streams are
            also the other's, so a prompt (streams 1 and 2) is read by both responses and neither
            reads the other; 0 is padding.
        rows: positions that need logits (None: all).
    """

    tokens: Int[Array, "N T"]
    positions: Int[Array, "N T"]
    streams: Int[Array, "N T"]
    rows: Int[Array, "N Q"] | None

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"] | None = None,
        streams: Int[Array, "N T"] | None = None,
        rows: Int[Array, "N Q"] | None = None,
    ) -> Inputs:
        """Plain sequences, but for what is given."""
        if positions is None:
            here = jnp.arange(tokens.shape[1], dtype=tokens.dtype)
            positions = jnp.broadcast_to(here[None], tokens.shape)
        return cls(tokens, positions, jnp.ones_like(tokens) if streams is None else streams, rows)

    def wanted(self, hidden: Float[Array, "N T D"]) -> Float[Array, "N Q D"]:
        """The states whose logits are asked for."""
        if self.rows is None:
            return hidden
        return jnp.take_along_axis(hidden, self.rows[:, :, None], axis=1)


class Apply(ABC):
    """A model as a pure, hashable function of parameters and tokens: ``apply(theta, tokens, ...)``.

    A subclass (a frozen dataclass) says which parameters are trained, how a batch is read and how
    logits are read off hidden states.
    """

    trainable: tuple[str, ...] = ()
    """Patterns of the parameters that are trained (:func:`simgrad.tree.selected`); (): all."""

    def __call__(
        self,
        theta: Theta,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"] | None = None,
        streams: Int[Array, "N T"] | None = None,
        rows: Int[Array, "N Q"] | None = None,
    ) -> Output:
        """Logits and hidden states; see :class:`Inputs` for what is left out."""
        return self.read(theta, Inputs.of(tokens, positions, streams, rows))

    @abstractmethod
    def read(self, theta: Theta, inputs: Inputs) -> Output:
        """Logits and hidden states."""

    @abstractmethod
    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of hidden states, in float32 or better."""


class TappedApply(Apply):
    """A model that can also report what its parameters acted on, and send signals back to them."""

    @abstractmethod
    def record(self, theta: Theta, inputs: Inputs) -> Output:
        """The forward pass, with ``Output.uses`` filled in."""

    @abstractmethod
    def backward(
        self,
        theta: Theta,
        inputs: Inputs,
        uses: dict[str, Use],
        cotangents: Float[Array, "J N T D"],
        visit: Visit,
    ) -> dict[str, Any]:
        """Send cotangents of ``Output.hidden`` back and collect what ``visit`` makes of signals.

        Results of operations under ``layers/`` are stacked on a leading depth axis. Signals of one
        layer are there at a time. The readout is the caller's: it reads no more than the hidden
        states.
        """


@runtime_checkable
class Memory(Protocol):
    """A pytree that remembers the tokens read so far."""

    def repeat(self, count: int) -> Memory:
        """Each sequence ``count`` times, copies side by side."""
        ...


class CachedApply(Apply):
    """A model that can go on from the tokens that it has read."""

    @abstractmethod
    def cache(self, theta: Theta, sequences: int, size: int) -> Memory:
        """Memory for ``sequences`` sequences of at most ``size`` tokens, none of them read."""

    @abstractmethod
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
