"""The configurable transformer and its parts."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import MODELS, PAIRS, close, model

from simgrad import tree
from simgrad.models import (
    InitScales,
    ModelConfig,
    Rope,
    add_lora,
    bind,
    contexts_of,
    create,
    linear_softmax,
    only,
    responses,
)
from simgrad.models.layers import rope_frequencies, rotate, visible
from simgrad.pairs import padded
from simgrad.theory import pair_kernel


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"width": 10, "heads": 4}, "set head_dim"),
        ({"positions": "rope", "head_dim": 3}, "even head_dim"),
    ],
)
def test_impossible_shapes_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig(vocab_size=5, **fields)


def test_initial_scales():
    scales = InitScales(
        embedding=0.5, positions=0.2, matrices=2.0, unembedding=0.05, final_norm=0.3
    )
    _, theta = create(ModelConfig(vocab_size=2000, width=64, depth=3, max_length=2000, init=scales))
    expected = {
        ("embedding", "table"): 0.5,
        ("positions", "table"): 0.2,
        ("unembedding", "table"): 0.05 / 8,
        ("layers", "attention", "query", "kernel"): 2 / 8,
        ("layers", "attention", "output", "kernel"): 2 / 8 / math.sqrt(6),
        ("layers", "mlp", "down", "kernel"): 2 / 16 / math.sqrt(6),
    }
    for path, std in expected.items():
        leaf = theta
        for key in path:
            leaf = leaf[key]
        assert abs(leaf.std() / std - 1) < 0.03, path
    assert (theta["final_norm"]["scale"] == np.float32(0.3)).all()


def test_layers_differ_and_seeds_repeat():
    config = ModelConfig(vocab_size=7, width=8, heads=2)
    (_, a), (_, b), (_, c) = create(config, 1), create(config, 1), create(config, 2)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))
    assert (a["embedding"]["table"] != c["embedding"]["table"]).any()
    kernel = a["layers"]["attention"]["query"]["kernel"]
    assert (kernel[0] != kernel[1]).any()


def test_causality():
    apply, theta = create(ModelConfig(vocab_size=7, width=8, heads=2, dtype="float64"))
    a = apply(theta, jnp.array([[1, 2, 3, 4]])).logits
    b = apply(theta, jnp.array([[1, 2, 3, 6]])).logits
    close(a[:, :3], b[:, :3])
    assert np.abs(a[:, 3] - b[:, 3]).max() > 1e-3


def test_rows_select_logits():
    apply, theta = create(ModelConfig(vocab_size=7, width=8, heads=2, dtype="float64"))
    tokens = jnp.array([[1, 2, 3, 4], [4, 3, 2, 1]])
    rows = jnp.array([[3, 1], [0, 0]])
    everywhere = apply(theta, tokens)
    selected = apply(theta, tokens, rows=rows)
    close(selected.logits, jnp.take_along_axis(everywhere.logits, rows[:, :, None], axis=1))
    close(selected.hidden, everywhere.hidden)


def test_rotation_depends_on_relative_position_only():
    """⟨R_p q, R_s k⟩ = ⟨R_{p+c} q, R_{s+c} k⟩, and lengths are kept."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(p, s, rope=Rope()):
        return (rotate(q, jnp.array([[p]]), rope, 64) * rotate(k, jnp.array([[s]]), rope, 64)).sum()

    close(score(7, 3), score(27, 23))
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    close(jnp.square(rotate(q, jnp.array([[11]]), Rope(), 64)).sum(), jnp.square(q).sum())


def test_scaled_rope_frequencies():
    base, _ = rope_frequencies(Rope(theta=1e4), 64, 2048)
    linear, _ = rope_frequencies(Rope(theta=1e4, kind="linear", factor=4.0), 64, 2048)
    close(linear, base / 4)
    llama3, _ = rope_frequencies(
        Rope(theta=1e4, kind="llama3", factor=8.0, original_max_length=2048, low_freq_factor=1.0),
        64,
        8192,
    )
    wavelength = 2 * np.pi / base
    close(llama3[wavelength < 2048 / 4], base[wavelength < 2048 / 4])
    close(llama3[wavelength > 2048], base[wavelength > 2048] / 8)
    assert (np.diff(llama3) < 0).all()
    yarn, factor = rope_frequencies(
        Rope(theta=1e4, kind="yarn", factor=4.0, original_max_length=2048), 64, 8192
    )
    close(yarn[0], base[0])
    close(yarn[-1], base[-1] / 4)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    dynamic, _ = rope_frequencies(Rope(theta=1e4, kind="dynamic", factor=4.0), 64, 2048)
    close(dynamic, base)


def test_padding_reads_padding_and_nothing_reads_padding():
    mask = visible(jnp.array([[0, 1, 0]]), jnp.array([[1, 1, 0]]))[0]
    assert not mask[:2, 2].any()
    assert mask.any(axis=1).all()


def test_linear_softmax_freezes_features_and_keeps_contexts():
    apply, theta = linear_softmax(PAIRS, 13)
    assert apply.trainable == ("!features/*",)
    assert (
        len(contexts_of(PAIRS))
        == theta["features"]["table"].shape[0]
        == len(set(contexts_of(PAIRS)))
    )


