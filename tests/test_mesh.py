"""Many devices and many processes give the table of one device; each holds and reads its own
part."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import close, write_checkpoint
from mesh_runs import CHECKPOINTS, MESHES

import simgrad
from simgrad.bridge import Policy, ScoreTable, device_mesh
from simgrad.bridge.checkpoints import policy as checkpoint
from simgrad.bridge.checkpoints.mesh import spec
from simgrad.cli.parsing import mesh_axes
from simgrad.cli.runtime import connect
from simgrad.models import ModelConfig, create
from simgrad.store import digest

PROGRAM = [sys.executable, str(Path(__file__).with_name("mesh_runs.py"))]
COMMAND = [sys.executable, "-c", "from simgrad.cli import main; main()"]


def run(*commands, cache, seconds=150):
    """Start all, wait for all, and end all where one fails or hangs; what they printed."""
    flags = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f)
    environment = {**os.environ, "XLA_FLAGS": flags, "SIMGRAD_CACHE": str(cache), "COLUMNS": "100"}
    started = [
        subprocess.Popen(
            [str(x) for x in command],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]
    try:
        texts = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, texts, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in texts]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and the tables of ``mesh_runs.py devices``."""
    folder = tmp_path_factory.mktemp("mesh")
    for name, case in (("gqa", "llama_gqa_head_dim"), ("gpt2", "gpt2_tied")):
        (folder / name).mkdir()
        write_checkpoint(folder / name, case, tokenizer=name == "gqa")
    config = ModelConfig(
        40, 16, 2, 4, kv_heads=2, max_length=32, positions="rope", mlp="gated", mlp_width=24,
        activation="silu", tied=True, dtype="float64",
    )  # fmt: skip
    simgrad.save(Policy(*create(config), config), folder / "tied")
    run([*PROGRAM, "devices", folder], cache=folder / "cache")
    return folder


def same(table, other):
    assert list(table) == list(other)
    for name in table:
        if name in ("regime", "index"):
            assert table[name].tolist() == other[name].tolist()
        else:
            close(table[name], other[name])


def table(folder, name):
    return ScoreTable.load(folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("name", "data", "model"), [(n, *mesh) for n in CHECKPOINTS for mesh in MESHES[n]]
)
def test_a_mesh_gives_the_table_of_one_device(folder, name, data, model):
    one, many = table(folder, name), table(folder, f"{name}-{data}-{model}")
    assert len(one) == 7
    same(many, one)
    assert (one.metadata["run"]["mesh"], many.metadata["run"]["mesh"]) == (
        None,
        f"data={data},model={model}",
    )
    runs = [{k: v for k, v in t.metadata["run"].items() if k != "mesh"} for t in (one, many)]
    assert runs[0] == runs[1]


def test_a_mesh_gives_the_predictions_of_one_device(folder):
    same(table(folder, "predicted-2-2"), table(folder, "predicted"))
    assert len(table(folder, "predicted")) == 7


def test_the_weights_are_named_alike_on_every_mesh(folder):
    one, many = (table(folder, name).metadata["identity"] for name in ("gqa", "gqa-2-2"))
    assert {k: v for k, v in one.items() if k != "mesh"} == {
        k: v for k, v in many.items() if k != "mesh"
    }
    assert many["mesh"] == "data=2,model=2"


def test_without_gradients_too(folder):
    same(table(folder, "forward-2-2"), table(folder, "forward"))


@pytest.fixture(scope="module")
def two_processes(folder):
    (folder / "alien.parquet").write_text("not ours")
    port = free_port()
    run(
        *([*PROGRAM, "process", folder, port, number] for number in range(2)),
        cache=folder / "cache",
    )
    return [json.loads((folder / f"found-{number}.json").read_text()) for number in range(2)]


def test_two_processes_give_the_same_table_interrupted_or_not(folder, two_processes):
    for found in two_processes:
        assert found["interrupted"] == "Interrupted: "
        assert found["seen"] == [3, 3, 3, 3, 4, 5, 6, 7]  # three were there already
    for name in (
        "two",
        "two-of-process-0",
        "two-of-process-1",
        "again-of-process-0",
        "again-of-process-1",
    ):
        same(table(folder, name), table(folder, "gqa"))
    assert not list(folder.glob("*.partial.npz*"))


def test_each_process_reads_only_what_its_devices_hold(two_processes):
    for found in two_processes:
        assert found["read"] == found["held"]
        assert found["held"] < 0.6 * found["size"]


