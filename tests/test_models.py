"""The configurable transformer and its parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close

from simgrad.models import InitScales, ModelConfig, Rope, contexts_of, create, linear_softmax
from simgrad.models.layers import rope_frequencies, rotate, visible


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
    assert apply.frozen == ("features/*",)
    assert (
        len(contexts_of(PAIRS))
        == theta["features"]["table"].shape[0]
        == len(set(contexts_of(PAIRS)))
    )
