"""Saving checkpoints: what is saved is what is loaded, by simgrad and by transformers, or is
refused by name."""

import ast
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, TOKENS
from helpers import write_checkpoint, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import simgrad
from simgrad import tree
from simgrad.bridge import Policy, UnsupportedCheckpointError, encode, save, word_tokenizer
from simgrad.bridge.checkpoints.families import FAMILIES
from simgrad.models import (
    InitScales,
    ModelConfig,
    Rope,
    TransformerApply,
    add_lora,
    create,
    merge_lora,
)

BASE = {"vocab_size": 37, "width": 24, "depth": 2, "heads": 4, "max_length": 32}
LLAMA = {**BASE, "positions": "rope", "mlp": "gated", "activation": "silu", "mlp_width": 40}
GPT2 = {
    **BASE,
    "norm": "layernorm",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
BIASES = {"qkv_bias": True, "attention_output_bias": True}
KINDS = {
    "gpt2": (GPT2, "gpt2"),
    "gpt2_tied_narrow_relu": (
        {**GPT2, "tied": True, "mlp_width": 20, "activation": "relu"},
        "gpt2",
    ),
    "gpt2_gelu_three_layers": (
        {**GPT2, "depth": 3, "heads": 2, "activation": "gelu", "norm_eps": 1e-3},
        "gpt2",
    ),
    "llama_mha_tied": ({**LLAMA, "tied": True}, "llama"),
    "llama_gqa_head_dim": ({**LLAMA, "kv_heads": 2, "head_dim": 8}, "llama"),
    "llama_mqa_biases": (
        {**LLAMA, **BIASES, "kv_heads": 1, "mlp_bias": True, "activation": "gelu_tanh"},
        "llama",
    ),
    "llama_mlp_bias": (
        {**LLAMA, "mlp_bias": True, "mlp_width": None, "activation": "gelu"},
        "llama",
    ),
    "llama_linear": ({**LLAMA, "rope": Rope(kind="linear", factor=4.0)}, "llama"),
    "llama_dynamic": ({**LLAMA, "rope": Rope(theta=500.0, kind="dynamic", factor=2.0)}, "llama"),
    "llama_llama3": (
        {
            **LLAMA,
            "rope": Rope(theta=500.0, kind="llama3", factor=8.0, original_max_length=16),
            "head_dim": 16,
        },
        "llama",
    ),
    "llama_yarn": (
        {**LLAMA, "rope": Rope(kind="yarn", factor=4.0, original_max_length=8), "head_dim": 16},
        "llama",
    ),
    "llama_yarn_all": (
        {
            **LLAMA,
            "rope": Rope(
                theta=500.0,
                kind="yarn",
                factor=4.0,
                original_max_length=8,
                beta_fast=4.0,
                beta_slow=0.5,
                mscale=1.5,
                mscale_all_dim=0.5,
                truncate=False,
            ),
        },
        "llama",
    ),
    "llama_yarn_attention": (
        {**LLAMA, "rope": Rope(kind="yarn", factor=2.0, attention_factor=1.3)},
        "llama",
    ),
    "mistral": ({**LLAMA, "heads": 5, "kv_heads": 1, "head_dim": 8}, "mistral"),
    "qwen2": ({**LLAMA, "qkv_bias": True, "kv_heads": 2}, "qwen2"),
    "qwen2_head_dim_tied": (
        {**LLAMA, "qkv_bias": True, "heads": 5, "head_dim": 6, "tied": True},
        "qwen2",
    ),
    "llama_without_layers": ({**LLAMA, "depth": 0}, "llama"),
    "gpt2_without_layers": ({**GPT2, "depth": 0}, "gpt2"),
}


def policy_of(fields, dtype="float32", tokenizer=None):
    """A random policy, gains near one."""
    config = ModelConfig(**{**fields, "dtype": dtype})
    abstract = jax.eval_shape(lambda: create(config)[1])
    draw, leaves = np.random.default_rng(0), []
    for path, leaf in zip(tree.names(abstract), jax.tree.leaves(abstract), strict=True):
        values = 0.2 * draw.normal(size=leaf.shape) + path.endswith("scale")
        leaves.append(jnp.asarray(values.astype(leaf.dtype)))
    theta = jax.tree.structure(abstract).unflatten(leaves)
    return Policy(TransformerApply(config), theta, config, tokenizer)


def attributes(folder):
    return json.loads((folder / "config.json").read_text())


def resolved(config):
    """The configuration with every default written out, and without what its kind does not use."""
    rope = config.rope
    if config.positions != "rope":
        rope = Rope()
    elif rope.kind == "default":
        rope = Rope(rope.theta)
    elif rope.kind == "linear":
        rope = Rope(rope.theta, "linear", rope.factor)
    elif rope.kind == "dynamic":
        rope = Rope(rope.theta, "dynamic", rope.factor, rope.original_max_length)
    else:
        rope = dataclasses.replace(
            rope, original_max_length=rope.original_max_length or config.max_length
        )
        unused = ("low_freq_factor", "high_freq_factor") if rope.kind == "yarn" else _YARN
        rope = dataclasses.replace(rope, **{name: getattr(Rope(), name) for name in unused})
    explicit = {
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_features,
        "mlp_width": config.mlp_features,
    }
    return dataclasses.replace(config, **explicit, rope=rope, init=InitScales())


_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def assert_same(policy, again):
    """Same configuration, and the same parameters bit for bit."""
    assert resolved(again.config) == resolved(policy.config)
    assert tree.names(again.theta) == tree.names(policy.theta)
    for x, y in zip(jax.tree.leaves(policy.theta), jax.tree.leaves(again.theta), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


OTHER_DTYPES = [
    (kind, dtype)
    for kind in ("gpt2", "llama_mqa_biases")
    for dtype in ("bfloat16", "float16", "float64")
]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), *OTHER_DTYPES])
def test_what_is_saved_is_what_is_loaded(tmp_path, kind, dtype):
    fields, family = KINDS[kind]
    policy = policy_of(fields, dtype)
    folder = save(policy, tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert (attributes(folder)["model_type"], attributes(folder)["dtype"]) == (family, dtype)
    again = simgrad.load(folder, dtype)
    assert_same(policy, again)
    assert again.tokenizer is None


@pytest.mark.parametrize("case", CASES)
def test_loaded_checkpoints_are_saved(tmp_path, case):
    policy = simgrad.load(write_checkpoint(tmp_path, case, tokenizer=False), "float64")
    again = simgrad.load(save(policy, tmp_path / "again"), "float64")
    assert_same(policy, again)
    apply = [jax.jit(p.apply)(p.theta, jnp.asarray(TOKENS)) for p in (policy, again)]
    np.testing.assert_array_equal(apply[0].logits, apply[1].logits)
    assert (attributes(tmp_path / "again")["model_type"] == "llama") == case.startswith(
        ("llama", "mistral")
    )


@pytest.mark.parametrize("case", ["gpt2_untied_wide", "llama_mqa_biases", "qwen2_mqa"])
def test_tensors_have_the_names_and_shapes_of_the_file_that_was_loaded(tmp_path, case):
    policy = simgrad.load(write_checkpoint(tmp_path, case, tokenizer=False))
    before, after = (
        load_file(p / "model.safetensors") for p in (tmp_path, save(policy, tmp_path / "again"))
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_itself_says_the_same(tmp_path, kind, caplog):
    torch = pytest.importorskip("torch")
    import transformers

    policy = policy_of(KINDS[kind][0])
    folder = save(policy, tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
    finally:
        transformers.utils.logging.disable_propagation()
    assert not any(info.values())
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert type(model).__name__ == attributes(folder)["architectures"][0]
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS), use_cache=False).logits.numpy()
    ours = jax.jit(policy.apply)(policy.theta, jnp.asarray(TOKENS)).logits
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)


