"""A sweep is many runs of train(), whatever device they land on, however often it is stopped."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PAIRS, close, model

from simgrad.dynamics import DivergedError, RunConfig, SweepTable, grid, sweep, train
from simgrad.dynamics.configs import MITIGATIONS
from simgrad.dynamics.sweep import _running
from simgrad.models import only
from simgrad.pairs import packed, padded
from simgrad.theory.optimizers import updated
from simgrad.validation.bench import sweeps as bench_sweep

BATCH = padded(PAIRS)
SEEDS = [3, 5]


def policies(kind, seeds=SEEDS):
    apply, theta = model(kind)
    return apply, stacked([jax.tree.map(lambda x, s=s: (1 + 0.05 * s) * x, theta) for s in seeds])


def stacked(things):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *things)


def one(things, i):
    return jax.tree.map(lambda x: x[i], things)


CONFIGS = {
    "mitigations": [
        RunConfig(optimizer="momentum", learning_rate=0.05, steps=3, batch_size=2, mitigation=m)
        for m in ("projected", "running", "mask")
    ],
    "optimizers": [
        RunConfig(optimizer=kind, learning_rate=0.01, steps=4, batch_size=2, clip=clip)
        for kind, clip in (("momentum", 0.1), ("adamw", None))
    ],
    "a transformer": [RunConfig(learning_rate=0.01, steps=3, batch_size=2, clip=0.1)],
    "objectives and blocks": [
        RunConfig("ipo", {"beta": 0.2}, "adam", 0.01, steps=2, include=["unembedding/*"]),
        RunConfig("aot", (), "sgd", 0.1, steps=2, batch_size=4, accumulate=2),
    ],
}


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("mitigations", "a batch a seed"),
        ("optimizers", "shared"),
        ("objectives and blocks", "a batch a seed"),
        ("a transformer", "shared"),
    ],
)
def test_each_row_is_the_run_that_train_makes(what, layout):
    kind = "rope_gqa_head_dim" if what == "a transformer" else "linear_softmax"
    apply, thetas = policies(kind)
    batches = [BATCH, BATCH] if layout == "shared" else [BATCH, BATCH.take(np.array([2, 0, 3, 1]))]
    shared = BATCH if layout == "shared" else stacked(batches)
    found = sweep(apply, thetas, shared, CONFIGS[what], seeds=SEEDS)
    assert len(found) == 2 * len(CONFIGS[what])
    for k, config in enumerate(CONFIGS[what]):
        i = k % 2
        row = 2 * k + i
        trained = only(apply, *config.include or ())
        run = train(trained, one(thetas, i), batches[i], config.recipe(SEEDS[i]))
        change = np.asarray(run.trajectory.change[-1])
        np.testing.assert_allclose(found.change[row], change, rtol=1e-10, atol=1e-12)
        expected = {
            "dlogp_chosen": change[:, 0].mean(),
            "dlogp_rejected": change[:, 1].mean(),
            "margin": (change[:, 0] - change[:, 1]).mean(),
            "chosen_falls": (change[:, 0] < 0).mean(),
            "both_fall": (change < 0).all(1).mean(),
            "largest": np.abs(change).max(),
            "first_loss": run.trajectory.losses[0],
            "last_loss": run.trajectory.losses[-1],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name][row], value, rtol=1e-10, atol=1e-12, err_msg=name
            )
        assert (found["seed"][row], found["diverged"][row]) == (SEEDS[i], -1)


def test_columns_say_what_was_run():
    apply, thetas = policies("linear_softmax")
    configs = grid(objective=["dpo", "ipo"], beta=[0.1, 0.3], optimizer="sgd", steps=1)
    configs += [RunConfig("sft", optimizer="adamw", steps=1, clip=1.0, include=["unembedding/*"])]
    found = sweep(apply, thetas, BATCH, configs, seeds=SEEDS)
    assert found["objective"].tolist()[::2] == ["dpo", "dpo", "ipo", "ipo", "sft"]
    np.testing.assert_array_equal(found["beta"][::2], [0.1, 0.3, 0.1, 0.3, np.nan])
    np.testing.assert_array_equal(found["weight_decay"][-2:], [0.01, 0.01])
    np.testing.assert_array_equal(found["clip"], [np.nan] * 8 + [1.0] * 2)
    assert found["include"].tolist()[-1] == "unembedding/*"
    assert (found["batch_size"] == len(PAIRS)).all()
    with pytest.raises(KeyError, match=r"no column 'lr'; there are: objective, beta"):
        found["lr"]


def test_learning_rates_share_one_program():
    apply, thetas = policies("linear_softmax")
    rates = grid(learning_rate=[0.01, 0.02, 0.04], optimizer="sgd", steps=2)
    _running.cache_clear()
    sweep(apply, thetas, BATCH, rates, seeds=SEEDS, at_once=1)
    assert _running.cache_info().misses == 1
    count = compiled(lambda: sweep(apply, thetas, BATCH, rates, seeds=SEEDS, at_once=1))
    assert count == 0
    others = grid(learning_rate=[0.03, 0.05, 0.06], optimizer="sgd", steps=2)
    assert compiled(lambda: sweep(apply, thetas, BATCH, others, seeds=SEEDS, at_once=1)) == 0
    assert compiled(lambda: sweep(apply, thetas, BATCH, grid(steps=[2, 3]), seeds=SEEDS)) >= 2
    assert _running.cache_info().misses == 3


def compiled(call):
    """How many programs XLA compiles during the call."""
    events = []

    def note(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return len(events)


def test_at_once_does_not_change_the_table():
    apply, thetas = policies("linear_softmax", range(5))
    runs = grid(learning_rate=[0.01, 0.1], optimizer="sgd", steps=3)
    tables = [sweep(apply, thetas, BATCH, runs, seeds=range(5), at_once=k) for k in (1, 3, None)]
    for table in tables[1:]:
        np.testing.assert_allclose(table.change, tables[0].change, rtol=1e-10, atol=1e-13)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_stopped_sweep_continues_with_what_is_missing(tmp_path, at_once):
    apply, thetas = policies("linear_softmax", range(3))
    configs = grid(learning_rate=[0.05, 0.1], optimizer="sgd", steps=[2, 3])
    options = {"seeds": range(3), "at_once": at_once}
    whole = sweep(apply, thetas, BATCH, configs, **options)
    out, seen = tmp_path / "sweep.npz", []

    def stop(done, total):
        seen.append((done, total))
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        sweep(apply, thetas, BATCH, configs, out=out, progress=stop, **options)
    done = seen[-1][0]
    assert len(SweepTable.load(out)) == done < 12
    rest = []
    resumed = sweep(
        apply,
        thetas,
        BATCH,
        configs,
        out=out,
        progress=lambda n, total: rest.append((n, total)),
        **options,
    )
    assert rest == [(n, 12) for n in range(done + at_once, 13, at_once)]
    again = sweep(
        apply, thetas, BATCH, configs, out=out, progress=lambda *_: rest.append("more"), **options
    )
    assert "more" not in rest
    for table in (resumed, again, SweepTable.load(out)):
        assert list(table.columns) == list(whole.columns)
        np.testing.assert_array_equal(table.change, whole.change)
        for name in whole.columns:
            np.testing.assert_array_equal(table[name], whole[name], err_msg=name)
    before = out.read_bytes()
    (tmp_path / "again.npz").unlink(missing_ok=True)
    sweep(apply, thetas, BATCH, configs, out=tmp_path / "again.npz", **options)
    assert (tmp_path / "again.npz").read_bytes() == before


def test_the_file_of_another_sweep_is_refused(tmp_path):
    apply, thetas = policies("linear_softmax")
    out, configs = tmp_path / "sweep.npz", grid(optimizer="sgd", steps=1)
    sweep(apply, thetas, BATCH, configs, seeds=SEEDS, out=out)
    before = out.read_bytes()
    for change, match in (
        (
            {"configs": grid(optimizer="sgd", steps=2)},
            r"sweep.npz belongs to another run \(configs: .* there, .* now\)",
        ),
        ({"seeds": [1, 2]}, r"run \(seeds: \[3, 5\] there, \[1, 2\] now\)"),
        (
            {"thetas": jax.tree.map(lambda x: 2 * x, thetas), "batches": packed(PAIRS)},
            r"run \(pairs: \w{16} there, \w{16} now; policies: \w{16} there, \w{16} now\)",
        ),
    ):
        call = {"thetas": thetas, "batches": BATCH, "configs": configs, "seeds": SEEDS, **change}
        with pytest.raises(ValueError, match=match):
            sweep(apply, out=out, **call)
    assert out.read_bytes() == before
    train(apply, one(thetas, 0), BATCH, configs[0].recipe(), out=tmp_path / "run.npz")
    with pytest.raises(ValueError, match=r"run\.npz holds no rows"):
        sweep(apply, thetas, BATCH, configs, seeds=SEEDS, out=tmp_path / "run.npz")


def test_a_run_that_diverges_is_a_row_that_says_when():
    apply, thetas = policies("unconstrained_features")
    configs = grid(objective="ipo", learning_rate=[0.01, 1e30], optimizer="sgd", steps=30)
    found = sweep(apply, thetas, BATCH, configs, seeds=SEEDS, at_once=2)
    with pytest.raises(DivergedError) as caught:
        train(apply, one(thetas, 1), BATCH, configs[1].recipe(SEEDS[1]))
    assert found["diverged"].tolist()[:2] == [-1, -1]
    assert found["diverged"][3] == caught.value.step
    assert np.isfinite(found.change[:2]).all()
    assert np.isnan(found.change[2:]).all()
    for name in ("dlogp_chosen", "margin", "chosen_falls", "both_fall", "largest", "last_loss"):
        assert np.isnan(found[name]).tolist() == [False, False, True, True], name
    assert np.isfinite(found["first_loss"]).all()
    late = sweep(apply, thetas, BATCH, [RunConfig("ipo", (), "sgd", 1e200, steps=1)], seeds=SEEDS)
    assert late["diverged"].tolist() == [1, 1]


ERRORS = {
    "unknown optimizer 'adma'; did you mean 'adam'": {"optimizer": "adma"},
    "unknown mitigation 'project'; did you mean 'projected'": {"mitigation": "project"},
    "did you mean 'dpo'": {"objective": "dpoo"},
    "dpo has no hyperparameter gamma; it takes: beta": {"gamma": 0.1},
    "unknown name in a grid 'learning_rat'; did you mean 'learning_rate'": {"learning_rat": 0.1},
    "learning_rate is an empty list": {"learning_rate": []},
    "learning_rate must be positive and finite, got -0.1": {"learning_rate": [0.1, -0.1]},
    "clip must be positive and finite, got 0.0": {"clip": 0.0},
    "steps must be a whole number of at least 1, got 0": {"steps": 0},
    "momentum belongs to optimizer='momentum', not to 'sgd'": {"optimizer": "sgd", "momentum": 0.5},
    "include takes a list of patterns": {"include": "embedding/*"},
}


@pytest.mark.parametrize("match", ERRORS)
def test_grids_that_make_no_recipe(match):
    with pytest.raises(ValueError, match=match.replace("[", r"\[")):
        grid(**ERRORS[match])


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_optax(name, clip):
    expected = (
        OPTIMIZERS[name]
        if clip is None
        else optax.chain(optax.clip_by_global_norm(clip), OPTIMIZERS[name])
    )
    chosen = RunConfig(optimizer=name, learning_rate=0.1, clip=clip).recipe().optimizer
    theta = {"w": jnp.array([0.3, -2.0]), "b": jnp.array(0.5)}
    inner, other = chosen.init(theta), expected.init(theta)
    for k in range(3):
        gradient = jax.tree.map(lambda x, k=k: jnp.sin(x + k), theta)
        update, inner = updated(chosen, gradient, inner, theta)
        reference, other = updated(expected, gradient, other, theta)
        close(update, reference)
        theta = jax.tree.map(jnp.add, theta, update)


def test_names_of_mitigations():
    kinds = [type(RunConfig(mitigation=m).recipe().mitigation).__name__ for m in MITIGATIONS]
    assert kinds == ["PairwiseNormalized", "Calibrated", "RunningCalibrated", "Projected"]


def test_grids_are_products_and_add_up():
    some = grid(
        objective=["dpo", "ipo"], beta=np.array([0.1, 0.2]), steps=7, include=("embedding/*",)
    )
    assert [(c.objective, dict(c.hyperparameters)["beta"]) for c in some] == [
        ("dpo", 0.1), ("dpo", 0.2), ("ipo", 0.1), ("ipo", 0.2)
    ]  # fmt: skip
    assert all(c.steps == 7 and c.include == ("embedding/*",) for c in some)
    assert len({*some, *grid(objective="dpo", beta=0.1, steps=7, include=["embedding/*"])}) == 4


def test_calls_that_cannot_be_followed(tmp_path):
    apply, thetas = policies("linear_softmax")
    some = grid(optimizer="sgd", steps=1)
    for change, match in (
        ({"configs": []}, "no configs: give at least one"),
        ({"configs": some * 2}, r"configs holds RunConfig\(.*\) twice"),
        ({"seeds": [1, 1]}, "seeds holds 1 twice"),
        ({"seeds": [1, 2, 3]}, "3 seeds, but thetas has leading axes"),
        ({"batches": stacked([BATCH] * 3)}, "2 seeds, but 3 batches"),
        ({"configs": grid(batch_size=9)}, "batch_size=9, but there are only 4 pairs"),
        ({"configs": grid(include=[["nothing"]])}, "no parameter matches 'nothing'"),
        ({"out": tmp_path / "sweep.json"}, "written as .npz"),
    ):
        call = {"thetas": thetas, "batches": BATCH, "configs": some, "seeds": SEEDS, **change}
        with pytest.raises(ValueError, match=match):
            sweep(apply, **call)


TOY = bench_sweep.SweepConfig(
    steps=3, batch_sizes=(2,), pairs=3, width=8, linear_width=4, linear_pairs=3, depth=1, seeds=1,
    linear_seeds=2, linear_rates=2, repeats=2, loops=1, vocab_size=20
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_compares_equal_runs():
    pytest.importorskip("torch")
    record = bench_sweep.bench_sweeps(TOY)
    assert [(m["task"], m["runs"]) for m in record["measurements"]] == [
        ("1-layer transformer", 1),
        ("linear-softmax", 4),
    ]
    for m in record["measurements"]:
        assert m["error"] < 1e-3
        assert m["ratio_range"][0] <= m["ratio"] <= m["ratio_range"][1]


def test_the_benchmark_runs_without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    record = bench_sweep.bench_sweeps(dataclasses.replace(TOY, batch_sizes=()))
    assert [(m["ratio"], m["seconds"] > 0) for m in record["measurements"]] == [(None, True)]


DEVICES = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import jax, numpy as np
from test_sweep import *
assert jax.local_device_count() == 2
apply, thetas = policies("linear_softmax", range(3))
some = grid(optimizer="sgd", steps=2, learning_rate=[0.01, 0.02])
found = sweep(apply, thetas, BATCH, some, seeds=range(3))
np.save({out!r}, found.change)
"""


