"""Checkpoint families: how their configurations and tensors map to simgrad's transformer, and back.

The mapping is total both ways. Every configuration attribute is used, known to be without effect,
or rejected by name; every parameter leaf names the tensor it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simgrad.errors import InputError
from simgrad.models import ModelConfig, Rope

_HEAD = "lm_head.weight"


class UnsupportedCheckpointError(InputError):
    """A checkpoint that simgrad would not reproduce exactly."""


@dataclass(frozen=True)
class Source:
    """Tensor that fills a parameter leaf.

    ``name`` holds ``{layer}`` where there is one a layer. ``transpose`` turns (O, I) into (I, O).
    ``part`` is (index, count) for a leaf that is one of equal slices of the tensor's last axis.
    """

    name: str
    transpose: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        config: builds the :class:`ModelConfig` (without dtype) from the attributes.
        attributes: the inverse of ``config``; what the family cannot express comes back otherwise.
        used: attributes that ``config`` reads.
        required: attributes with one supported value, and what another would mean.
        sources: leaf path to tensor, for a configuration.
        prefix: may or may not stand before every tensor name.
        ignorable: tensor-name endings that hold no parameter.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    attributes: Callable[[ModelConfig], dict[str, Any]]
    used: frozenset[str]
    required: Mapping[str, Any]
    sources: Callable[[ModelConfig], dict[str, Source]]
    prefix: str
    ignorable: tuple[str, ...] = ()

    def full_name(self, name: str) -> str:
        """Name of a source's tensor in the family's own files: the prefix, but for the head."""
        return name if name == _HEAD else self.prefix + name


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

# attributes that change neither logits nor hidden states in evaluation mode
_WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout attn_pdrop bos_token_id chunk_size_feed_forward dtype "
    "embd_pdrop eos_token_id gradient_checkpointing id2label initializer_range is_llama_config "
    "label2id max_window_layers model_type n_ctx name_or_path output_attentions "
    "output_hidden_states output_past pad_token_id pretraining_tp problem_type "
    "reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "task_specific_params torch_dtype transformers.js_config transformers_version torchscript "
    "unk_token_id use_bfloat16 use_cache".split()
)
_REQUIRED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": (False, True),
    "rope_interleaved": False,
    "use_mrope": False,
    "quantization_config": None,
    "tie_encoder_decoder": False,
    "pruned_heads": ({}, None),
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedCheckpointError(
            f"activation {name!r} is not supported; there are: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


_ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_position_embeddings": "original_max_length"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_length",
        **{n: n for n in "attention_factor beta_fast beta_slow mscale mscale_all_dim".split()},
        "truncate": "truncate",
    },
}


_ROPE_NEEDS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}


def _rope(parameters: Mapping[str, Any] | None) -> Rope:
    parameters = dict(parameters or {})
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise UnsupportedCheckpointError(
            f"rope_type {kind!r} is not supported; there are: {', '.join(_ROPE_FIELDS)}"
        )
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedCheckpointError("partial_rotary_factor other than 1 is not supported")
    fields = _ROPE_FIELDS[kind] | {"rope_theta": "theta"}
    if unknown := sorted(k for k, v in parameters.items() if k not in fields and v is not None):
        raise UnsupportedCheckpointError(
            f"rope_parameters of type {kind!r} hold unknown {', '.join(unknown)}"
        )
    if missing := sorted(k for k in _ROPE_NEEDS.get(kind, ()) if parameters.get(k) is None):
        raise UnsupportedCheckpointError(
            f"rope_parameters of type {kind!r} lack {', '.join(missing)}"
        )
    given = {fields[k]: v for k, v in parameters.items() if k in fields and v is not None}
    if texts := sorted(k for k, v in given.items() if not isinstance(v, int | float)):
        raise UnsupportedCheckpointError(
            f"rope_parameters: {texts[0]} must be a number, got {given[texts[0]]!r}"
        )
    return Rope(kind=kind, **given)


def rope_attributes(rope: Rope, max_length: int) -> dict[str, Any]:
    """A checkpoint's ``rope_parameters``: what its kind uses, model-dependent defaults resolved."""
    fields = _ROPE_FIELDS.get(rope.kind, {})
    values = {theirs: getattr(rope, ours) for theirs, ours in fields.items()}
    if "original_max_position_embeddings" in _ROPE_NEEDS.get(rope.kind, ()):
        values["original_max_position_embeddings"] = rope.original_max_length or max_length
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **given}