ROPES = st.fixed_dictionaries(
    {
        "theta": st.sampled_from([500.0, 10_000.0]),
        "kind": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]),
        "factor": st.sampled_from([1.0, 4.0]),
        "original_max_length": st.sampled_from([None, 4]),
        "low_freq_factor": st.sampled_from([1.0, 2.0]),
        "beta_fast": st.sampled_from([16.0, 32.0]),
        "attention_factor": st.sampled_from([None, 1.5]),
        "mscale": st.sampled_from([None, 0.7]),
        "truncate": st.booleans(),
    }
)
CHANGES = {
    "depth": st.integers(0, 2),
    "kv_heads": st.sampled_from([None, 1, 2, 4]),
    "head_dim": st.sampled_from([None, 4, 6]),
    "max_length": st.integers(1, 8),
    "positions": st.sampled_from(["learned", "rope", "none"]),
    "rope": ROPES,
    "norm": st.sampled_from(["rmsnorm", "layernorm", "none"]),
    "norm_placement": st.sampled_from(["pre", "post"]),
    "norm_eps": st.sampled_from([1e-5, 1e-6]),
    "mlp": st.sampled_from(["plain", "gated", "none"]),
    "mlp_width": st.sampled_from([None, 5, 32]),
    "activation": st.sampled_from(["gelu_tanh", "gelu", "relu", "silu"]),
    "qkv_bias": st.booleans(),
    "attention_output_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "tied": st.booleans(),
}
NEAR = [LLAMA, {**LLAMA, **BIASES}, {**LLAMA, "qkv_bias": True}, GPT2]
NEEDED = re.compile(r"(\w+)=([^ ]+) instead of ([^ ,]+)")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NEAR), st.fixed_dictionaries({}, optional=CHANGES))
def test_every_configuration_is_saved_or_refused_by_its_attributes(near, changes):
    """What a refusal asks for is enough: with it the model can be saved."""
    changes = {
        **changes,
        "rope": Rope(**changes.get("rope", {})),
        "init": InitScales(embedding=1.0),
    }
    config = ModelConfig(**{**near, "vocab_size": 5, "width": 16, **changes})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        try:
            save(policy_of(vars(config)), folder)
        except UnsupportedCheckpointError as error:
            assert not folder.exists()
            needed = NEEDED.findall(str(error))
            assert needed
            for attribute, _, ours in needed:
                assert repr(getattr(resolved(config), attribute)) == ours
            config = dataclasses.replace(
                config, **{a: ast.literal_eval(theirs) for a, theirs, _ in needed}
            )
            save(policy_of(vars(config)), folder)
        assert resolved(simgrad.load(folder).config) == resolved(config)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"norm": "none"}, "nearest is llama, which needs norm='rmsnorm' instead of 'none'$"),
        ({"norm_placement": "post"}, "norm_placement='pre' instead of 'post'$"),
        ({"mlp": "none"}, "mlp='gated' instead of 'none'$"),
        ({"positions": "none"}, "positions='rope' instead of 'none'$"),
        ({"attention_output_bias": True}, "attention_output_bias=False instead of True$"),
        (
            {**GPT2, "qkv_bias": False},
            "nearest is gpt2, which needs qkv_bias=True instead of False$",
        ),
        (
            {**GPT2, "kv_heads": 2, "head_dim": 8},
            "gpt2, which needs kv_heads=4 instead of 2, head_dim=6 instead of 8$",
        ),
        (
            {**GPT2, "heads": 5, "head_dim": 4},
            r"nearest is gpt2, which needs head_dim=4\.8 instead of 4$",
        ),
        (
            {**GPT2, "positions": "rope", "mlp": "plain"},
            "gpt2, which needs positions='learned' instead of 'rope'$",
        ),
        (
            {"heads": 5, "head_dim": 8, "mlp_bias": True},
            "nearest is mistral, which needs mlp_bias=False",
        ),
        (
            {"vocab_size": 37, "norm": "none", "mlp": "none"},
            "norm='rmsnorm' .*, mlp='gated' instead",
        ),
        (
            {"head_dim": 2, "rope": Rope(kind="dynamic", factor=2.0)},
            r"llama.*transformers to accept .*head_dim - 2",
        ),
    ],
)
def test_refusals_name_every_attribute_and_write_nothing(tmp_path, fields, text):
    base = {} if "norm" in fields and fields["norm"] == "layernorm" else LLAMA
    with pytest.raises(UnsupportedCheckpointError, match=text):
        save(policy_of({**base, **fields}), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_the_kind_of_model_does_not_use_is_no_reason_to_refuse(tmp_path):
    rope = Rope(kind="yarn", factor=4.0)
    save(policy_of({**GPT2, "rope": rope}), tmp_path)
    assert simgrad.load(tmp_path).config.rope == Rope()


def change(theta, path, leaf):
    """Theta with one leaf replaced, or left out (None)."""
    *outer, last = path.split("/")
    theta = jax.tree.map(lambda x: x, theta)
    inner = theta
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = leaf
    if leaf is None:
        del inner[last]
    return theta


@pytest.mark.parametrize(
    ("path", "leaf", "text"),
    [
        ("final_norm/scale", None, "final_norm/scale is missing"),
        (
            "layers/mlp/up/bias",
            np.zeros((2, 40), np.float32),
            "layers/mlp/up/bias has no place in the model",
        ),
        (
            "final_norm/scale",
            np.zeros(23, np.float32),
            r"final_norm/scale has shape \(23,\) where .* \(24,\)",
        ),
        (
            "final_norm/scale",
            np.zeros(24, np.float16),
            "final_norm/scale is float16 where .* float32",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, path, leaf, text):
    policy = policy_of(LLAMA)
    broken = dataclasses.replace(policy, theta=change(policy.theta, path, leaf))
    with pytest.raises(ValueError, match=f"do not fit the configuration: {text}$"):
        save(broken, tmp_path / "folder")
    with pytest.raises(ValueError, match="embedding/table is missing; "):
        save(dataclasses.replace(policy, theta={}), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_adapters_are_merged_first(tmp_path):
    policy = policy_of(LLAMA)
    lora, adapted = add_lora(policy.apply, policy.theta, ["layers/mlp/*/kernel"], rank=2)
    with pytest.raises(ValueError, match=r"merge them first with simgrad\.models\.merge_lora"):
        save(dataclasses.replace(policy, theta=adapted), tmp_path)
    merged = dataclasses.replace(policy, theta=merge_lora(lora, adapted))
    assert_same(merged, simgrad.load(save(merged, tmp_path)))


def test_apply_and_config_must_agree(tmp_path):
    policy = policy_of(LLAMA)
    other = dataclasses.replace(policy.config, norm_eps=1e-3)
    with pytest.raises(ValueError, match="describe different models"):
        save(dataclasses.replace(policy, config=other), tmp_path)


def test_a_sharded_checkpoint_is_replaced_as_a_whole(tmp_path):
    first, second = (
        policy_of({**LLAMA, "depth": 3}, tokenizer=write_tokenizer(tmp_path)),
        policy_of(GPT2),
    )
    save(first, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(["model.norm.weight"], "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("generation_config.json", "merges.txt", "notes.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"holds a tokenizer \(.*tokenizer\.json.*\) but the policy has none"
    ):
        save(second, tmp_path)
    assert_same(first, simgrad.load(tmp_path))
    words = word_tokenizer(["a", "b"], bos="a")
    save(dataclasses.replace(second, tokenizer=words), tmp_path)
    again = simgrad.load(tmp_path)
    assert_same(second, again)
    assert again.tokenizer.chat_template is None
    there = [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_other_content_is_left_alone(tmp_path):
    policy = policy_of(LLAMA)
    for text in ('{"theme": "dark"}', "[1]", "7", "no json"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FileExistsError, match="is not a model's configuration"):
            save(policy, tmp_path)
        assert (tmp_path / "config.json").read_text() == text
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        save(policy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_failure_on_the_way_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    import safetensors.numpy

    def full(*_, **__):
        raise OSError("disk full")

    first = policy_of(LLAMA)
    save(first, tmp_path)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save(policy_of(GPT2), tmp_path)
    assert_same(first, simgrad.load(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


WORDS = ["<s>", "</s>", "<unk>", "yes", "no", "nö", "?", "it's", ",", "日本", "a.b"]


@pytest.mark.parametrize(
    "fields", [LLAMA, GPT2, KINDS["mistral"][0]], ids=["llama", "gpt2", "mistral"]
)
def test_words_stay_words_through_a_checkpoint(tmp_path, fields):
    words = word_tokenizer(WORDS, bos="<s>", eos="</s>", unk="<unk>", pad="</s>")
    folder = save(policy_of(fields, tokenizer=words), tmp_path)
    assert (attributes(folder)["bos_token_id"], attributes(folder)["eos_token_id"]) == (0, 1)
    for tokenizer in (words, simgrad.load(folder).tokenizer):
        for i, word in enumerate(WORDS):
            assert tokenizer(word)["input_ids"] == [0, i]
            assert tokenizer.decode([i]) == word
        text = "no , it's  a.b\nnö ? 日本 yes</s>"
        assert tokenizer(text)["input_ids"] == [0, 4, 8, 7, 10, 5, 6, 9, 3, 1]
        assert tokenizer("maybe no", add_special_tokens=False)["input_ids"] == [2, 4]
        assert tokenizer.decode([0, 4, 8, 7, 6, 1]) == "<s> no , it's ? </s>"
        assert tokenizer.decode([0, 4, 8, 7, 6, 1], skip_special_tokens=True) == "no , it's ?"
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<s>",
            "</s>",
            "</s>",
        )
        assert len(tokenizer) == len(WORDS)
        (pair,) = encode(
            [{"prompt": "no ,", "chosen": " yes", "rejected": " nö ?"}], tokenizer
        ).pairs
        assert (pair.prompt, pair.chosen, pair.rejected) == ((0, 4, 8), (3, 1), (5, 6, 1))


def test_words_without_special_tokens(tmp_path):
    words = word_tokenizer(("<unk>", "x"))
    folder = save(policy_of(LLAMA, tokenizer=words), tmp_path)
    assert (attributes(folder)["bos_token_id"], attributes(folder)["eos_token_id"]) == (None, None)
    for tokenizer in (words, simgrad.load(folder).tokenizer):
        assert tokenizer("x x <unk>")["input_ids"] == [1, 1, 0]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
            None,
            None,
            None,
        )
        with pytest.raises(Exception, match="UNK"):
            tokenizer("x y")


@pytest.mark.parametrize(
    ("words", "special", "text"),
    [
        (["a", "b", "a"], {}, "word 'a' is there twice, as 0 and 2"),
        (["a", "b c"], {}, "word 1 is 'b c'"),
        (["a", ""], {}, "word 1 is ''"),
        (["a", " b"], {}, "word 1 is ' b'"),
        ("a b", {}, r"\['a', 'b'\] instead of 'a b'"),
        (["a"], {"bos": "b"}, "bos_token 'b' is not among the words"),
        (["stop", "nonstop"], {"eos": "stop"}, "eos_token 'stop' is part of the word 'nonstop'"),
    ],
)
def test_words_that_make_no_vocabulary_are_named(words, special, text):
    with pytest.raises(ValueError, match=text):
        word_tokenizer(words, **special)


def test_token_ids_that_the_model_does_not_have_are_left_out(tmp_path):
    words = word_tokenizer(["a", "b", "c"], bos="b", eos="c")
    save(policy_of({**LLAMA, "vocab_size": 2}, tokenizer=words), tmp_path)
    assert (attributes(tmp_path)["bos_token_id"], attributes(tmp_path)["eos_token_id"]) == (1, None)


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path):
    """Under model_type qwen2 every tokenizer is read as Qwen2Tokenizer; one of that class is
    saved."""
    fields = KINDS["qwen2"][0]
    with pytest.raises(
        UnsupportedCheckpointError, match="tokenizer of a qwen2 checkpoint as Qwen2Tokenizer"
    ):
        save(policy_of(fields, tokenizer=word_tokenizer(WORDS)), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    from transformers import Qwen2Tokenizer

    own = Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
    again = simgrad.load(save(policy_of(fields, tokenizer=own), tmp_path / "folder")).tokenizer
    assert again("aabb")["input_ids"] == own("aabb")["input_ids"] == [1, 3, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_has_one_source_in_the_family_that_is_chosen(kind):
    """The mapping is total: the leaves of the model are the leaves that the family knows."""
    fields, family = KINDS[kind]
    config = ModelConfig(**fields)
    known = {
        leaf
        for leaf in FAMILIES[family].sources(config)
        if config.depth or not leaf.startswith("layers/")
    }
    assert known == set(tree.names(jax.eval_shape(lambda: create(config)[1])))
