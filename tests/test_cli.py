"""The command as a user runs it: in a process of its own, or many calls in one where starting is
all they do."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from simgrad.bridge import ScoreTable
from simgrad.cli.problems import is_refusal
from simgrad.store import load_arrays

COMMAND = [sys.executable, "-c", "from simgrad.cli import main; main()"]
ROWS = [
    {"prompt": "is it", "chosen": f" {a} so", "rejected": f" {b} so"}
    for a in ("yes", "good")
    for b in ("no", "never")
]


def simgrad(*arguments, cache, check=True):
    environment = {
        **os.environ,
        "SIMGRAD_CACHE": str(cache),
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def in_one_process(*calls, cache):
    """What :func:`simgrad` returns of each call, with ``check=False``."""
    environment = {
        **os.environ,
        "SIMGRAD_CACHE": str(cache),
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
    }
    given = json.dumps([[str(x) for x in call] for call in calls])
    code = [sys.executable, str(Path(__file__).parent / "commands.py"), given]
    done = subprocess.run(
        code, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**found) for found in json.loads(done.stdout)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, {**ROWS[0], "chosen": ""}]))
    return path


def test_help(tmp_path):
    names = "score report predict sweep world worlds objectives figures validate bench".split()
    calls = [("--help",), *[(name, "--help") for name in names]]
    for (*name, _), found in zip(calls, in_one_process(*calls, cache=tmp_path), strict=True):
        assert (found.returncode, found.stderr) == (0, "")
        assert f"usage: {' '.join(['simgrad', *name])} " in found.stdout


def test_help_does_not_import_jax(tmp_path):
    code = (
        "import sys; sys.argv = ['simgrad', '--help']\nfrom simgrad.cli import main\n"
        "try: main()\nexcept SystemExit: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_objectives_lists_them_all_with_what_they_do(tmp_path):
    from simgrad.objectives import FAMILIES, catalog

    whole, some, listed, wrong = in_one_process(
        ("objectives",),
        ("objectives", "kto", "cdpo"),
        ("objectives", "bco", "--json"),
        ("objectives", "dpoo"),
        cache=tmp_path,
    )
    assert [found.returncode for found in (whole, some, listed, wrong)] == [0, 0, 0, 2]
    text = whole.stdout
    assert max(map(len, text.splitlines())) <= 100
    joined = " ".join(text.split())
    for d in catalog():
        assert f"\n{d.name} " in text
    for line in ("-logσ(β·m)", "d_w/d_l = |y_l|/|y_w|", "d_w < 0 where m > 1/(2·β)", *FAMILIES):
        assert line in joined
    assert "λ_D desirable_weight=1.0" in some.stdout
    assert "where σ(-β·m) < ε" in some.stdout
    assert [(d["name"], d["batch_coupled"]) for d in json.loads(listed.stdout)] == [("bco", True)]
    assert "did you mean 'dpo'" in wrong.stderr


def test_score_writes_a_table_and_a_summary(checkpoint, data, tmp_path):
    out = tmp_path / "scores.parquet"
    done = simgrad(
        "score",
        "--model",
        checkpoint,
        "--data",
        data,
        "--out",
        out,
        "--lr",
        "1e-4",
        cache=tmp_path / "c",
    )
    table = ScoreTable.load(out)
    assert table["index"].tolist() == [0, 1, 2, 3]
    assert "4 pairs scored, 1 skipped" in done.stdout
    assert "empty chosen response" in done.stdout
    assert "Worst pairs" in done.stdout
    assert "both_fall" in done.stdout
    assert json.loads((tmp_path / "scores.skipped.jsonl").read_text()) == {
        "index": 4,
        "reason": "empty chosen response",
    }


def test_killed_with_signal_nine_it_continues(checkpoint, data, tmp_path):
    arguments = (
        "score",
        "--model",
        checkpoint,
        "--data",
        data,
        "--batch-tokens",
        "1",
        "--no-gradients",
    )
    whole, part = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    simgrad(*arguments, "--out", whole, cache=tmp_path / "c")
    environment = {**os.environ, "SIMGRAD_CACHE": str(tmp_path / "other")}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--out", str(part)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    partial = tmp_path / "part.parquet.partial.npz"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if partial.exists() and load_arrays(partial)[0]["__done__"].any():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    simgrad(*arguments, "--out", part, cache=tmp_path / "c")
    assert part.read_bytes() == whole.read_bytes()
    assert not partial.exists()


MISTAKES = {
    ("--objective", "dpoo"): "did you mean 'dpo'",
    ("--gamma", "1.0"): "dpo has no hyperparameter gamma",
    ("--set", "alpha"): "--set takes NAME=VALUE, got 'alpha'",
    ("--objective", "r_dpo", "--set", "alpha=nan"): "alpha must be",
    ("--objective", "r_dpo", "--set", "alpha=big"): "alpha must be a number, got 'big'",
    ("--beta", "0.1", "--set", "beta=0.2"): "beta is given twice",
    ("--model", "no/such/folder"): "neither a folder nor a valid Hub id",
    ("--data", "none.jsonl"): "none.jsonl: no such file",
    ("--max-length", "100"): "the model reads 1 to 32 tokens",
}


def test_mistakes_end_in_one_line(checkpoint, data, tmp_path):
    usual = {"--model": checkpoint, "--data": data, "--out": tmp_path / "s.parquet"}
    given = [usual | dict(zip(change[::2], change[1::2], strict=True)) for change in MISTAKES]
    calls = [("score", *(x for item in arguments.items() for x in item)) for arguments in given]
    for message, found in zip(
        MISTAKES.values(), in_one_process(*calls, cache=tmp_path), strict=True
    ):
        assert found.returncode == 2, message
        assert message in found.stderr
        assert "Traceback" not in found.stderr
    assert not (tmp_path / "s.parquet").exists()


def test_float64_is_float64(checkpoint, data, tmp_path):
    some = ("score", "--model", checkpoint, "--data", data, "--no-gradients")
    calls = [
        (*some, "--out", tmp_path / f"{d}.parquet", "--dtype", d) for d in ("float64", "float32")
    ]
    assert [found.returncode for found in in_one_process(*calls, cache=tmp_path / "c")] == [0, 0]
    a, b = (
        ScoreTable.load(tmp_path / f"{d}.parquet")["logp_chosen"] for d in ("float64", "float32")
    )
    assert 0 < np.abs(a - b).max() < 1e-5


def test_predict_and_check(checkpoint, data, tmp_path):
    out = tmp_path / "new" / "predicted.parquet"
    given = {"--model": checkpoint, "--data": data, "--out": out, "--batch-size": 3, "--lr": 1e-3}

    def call(*more, **changes):
        changed = given | {f"--{name}": value for name, value in changes.items()}
        return ("predict", *(x for item in changed.items() for x in item), *more)

    done, again, other, sampled, long, wrong, diverged = in_one_process(
        call("--check"),
        call(),
        call(lr=1e-4),
        call("--sample", 3, out=tmp_path / "s.parquet"),
        call("--max-length", 33, out=tmp_path / "l.parquet"),
        call(out=tmp_path / "x.csv"),
        call("--check", out=tmp_path / "d.parquet", lr=1e30, optimizer="sgd"),
        cache=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "are predicted to fall" in done.stdout
    assert "kernel flow, refreshed" in done.stdout
    table = ScoreTable.load(out)
    assert table["index"].tolist() == [0, 1, 2, 3]
    assert all(np.isfinite(table[name]).all() for name in table)
    assert table.metadata["run"]["steps"] == "2"  # the last, which four pairs do not fill, too
    assert [s.reason for s in table.skipped] == ["empty chosen response"]
    import pyarrow.parquet as pq

    checked = json.loads(
        pq.read_schema(out.with_name("predicted.check.parquet")).metadata[b"simgrad"]
    )
    run = checked["run"]
    assert (run["learning_rate"], run["optimizer"], run["batch_size"]) == ("0.001", "adam", "3")
    assert checked["identity"]["weights"] == table.metadata["identity"]["weights"]
    assert again.returncode == 0
    assert "4/4" not in again.stderr  # the finished table is recognised
    for found, message in (
        (other, "recipe.learning_rate: 0.001 there, 0.0001 now"),
        (sampled, "groups <= sample <= pairs"),
        (long, "max_length=33 is out of range: the model reads 1 to 32 tokens"),
        (wrong, "written as .parquet"),
        (diverged, "are not finite: lower the learning rate"),
    ):
        assert found.returncode == 2, found.stderr
        assert message in found.stderr
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize("command", ["score", "predict"])
def test_every_command_guards_what_it_reads(checkpoint, data, tmp_path, command):
    """No tokenizer, and files that are damaged: one sentence that names the file and the remedy."""
    bare, torn, deep = tmp_path / "bare", tmp_path / "torn", tmp_path / "deep.jsonl"
    for folder in (bare, torn):
        shutil.copytree(checkpoint, folder)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    deep.write_text('{"prompt": "is", "chosen": ' + "[" * 100_000 + "]" * 100_000 + "}")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (tmp_path / "zip.jsonl").write_bytes(gzip.compress(data.read_bytes()))
    calls = {
        (bare, data): "bare has no tokenizer: pass simgrad.pairs.Pair objects",
        (torn, data): "model.safetensors is damaged or not complete",
        (checkpoint, deep): "deep.jsonl, line 1: nested too deeply for a preference row",
        (checkpoint, tmp_path / "latin.jsonl"): "latin.jsonl: not text in UTF-8",
        (checkpoint, tmp_path / "zip.jsonl"): "zip.jsonl: compressed with gzip: unpack it first",
    }
    given = [
        (command, "--model", model, "--data", source, "--out", tmp_path / "o.parquet")
        for model, source in calls
    ]
    for message, found in zip(calls.values(), in_one_process(*given, cache=tmp_path), strict=True):
        assert found.returncode == 2, found.stderr
        assert message in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1, found.stderr


def raised(make):
    with pytest.raises(ValueError, match=".") as caught:
        make()
    return caught.value


def test_errors_inside_a_computation_are_not_the_users():
    import jax
    import jax.numpy as jnp

    from simgrad import objectives
    from simgrad.models import ModelConfig

    assert is_refusal(raised(lambda: objectives.get("dpoo")))
    assert is_refusal(raised(lambda: ModelConfig(vocab_size=9, width=-1)))
    assert not is_refusal(raised(lambda: np.zeros(2) + np.zeros(3)))  # not simgrad's sentence
    inside = {"__name__": "simgrad.somewhere", "np": np}
    exec("def add(): return np.zeros(2) + np.zeros(3)", inside)
    assert not is_refusal(raised(inside["add"]))  # NumPy's sentence, though simgrad called it
    jax.config.update("jax_traceback_filtering", "off")  # as the commands do
    traced = raised(lambda: jax.jit(lambda x: objectives.get("dpoo"))(jnp.ones(())))
    jax.config.update("jax_traceback_filtering", "auto")
    assert not is_refusal(traced)


def test_internal_errors_ask_for_a_report(tmp_path, checkpoint, data):
    code = (
        "import sys\nfrom simgrad.bridge.engine import score\n"
        "def broken(*_, **__): raise ValueError('shapes')\n"
        "score.score_batch = broken\n"
        "from simgrad.cli import main; main()"
    )
    score = ["score", "--model", checkpoint, "--data", data, "--out", tmp_path / "o.parquet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, score)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SIMGRAD_CACHE": str(tmp_path)},
    )
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "an error in simgrad, not in what you gave it. Please report it" in done.stderr


@pytest.mark.parametrize("seconds", [0.15, 0.5, 1.5])
def test_an_interrupt_while_starting_up_is_answered_in_one_line(
    checkpoint, data, tmp_path, seconds
):
    score = ["score", "--model", checkpoint, "--data", data, "--out", tmp_path / "o.parquet"]
    started = (
        "import os, signal, sys, threading\n"
        f"threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "from simgrad.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", started, *map(str, score)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "SIMGRAD_CACHE": str(tmp_path)},
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Interrupted.")


def assert_interrupted(imports, body):
    """A command whose run() is this body ends as interrupted, in one line."""
    code = (
        f"import {imports}\nimport simgrad.cli.commands as commands\n"
        f"from simgrad.cli import main\nclass Parsed:\n    def run(self):\n{body}"
        "commands.parsed = Parsed\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("Interrupted.")


def test_an_interrupt_that_falls_into_garbage_collection_is_not_lost():
    imports, body = (
        "gc, os, signal, time",
        (
            "        def collect(phase, info):\n"
            "            gc.callbacks.clear()\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "        gc.callbacks.append(collect)\n"
            "        gc.collect()\n"
            "        time.sleep(60)\n"
        ),
    )
    assert_interrupted(imports, body)


def test_an_interrupt_that_c_code_turns_into_an_error_is_still_one():
    """As NumPy's import does: it prints the interrupt, and raises an ImportError of its own."""
    imports, body = (
        "sys",
        (
            "        try:\n"
            "            raise KeyboardInterrupt\n"
            "        except KeyboardInterrupt:\n"
            "            sys.excepthook(*sys.exc_info())\n"
            "        raise ImportError('numpy._core.multiarray failed to import') from None\n"
        ),
    )
    assert_interrupted(imports, body)


def test_worlds_are_listed_with_their_knobs_measured_and_saved(tmp_path):
    from simgrad import worlds

    options = ("--seeds", 2, "--set", "draws=4", "--out", tmp_path / "out")
    done, listed, wrong = in_one_process(
        ("world", "squeezing", *options),
        ("worlds",),
        ("world", "squeezing", "--set", "draw=4"),
        cache=tmp_path,
    )
    text = listed.stdout
    for name in worlds.names():
        assert name in text
    assert "overlap=0.6" in text
    assert done.returncode == 0, done.stderr
    assert "What these seeds say" in done.stdout
    import pyarrow.parquet as pq

    files = sorted((tmp_path / "out").iterdir())
    assert files
    for file in files:
        metadata = json.loads(pq.read_schema(file).metadata[b"simgrad"])
        assert metadata["knobs"]["draws"] == 4
        assert metadata["seeds"] == [0, 1]
        assert "git_revision" in metadata["provenance"]
    assert wrong.returncode == 2
    assert "squeezing has no knob draw; it has:" in wrong.stderr
