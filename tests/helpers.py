"""Tolerances by dtype, models of every kind, tiny checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from golden.cases import CASES, weight
from safetensors.numpy import save_file

from simgrad.models import ModelConfig, create, linear_softmax, unconstrained_features
from simgrad.pairs import Pair

VOCAB = 13

PAIRS = [
    Pair([1, 5, 3], [7, 2, 7, 1], [8, 9, 2]),
    Pair([1], [7], [8, 5]),
    Pair([4, 4, 4, 4], [4, 4, 2], [4, 2]),
    Pair([2, 6], [3, 9, 10, 11, 12], [5, 9, 10, 11, 12]),
]


def tolerance(dtype):
    """Relative tolerance for a short chain of operations in ``dtype``."""
    return {"float64": 1e-10, "float32": 2e-5, "bfloat16": 5e-2}[np.dtype(dtype).name]


def close(a, b, dtype="float64", scale=1.0):
    """Assert that two trees agree to the dtype's tolerance, relative to the larger entries."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(
            x, y, rtol=tolerance(dtype), atol=scale * tolerance(dtype) * (np.abs(y).max() + 1e-300)
        )


def force(d_w, d_l):
    """What an objective does to (chosen, rejected) log-probs: (d_w, -d_l) on a last axis."""
    return jnp.stack([d_w, -d_l], -1)


TRANSFORMERS = {
    "plain": {},
    "tied_layernorm_biases": {
        "tied": True,
        "norm": "layernorm",
        "qkv_bias": True,
        "mlp_bias": True,
        "attention_output_bias": True,
    },
    "rope_mqa_gated_tied": {
        "positions": "rope",
        "kv_heads": 1,
        "mlp": "gated",
        "activation": "silu",
        "tied": True,
    },
    "rope_gqa_head_dim": {
        "positions": "rope",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "activation": "relu",
    },
    "no_norm_no_mlp_no_positions": {"norm": "none", "mlp": "none", "positions": "none"},
    "bare_embedding": {"depth": 0},
    "post_norm": {"norm_placement": "post"},
}
MODELS = [*TRANSFORMERS, "linear_softmax", "unconstrained_features"]


def model(kind, dtype="float64", pairs=PAIRS, **overrides):
    """``(apply, theta)`` of a kind in :data:`MODELS`."""
    if kind == "linear_softmax":
        return linear_softmax(pairs, VOCAB, 8, dtype=dtype)
    if kind == "unconstrained_features":
        return unconstrained_features(pairs, VOCAB, 8, dtype=dtype)
    base = {
        "vocab_size": VOCAB,
        "width": 8,
        "depth": 2,
        "heads": 2,
        "max_length": 32,
        "dtype": dtype,
    }
    apply, theta = create(ModelConfig(**{**base, **TRANSFORMERS[kind], **overrides}))
    # gains and biases away from their trivial initial values
    keys = iter(jax.random.split(jax.random.key(7), 100))
    return apply, jax.tree.map(
        lambda x: x + (0.1 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), theta
    )


WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "yes",
    "no",
    "never",
    "maybe",
    "is",
    "it",
    "so",
    "?",
    "good",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def write_tokenizer(folder, template=True):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_weights(folder, case, shapes, change=lambda tensors: tensors):
    """model.safetensors of a golden case; ``change`` edits the tensors first."""
    save_file(
        change({name: weight(name, shape) for name, shape in shapes.items()}),
        folder / "model.safetensors",
    )


def golden(case):
    """Stored results of a case: logits, hidden, tensor shapes."""
    from pathlib import Path

    with np.load(Path(__file__).parent / "golden" / f"{case}.npz") as file:
        return file["logits"], file["hidden"], json.loads(str(file["shapes"]))


def write_checkpoint(
    folder, case="llama_gqa_head_dim", tokenizer=True, change=lambda tensors: tensors, **fields
):
    """A whole checkpoint folder; ``fields`` change the configuration."""
    config = {k: v for k, v in {**CASES[case], **fields}.items() if v != "drop"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(folder, case, golden(case)[2], change)
    if tokenizer:
        write_tokenizer(folder)
    return folder