# ---------------------------------------------------------------- what is trained


def trained(apply, theta):
    """Names of the trained parameters, of which there is at least one."""
    return tree.names(bind(apply, theta).trained)


@pytest.mark.parametrize(
    ("patterns", "keep"),
    [
        ([], lambda name: True),
        (["layers/*"], lambda name: name.startswith("layers/")),
        (["*/scale", "positions/*"], lambda name: name.endswith("/scale") or "positions" in name),
        (["!layers/*"], lambda name: not name.startswith("layers/")),
        (["!layers/mlp/*", "layers/*"], lambda name: "layers/" in name and "/mlp/" not in name),
        (["layers/*", "!*/kernel", "!*mlp*"], lambda name: name == "layers/attention_norm/scale"),
    ],
)
def test_only_selects_and_excludes_by_name(patterns, keep):
    apply, theta = model("plain")
    some = only(apply, *patterns)
    assert trained(some, theta) == [name for name in tree.names(theta) if keep(name)]
    bound = bind(some, theta)
    assert len(jax.tree.leaves(bound.trained)) + len(jax.tree.leaves(bound.rest)) == len(
        jax.tree.leaves(theta)
    )
    whole = bound.whole(bound.trained)
    assert jax.tree.structure(whole) == jax.tree.structure(theta)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (whole, theta)), strict=True))
    assert apply.trainable == ()  # the model given is left as it was


def test_a_later_choice_replaces_names_and_adds_exclusions():
    apply, theta = model("plain")
    mlp = [name for name in tree.names(theta) if name.startswith("layers/mlp/")]
    assert trained(only(only(apply, "embedding/*"), "layers/mlp/*"), theta) == mlp
    twice = only(only(apply, "!layers/*"), "!embedding/*")
    assert trained(twice, theta) == ["final_norm/scale", "positions/table", "unembedding/table"]
    assert trained(only(twice, "*/table"), theta) == ["positions/table", "unembedding/table"]
    assert only(apply, "layers/*") == only(apply, "layers/*")  # one program for both
    assert len({only(apply, "layers/*"), only(apply, "layers/*"), apply}) == 2


def test_what_a_model_excludes_itself_stays_excluded():
    apply, theta = model("linear_softmax")
    assert trained(only(apply, "*/table"), theta) == ["unembedding/table"]
    with pytest.raises(ValueError, match="no parameter is left to train.*!features"):
        bind(only(apply, "features/*"), theta)
    lora, parameters = add_lora(*model("plain"), ["layers/mlp/up/kernel"], rank=2)
    name = "lora/layers/mlp/up/kernel"
    assert trained(lora, parameters) == [f"{name}/a", f"{name}/b"]
    assert trained(only(lora, "*/b"), parameters) == [f"{name}/b"]
    with pytest.raises(ValueError, match="no parameter is left"):
        bind(only(lora, "base/*"), parameters)


def test_kernels_of_a_selection_and_of_its_complement_add_up():
    apply, theta = model("rope_mqa_gated_tied")
    parts = [["layers/mlp/*"], ["layers/*", "!layers/mlp/*"], ["!layers/*"]]
    kernels = [pair_kernel(only(apply, *p), theta, padded(PAIRS)) for p in parts]
    assert all((k.sq_chosen > 0).all() for k in kernels)
    close(kernels[0] + kernels[1] + kernels[2], pair_kernel(apply, theta, padded(PAIRS)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_bound_model_is_a_function_of_what_is_trained(kind):
    """Same log-probs as the whole model; derivatives are the trained parameters' own."""
    apply, theta = model(kind)
    apply, batch = only(apply, "*/table"), padded(PAIRS)
    bound = bind(apply, theta)
    whole = responses(apply, theta, batch)
    close(bound.logp(bound.trained, batch), whole.logp)
    close(bound.token_logp(bound.trained, batch), whole.token_logp)
    got = jax.jit(lambda b: jax.grad(lambda t: b.logp(t, batch)[0, 1])(b.trained))(bound)
    full = reference.gradient(apply, theta, PAIRS[0].prompt, PAIRS[0].rejected)
    every = dict(zip(tree.names(full), jax.tree.leaves(full), strict=True))
    names = [
        n
        for n in every
        if n.endswith("/table") and (kind != "linear_softmax" or n != "features/table")
    ]
    assert tree.names(got) == names
    scale = max(float(np.abs(every[n]).max()) for n in names)
    for name, leaf in zip(names, jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(leaf, every[name], rtol=1e-10, atol=1e-12 * scale)


def test_selections_that_mean_nothing_are_refused():
    apply, theta = model("plain")
    for alien in (["layers/*"], None, 3, ("a", "b")):
        with pytest.raises(ValueError, match=r"patterns are texts such as 'layers/\*'"):
            inspect.unwrap(only)(apply, alien)  # as where nothing checks types
    with pytest.raises(
        ValueError, match=r"no parameter matches 'attn\*'; there are: embedding/table"
    ):
        bind(only(apply, "layers/*", "attn*"), theta)
    with pytest.raises(ValueError, match=r"no parameter is left to train.*!\*"):
        bind(only(apply, "!*"), theta)