def _llama_like(attributes: Mapping[str, Any], **biases: bool) -> dict[str, Any]:
    if kinds := sorted(set(attributes.get("layer_types") or ()) - {"full_attention"}):
        raise UnsupportedCheckpointError(
            f"layer_types hold {', '.join(kinds)}; only full_attention is supported"
        )
    return {
        "vocab_size": attributes["vocab_size"],
        "width": attributes["hidden_size"],
        "depth": attributes["num_hidden_layers"],
        "heads": attributes["num_attention_heads"],
        "kv_heads": attributes.get("num_key_value_heads"),
        "head_dim": attributes.get("head_dim"),
        "max_length": attributes["max_position_embeddings"],
        "positions": "rope",
        "rope": _rope(attributes.get("rope_parameters")),
        "norm": "rmsnorm",
        "norm_eps": attributes["rms_norm_eps"],
        "mlp": "gated",
        "mlp_width": attributes["intermediate_size"],
        "activation": _activation(attributes["hidden_act"]),
        "tied": attributes["tie_word_embeddings"],
        **biases,
    }


def _llama_like_attributes(config: ModelConfig, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_features,
        "max_position_embeddings": config.max_length,
        "rope_parameters": rope_attributes(config.rope, config.max_length),
        "rms_norm_eps": float(config.norm_eps),
        "intermediate_size": config.mlp_features,
        "hidden_act": _ACTIVATION_NAMES.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied,
        **more,
    }


def _llama(attributes: Mapping[str, Any]) -> dict[str, Any]:
    bias, mlp_bias = bool(attributes.get("attention_bias")), bool(attributes.get("mlp_bias"))
    return _llama_like(attributes, qkv_bias=bias, attention_output_bias=bias, mlp_bias=mlp_bias)


