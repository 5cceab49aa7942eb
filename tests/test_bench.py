"""The benchmark at toy size: it runs with and without torch, and both sides agree."""

import importlib.util

import pytest

from simgrad.validation import bench

TOY = bench.Config(shapes=((5, 4),), pairs=2, repeats=2, width=16, depth=1, heads=2, vocab_size=50)


def test_without_torch(monkeypatch):
    monkeypatch.setattr(bench, "_version", lambda package: None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    record = bench.bench(TOY)
    assert [m["task"] for m in record["measurements"]] == ["scoring", "gradients"]
    assert all(m["ratio"] is None and m["seconds"] > 0 for m in record["measurements"])


@pytest.mark.filterwarnings("ignore")
def test_both_sides_compute_the_same():
    pytest.importorskip("torch")
    for m in bench.bench(TOY)["measurements"]:
        assert m["error"] < 1e-4
        assert m["ratio_range"][0] <= m["ratio"] <= m["ratio_range"][1]