def test_what_fails_on_one_process_fails_on_all(two_processes):
    for found in two_processes:
        assert (
            "different arguments (learning_rate: 0.1 on process 0, 1.1 on process 1)"
            in found["arguments"]
        )
        assert "none.jsonl: no such file" in found["data"]
        assert "alien.parquet is not a score table of simgrad" in found["out"]


def test_the_command_in_two_processes(folder, tmp_path):
    rows = [
        {"prompt": "is it", "chosen": f" {a}", "rejected": f" {b} so"}
        for a in ("yes", "good")
        for b in ("no",)
    ]
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, rows[0] | {"chosen": " so"}]))
    )
    score = [
        *COMMAND,
        "score",
        "--model",
        folder / "gqa",
        "--data",
        tmp_path / "pairs.jsonl",
        "--no-gradients",
    ]
    score += ["--out", tmp_path / "two.parquet", "--dtype", "float64"]
    many = [
        "--mesh",
        "data=2,model=2",
        "--coordinator",
        f"localhost:{free_port()}",
        "--processes",
        2,
    ]
    out = run(*([*score, *many, "--process", i] for i in range(2)), cache=folder / "cache")
    assert "3 pairs scored" in out[0]
    assert "scored" not in out[1]
    two = ScoreTable.load(tmp_path / "two.parquet")
    assert two.metadata["run"]["mesh"] == "data=2,model=2"
    same(
        two,
        simgrad.score(
            simgrad.load(folder / "gqa", "float64"), tmp_path / "pairs.jsonl", gradients=False
        ),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "--mesh takes NAME=VALUE, got 'data'"),
        ("data=2,modle=2", "--mesh has no axis 'modle'; there are data and model"),
        ("data=0", "--mesh data=0: a positive number of devices is needed"),
        ("data=2,model=1.5", "--mesh model=1.5: a positive number"),
        ("data=true", "--mesh data=True: a positive number"),
        ("data=2,data=2", "--mesh: data is given twice"),
    ],
)
def test_meshes_that_cannot_be_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_axes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, 2, 0), "--processes and --process go with --coordinator HOST:PORT"),
        ((None, "auto", 2, None), "--processes and --process go with --coordinator HOST:PORT"),
        ((None, "host:1", 2, None), "needs --processes N, and --process I from 0 to N - 1"),
        ((None, "host:1", 2, 2), "needs --processes N, and --process I from 0 to N - 1"),
        (
            ({"data": 3, "model": 1}, "host:1", 2, 0),
            "3 devices, which 2 processes cannot share equally",
        ),
    ],
)
def test_process_arguments_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        connect("float32", *arguments)


def test_without_a_cluster_the_coordinator_must_be_named(tmp_path):
    score = [
        *COMMAND,
        "score",
        "--model",
        "m",
        "--data",
        "d",
        "--out",
        "o.parquet",
        "--coordinator",
        "auto",
    ]
    done = subprocess.run(
        score, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "--coordinator auto: JAX finds no processes" in done.stderr
    assert "give --coordinator HOST:PORT --processes N --process I" in done.stderr


def test_a_mesh_has_as_many_devices_as_there_are():
    with pytest.raises(
        ValueError, match=r"takes 6 devices, but JAX has 1 \(cpu\): .*device_count=6"
    ):
        device_mesh(2, 3)
    with pytest.raises(ValueError, match="both axes must be at least 1"):
        device_mesh(0)


def test_heads_are_never_cut():
    """24 features of three heads divide by 4 and by 2; the heads do not."""
    config = ModelConfig(
        vocab_size=33, width=18, heads=3, head_dim=8, mlp_width=20, qkv_bias=True, tied=True
    )
    _, theta = create(config)
    specs = {path: spec(path, config, 4) for path in simgrad.tree.names(theta)}
    assert {path: tuple(s) for path, s in specs.items() if len(s)} == {
        "layers/mlp/up/kernel": (None, None, "model"),
        "layers/mlp/down/kernel": (None, "model"),
    }


def test_parameters_of_a_world_go_on_a_mesh(monkeypatch):
    config = ModelConfig(vocab_size=9, width=8, depth=1, heads=2)
    apply, theta = create(config)
    monkeypatch.setattr(
        checkpoint, "world_policy", lambda source, dtype: (apply, theta, config, None)
    )
    policy = simgrad.load("world:verdicts", mesh=device_mesh())
    jax.tree.map(np.testing.assert_array_equal, policy.theta, theta)
    assert {leaf.sharding.mesh.axis_names for leaf in jax.tree.leaves(policy.theta)} == {
        ("data", "model")
    }
    assert digest(policy.theta) == digest(theta) == digest(jax.tree.map(np.asarray, theta))
