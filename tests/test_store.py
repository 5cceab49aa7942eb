"""Identities say all that makes a result; files are whole; runs continue bit by bit."""

import dataclasses
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simgrad import store
from simgrad.errors import InputError
from simgrad.models import ModelConfig
from simgrad.objectives import get
from simgrad.store import content, source
from simgrad.store import rows as row_store


def test_arrays_of_every_kind_survive_the_disk(tmp_path):
    arrays = {"a/b": np.arange(3), "half": jnp.ones((2, 2), "bfloat16"), "scalar": np.float64(2.5)}
    store.save_arrays(tmp_path / "new" / "x.npz", arrays, {"k": [1, None]})
    loaded, header = store.load_arrays(tmp_path / "new" / "x.npz")
    assert header == {"k": [1, None]}
    for name, value in arrays.items():
        assert loaded[name].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(loaded[name], np.asarray(value))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.npz"]
    (tmp_path / "torn.npz").write_bytes((tmp_path / "new" / "x.npz").read_bytes()[:200])
    with pytest.raises(InputError, match=r"torn.npz is not a file that simgrad wrote, or is damag"):
        store.load_arrays(tmp_path / "torn.npz")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.html"
    store.write(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write(path, half)
    assert path.read_text() == "old"
    store.write(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_digests_tell_values_shapes_and_dtypes_apart():
    base = np.zeros((2, 3))
    others = [base.T, base.astype(np.float32), base + 1e-12, {"a": base}, 0.0, None]
    assert len({store.digest(x) for x in (base, *others)}) == len(others) + 1
    assert store.digest(base) == store.digest(jnp.asarray(base))
    assert store.digest(base.T.copy()) == store.digest(base.T)


def test_every_value_counts_however_large_the_array(monkeypatch):
    big = np.zeros((300, 40), np.float32)
    other = big.copy()
    other[211, 17] = 1e-30
    whole = store.digest(big)
    monkeypatch.setattr(content, "_SLAB", 1000)  # read in slabs, of which the last overlaps
    assert store.digest(jnp.asarray(big)) == whole
    assert store.digest(jnp.asarray(other)) == store.digest(other) != whole


def test_arrays_of_jax_are_read_once_and_forgotten_when_they_die(monkeypatch):
    x = jnp.arange(5.0)
    first, known = store.digest(x), len(content._KNOWN)
    monkeypatch.setattr(content, "_slabs", None)
    assert store.digest(x) == first
    del x
    assert len(content._KNOWN) < known


def schedule(value):
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, value, 100))
    )


def test_functions_are_named_by_what_they_do():
    """Optimizers are closures: their schedules and constants count, also those of later steps."""
    assert store.digest(schedule(0.1)) == store.digest(schedule(0.1)) != store.digest(schedule(0.2))
    masked = [optax.masked(optax.sgd(0.1), {"a": a, "b": True}) for a in (True, False, True)]
    names = [store.digest(m) for m in masked]
    assert names[0] == names[2] != names[1]

    @dataclasses.dataclass
    class Holder:
        values: np.ndarray

    values = np.zeros(5000)  # too long for a repr to show
    first = store.digest(Holder(values))
    values[2500] = 1.0
    assert store.digest(Holder(values)) != first

    def endless(n):
        return endless(n - 1)

    assert store.digest(endless) == store.digest(endless)


USERS = """
from dataclasses import dataclass
from simgrad.objectives import Objective

WEIGHT = {weight}

def shaped(margin):
    return {shape}

def loss(margin):
    return WEIGHT * shaped(margin)

@dataclass(frozen=True)
class Mine(Objective):
    beta: float = 0.1

    def per_pair(self, x):
        return {sign}loss(self.beta * x.margin)
"""


