"""What a transformer is made of, as frozen configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) and its length-scaled variants.

    Angle of frequency i at position p: ``p * f_i`` with ``f_i = theta ** (-2i / head_dim)``, then
    rescaled by ``kind``. ``dynamic`` changes nothing up to the model's ``max_length``, beyond which
    simgrad does not go; it is kept so that such checkpoints load.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class InitScales:
    """Standard deviations at initialisation.

    ``embedding`` and ``positions`` are absolute; ``matrices`` multiplies ``1/sqrt(fan_in)``
    (matrices that write to the residual stream are further divided by ``sqrt(2 * depth)``);
    ``unembedding`` multiplies ``1/sqrt(width)``; ``final_norm`` is the constant gain of the last
    norm.
    """

    embedding: float = 0.3
    positions: float = 0.1
    matrices: float = 1.0
    unembedding: float = 1.0
    final_norm: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, from a bare embedding to a Llama-like checkpoint.

    Attributes:
        vocab_size: V, number of tokens.
        width: D, size of the residual stream.
        depth: number of blocks; 0 leaves embedding, final norm and unembedding.
        heads: query heads.
        kv_heads: key and value heads (``None``: as many as ``heads``; 1 is multi-query attention).
        head_dim: features per head (``None``: ``width // heads``).
        max_length: longest sequence in tokens; size of the table when ``positions="learned"``.
        positions: learned table, rotary, or none at all.
        rope: used when ``positions="rope"``.
        norm: ``rmsnorm`` (gain), ``layernorm`` (gain and bias) or ``none``.
        norm_placement: ``pre``: x + f(norm(x)) with a final norm; ``post``: norm(x + f(x)) without
            one.
        norm_eps: added to the (mean) square before the root.
        mlp: ``gated``: down(act(gate(x)) * up(x)); ``plain``: down(act(up(x))); ``none``: attention
            only.
        mlp_width: hidden features of the MLP (``None``: ``4 * width``).
        activation: ``gelu_tanh`` is GPT-2's "gelu_new".
        qkv_bias: bias on query, key and value.
        attention_output_bias: bias on the attention's output matrix.
        mlp_bias: bias on the MLP's matrices.
        tied: the unembedding is the embedding table.
        init: standard deviations for :func:`simgrad.models.create`.
        dtype: parameters and activations; norms, softmax and inner products use float32 or better.
    """

    vocab_size: int
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 512
    positions: Literal["learned", "rope", "none"] = "learned"
    rope: Rope = field(default_factory=Rope)
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    mlp: Literal["plain", "gated", "none"] = "plain"
    mlp_width: int | None = None
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    init: InitScales = field(default_factory=InitScales)
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.heads % self.n_kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.n_kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}: set head_dim"
            )
        if self.positions == "rope" and self.head_features % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_features}")

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_features(self) -> int:
        """Features per head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def mlp_features(self) -> int:
        """Hidden features of the MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width
