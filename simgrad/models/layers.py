"""Linear maps, norms, rotary positions, attention and MLP in plain jnp, as flax-nnx modules.

Attention and norms are written out because the library's versions lose float64 or use fast
variance. Every parameterised operation reports to a :class:`Tape`, which is how exact gradient
inner products are later formed without ever forming a weight gradient.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simgrad.models.cache import Slots
from simgrad.models.config import ModelConfig, Rope
from simgrad.models.output import Use
from simgrad.tree import accumulator
from simgrad.typing import Array, Bool, Float, Int

_ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Tape:
    """Notes what parameterised operations act on, or stands in for a forward pass that was noted.

    With ``known`` outputs of linear maps, each keeps its value and is not computed again; ``taps``
    have no effect on any value, and the gradient with respect to one is the gradient at that
    operation's output. With neither, nothing is changed, and inputs and outputs are kept in
    ``uses`` if ``record``.
    """

    def __init__(
        self,
        record: bool = False,
        known: dict[str, Array] | None = None,
        taps: dict[str, Array] | None = None,
    ) -> None:
        self.record, self.known, self.taps = record, known or {}, taps
        self.uses: dict[str, Use] = {}

    def __call__(self, kind: str, x: Array, outputs: dict[str, Array]) -> tuple[Array, ...]:
        """Report that parameters at sites ``outputs`` read ``x``; return outputs to use next."""
        values = tuple(outputs.values())
        if self.taps is not None:
            return tuple(
                _recalled(y, self.taps[site], self.known.get(site, y))
                for site, y in outputs.items()
            )
        if self.record:
            kept = values if kind == "linear" else ()
            name = "readout" if kind == "readout" else next(iter(outputs))
            self.uses[name] = Use(kind, tuple(outputs), x, kept)  # type: ignore[arg-type]
        return values


@jax.custom_jvp
def _recalled(y: Array, tap: Array, known: Array) -> Array:
    """The value ``known`` with the derivative of ``y + tap``: y itself need not be computed."""
    return known


@_recalled.defjvp
def _recalled_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return primals[2], tangents[0] + tangents[1]


def _last(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: str) -> nnx.Param:
    draw = jax.random.normal(rngs.params(), shape, accumulator(dtype))
    return nnx.Param((draw * std).astype(dtype))


class Linear(nnx.Module):
    """y = x W + b with W of shape (I, O)."""

    def __init__(
        self, fan_in: int, out: int, bias: bool, std: float, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.kernel = _normal(rngs, (fan_in, out), std, dtype)
        if bias:
            self.bias = nnx.Param(jnp.zeros(out, dtype))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Apply the map to the last axis."""
        y = x @ self.kernel[...]
        return y + _last(self.bias[...], y) if hasattr(self, "bias") else y


