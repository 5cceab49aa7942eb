"""What the README and the guides show runs, and every name in the table of symbols exists."""

import json
import re
from pathlib import Path

import jax
import pytest

import simgrad.dynamics
import simgrad.models
import simgrad.objectives
import simgrad.theory

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text("utf-8")


def blocks(text, language="python"):
    """Blocks of code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def example(word):
    """Run the one block of the page on Python that holds ``word``; return its names."""
    (code,) = (block for block in blocks(PAGES["python.md"]) if word in block)
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, scope)
    return scope


def test_theory_example_runs():
    assert example("linearized_run")["kernel"].inner.shape == (2,)


def test_training_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert example("predictor_table")["run"].trajectory.steps.tolist() == [0, 20, 40, 60]
    assert (tmp_path / "trajectory.npz").exists()


def test_the_five_lines_run(tmp_path, monkeypatch, checkpoint):
    """On a tiny checkpoint and pairs of its words."""
    (code,) = blocks(README)
    (tmp_path / "preferences.jsonl").write_text(
        json.dumps({"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}) + "\n"
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(checkpoint)), {})
    assert "<html" in (tmp_path / "report.html").read_text("utf-8")


def test_every_block_of_code_is_tested_somewhere():
    """The home page shows the README's lines, test_extend.py executes its page."""
    tested = {"python.md": 2, "extend.md": 5, "index.md": 1}
    assert {name: n for name, text in PAGES.items() if (n := len(blocks(text)))} == tested
    assert blocks(PAGES["index.md"])[0].split("\n")[:3] == blocks(README)[0].split("\n")[:3]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]


def index():
    for row in re.findall(r"^\|.*\|.*\|$", PAGES["papers.md"], re.M):
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
    block = next(b for b in blocks(PAGES["score.md"], "text") if "apo_down" in b)
    for name in re.findall(r"^(\w+) ", block, re.M):
        shown = simgrad.objectives.describe(name)
        assert shown.formula in block
        assert shown.ratio == "1" or f"d_w/d_l = {shown.ratio}" in block
        down = shown.pushes_chosen_down
        assert not down or f"d_w < 0 where {down}" in block
