"""What the page "Add your own" shows works, each example in the place that it names."""

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_checkpoint

from simgrad import objectives
from simgrad.bridge import load, score
from simgrad.bridge.checkpoints.families import FAMILIES, UnsupportedCheckpointError
from simgrad.bridge.engine import columns
from simgrad.figures import gallery
from simgrad.objectives.base import REGISTRY

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text("utf-8")


def example(title):
    """The block of code under a heading."""
    return re.search(rf"^## {title}$.*?```python\n(.*?)```", PAGE, re.S | re.M)[1]


def run(title):
    scope = {"__name__": "example"}
    exec(example(title), scope)
    return scope


@pytest.fixture(autouse=True)
def _tidy(monkeypatch, tmp_path):
    """Registries as they were, afterwards."""
    monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "SCORE_COLUMNS", columns.SCORE_COLUMNS)
    before = dict(REGISTRY), dict(FAMILIES)
    yield
    for registry, old in zip((REGISTRY, FAMILIES), before, strict=True):
        registry.clear()
        registry.update(old)


def test_an_objective_is_known_by_its_name_and_pulls_as_its_texts_say():
    run("An objective")
    shown = objectives.describe("quartic")
    assert shown.ratio == "1"
    assert shown.pushes_chosen_down == "m > 1"
    logp, zero, lengths = jnp.array([[3.0, 0.0], [0.5, 0.0]]), jnp.zeros((2, 2)), jnp.ones((2, 2))
    objective = objectives.get("quartic", target=1.0)
    force = objective.force(logp, zero, lengths.astype(int))
    np.testing.assert_allclose(force, [[-32.0, 32.0], [0.5, -0.5]])


def test_a_family_reads_its_checkpoints_and_refuses_what_it_does_not_know(tmp_path):
    """Weights with biases on queries, keys and values, written as Qwen2's and as Seed-OSS's."""
    run("A checkpoint family")
    write_checkpoint(tmp_path, "qwen2_mqa")
    expected, path = load(tmp_path), tmp_path / "config.json"
    dropped = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    attributes = {k: v for k, v in json.loads(path.read_text()).items() if k not in dropped}
    attributes |= {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False}
    attributes |= {"head_dim": expected.config.head_features}
    path.write_text(json.dumps(attributes))
    policy = load(tmp_path)
    logits = (p.apply(p.theta, jnp.array([[1, 2, 3]])).logits for p in (policy, expected))
    np.testing.assert_array_equal(*logits)
    path.write_text(json.dumps(attributes | {"logit_scale": 2.0}))
    with pytest.raises(UnsupportedCheckpointError, match="unknown attribute logit_scale"):
        load(tmp_path)


def test_a_world_pretrains_policies_that_know_its_pairs():
    scope = run("A world")
    world = scope["Echo"](agreement=0.9)
    apply, thetas = scope["apply"], scope["thetas"]
    assert world.with_knobs(agreement=0.5).agreement == 0.5
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), thetas)
    for pair in world.pairs(0):
        logits = apply(first, jnp.asarray([pair.prompt])).logits[0, -1]
        assert logits[pair.chosen[0]] > logits[pair.rejected[0]]


def test_a_figure_is_drawn_with_its_numbers_beside_it(tmp_path, monkeypatch):
    (tmp_path / "pull.py").write_text(example("A figure"))
    monkeypatch.syspath_prepend(tmp_path)
    entry = gallery._entry(importlib.import_module("pull"))
    monkeypatch.setattr(gallery, "FIGURES", {"pull": entry})
    numbers, picture = gallery.render("pull", tmp_path / "out", formats=("png",))
    record = json.loads(numbers.read_text())
    assert record["caption"].endswith("for β = (0.1, 0.5).")
    np.testing.assert_allclose(np.array(record["data"]["pull"])[:, 50], [0.05, 0.25])
    assert picture.stat().st_size > 0


def test_a_column_is_in_every_score_table(checkpoint):
    run("A score column")
    rows = [{"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}]
    table = score(load(checkpoint), rows, gradients=False)
    np.testing.assert_allclose(
        table["margin_start"], table["logp_chosen"] - table["logp_rejected"], rtol=1e-6
    )
    assert "margin before training" in {c.label for c in columns.score_columns(False)}
