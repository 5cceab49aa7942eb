"""The 2n x 2n kernel against gradients of one response at a time, and its invariances."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import PAIRS, close, model

import simgrad.theory.kernel.dataset as module
from simgrad.models import bind, only
from simgrad.objectives import DPO
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import displacement, entanglement_kernel, optimizer_step, pair_kernel, responses
from simgrad.theory.kernel import (
    by_layer,
    by_matrix,
    entanglement_blocks,
    jacobian,
    kernel_plan,
    pair_kernel_blocks,
    pair_pushes,
)

PROBES = [Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS[:3]]


KINDS = ["plain", "rope_mqa_gated_tied", "linear_softmax", "unconstrained_features"]


@functools.cache
def gradients(kind, probes=False):
    apply, theta = model(kind)
    pairs = PROBES if probes else PAIRS
    return [
        reference.gradient(apply, theta, p.prompt, r) for p in pairs for r in (p.chosen, p.rejected)
    ]


def trainable(apply):
    return (
        (lambda name: not name.startswith("features")) if apply.trainable else (lambda name: True)
    )


def gram(left, right, keep=lambda name: True):
    return np.array([[reference.dot(a, b, keep) for b in right] for a in left])


def row_bytes(apply, theta):
    return 8 * sum(x.size for x in jax.tree.leaves(bind(apply, theta).trained))


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_is_the_gram_matrix_of_all_gradients(kind):
    apply, theta = model(kind)
    rows = gradients(kind)
    kernel = entanglement_kernel(apply, theta, padded(PAIRS))
    close(kernel, gram(rows, rows, trainable(apply)))
    np.testing.assert_array_equal(kernel, kernel.T)
    assert np.linalg.eigvalsh(kernel).min() > -1e-10 * np.abs(kernel).max()


def test_diagonal_blocks_are_the_pair_kernels_and_the_rest_is_not_zero():
    """Training pairs together adds what a pair's own kernel cannot see."""
    apply, theta = model("plain")
    kernel = np.asarray(entanglement_kernel(apply, theta, padded(PAIRS))).reshape(4, 2, 4, 2)
    own = pair_kernel(apply, theta, padded(PAIRS))
    for i in range(4):
        close(
            kernel[i, :, i, :],
            np.array([[own.sq_chosen[i], own.inner[i]], [own.inner[i], own.sq_rejected[i]]]),
        )
    others = np.delete(kernel[0], 0, axis=1)
    assert np.abs(others).max() > 0.1 * np.abs(kernel[0, :, 0]).max()


def test_memory_bound_changes_the_cost_and_not_the_result():
    apply, theta = model("plain")
    pairs = [*PAIRS, PROBES[0]]
    batch, row = padded(pairs), row_bytes(apply, theta)
    whole = entanglement_kernel(apply, theta, batch)
    for memory, chunk, gradients_taken in ((10 * row, 5, 10), (9 * row, 2, 24), (4 * row, 1, 30)):
        plan = kernel_plan(apply, theta, 5, memory=memory)
        assert (plan.chunk, plan.gradients) == (chunk, gradients_taken)
        assert plan.bytes <= memory
        close(entanglement_kernel(apply, theta, batch, memory=memory), whole)
    held = sum(x.nbytes for x in jax.tree.leaves(jacobian(apply, theta, padded(PAIRS[:1]))))
    assert 2 * held == kernel_plan(apply, theta, 4, memory=4 * row).bytes
    with pytest.raises(ValueError, match=r"two pairs take .* raise it, or select fewer"):
        entanglement_kernel(apply, theta, batch, memory=4 * row - 1)


