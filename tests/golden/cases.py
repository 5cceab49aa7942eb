"""Tiny random checkpoints of every family, described by their configurations.

Weights are drawn by numpy from each tensor's name, so that the golden files hold results only.
"""

import json
import zlib

import numpy as np

_LLAMA = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN_LAYERS = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}


def _scaled(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


CASES = {
    "gpt2_tied": {
        "model_type": "gpt2",
        "vocab_size": 37,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
    },
    "gpt2_untied_wide": {
        "model_type": "gpt2",
        "vocab_size": 37,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 32,
        "n_inner": 32,
        "tie_word_embeddings": False,
    },
    "llama_mha_tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "llama_gqa_head_dim": {
        "model_type": "llama",
        **_LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "llama_mqa_biases": {
        "model_type": "llama",
        **_LLAMA,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "llama_rope_linear": {"model_type": "llama", **_LLAMA, **_scaled("linear", factor=4.0)},
    "llama_rope_dynamic": {"model_type": "llama", **_LLAMA, **_scaled("dynamic", factor=2.0)},
    "llama_rope_llama3": {
        "model_type": "llama",
        **_LLAMA,
        "head_dim": 16,
        **_scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    },
    "llama_rope_yarn": {
        "model_type": "llama",
        **_LLAMA,
        "head_dim": 16,
        **_scaled("yarn", factor=4.0, original_max_position_embeddings=8),
    },
    "mistral_gqa": {
        "model_type": "mistral",
        **_LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": None,
    },
    "qwen2_tied_yarn": {
        "model_type": "qwen2",
        **_LLAMA,
        **_QWEN_LAYERS,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        **_scaled(
            "yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, truncate=False
        ),
    },
    "qwen2_mqa": {"model_type": "qwen2", **_LLAMA, **_QWEN_LAYERS, "num_key_value_heads": 1},
}

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 24))


def weight(name, shape):
    """The tensor called ``name``: float32, of moderate size, gains near one."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return (1 + 0.1 * values if "norm" in name or "ln_" in name else 0.2 * values).astype(
        np.float32
    )


def write_config(folder, case):
    """config.json of a case."""
    (folder / "config.json").write_text(json.dumps(CASES[case]), encoding="utf-8")
