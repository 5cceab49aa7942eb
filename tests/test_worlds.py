"""The effects of the transformer worlds have the papers' signs; worlds serve as checkpoints and
data sets."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from simgrad import store, worlds
from simgrad.bridge import encode, load, read_rows, save
from simgrad.store import naming, provenance, source
from simgrad.worlds import verdicts
from simgrad.worlds import world as world_module
from simgrad.worlds.world import Pretraining, policy_identity

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache of pretrained policies for the whole run."""
    return tmp_path_factory.mktemp("cache")


@functools.cache
def measured(name, cache):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "SIMGRAD_CACHE": str(cache)
    }
    command = [sys.executable, str(HERE / "world_signs.py"), name]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_preferring_one_refusal_to_another_makes_the_model_say_yes(cache):
    found = measured("verdicts", cache)
    assert min(found["moved"]) > 0.4
    assert all(found["agrees"])
    assert max(found["mild"]) < 0.05


def test_the_shared_ending_entangles_and_the_batch_kernel_knows(cache):
    found = measured("suffix", cache)
    assert found["cosine"][0] < 0.05 < found["cosine"][1]
    assert found["change"][1] < -0.05 < found["change"][0]
    assert found["word"] > 0
    assert found["batch right"] > found["own right"] + 0.2


def test_refusals_fall_under_dpo_and_stay_with_random_preferences_or_sft(cache):
    found = measured("refusals", cache)
    start, dpo = (np.array(found[k]) for k in ("start", "DPO"))
    assert (dpo < 0.65 * start).all()
    assert (np.array(found["random preferences"]) > 0.9 * start).all()
    assert (np.array(found["SFT term 0.1"]) > dpo + 0.1).all()
    assert np.mean(found["rolled openings"]) > 0.95


def test_the_direction_of_the_data_set_predicts_and_ches_does_not(cache):
    found = measured("percentiles", cache)
    assert found["directional"] > 0.85
    assert found["kernel flow, ray"] > 0.9
    assert found["CHES"] < found["directional"] - 0.2


class Tiny(verdicts.Verdicts):
    """Pretrained for two steps."""

    name = "tiny"
    pretraining = Pretraining(steps=2, batch_size=4, warmup=1)


def test_a_seed_has_one_policy_whoever_is_trained_with_it(monkeypatch, tmp_path):
    world = Tiny()
    found = []
    for seeds in ([0], [0, 1, 2, 3, 4]):
        monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path / str(len(seeds))))
        found.append(worlds.pretrained(world, seeds)[1])
    for alone, together in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(alone[0], together[0])


def test_pretraining_is_cached_by_configuration_and_seed(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path))
    world = Tiny(sequences=16)
    _, first = worlds.pretrained(world, [0, 1])
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "worlds").iterdir()}
    assert len(files) == 2
    _, second = worlds.pretrained(world, [1, 0])
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "worlds").iterdir()} == files
    a, b = (x["unembedding"]["table"] for x in (first, second))
    np.testing.assert_array_equal(a, b[::-1])
    assert not np.array_equal(a[0], a[1])
    worlds.pretrained(Tiny(sequences=17), [0])
    assert len(list((tmp_path / "worlds").iterdir())) == 3


def _key(world=None):
    return store.digest(policy_identity(world or Tiny()))


def test_policies_are_named_by_all_that_makes_them(monkeypatch):
    """The code of the world and what it imports, knobs, recipe, versions and device."""
    keys = [_key(), _key(Tiny(frequency_no=2.0)), _key(Tiny(unembedding=0.06))]
    with monkeypatch.context() as m:
        m.setattr(Tiny, "pretraining", Pretraining(steps=3, batch_size=4, warmup=1))
        keys.append(_key())
    for name in ("jax", "device", "simgrad"):
        with monkeypatch.context() as m:
            m.setattr(naming, "provenance", lambda name=name: {**provenance(), name: "another"})
            keys.append(_key())
    with monkeypatch.context() as m:
        m.setattr(Tiny, "corpus", lambda self, seed: None)
        keys.append(_key())
    assert len(set(keys)) == len(keys)
    assert _key(Tiny(learning_rate=1.0)) == keys[0]


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("worlds/verdicts.py", True),
        ("models/layers.py", True),
        ("dynamics/pretraining.py", True),
        ("experiments/verdicts.py", False),
        ("experiments/findings.py", False),
        ("figures/verdicts.py", False),
        ("worlds/suffix.py", False),
    ],
)
def test_policies_are_stale_when_code_that_makes_them_changes_and_only_then(
    file, stale, tmp_path, monkeypatch
):
    folder = tmp_path / "simgrad"
    shutil.copytree(source.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "PACKAGE", folder)
    keys = []
    for text in ("", "\nCAPTION = 'another'\n"):
        (folder / file).write_text((folder / file).read_text() + text)
        for cache in (source.code, source._module, source._parsed):
            cache.cache_clear()
        keys.append(_key(verdicts.Verdicts()))
    for cache in (source.code, source._module, source._parsed):
        cache.cache_clear()
    assert (keys[0] != keys[1]) == stale


