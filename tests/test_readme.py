"""What the README shows runs, and every name in its index exists."""

import re
from pathlib import Path

import jax
import pytest

import simgrad.dynamics
import simgrad.models
import simgrad.objectives
import simgrad.theory

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example(word):
    """Run the one block that holds ``word``; return its names."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if word in block)
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, scope)
    return scope


def test_theory_example_runs():
    assert example("linearized_run")["kernel"].inner.shape == (2,)


def test_training_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert example("predictor_table")["run"].trace.steps.tolist() == [0, 20, 40, 60]
    assert (tmp_path / "trace.npz").exists()


def index():
    section = README[README.index("## From the papers to the code") : README.index("## How exact")]
    for row in re.findall(r"^\|.*\|.*\|$", section, re.M):
        right = re.split(r"(?<!\\)\|", row)[2]
        for name in re.findall(r"`([A-Za-z_.]+)(?:\(.*?\))?`", right):
            if not name.startswith("."):
                yield right.strip(), name


def test_index_is_found():
    assert len(list(index())) > 60


@pytest.mark.parametrize(("row", "name"), list(index()))
def test_every_name_in_the_index_exists(row, name):
    homes = (simgrad.theory, simgrad, simgrad.objectives)
    parts = name.split(".")

    def resolves(home):
        for part in parts:
            if not hasattr(home, part):
                return False
            home = getattr(home, part)
        return True

    assert any(map(resolves, homes)), f"{name} in: {row}"


def test_objective_excerpt_is_what_the_command_prints():
    block = next(b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "apo_down" in b)
    for name in re.findall(r"^(\w+) ", block, re.M):
        shown = simgrad.objectives.describe(name)
        assert shown.formula in block
        assert shown.ratio == "1" or f"d_w/d_l = {shown.ratio}" in block
        down = shown.pushes_chosen_down
        assert not down or f"d_w < 0 where {down}" in block