def _llama_attributes(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return _llama_like_attributes(config, "LlamaForCausalLM", **biases)


def _mistral(attributes: Mapping[str, Any]) -> dict[str, Any]:
    if attributes.get("sliding_window") is not None:
        raise UnsupportedCheckpointError(
            f"sliding_window={attributes['sliding_window']} is not supported; if your sequences "
            "are shorter than the window, set it to null in config.json"
        )
    return _llama_like(attributes)


def _mistral_attributes(config: ModelConfig) -> dict[str, Any]:
    return _llama_like_attributes(config, "MistralForCausalLM", sliding_window=None)


def _qwen2(attributes: Mapping[str, Any]) -> dict[str, Any]:
    if attributes.get("use_sliding_window"):
        raise UnsupportedCheckpointError(
            "use_sliding_window=True (sliding window attention) is not supported"
        )
    return _llama_like(attributes, qkv_bias=True)


def _qwen2_attributes(config: ModelConfig) -> dict[str, Any]:
    return _llama_like_attributes(
        config, "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=None
    )


def _gpt2(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": attributes["vocab_size"],
        "width": attributes["n_embd"],
        "depth": attributes["n_layer"],
        "heads": attributes["n_head"],
        "max_length": attributes["n_positions"],
        "norm": "layernorm",
        "norm_eps": attributes["layer_norm_epsilon"],
        "mlp_width": attributes["n_inner"],
        "activation": _activation(attributes["activation_function"]),
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tied": attributes["tie_word_embeddings"],
    }


def _gpt2_attributes(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": float(config.norm_eps),
        "n_inner": config.mlp_width,
        "activation_function": _ACTIVATION_NAMES.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied,
    }


def _head(config: ModelConfig) -> dict[str, Source]:
    return {} if config.tied else {"unembedding/table": Source(_HEAD)}


def _gpt2_sources(config: ModelConfig) -> dict[str, Source]:
    block = "h.{layer}."
    linear = {"attention/output": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    norms = {
        "layers/attention_norm": f"{block}ln_1",
        "layers/mlp_norm": f"{block}ln_2",
        "final_norm": "ln_f",
    }
    sources = {
        "embedding/table": Source("wte.weight"),
        "positions/table": Source("wpe.weight"),
        **_head(config),
    }
    for i, site in enumerate(("query", "key", "value")):
        sources[f"layers/attention/{site}/kernel"] = Source(
            f"{block}attn.c_attn.weight", part=(i, 3)
        )
        sources[f"layers/attention/{site}/bias"] = Source(f"{block}attn.c_attn.bias", part=(i, 3))
    for site, name in linear.items():
        sources[f"layers/{site}/kernel"] = Source(f"{block}{name}.weight")
        sources[f"layers/{site}/bias"] = Source(f"{block}{name}.bias")
    for site, name in norms.items():
        sources[f"{site}/scale"] = Source(f"{name}.weight")
        sources[f"{site}/bias"] = Source(f"{name}.bias")
    return sources


def _llama_sources(config: ModelConfig) -> dict[str, Source]:
    block = "layers.{layer}."
    linear = {
        "attention/query": ("self_attn.q_proj", config.qkv_bias),
        "attention/key": ("self_attn.k_proj", config.qkv_bias),
        "attention/value": ("self_attn.v_proj", config.qkv_bias),
        "attention/output": ("self_attn.o_proj", config.attention_output_bias),
        "mlp/gate": ("mlp.gate_proj", config.mlp_bias),
        "mlp/up": ("mlp.up_proj", config.mlp_bias),
        "mlp/down": ("mlp.down_proj", config.mlp_bias),
    }
    sources = {
        "embedding/table": Source("embed_tokens.weight"),
        "layers/attention_norm/scale": Source(f"{block}input_layernorm.weight"),
        "layers/mlp_norm/scale": Source(f"{block}post_attention_layernorm.weight"),
        "final_norm/scale": Source("norm.weight"),
        **_head(config),
    }
    for site, (name, bias) in linear.items():
        sources[f"layers/{site}/kernel"] = Source(f"{block}{name}.weight", transpose=True)
        if bias:
            sources[f"layers/{site}/bias"] = Source(f"{block}{name}.bias")
    return sources


_LLAMA_USED = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_parameters rms_norm_eps intermediate_size hidden_act "
    "tie_word_embeddings layer_types".split()
)
_GPT2_USED = frozenset(
    "vocab_size n_embd n_layer n_head n_positions layer_norm_epsilon n_inner activation_function "
    "tie_word_embeddings".split()
)


def _llama_family(
    config: Callable[[Mapping[str, Any]], dict[str, Any]],
    attributes: Callable[[ModelConfig], dict[str, Any]],
    *used: str,
) -> Family:
    reads, ignorable = _LLAMA_USED | set(used), ("rotary_emb.inv_freq",)
    return Family(config, attributes, reads, {}, _llama_sources, "model.", ignorable)


FAMILIES = {
    "gpt2": Family(
        _gpt2,
        _gpt2_attributes,
        _GPT2_USED,
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        _gpt2_sources,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    "llama": _llama_family(_llama, _llama_attributes, "attention_bias", "mlp_bias"),
    "mistral": _llama_family(_mistral, _mistral_attributes, "sliding_window"),
    "qwen2": _llama_family(_qwen2, _qwen2_attributes, "use_sliding_window", "sliding_window"),
}


def family_of(attributes: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Family of a configuration's attributes, and the arguments of its :class:`ModelConfig`.

    Raises:
        UnsupportedCheckpointError: names the family or the attribute that is not supported.
    """
    kind = attributes.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedCheckpointError(
            f"model_type {kind!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    required = _REQUIRED | dict(family.required)
    for name, value in attributes.items():
        if name in family.used or name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        if name not in required:
            raise UnsupportedCheckpointError(
                f"{kind} configuration has an unknown attribute {name}={value!r}: simgrad cannot "
                "tell whether it changes the model. If it does not, remove it from config.json"
            )
        allowed = required[name] if isinstance(required[name], tuple) else (required[name],)
        if value not in allowed:
            raise UnsupportedCheckpointError(
                f"{kind} configuration has unsupported {name}={value!r}"
            )
    return family, family.config(attributes)