@pytest.mark.parametrize(("pairs", "others"), [(5, None), (4, 1), (1, 4), (3, 4)])
def test_plan_counts_the_gradients_taken_and_bounds_the_rows_held(monkeypatch, pairs, others):
    apply, theta = model("bare_embedding")
    row, taken, held = row_bytes(apply, theta), [], []
    shape = (*theta["unembedding"]["table"].shape,)

    def spy(apply, theta, batch):
        result = jacobian(apply, theta, batch)
        taken.append(2 * batch.size)
        gc.collect()
        rows = sum(x.shape[0] for x in jax.live_arrays() if x.shape[1:] == shape and x.ndim == 3)
        held.append(rows // 2)  # two leaves of that shape: embedding and unembedding
        return result

    assert theta["embedding"]["table"].shape == shape
    monkeypatch.setattr(module, "jacobian", spy)
    every = [*PAIRS, PROBES[0]]
    other = None if others is None else padded(every[:others])
    entanglement_kernel(apply, theta, padded(every[:pairs]), other, memory=4 * row)
    plan = kernel_plan(apply, theta, pairs, others, memory=4 * row)
    assert sum(taken) == plan.gradients
    assert max(held) * row <= plan.bytes


@pytest.mark.parametrize("kind", ["plain", "rope_mqa_gated_tied"])
def test_invariant_to_padding_packing_and_batch_order(kind):
    apply, theta = model(kind)
    kernel = entanglement_kernel(apply, theta, padded(PAIRS))
    close(entanglement_kernel(apply, theta, padded(PAIRS, length=27, rows=11)), kernel)
    close(entanglement_kernel(apply, theta, packed(PAIRS)), kernel)
    backwards = np.asarray(entanglement_kernel(apply, theta, padded(PAIRS[::-1]))).reshape(
        4, 2, 4, 2
    )
    close(backwards[::-1, :, ::-1], np.asarray(kernel).reshape(4, 2, 4, 2))


def test_probes_get_a_rectangular_kernel():
    apply, theta = model("rope_mqa_gated_tied")
    expected = gram(gradients("rope_mqa_gated_tied", probes=True), gradients("rope_mqa_gated_tied"))
    row = row_bytes(apply, theta)
    for memory in (2**30, 4 * row, 8 * row):
        close(
            entanglement_kernel(apply, theta, padded(PROBES), packed(PAIRS), memory=memory),
            expected,
        )


def test_blocks_sum_to_the_whole_and_group_by_layer_and_matrix():
    apply, theta = model("plain")
    batch, rows = padded(PAIRS), gradients("plain")
    blocks = entanglement_blocks(apply, theta, batch)
    whole = entanglement_kernel(apply, theta, batch)
    for groups in (by_layer(blocks), by_matrix(blocks)):
        close(sum(groups.values()), whole)
    assert set(by_layer(blocks)) == {
        "embedding",
        "positions",
        "layer 0",
        "layer 1",
        "final_norm",
        "unembedding",
    }
    query = gram(rows, rows, lambda name: name.startswith("layers/attention/query/"))
    close(by_matrix(blocks)["attention/query"], query)
    first = [jax.tree.map(lambda x: x[:1], g["layers"]) for g in rows]
    close(by_layer(blocks)["layer 0"], gram(first, first))
    for grouping in (by_layer, by_matrix):  # the same groups of pair kernels
        pairs = grouping(pair_kernel_blocks(apply, theta, batch))
        for name, block in grouping(blocks).items():
            close(
                pairs[name].inner,
                np.asarray(block).reshape(4, 2, 4, 2)[range(4), 0, range(4), 1],
                scale=10,
            )


def test_a_scale_acts_on_the_coordinates():
    apply, theta = model("plain")
    scale = jax.tree.map(lambda x: jnp.abs(x) + 0.5, theta)
    rows = gradients("plain")
    scaled = [jax.tree.map(jnp.multiply, g, scale) for g in rows]
    close(entanglement_kernel(apply, theta, padded(PAIRS), scale=scale), gram(scaled, rows))


def test_subsets_of_parameters():
    apply, theta = model("plain")
    rows = gradients("plain")
    expected = gram(rows, rows, lambda name: name.startswith("layers/mlp/"))
    close(entanglement_kernel(only(apply, "layers/mlp/*"), theta, padded(PAIRS)), expected)


def test_what_pairs_do_to_a_probe_adds_up_to_a_step():
    apply, theta = model("plain")
    batch, probes, rate = padded(PAIRS), padded([Pair([1, 5], [9, 9], [3])]), 1e-3
    step = optimizer_step(apply, theta, batch, DPO(), optax.sgd(rate)).direction
    logp = responses(apply, theta, batch).logp
    force = DPO().force(logp, logp, batch.lengths)
    pushes = pair_pushes(entanglement_kernel(apply, theta, probes, batch), force)
    assert pushes.shape == (2, len(PAIRS))
    close(rate * pushes.sum(-1), displacement(apply, theta, probes, step).first[0])
    with pytest.raises(ValueError, match="8 columns, but 3 pairs need 6"):
        pair_pushes(entanglement_kernel(apply, theta, probes, batch), force[:3])