def test_policies_can_be_made_anew_once_each(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path))
    trained, train = [], world_module._train

    def counted(world, config, seeds):
        trained.extend(seeds)
        return train(world, config, seeds)

    monkeypatch.setattr(world_module, "_train", counted)
    for _ in range(2):
        worlds.pretrained(Tiny(), [0])
    assert trained == [0]
    with worlds.pretrained_anew():
        worlds.pretrained(Tiny(), [0])
        with worlds.pretrained_anew():
            worlds.pretrained(Tiny(), [0, 1])
    worlds.pretrained(Tiny(), [0, 1])
    assert trained == [0, 0, 1]


@pytest.mark.parametrize(
    "name", [n for n in worlds.names() if worlds.get(n).has_transformer and n != "refusals"]
)
def test_a_worlds_rows_are_its_pairs(name, monkeypatch, tmp_path):
    """Text, tokenizer and back."""
    monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path))
    world = worlds.get(name)
    from simgrad.bridge.checkpoints.words import word_tokenizer

    tokenizer = word_tokenizer(world.words, bos=world.words[0], eos=world.end)
    rows = read_rows(f"world:{name}:3", limit=20)
    encoded = encode(rows, tokenizer)
    assert not encoded.skipped
    assert list(encoded.pairs) == world.pairs(3)[:20]


def test_a_world_is_a_checkpoint_that_survives_export(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(worlds._WORLDS, "verdicts", "Tiny")
    monkeypatch.setattr(verdicts, "Tiny", Tiny, raising=False)
    policy = load("world:verdicts:1")
    save(policy, tmp_path / "out")
    again = load(tmp_path / "out")
    np.testing.assert_array_equal(
        again.theta["unembedding"]["table"], policy.theta["unembedding"]["table"]
    )
    text = "cue-1.21 filler0 ? No"
    assert again.tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert policy.tokenizer.decode(policy.tokenizer(text)["input_ids"]) == f"<b> {text}"


def test_worlds_that_are_not_there():
    with pytest.raises(ValueError, match=r"no world 'verdict'; did you mean 'verdicts'"):
        worlds.get("verdict")
    with pytest.raises(ValueError, match=r"no knob overlop; it has: overlap"):
        worlds.get("verdicts", overlop=1.0)
    with pytest.raises(ValueError, match=r"overlap takes a float such as 0.6, got 'x'"):
        worlds.get("verdicts", overlap="x")
    with pytest.raises(ValueError, match=r"steps takes a int"):
        worlds.get("verdicts", steps=1.5)
    with pytest.raises(ValueError, match=r"linear has no transformer; worlds that have: verdicts"):
        load("world:linear")
    with pytest.raises(ValueError, match=r"world:verdicts:3 for seed 3"):
        read_rows("world:verdicts:x")
    with pytest.raises(ValueError, match=r"lengths must lie between 0 and 16"):
        worlds.get("suffix", lengths=(0, 40))
    with pytest.raises(ValueError, match=r"three shares that sum to 1"):
        worlds.get("refusals", mixture=(0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"multiple of 4"):
        worlds.get("percentiles", n_pairs=10)


@pytest.mark.parametrize("name", worlds.names())
def test_every_knob_is_documented(name):
    from simgrad.cli.display import _meanings

    world = type(worlds.get(name))
    assert world.name == name
    assert set(_meanings(__import__("inspect").getdoc(world))) == set(vars(worlds.get(name)))
