"""The benchmark at toy size: it runs with and without torch, and both sides agree."""

import dataclasses
import importlib.util
import json

import pytest

from simgrad.validation import bench


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(
        bench.SHAPES, "toy", {"width": 16, "depth": 1, "heads": 2, "vocab_size": 50}
    )
    return bench.Config(
        lengths=((5, 4),), token_lengths=(3, 3), pairs=2, repeats=1, shape="toy", sample=2
    )


def test_without_torch(monkeypatch, tmp_path, toy):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    record = bench.bench(toy, tasks=("scoring", "gradients", "routes"))
    assert [m["task"] for m in record["measurements"]] == ["scoring", "gradients"]
    assert all(
        m["ratio"] is None and m["seconds"] > 0 and m["achieved"] > 0
        for m in record["measurements"]
    )
    (row,) = record["routes"]
    assert set(row["predicted"]) == set(row["measured"])
    assert row["predicted"][row["chosen"]] == min(row["predicted"].values())
    bench.write(record, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["config"]["shape"] == "toy"


@pytest.mark.filterwarnings("ignore")
def test_both_sides_compute_the_same(toy):
    pytest.importorskip("torch")
    found = []
    record = bench.bench(toy, found.append)
    assert [m.task for m in found] == list(bench.TASKS)
    for m in record["measurements"]:
        assert m["error"] < 1e-4
        assert m["ratio_range"][0] <= m["ratio"] <= m["ratio_range"][1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shape": "gpt5"}, "shape='gpt5': choose from gpt2, small, llama-135m"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"lengths": ()}, "lengths: give at least one"),
        ({"lengths": ((5, 0),)}, "at least one token, got 5 and 0"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_refused_at_once(changes, text, toy):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(toy, **changes)


def test_unknown_tasks_are_named(toy):
    with pytest.raises(ValueError, match="task 'sweeping': choose from scoring, logprobs"):
        bench.bench(toy, tasks=("sweeping",))