class Lookup(nnx.Module):
    """One learned vector per row."""

    def __init__(self, rows: int, width: int, std: float, dtype: str, rngs: nnx.Rngs) -> None:
        self.table = _normal(rngs, (rows, width), std, dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm with two-pass variance, statistics in float32 or better."""

    def __init__(self, config: ModelConfig, gain: float = 1.0) -> None:
        self.kind, self.eps = config.norm, config.norm_eps
        self.scale = nnx.Param(jnp.full(config.width, gain, config.dtype))
        if config.norm == "layernorm":
            self.bias = nnx.Param(jnp.zeros(config.width, config.dtype))

    def __call__(self, x: Float[Array, "N T D"], site: str, tape: Tape) -> Float[Array, "N T D"]:
        """X / rms(x) * gain, or (x - mean) / std * gain + bias."""
        wide = x.astype(accumulator(x.dtype))
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        unit = wide.astype(x.dtype)
        y = unit * _last(self.scale[...], unit)
        y = y + _last(self.bias[...], y) if hasattr(self, "bias") else y
        return tape("affine", unit, {site: y})[0]


def unembedded(hidden: Float[Array, "*n D"], table: Float[Array, "V D"]) -> Float[Array, "*n V"]:
    """Logits ``table @ hidden``, accumulated in float32 or better."""
    wide = accumulator(table.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=wide)


def rope_frequencies(rope: Rope, head_dim: int, max_length: int) -> tuple[np.ndarray, float]:
    """Angular frequencies (radians per position) and the factor on cos and sin.

    linear: f / factor (position interpolation, arXiv 2306.15595). llama3: long wavelengths divided
    by ``factor``, short ones kept, linear blend between (Llama 3.1). yarn: arXiv 2309.00071, eqs.
    22-25.

    >>> rope_frequencies(Rope(theta=100.0), 4, 16)[0].tolist()
    [1.0, 0.1]
    """
    frequency = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    original = rope.original_max_length or max_length
    if rope.kind == "linear":
        return frequency / rope.factor, 1.0
    if rope.kind == "llama3":
        turns = original * frequency / (2 * math.pi)  # full turns within the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return frequency * (keep + (1 - keep) / rope.factor), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequency, head_dim, original)
    return frequency, 1.0


def _yarn(
    rope: Rope, frequency: np.ndarray, head_dim: int, original: int
) -> tuple[np.ndarray, float]:
    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    divide = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    blended = frequency * (1 - divide + divide / rope.factor)
    return blended, magnitude(1.0) if factor is None else factor


def rotate(
    x: Float[Array, "N T H E"], positions: Int[Array, "N T"], rope: Rope, max_length: int
) -> Float[Array, "N T H E"]:
    """Rotate the two halves of each head by its position's angles (Llama layout)."""
    frequency, factor = rope_frequencies(rope, x.shape[-1], max_length)
    # angles grow with position: best precision on offer
    wide = jax.dtypes.canonicalize_dtype(jnp.float64)
    frequency = jnp.asarray(frequency, wide)[None, None, None, :]
    angle = positions.astype(wide)[:, :, None, None] * frequency
    cos, sin = ((f(angle) * factor).astype(accumulator(x.dtype)) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def visible(positions: Int[Array, "N T"], streams: Int[Array, "N T"]) -> Bool[Array, "N T T"]:
    """True where the query (axis 1) may read the key (axis 2).

    A key is read when it stands no later and is in every stream of the query. Padding (stream 0) is
    read by padding only, so no row of the mask is ever empty.

    >>> import jax.numpy as jnp
    >>> streams = jnp.array([[3, 1, 2]])  # prompt, chosen, rejected
    >>> visible(jnp.array([[0, 1, 1]]), streams)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    query, key = streams[:, :, None], streams[:, None, :]
    return (positions[:, None, :] <= positions[:, :, None]) & ((query & key) == query)


@jax.checkpoint
def attend(
    query: Float[Array, "N T H E"],
    key: Float[Array, "N L K E"],
    value: Float[Array, "N L K E"],
    mask: Bool[Array, "N T L"],
) -> Float[Array, "N T H E"]:
    """softmax(q k^T / sqrt(head_dim)) v over the visible positions; H is a multiple of K.

    The T x L weights are computed again in the backward pass: that is cheaper than keeping them.
    """
    n, t, h, e = query.shape
    wide = accumulator(query.dtype)
    grouped = (query / math.sqrt(e)).reshape(n, t, key.shape[2], -1, e)
    scores = jnp.einsum("nqkge,nske->nkgqs", grouped, key, preferred_element_type=wide)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("nkgqs,nske->nqkge", weights, value).reshape(n, t, h, e)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, e, init = config.width, config.head_features, config.init.matrices
        out_std = init / math.sqrt(config.heads * e * 2 * config.depth)

        def projection(heads: int) -> Linear:
            return Linear(d, heads * e, config.qkv_bias, init / math.sqrt(d), config.dtype, rngs)

        self.query = projection(config.heads)
        self.key = projection(config.n_kv_heads)
        self.value = projection(config.n_kv_heads)
        self.output = Linear(
            config.heads * e, d, config.attention_output_bias, out_std, config.dtype, rngs
        )

    def __call__(
        self,
        x: Float[Array, "N T D"],
        positions: Int[Array, "N T"],
        mask: Bool[Array, "N T L"],
        tape: Tape,
        slots: Slots | None = None,
    ) -> Float[Array, "N T D"]:
        """softmax(q k^T / sqrt(head_dim)) v over visible positions (the cache's with ``slots``)."""
        c, (n, t, _) = self.config, x.shape
        outputs = {f"attention/{k}": getattr(self, k)(x) for k in ("query", "key", "value")}
        q, k, v = (y.reshape(n, t, -1, c.head_features) for y in tape("linear", x, outputs))
        if c.positions == "rope":
            q, k = (rotate(y, positions, c.rope, c.max_length) for y in (q, k))
        if slots is not None:
            k, v = slots(k, v)
        mixed = attend(q, k, v, mask).reshape(n, t, -1)
        return tape("linear", mixed, {"attention/output": self.output(mixed)})[0]


class Mlp(nnx.Module):
    """Plain or gated two-layer perceptron."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.activation = _ACTIVATIONS[config.activation]
        d, f, init = config.width, config.mlp_features, config.init.matrices

        def linear(fan_in: int, out: int, std: float) -> Linear:
            return Linear(fan_in, out, config.mlp_bias, std, config.dtype, rngs)

        if config.mlp == "gated":
            self.gate = linear(d, f, init / math.sqrt(d))
        self.up = linear(d, f, init / math.sqrt(d))
        self.down = linear(f, d, init / math.sqrt(f * 2 * config.depth))

    def __call__(self, x: Float[Array, "N T D"], tape: Tape) -> Float[Array, "N T D"]:
        """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
        if hasattr(self, "gate"):
            gate, up = tape("linear", x, {"mlp/gate": self.gate(x), "mlp/up": self.up(x)})
            inner = self.activation(gate) * up
        else:
            inner = self.activation(tape("linear", x, {"mlp/up": self.up(x)})[0])
        return tape("linear", inner, {"mlp/down": self.down(inner)})[0]


class Block(nnx.Module):
    """Attention and MLP, each with its residual connection and norm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.placement = config.norm_placement
        self.attention = Attention(config, rngs)
        if config.norm != "none":
            self.attention_norm = Norm(config)
        if config.mlp != "none":
            self.mlp = Mlp(config, rngs)
            if config.norm != "none":
                self.mlp_norm = Norm(config)

    def __call__(
        self,
        x: Float[Array, "N T D"],
        positions: Int[Array, "N T"],
        mask: Bool[Array, "N T L"],
        tape: Tape,
        slots: Slots | None = None,
    ) -> Float[Array, "N T D"]:
        """One layer of the residual stream."""
        x = self._residual(
            x, "attention_norm", tape, lambda y: self.attention(y, positions, mask, tape, slots)
        )
        if hasattr(self, "mlp"):
            x = self._residual(x, "mlp_norm", tape, lambda y: self.mlp(y, tape))
        return x

    def _residual(self, x: Array, site: str, tape: Tape, sublayer) -> Array:
        norm = getattr(self, site, None)
        if norm is None:
            return x + sublayer(x)
        if self.placement == "pre":
            return x + sublayer(norm(x, site, tape))
        return norm(x + sublayer(x), site, tape)
