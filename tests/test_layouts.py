"""Packed, padded and one-by-one evaluation of a pair are the same thing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import MODELS, PAIRS, close, model

from simgrad.pairs import Pair, _ids, packed, padded
from simgrad.theory import responses


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("kind", MODELS)
def test_layouts_agree_with_plain_sequences(kind, layout, dtype):
    apply, theta = model(kind, dtype)
    got = responses(apply, theta, layout(PAIRS))
    for i, pair in enumerate(PAIRS):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            logps, logits, states, last = reference.sequence(apply, theta, pair.prompt, response)
            n = len(response)
            close(got.token_logp[i, side, :n], logps, dtype)
            close(got.logits[i, side, :n], logits, dtype)
            close(got.hidden[i, side, :n], states, dtype)
            close(got.last_hidden[i, side], last, dtype)
            close(got.logp[i, side], logps.sum(), dtype)


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("kind", MODELS)
def test_invariant_to_padding_and_batch_order(kind, layout):
    apply, theta = model(kind)
    base = responses(apply, theta, layout(PAIRS)).logp
    close(responses(apply, theta, layout(PAIRS, length=29, rows=9)).logp, base)
    close(responses(apply, theta, layout(PAIRS[::-1])).logp[::-1], base)


def test_responses_do_not_see_each_other():
    """Without the streams the responses of a packed sequence would read each other."""
    apply, theta = model("plain")
    batch = packed(PAIRS)
    right = responses(apply, theta, batch).logp
    blurred = dataclasses.replace(batch, streams=jnp.where(batch.streams > 0, 3, 0))
    wrong = responses(apply, theta, blurred).logp
    assert np.abs(wrong - right).max(axis=1).min() > 1e-6


def test_positions_restart_at_the_rejected_response():
    apply, theta = model("plain")
    batch = packed(PAIRS)
    right = responses(apply, theta, batch).logp
    running = jnp.broadcast_to(
        jnp.arange(batch.tokens.shape[-1], dtype=jnp.int32)[None, None], batch.positions.shape
    )
    wrong = responses(apply, theta, dataclasses.replace(batch, positions=running)).logp
    assert np.abs(wrong[:, 1] - right[:, 1]).min() > 1e-6


def test_unknown_context_is_not_silent():
    apply, theta = model("unconstrained_features")
    assert np.isnan(apply(theta, jnp.array([[9, 9]])).logits).all()


def test_bfloat16_reads_out_in_float32():
    apply, theta = model("plain", "bfloat16")
    out = responses(apply, theta, packed(PAIRS))
    assert out.logits.dtype == out.token_logp.dtype == jnp.float32
    exact, _ = model("plain", "float32")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), theta)
    close(out.logp, responses(exact, wide, packed(PAIRS)).logp, "bfloat16")


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (Pair([], [1], [2]), "empty prompt"),
        (Pair([1], [], [2]), "empty chosen"),
        (Pair([1], [2], []), "empty rejected"),
        (Pair([1], [2], [2]), "identical"),
    ],
)
def test_unusable_pairs_are_named(pair, text):
    with pytest.raises(ValueError, match=f"pair 1: .*{text}"):
        padded([PAIRS[0], pair])


def test_sizes_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="length=3 is too small"):
        packed(PAIRS, length=3)
    with pytest.raises(ValueError, match="rows=1 is too small"):
        padded(PAIRS, rows=1)
    with pytest.raises(ValueError, match="no pairs"):
        padded([])


def test_what_is_no_token_id_is_refused():
    with pytest.raises(
        ValueError, match="pair 0: token id -3 is outside any vocabulary: ids count from 0"
    ):
        padded([Pair([1], [4, -3], [2])])
    for alien in ("hello", [1.5], [None]):
        with pytest.raises(ValueError, match=r"prompt must hold token ids .* tokenize text first"):
            _ids("prompt", alien)
