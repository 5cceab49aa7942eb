"""Logits and hidden states of every checkpoint family against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, TOKENS
from helpers import golden, write_checkpoint

import simgrad


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_family_agrees_with_transformers(tmp_path, case, dtype, tolerance):
    logits, hidden, _ = golden(case)
    policy = simgrad.load(write_checkpoint(tmp_path, case, tokenizer=False), dtype)
    out = jax.jit(policy.apply)(policy.theta, jnp.asarray(TOKENS))
    assert out.logits.dtype == out.hidden.dtype == dtype
    assert np.abs(np.asarray(out.logits, np.float64) - logits).max() < tolerance
    assert np.abs(np.asarray(out.hidden, np.float64) - hidden).max() < tolerance


@pytest.mark.parametrize("case", ["llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn"])
def test_rope_scaling_matters(tmp_path, case):
    """The scaled cases would notice a missing scaling: without it they fail by far."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    policy = simgrad.load(write_checkpoint(tmp_path, case, tokenizer=False, **rope), "float64")
    out = policy.apply(policy.theta, jnp.asarray(TOKENS))
    assert np.abs(out.logits - golden(case)[0]).max() > 1e-3


def test_hidden_is_what_the_unembedding_multiplies(tmp_path):
    for i, case in enumerate(("gpt2_tied", "llama_gqa_head_dim")):
        folder = tmp_path / str(i)
        folder.mkdir()
        policy = simgrad.load(write_checkpoint(folder, case, tokenizer=False), "float64")
        out = policy.apply(policy.theta, jnp.asarray(TOKENS))
        table = policy.theta["embedding" if policy.config.tied else "unembedding"]["table"]
        np.testing.assert_allclose(out.logits, out.hidden @ table.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_golden_files_are_what_transformers_says(case):
    pytest.importorskip("torch")
    from golden.torch_models import build, evaluate, shapes

    model = build(case)
    logits, hidden, stored = golden(case)
    now_logits, now_hidden = evaluate(model)
    assert shapes(model) == stored
    np.testing.assert_allclose(now_logits, logits, rtol=0, atol=1e-12)
    np.testing.assert_allclose(now_hidden, hidden, rtol=0, atol=1e-12)