def test_what_a_user_wrote_counts_down_to_what_it_calls_by_name(monkeypatch):
    """A notebook's cell that is run again with another body must not find the old result."""

    def named(weight="1.0", shape="margin**2", sign="-"):
        module = types.ModuleType("a_notebook")
        module.__file__ = "/home/user/a_notebook.py"
        monkeypatch.setitem(sys.modules, "a_notebook", module)
        exec(USERS.format(weight=weight, shape=shape, sign=sign), vars(module))
        return store.identity("simgrad.tree", objective=module.Mine(), loss=module.loss)

    first = named()
    assert first == named()
    assert "Mine(beta=0.1)" in first["objective"]  # still readable in a message
    for changed in ({"weight": "2.0"}, {"shape": "margin**3"}, {"sign": "+"}):
        other = named(**changed)
        assert other["objective"] != first["objective"]
        assert (other["loss"] != first["loss"]) == (changed != {"sign": "+"})
    # of simgrad's own the code has a name already, and the text is enough
    assert store.identity("simgrad.tree", objective=get("dpo"))["objective"] == "DPO(beta=0.1)"


DEEPER = {
    "lambda": "def f(x):\n    return (lambda y: helper(y))(x)\n",
    "comprehension": "def f(x):\n    return [helper(y) for y in x]\n",
    "inherited": "class Base:\n    def go(self, x):\n        return helper(x)\n"
    "class Own(Base):\n    pass\nf = Own()\n",
    "static": "class Own:\n    @staticmethod\n    def go(x):\n        return helper(x)\n"
    "f = Own()\n",
    "property": "class Own:\n    @property\n    def go(self):\n        return helper(1)\n"
    "f = Own()\n",
    "class": "class Own:\n    def go(self, x):\n        return helper(x)\n"
    "def f(x):\n    return Own().go(x)\n",
}


@pytest.mark.parametrize("way", DEEPER)
def test_a_users_helper_counts_however_it_is_reached(monkeypatch, way):
    def named(body):
        module = types.ModuleType("a_notebook")
        module.__file__ = "/home/user/a_notebook.py"
        monkeypatch.setitem(sys.modules, "a_notebook", module)
        exec(f"def helper(x):\n    return {body}\n{DEEPER[way]}", vars(module))
        return store.digest(module.f)

    assert named("x") == named("x") != named("2 * x")


def test_a_users_module_counts_by_its_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_helpers.py").write_text("def h(x):\n    return x\n")
    import users_helpers

    module = types.ModuleType("a_notebook")
    module.__file__ = "/home/user/a_notebook.py"
    monkeypatch.setitem(sys.modules, "a_notebook", module)
    exec("import users_helpers\ndef f(x):\n    return users_helpers.h(x)\n", vars(module))
    first = store.digest(module.f)
    (tmp_path / "users_helpers.py").write_text("def h(x):\n    return 2 * x\n")
    assert store.digest(module.f) != first
    assert users_helpers.h(1) == 1


def test_digests_are_the_same_in_every_process():
    program = """
        import optax, numpy as np
        from simgrad import store
        from simgrad.objectives import get
        optimizer = optax.adamw(optax.cosine_decay_schedule(0.1, 9))
        print(store.digest(optimizer, get("simpo"), {"b", "a"}))
    """
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_an_identity_is_readable_and_names_the_part_that_differs():
    config = ModelConfig(vocab_size=9, width=8)
    made = store.identity("simgrad.tree", configuration=config, objective=get("dpo"), rate=None)
    assert made["objective"] == "DPO(beta=0.1)"
    assert made["rate"] == "None"
    other = dataclasses.replace(config, norm_eps=1e-3)
    changed = store.identity("simgrad.tree", configuration=other, objective=get("dpo"), rate=None)
    said = f"configuration.norm_eps: {config.norm_eps} there, 0.001 now"
    assert store.differences(made, changed) == said
    assert store.differences(made, made) == ""
    with pytest.raises(store.RunMismatchError) as error:
        store.require_same("t.npz", made, changed)
    assert str(error.value) == (
        f"t.npz belongs to another run ({said}). Choose another --out or delete it"
    )
    for name in ("code", "simgrad", "jax", "device", "x64"):
        assert store.differences({**made, name: "x"}, made).startswith(f"{name}: x there")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of simgrad's folder."""
    files = {
        "__init__": "",
        "maths": "import numpy\n\ndef f(x):\n    return x + 1\n",
        "kernel/__init__": "from simgrad.kernel.a import a\nfrom simgrad.kernel.b import b\n",
        "kernel/a": "from simgrad import maths\na = maths.f(1)\n",
        "kernel/b": "b = 2\n",
        "top": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from simgrad.kernel import b\n"
            "def run():\n    from simgrad.kernel import a\n    return a\n"
        ),
    }
    folder = tmp_path / "simgrad"
    for name, text in files.items():
        store.write(folder / f"{name}.py", text)
    monkeypatch.setattr(source, "PACKAGE", folder)
    caches = (source.code, source._module, source._parsed)

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield folder, clear
    clear()


