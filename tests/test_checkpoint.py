"""Loading checkpoints: the mapping is total, and every refusal names its cause."""

import gc
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, TOKENS
from helpers import golden, write_checkpoint
from safetensors.numpy import load_file, save_file

import simgrad
from simgrad.bridge import Policy, UnsupportedCheckpointError, device_mesh
from simgrad.models import ModelConfig, TransformerApply, init_transformer

LLAMA = "llama_gqa_head_dim"
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


def load(folder, case=LLAMA, dtype="float64", **changes):
    return simgrad.load(write_checkpoint(folder, case, tokenizer=False, **changes), dtype)


@pytest.mark.parametrize(
    ("case", "fields", "text"),
    [
        (
            LLAMA,
            {"model_type": "gemma2"},
            "model_type 'gemma2' is not supported; supported families: gpt2, llama",
        ),
        (LLAMA, {"surprise": 3}, "unknown attribute surprise=3"),
        (
            LLAMA,
            {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
            "quantization_config",
        ),
        (LLAMA, {"hidden_act": "tanh"}, "activation 'tanh'"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}},
            "cannot read .*longrope",
        ),
        (LLAMA, {"rope_parameters": {**LONGROPE, "rope_theta": 1e4}}, "rope_type 'longrope'"),
        (LLAMA, {"model_type": "no_such_family"}, "cannot read .*no_such_family"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "rope_theta": 1e4}},
            "'yarn' lack factor",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "linear", "factor": "two", "rope_theta": 1e4}},
            "factor must be a number, got 'two'",
        ),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts=8"),
        ("mistral_gqa", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen2_mqa", {"use_sliding_window": True, "sliding_window": 8}, "sliding"),
        (
            "qwen2_mqa",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding_attention",
        ),
        (
            "gpt2_tied",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True",
        ),
        ("gpt2_tied", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_configurations_are_named(tmp_path, case, fields, text):
    with pytest.raises(UnsupportedCheckpointError, match=text):
        load(tmp_path, case, **fields)


def test_harmless_attributes_are_accepted(tmp_path):
    load(
        tmp_path,
        attention_dropout=0.1,
        torch_dtype="float32",
        is_llama_config=True,
        rope_interleaved=False,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k},
            "missing tensors: model.layers.1.mlp.up",
        ),
        (
            lambda t: t | {"model.layers.0.extra.weight": np.zeros(2, np.float32)},
            "surplus.*model.layers.0.extra.weight",
        ),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": np.zeros(2, np.float32)},
            "surplus.*layers.2",
        ),
        (
            lambda t: t | {"model.norm.weight": np.zeros(5, np.float32)},
            r"model.norm.weight gives shape \(5,\)",
        ),
        (lambda t: t | {"model.norm.weight": np.zeros(24, np.int8)}, "dtype int8: quantised"),
        (lambda t: t | {"norm.weight": t["model.norm.weight"]}, "norm.weight is there twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, text):
    with pytest.raises(UnsupportedCheckpointError, match=text):
        load(tmp_path, change=change)


def test_tied_head_must_equal_the_embedding(tmp_path):
    case = "llama_mha_tied"
    same = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()}  # noqa: E731
    load(tmp_path, case, change=same)
    with pytest.raises(UnsupportedCheckpointError, match="lm_head.weight differs"):
        load(
            tmp_path,
            case,
            change=lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
        )


def test_missing_head_of_an_untied_model_is_named(tmp_path):
    with pytest.raises(UnsupportedCheckpointError, match="missing tensors: .*lm_head.weight"):
        load(tmp_path, change=lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})


def test_gpt2_files_without_prefix_and_with_buffers(tmp_path):
    """The Hub's own gpt2 files hold attention masks and no "transformer." prefix."""

    def as_on_the_hub(tensors):
        bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        return bare | {
            "h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32),
            "h.1.attn.masked_bias": np.ones(1, np.float32),
        }

    policy = load(tmp_path, "gpt2_tied", change=as_on_the_hub)
    assert (
        np.abs(
            policy.apply(policy.theta, jnp.asarray(TOKENS)).logits - golden("gpt2_tied")[0]
        ).max()
        < 1e-10
    )


def test_sharded_files(tmp_path):
    whole = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {n: file for file, part in shards.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = simgrad.load(tmp_path, "float64")
    logits = [p.apply(p.theta, jnp.asarray(TOKENS)).logits for p in (whole, again)]
    np.testing.assert_array_equal(*logits)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"b\.safetensors is missing"):
        simgrad.load(tmp_path)


def test_bfloat16_files_and_dtypes(tmp_path):
    import ml_dtypes

    policy = load(
        tmp_path,
        change=lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()},
        dtype="bfloat16",
    )
    assert policy.theta["embedding"]["table"].dtype == jnp.bfloat16
    assert policy.config.dtype == "bfloat16"


def test_the_host_holds_one_leaf_at_a_time(tmp_path):
    """Beside what devices hold, which on a CPU may be the arrays that were read themselves."""
    config = ModelConfig(
        2048, 256, 4, 4, mlp="gated", positions="rope", activation="silu", mlp_width=1024
    )
    abstract = jax.eval_shape(lambda: init_transformer(config))
    theta = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
    simgrad.save(Policy(TransformerApply(config), theta, config), tmp_path)
    sizes = [x.nbytes for x in jax.tree.leaves(theta)]
    for mesh in (None, device_mesh()):
        gc.collect()
        tracemalloc.start()  # numpy reports its arrays
        loaded = simgrad.load(tmp_path, mesh=mesh)
        left, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert max(sizes) < peak
        assert peak - left < 2 * max(sizes) < 0.5 * sum(sizes)
        jax.tree.map(np.testing.assert_array_equal, loaded.theta, theta)


def test_errors_before_reading(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a valid Hub id"):
        simgrad.load("no/such/folder/here")
    with pytest.raises(FileNotFoundError, match="is not a folder, and the Hub did not give it"):
        simgrad.load("nobody/nothing")
    write_checkpoint(tmp_path, tokenizer=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UnsupportedCheckpointError, match=r"pytorch_model\.bin: convert to safetensors"
    ):
        simgrad.load(tmp_path)


def test_policy_carries_configuration_and_tokenizer(checkpoint):
    policy = simgrad.load(checkpoint)
    assert (policy.config.n_kv_heads, policy.config.head_features) == (2, 8)
    assert policy.tokenizer.eos_token == "</s>"
    assert CASES[LLAMA]["max_position_embeddings"] == policy.config.max_length


@pytest.mark.parametrize("kept", [0, 5, 60, -100])
def test_truncated_weights_are_refused_by_name(tmp_path, kept):
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(
        UnsupportedCheckpointError, match=r"model\.safetensors is damaged .*: download or copy it"
    ):
        simgrad.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors.index.json", "{", r"index\.json is damaged .*: download or copy it"),
        ("model.safetensors.index.json", '{"weight_map": 3}', r"index\.json is damaged"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', r"index\.json is damaged"),
        ("config.json", '{"a":' * 9999 + "1" + "}" * 9999, r"cannot read .*config\.json"),
        ("tokenizer.json", "{", "cannot read the tokenizer in .*: download or copy it again"),
        ("config.json", "{", r"cannot read .*config\.json"),
        ("config.json", "\udcff", r"cannot read .*config\.json"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, text, message):
    write_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UnsupportedCheckpointError, match=message):
        simgrad.load(tmp_path)