def test_two_devices_give_the_table_of_one(tmp_path):
    apply, thetas = policies("linear_softmax", range(3))
    runs = grid(optimizer="sgd", steps=2, learning_rate=[0.01, 0.02])
    found = sweep(apply, thetas, BATCH, runs, seeds=range(3))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    code = DEVICES.format(tests=os.path.dirname(__file__), out=str(tmp_path / "change.npy"))
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "change.npy"), found.change, rtol=1e-10, atol=1e-13
    )


COMMAND = """
import contextlib, io, json, sys
from dataclasses import dataclass
import tyro
from simgrad import worlds
from simgrad.models import linear_softmax
from simgrad.pairs import Pair
from simgrad.worlds.tuning import stacked

@dataclass(frozen=True)
class Tiny(worlds.World):
    name = "tiny"
    learning_rate: float = 0.05
    steps: int = 3
    beta: float = 0.2
    def corpus(self, seed):
        return None
    def policies(self, seeds):
        some = [pair for seed in seeds for pair in self.pairs(seed)]
        made = [linear_softmax(some, 13, 8, seed) for seed in seeds]
        return made[0][0], stacked([theta for _, theta in made])
    def pairs(self, seed):
        return [Pair([1, 2], [3] * (1 + seed), [4]), Pair([1], [5], [6, 7])]

worlds.get = lambda name, **knobs: Tiny().with_knobs(**knobs)
from simgrad.cli.sweep import Sweep
results = []
for arguments in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            results.append([tyro.cli(Sweep, args=["tiny", *arguments]).run(), printed.getvalue()])
        except ValueError as error:
            results.append([2, str(error)])
print(json.dumps(results))
"""