@pytest.mark.parametrize(
    ("file", "text", "stale"),
    [
        ("maths.py", "import numpy\n\ndef f(x):\n    return x + 2\n", True),
        ("maths.py", '"""Words."""\nimport numpy\ndef f(x):  # a comment\n  return x+1\n', False),
        ("maths.py", 'import numpy\ndef f(x):\n  "Words."\n  return x+1\n', False),
        ("kernel/a.py", "from simgrad import maths\na = maths.f(2)\n", True),
        ("kernel/b.py", "b = 3\n", False),
    ],
)
def test_results_are_stale_when_code_that_computes_them_changes_and_only_then(
    package, file, text, stale
):
    folder, clear = package
    before = store.code("simgrad.top")
    (folder / file).write_text(text)
    clear()
    assert (store.code("simgrad.top") != before) == stale


def test_the_code_of_this_package_is_found():
    assert len({store.code(f"simgrad.{name}") for name in ("tree", "pairs", "theory")}) == 3
    with pytest.raises(ValueError, match="no module simgrad.gone"):
        store.code("simgrad.gone")


RUN = {"data": "d"}


def rows_of(index):
    index = np.asarray(index)
    return {"x": index / 3, "pair": np.stack([index, -index], 1) * 0.1, "n": index}


def test_a_run_continues_bit_by_bit(tmp_path):
    path = tmp_path / "new" / "t.npz"
    with pytest.raises(KeyboardInterrupt), store.RowStore(path, RUN, 5) as first:
        first.add([3, 0], rows_of([3, 0]))
        first.add([2], rows_of([2]))
        raise KeyboardInterrupt
    with store.RowStore(path, RUN, 5) as second:
        assert second.done.tolist() == [True, False, True, True, False]
        second.add([1, 4], rows_of([1, 4]))
    with store.RowStore(path, RUN, 5) as third:
        assert third.done.all()
        for name, values in rows_of(range(5)).items():
            assert third.columns[name].dtype == values.dtype
            np.testing.assert_array_equal(third.columns[name], values)
        third.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_not_a_number_survives(tmp_path):
    with store.RowStore(tmp_path / "t.npz", RUN, 1) as first:
        first.add([0], {"x": np.array([np.nan])})
    with store.RowStore(tmp_path / "t.npz", RUN, 1) as second:
        assert np.isnan(second.columns["x"][0])


def test_writing_takes_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    written = []

    def slow(path, arrays, header):
        written.append(int(arrays["__done__"].sum()))
        now[0] += 2.0

    monkeypatch.setattr(row_store.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(row_store, "save_arrays", slow)
    with store.RowStore(tmp_path / "t.npz", RUN, 50) as found:
        for i in range(50):
            now[0] += 1.0
            found.add([i], rows_of([i]))
    assert written == [1, 22, 43, 50]


def test_others_are_kept_out(tmp_path):
    path = tmp_path / "t.npz"
    with store.RowStore(path, RUN, 2) as first:
        first.add([0], rows_of([0]))
        first.keep()
        with (
            pytest.raises(store.RunMismatchError, match="in use by another process"),
            store.RowStore(path, RUN, 2),
        ):
            pass
    with (
        pytest.raises(store.RunMismatchError, match="another run .data: d there, e now"),
        store.RowStore(path, {"data": "e"}, 2),
    ):
        pass
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"t\.npz is not .* damaged"), store.RowStore(path, RUN, 2):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npz"]


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with store.RowStore(None, RUN, 2) as found:
        found.add([0, 1], rows_of([0, 1]))
        found.remove()
    assert found.done.all()
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_the_same_on_every_mesh():
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    x = np.arange(24.0).reshape(4, 6)
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "model")))
    assert store.digest(split) == store.digest(x)
