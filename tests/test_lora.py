"""Adapters: the model starts unchanged, and their kernel is a projection of the full one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import PAIRS, close, model

from simgrad.models import add_lora, merge_lora, only
from simgrad.pairs import padded
from simgrad.theory import entanglement_kernel, pair_kernel, responses
from simgrad.theory.kernel import by_layer, by_matrix, pair_kernel_blocks

TARGETS = ["layers/attention/query/kernel", "layers/mlp/*/kernel"]


def adapted(rank=2, trained=True, alpha=3.0):
    apply, theta = model("plain")
    lora, parameters = add_lora(apply, theta, TARGETS, rank, alpha)
    if trained:  # adapters some way into training
        noise = np.random.default_rng(0)
        parameters["lora"] = jax.tree.map(
            lambda x: x + 0.2 * noise.normal(size=x.shape), parameters["lora"]
        )
    return apply, theta, lora, parameters


def test_starts_as_the_model_it_adapts_and_trains_only_the_adapters():
    apply, theta, lora, parameters = adapted(trained=False)
    close(responses(lora, parameters, padded(PAIRS)), responses(apply, theta, padded(PAIRS)))
    a_only = pair_kernel(only(lora, "lora/*/a"), parameters, padded(PAIRS))
    b_only = pair_kernel(only(lora, "lora/*/b"), parameters, padded(PAIRS))
    assert not np.asarray(a_only.sq_chosen).any()
    close(pair_kernel(lora, parameters, padded(PAIRS)), b_only)


def test_kernel_is_the_projection_of_the_full_one():
    """s² (⟨G Bᵀ, G' Bᵀ⟩ + ⟨Aᵀ G, Aᵀ G'⟩) with G the full gradient at the merged parameters."""
    apply, _, lora, parameters = adapted()
    merged = merge_lora(lora, parameters)
    rows = [
        reference.gradient(apply, merged, p.prompt, r)
        for p in PAIRS
        for r in (p.chosen, p.rejected)
    ]
    projected = []
    for g in rows:
        leaves = {
            "layers/attention/query/kernel": g["layers"]["attention"]["query"]["kernel"],
            **{
                f"layers/mlp/{n}/kernel": g["layers"]["mlp"][n]["kernel"]
                for n in g["layers"]["mlp"]
            },
        }
        parts = []
        for name, factors in parameters["lora"].items():
            for layer, matrix in enumerate(np.asarray(leaves[name])):
                a, b = (np.asarray(factors[x][layer]) for x in "ab")
                parts += [(lora.scale * matrix @ b.T).ravel(), (lora.scale * a.T @ matrix).ravel()]
        projected.append(np.concatenate(parts))
    expected = np.array([[x @ y for y in projected] for x in projected])
    close(entanglement_kernel(lora, parameters, padded(PAIRS)), expected)


def test_complete_factors_give_back_the_full_kernel_and_thin_ones_do_not():
    """With A an identity and scale 1 nothing is projected away; at rank 2 something is."""
    apply, theta = model("plain")
    target = ["layers/attention/query/kernel"]
    full = pair_kernel(only(apply, *target), theta, padded(PAIRS))
    lora, parameters = add_lora(apply, theta, target, rank=8, alpha=8.0)
    parameters["lora"][target[0]]["a"] = jnp.tile(jnp.eye(8)[None], (2, 1, 1))
    close(pair_kernel(lora, parameters, padded(PAIRS)), full)
    thin, parameters = add_lora(apply, theta, target, rank=2, alpha=2.0)
    q, _ = np.linalg.qr(np.asarray(parameters["lora"][target[0]]["a"]))
    parameters["lora"][target[0]]["a"] = jnp.asarray(q)
    lost = pair_kernel(thin, parameters, padded(PAIRS))
    # (the single token after a one-token prompt attends to itself alone: its query has no gradient)
    assert (np.asarray(lost.sq_chosen) < 0.9 * np.asarray(full.sq_chosen))[[0, 2, 3]].all()


def test_layers_and_matrices_can_be_asked_for():
    _, _, lora, parameters = adapted()
    blocks = pair_kernel_blocks(lora, parameters, padded(PAIRS))
    layers, matrices = by_layer(blocks), by_matrix(blocks)
    assert set(layers) == {"layer 0", "layer 1"}
    assert set(matrices) == {
        "lora/attention/query/kernel",
        "lora/mlp/up/kernel",
        "lora/mlp/down/kernel",
    }
    whole = pair_kernel(lora, parameters, padded(PAIRS)).inner
    for groups in (layers, matrices):
        close(sum(k.inner for k in groups.values()), whole)
    first = {k: {n: x[:1] for n, x in v.items()} for k, v in parameters["lora"].items()}
    rest = {k: {n: x[1:] for n, x in v.items()} for k, v in parameters["lora"].items()}

    def split(first, rest):
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
        return responses(lora, {"base": parameters["base"], "lora": both}, padded(PAIRS[:1])).logp[
            0
        ]

    w, l = (jax.grad(lambda f, s=s: split(f, rest)[s])(first) for s in (0, 1))  # noqa: E741
    inner = sum(
        float((a * b).sum()) for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(l), strict=True)
    )
    np.testing.assert_allclose(layers["layer 0"].inner[0], inner, rtol=1e-9)


def test_refuses_targets_that_are_not_there():
    apply, theta = model("plain")
    with pytest.raises(
        ValueError, match="no matrix matches 'q_proj'; there are: layers/attention/key/kernel"
    ):
        add_lora(apply, theta, ["q_proj"])
    with pytest.raises(ValueError, match="no matrix matches 'final_norm/scale'"):
        add_lora(apply, theta, ["final_norm/scale"])
    with pytest.raises(ValueError, match="no matrix matches 'unembedding/table'"):
        add_lora(apply, theta, ["unembedding/table"])
    with pytest.raises(
        ValueError, match="targets takes a list of one or more patterns, got 'layers/"
    ):
        add_lora(apply, theta, "layers/*")
    with pytest.raises(
        ValueError, match=r"patterns are texts .* one argument each: got \['layers/"
    ):
        inspect.unwrap(only)(apply, ["layers/*"])
    with pytest.raises(ValueError, match="rank must be positive"):
        add_lora(apply, theta, TARGETS, rank=0)