def commands(*calls, cache):
    """(exit status, what was printed) of each call of the command, all in one process."""
    environment = {**os.environ, "SIMGRAD_CACHE": str(cache), "COLUMNS": "120"}
    code = [sys.executable, "-c", COMMAND, json.dumps([[str(x) for x in call] for call in calls])]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_tabulates_and_saves(tmp_path):
    import pyarrow.parquet as pq

    out = tmp_path / "s.parquet"
    some = ("--seeds", 2, "--set", "steps=4", "--grid", "optimizer=sgd", "clip=none,1")
    call = (*some, "learning_rate=0.1,0.2", "--out", out)
    ((status, printed),) = commands(call, cache=tmp_path)
    assert status == 0
    assert "tiny (2 seeds; mean ± half of the 95 % interval)" in printed
    assert "objective=dpo, beta=0.2, optimizer=sgd, steps=4, batch_size=2" in printed
    assert max(map(len, printed.splitlines())) <= 120
    table = pq.read_table(out)
    meta = json.loads(table.schema.metadata[b"simgrad"])
    assert (meta["world"], meta["knobs"]["steps"]) == ("tiny", 4)
    assert meta["run"]["seeds"] == "[0, 1]"
    assert meta["provenance"]["simgrad"]
    stored = SweepTable.load(tmp_path / "s.npz")
    assert table["learning_rate"].to_pylist() == [0.1, 0.1, 0.2, 0.2] * 2
    np.testing.assert_array_equal(table["margin"].to_numpy(), stored["margin"])
    assert stored.change.shape == (8, 2, 2)
    before, other = out.read_bytes(), tmp_path / "other.parquet"
    other.write_bytes(b"")
    wrong = {
        (*some, "--out", out): "belongs to another run (configs: ",
        (*some, "--out", other): "is there, but not its other.npz",
        ("--grid", "optimizer=adma"): "did you mean 'adam'",
        ("--grid", "include=none,unembedding/*+nope/*"): "no parameter matches 'nope/*'",
        ("--grid", "beta"): "--grid takes NAME=VALUE, got 'beta'",
        ("--set", "betta=1"): "tiny has no knob betta",
        ("--seeds", "0"): "at least one",
        ("--out", tmp_path / "s.csv"): "tables are written as .parquet",
    }
    calls = [x if "--out" in x else (*x, "--out", tmp_path / "none.parquet") for x in wrong]
    again, *mistakes = commands(call, *calls, cache=tmp_path)
    assert again == [0, printed]
    assert out.read_bytes() == before
    for (status, text), message in zip(mistakes, wrong.values(), strict=True):
        assert status == 2
        assert message in text
    assert not (tmp_path / "none.parquet").exists()
