"""Log-probs and hidden states of the responses in a batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models.output import Apply, Inputs, Output
from simgrad.pairs import Batch, in_chunks
from simgrad.typing import Array, Bool, Float, Int, Theta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """A model's output on both responses of each pair; the axis of length 2 is (chosen, rejected).

    Attributes:
        token_logp: log π(y_k | x, y_<k) in nats, 0 where padded.
        logits: of the states that predict the response tokens, float32 or better.
        hidden: those states (last prompt position to last-but-one response position), 0 where
            padded.
        last_hidden: state at each response's last token, which has read the whole response.
    """

    token_logp: Float[Array, "B 2 R"]
    logits: Float[Array, "B 2 R V"]
    hidden: Float[Array, "B 2 R D"]
    last_hidden: Float[Array, "B 2 D"]

    @property
    def logp(self) -> Float[Array, "B 2"]:
        """Log π(y | x) = Σ_k log π(y_k | x, y_<k) in nats."""
        return self.token_logp.sum(-1)


def sequences(batch: Batch) -> Inputs:
    """The N = B S sequences of a batch, logits asked for on the response rows (Q = 2 R / S)."""
    b, s, t = batch.tokens.shape
    tokens, positions, streams = (
        x.reshape(b * s, t) for x in (batch.tokens, batch.positions, batch.streams)
    )
    return Inputs(tokens, positions, streams, batch.rows.reshape(b * s, -1))


@functools.partial(jax.jit, static_argnames="apply")
def responses(apply: Apply, theta: Theta, batch: Batch) -> Responses:
    """Evaluate both responses of every pair in one forward pass, logits on response rows only.

    Compiled once per ``apply`` (which must be hashable) and batch shape.

    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, packed
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> responses(apply, theta, packed([Pair([1, 2], [3], [4, 5])])).logp.shape
    (1, 2)
    """
    return arranged(apply.read(theta, sequences(batch)), batch)


def arranged(output: Output, batch: Batch) -> Responses:
    """Arrange a model's output on the batch's sequences by pair and response."""
    b, s, t = batch.tokens.shape
    rows, last = batch.rows, batch.last
    valid, targets = batch.valid, batch.targets
    logits = output.logits.reshape(*rows.shape, -1)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    token_logp = jnp.where(valid, at_target - jax.nn.logsumexp(logits, axis=-1), 0.0)
    states = jnp.broadcast_to(
        output.hidden.reshape(b, s, t, -1), (b, 2, t, output.hidden.shape[-1])
    )
    hidden = jnp.take_along_axis(states, rows[..., None], axis=2)
    hidden = jnp.where(valid[..., None], hidden, jnp.zeros((), hidden.dtype))
    last_hidden = jnp.take_along_axis(states, last[..., None, None], axis=2)[:, :, 0]
    return Responses(token_logp, logits, hidden, last_hidden)


@functools.partial(jax.jit, static_argnames="apply")
def sequence_logp(apply: Apply, theta: Theta, batch: Batch) -> Float[Array, "B 2"]:
    """Log π(y | x) of both responses of every pair, in nats, a few pairs at a time."""
    return in_chunks(lambda some: responses(apply, theta, some).logp, batch)


def prediction_error(
    logits: Float[Array, "*rows V"],
    targets: Int[Array, "*rows"],
    valid: Bool[Array, "*rows"] | None = None,
) -> Float[Array, "*rows V"]:
    """e_y - π, the gradient of log π(y) with respect to the logits; 0 where not ``valid``.

    >>> import jax.numpy as jnp
    >>> prediction_error(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [[-0.25, -0.25, 0.75, -0.25]]
    """
    logits = tree.widen(logits)
    here = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    others = jnp.where(here, 0.0, jax.nn.softmax(logits, axis=-1))
    # 1 - π_y as the sum of the other probabilities, which does not cancel where the model is
    # certain
    error = jnp.where(here, others.sum(-1, keepdims=True), -others)
    return (
        error if valid is None else jnp.where(valid[..., None], error, jnp.zeros((), error.dtype))
    )


def require_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape: JAX would clamp indices or broadcast without a word."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}, but {shape} is needed")


def require_wide(trained: Theta) -> None:
    """Refuse trained parameters below float32, in which small steps would be rounded away."""
    if narrow := [str(x.dtype) for x in jax.tree.leaves(trained) if x.dtype.itemsize < 4]:
        raise ValueError(
            f"parameters are {narrow[0]}: small steps would be rounded away; convert theta to "
            "float32"
        )
