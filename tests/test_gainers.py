"""Where the mass goes: every token's change along a step."""

import jax
import numpy as np
import optax
import pytest
from helpers import PAIRS, VOCAB, close, model

from simgrad.objectives import DPO
from simgrad.pairs import Pair, padded
from simgrad.theory import displacement, optimizer_step, responses, top_gainers
from simgrad.theory.prediction import token_displacement

SINGLE = [Pair([1, 5], [7], [8])]


def step_of(kind, pairs, optimizer=None):
    apply, theta = model(kind, pairs=pairs)
    batch = padded(pairs)
    return (
        apply,
        theta,
        batch,
        optimizer_step(apply, theta, batch, DPO(), optimizer or optax.sgd(1.0)).direction,
    )


def table(apply, theta, batch):
    return np.asarray(jax.nn.log_softmax(responses(apply, theta, batch).logits, axis=-1))


@pytest.mark.parametrize("optimizer", [optax.sgd(1.0), optax.adam(1.0)], ids=["sgd", "adam"])
def test_every_tokens_change_is_right_to_first_order(optimizer):
    apply, theta, batch, direction = step_of("plain", PAIRS, optimizer)
    predicted, start = (
        np.asarray(token_displacement(apply, theta, batch, direction)),
        table(apply, theta, batch),
    )
    factors = np.geomspace(1e-5, 1e-3, 4) / np.abs(predicted).max()
    valid = np.asarray(batch.valid)
    miss = []
    for f in factors:
        moved = table(apply, jax.tree.map(lambda t, d, f=f: t + f * d, theta, direction), batch)
        miss.append(np.abs(moved - start - f * predicted)[valid].mean())
    np.testing.assert_allclose(np.polyfit(np.log(factors), np.log(miss), 1)[0], 2.0, atol=0.05)
    assert not predicted[~valid].any()


def test_mass_is_conserved_and_targets_add_up_to_the_response():
    apply, theta, batch, direction = step_of("rope_mqa_gated_tied", PAIRS)
    change = np.asarray(token_displacement(apply, theta, batch, direction))
    probability = np.exp(table(apply, theta, batch))
    np.testing.assert_allclose((probability * change).sum(-1), 0.0, atol=1e-12)
    at_targets = np.take_along_axis(change, np.asarray(batch.targets)[..., None], -1)[..., 0]
    close(at_targets.sum(-1), displacement(apply, theta, batch, direction).first)


def test_top_gainers_are_the_head_of_the_sorted_table():
    apply, theta, batch, direction = step_of("plain", PAIRS)
    change = np.asarray(token_displacement(apply, theta, batch, direction))
    probability = np.exp(table(apply, theta, batch))
    for by, gain in (("logp", change), ("probability", probability * change)):
        top = top_gainers(apply, theta, batch, direction, k=3, by=by)
        expected = np.sort(gain, -1)[..., ::-1][..., :3]
        close(top.gain, expected)
        valid = np.asarray(batch.valid)
        best = np.argsort(-gain, -1, kind="stable")[..., 0]
        np.testing.assert_array_equal(np.asarray(top.tokens)[valid][:, 0], best[valid])
        at_top = np.take_along_axis(probability, np.asarray(top.tokens), -1)
        close(np.asarray(top.probability)[valid], at_top[valid])


def test_unconstrained_features_order_the_bystanders_by_projection_on_the_difference():
    """⟨W_z, W_w - W_l⟩ ranks every z outside the pair; a transformer need not obey it."""

    def agreement(kind):
        apply, theta, batch, direction = step_of(kind, SINGLE)
        change = np.asarray(token_displacement(apply, theta, batch, direction))[0, 0, 0]
        w = np.asarray(theta["unembedding"]["table"])
        others = [z for z in range(VOCAB) if z not in (7, 8)]
        projection = w[others] @ (w[7] - w[8])
        return np.argsort(projection).tolist() == np.argsort(change[others]).tolist()

    assert agreement("unconstrained_features")
    assert not agreement("plain")


def test_how_many_is_checked():
    apply, theta, batch, direction = step_of("unconstrained_features", SINGLE)
    with pytest.raises(ValueError, match=f"k=14 tokens of a vocabulary of {VOCAB}"):
        top_gainers(apply, theta, batch, direction, k=14)


def test_padding_gains_nothing_and_names_no_token():
    apply, theta, batch, direction = step_of("unconstrained_features", PAIRS)
    top = top_gainers(apply, theta, batch, direction, k=2)
    absent = ~np.asarray(batch.valid)
    assert (np.asarray(top.tokens)[absent] == -1).all()
    assert not np.asarray(top.probability)[absent].any()
    assert not np.asarray(top.gain)[absent].any()
    assert (np.asarray(top.tokens)[~absent] >= 0).all()
