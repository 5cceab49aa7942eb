"""Measured steps, fitted orders and statements; and that a wrong theory is found out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close, model

from simgrad.pairs import padded
from simgrad.theory import responses
from simgrad.theory.prediction import StepChange
from simgrad.validation import agreement, cells, closed_forms
from simgrad.validation.cells import regimes_of
from simgrad.validation.checks import Check, gap
from simgrad.validation.grid import Arithmetic, Grid, optimizer
from simgrad.validation.measure import difference, measured_along, pulled
from simgrad.validation.statements import statements
from simgrad.validation.subjects import base_of, subject, twin
from simgrad.validation.validate import validate

TINY = Grid(
    models=("linear-softmax",),
    objectives=("dpo", "hinge"),
    optimizers=("sgd", "adam"),
    dtypes=("float64", "float32"),
    pairs=4,
    probes=1,
)


@functools.cache
def found(grid=TINY):
    return validate(grid)


def by_name(validation):
    return {s.name: s for s in validation.statements}


def ascent(dtype):
    apply, theta = model("plain", dtype, depth=1)
    batch = padded(PAIRS)
    pull = jnp.asarray(np.random.default_rng(0).normal(size=(len(PAIRS), 2)), dtype)
    return apply, theta, batch, pulled(apply, theta, batch, pull)


def test_the_path_integral_is_the_difference():
    apply, theta, batch, step = ascent("float64")
    for rate in (1e-6, 1e-3):
        rates = jnp.asarray([rate, 2 * rate])
        along = measured_along(apply, theta, batch, step, rates)
        for i, eta in enumerate(rates):
            plain = difference(apply, theta, batch, step, eta)
            np.testing.assert_allclose(along[i], plain, atol=1e-13 + 1e-7 * np.abs(plain).max())
    start = responses(apply, theta, batch).logp
    moved = jax.tree.map(lambda t, v: t + 1e-3 * v, theta, step)
    close(
        difference(apply, theta, batch, step, jnp.asarray(1e-3)),
        responses(apply, moved, batch).logp - start,
    )


def test_in_float32_it_keeps_the_digits_that_a_difference_loses():
    apply, theta, batch, step = ascent("float32")
    wide = jax.tree.map(lambda x: x.astype("float64"), (theta, step))
    apply64 = model("plain", "float64", depth=1)[0]
    exact = measured_along(apply64, wide[0], batch, wide[1], jnp.asarray([1e-8]))[0]
    along = measured_along(apply, theta, batch, step, jnp.asarray([1e-8], "float32"))[0]
    plain = difference(apply, theta, batch, step, jnp.asarray(1e-8, "float32"))
    assert gap(along, exact) < 1e-5
    assert gap(plain, exact) > 1e-2


def test_orders_are_fitted_where_rounding_leaves_them_alone():
    rates = np.geomspace(1e-4, 10, 11)
    size = np.array([1.0, 2.0, -0.5])[None, :, None] * np.ones((1, 3, 2))
    eta = rates[:, None, None]
    measured = eta * size
    for order in (1, 2, 3):
        miss = np.abs(size) * (eta**order + eta ** (order + 1))
        fit = cells._order(rates, rates, miss, measured, 1e-16)
        np.testing.assert_allclose(fit[0], order, atol=0.01)
        assert fit[1] <= fit[0] <= fit[2]
    noise = np.abs(measured) * 1e-4 * np.random.default_rng(0).uniform(size=measured.shape)
    assert cells._order(rates, rates, eta**2 * np.abs(size) + noise, measured, 1e-3) is None


def test_the_safe_radius_bounds_a_response_whose_second_order_vanishes():
    change = StepChange(jnp.array([[1.0, -1.0]]), jnp.array([[1e-9, 2.0]]))
    assert change.trust_radius[0, 0] > 1e8
    np.testing.assert_allclose(change.safe_radius[0], [0.5 * np.sqrt(2) / 2, 0.25], rtol=1e-9)
    assert np.isinf(StepChange(jnp.ones((1, 2)), jnp.zeros((1, 2))).safe_radius).all()


def test_regimes_of_changes():
    change = np.array([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    assert regimes_of(change).tolist() == [0, 1, 2, 3, 0]


def test_a_small_grid_holds():
    result = found()
    assert result.failed == ()
    names = by_name(result)
    assert {
        "first order/float64",
        "second order/float64",
        "signs/float32",
        "float64/float32",
    } <= set(names)
    assert {
        "closed forms/float64",
        "kernels/float64",
        "routes/float64",
        "determinism/float32",
    } <= set(names)
    assert all(
        names[n].holds for n in ("first order/float64", "closed forms/float64", "routes/float64")
    )
    assert {(c.kind, c.objective, c.optimizer) for c in result.cells} == {
        ("alone", "dpo", "sgd"),
        ("alone", "hinge", "sgd"),
        ("together", "dpo", "sgd"),
        ("together", "dpo", "adam"),
    }


def test_the_record_is_json_and_reproducible(tmp_path):
    result = found()
    result.save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["cells"]) == len(result.cells)
    assert record["provenance"]["seed"] == 0
    assert {"jax", "devices", "git_revision", "xla_flags", "python"} <= set(record["provenance"])
    again = validate(
        dataclasses.replace(TINY, objectives=("dpo",), optimizers=("sgd",), dtypes=("float32",))
    )
    setting = lambda c: (c.kind, c.arithmetic, c.objective, c.optimizer)  # noqa: E731
    before = {setting(c): c for c in result.cells}
    assert len(again.cells) == 2
    assert all(before[setting(c)] == c for c in again.cells)


@functools.cache
def base(dtype="float64", name="linear-softmax"):
    return base_of(subject(name, TINY, dtype), TINY.objectives, Arithmetic(dtype))


def steps():
    return [cells.alone(base(), base(), "dpo", TINY)], []


def identities():
    some = [
        *agreement.against_reference(base(), base(), thorough=False),
        *agreement.agreed(base(), agreement.routes(base(), TINY.rates)),
    ]
    return [], [*some, agreement.repeated(base(), TINY.rates)]


def forms():
    return [], closed_forms.closed_forms(0, "cpu")


def sabotaged(monkeypatch, part, where, name, change):
    """The statements that fail when one function of the theory has gone wrong."""
    assert not failures(part)
    right = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: change(right(*args, **kwargs)))
    return failures(part)


def failures(part):
    return {s.name.split("/")[0] for s in statements(*part()) if s.holds is False}


def scaled(factor):
    return lambda tree: jax.tree.map(lambda x: factor * x, tree)


def test_a_wrong_prefactor_is_found(monkeypatch):
    assert "first order" in sabotaged(monkeypatch, steps, cells, "first_order", scaled(1.001))


def test_a_wrong_second_order_is_found(monkeypatch):
    wrong = lambda change: dataclasses.replace(change, second=1.01 * change.second)  # noqa: E731
    assert "second order" in sabotaged(monkeypatch, steps, cells, "displacement", wrong)


def test_a_wrong_sign_is_found(monkeypatch):
    assert "signs" in sabotaged(monkeypatch, steps, cells, "first_order", scaled(-1.0))


def test_a_wrong_regime_is_found(monkeypatch):
    assert sabotaged(monkeypatch, steps, cells, "regime", lambda r: (r + 1) % 4) == {"regimes"}


def test_a_wrong_kernel_is_found(monkeypatch):
    failed = sabotaged(monkeypatch, identities, agreement, "token_kernel", scaled(1 + 1e-8))
    assert failed == {"kernels"}


def test_a_wrong_run_is_found(monkeypatch):
    assert sabotaged(
        monkeypatch, identities, agreement, "entanglement_kernel", scaled(1 + 1e-6)
    ) == {"routes"}


def test_a_wrong_closed_form_is_found(monkeypatch):
    assert sabotaged(monkeypatch, forms, closed_forms, "head_kernel", scaled(1 + 1e-8)) == {
        "closed forms"
    }


def test_steps_and_runs_of_a_transformer():
    """Routes that context tables do not take: ghost kernels, training, runs linearised anew."""
    toy = base(name="transformer")
    checks = [
        *agreement.against_reference(toy, toy, thorough=True),
        *agreement.agreed(toy, agreement.runs(toy, ["adam"])),
    ]
    assert {"pair kernel, ghost", "pair kernel, explicit", "pair kernel, plain"} <= {
        c.name for c in checks
    }
    assert all(c.holds for c in checks)


def test_low_precision_is_shown_but_not_judged():
    low = base("bfloat16")
    wide = twin(subject(low.name, TINY, "bfloat16"))
    wide = base_of(wide, TINY.objectives, Arithmetic("float64"))
    cell = cells.alone(low, wide, "dpo", TINY)
    checks = agreement.against_reference(low, wide, thorough=False)
    names = {s.name: s for s in statements([cell], checks)}
    assert names["signs/bfloat16"].holds is None
    assert names["float64/bfloat16"].holds is None
    assert names["kernels/bfloat16"].holds
    assert "first order/bfloat16" not in names


def test_numbers_that_are_not_finite_fail():
    cell = found().cells[0]
    broken = dataclasses.replace(cell, finite=False)
    named = {s.name: s.holds for s in statements([broken], [])}
    assert named["finite/float64"] is False
    nan = Check("kernels", "k", "m", "float64", "cpu", float("inf"), 1e-10)
    assert [s.holds for s in statements([], [nan])] == [False]
    assert gap([1.0, np.nan], [1.0, 2.0]) == np.inf


def test_what_cannot_be_told_is_said():
    cell = dataclasses.replace(found().cells[0], order_first=None, signs_count=0, regimes_count=0)
    named = {s.name: s for s in statements([cell], [])}
    assert [named[f"{n}/float64"].holds for n in ("first order", "signs", "regimes")] == [None] * 3
    assert "safe radius" in named["signs/float64"].text


def test_subjects_are_one_draw_in_every_dtype():
    wide, narrow = (subject("transformer", TINY, dtype) for dtype in ("float64", "bfloat16"))
    for x, y in zip(jax.tree.leaves(wide.theta), jax.tree.leaves(narrow.theta), strict=True):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype("bfloat16"), y)
    assert wide.pairs == narrow.pairs
    assert twin(narrow).apply == wide.apply


@pytest.mark.parametrize("name", ["sgd", "momentum", "rmsprop", "adam", "adamw", "clipped"])
def test_updates_are_proportional_to_the_learning_rate(name):
    g = {"w": jnp.asarray([0.3, -2.0])}
    p = {"w": jnp.asarray([1.0, 5.0])}
    one, half = (optimizer(name, rate) for rate in (1.0, 0.5))
    with jax.numpy_dtype_promotion("standard"):
        a, b = (o.update(g, o.init(p), p)[0] for o in (one, half))
    close(b, jax.tree.map(lambda x: 0.5 * x, a))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("gpt",)}, "models: 'gpt' is unknown"),
        ({"objectives": ("dpoo",)}, "objectives: 'dpoo' is unknown"),
        ({"optimizers": ("lion",)}, "optimizers: 'lion' is unknown"),
        ({"dtypes": ("int8",)}, "dtypes: 'int8' is unknown"),
        ({"dtypes": "float64"}, "list of names"),
        ({"models": ()}, "no models"),
        ({"optimizers": ()}, "no optimizers"),
        ({"model": "folder"}, "needs preference pairs"),
        ({"data": "file"}, "give model"),
        ({"learning_rates": (0.1, -1.0)}, "learning_rates must be positive"),
        ({"pairs": 1}, "at least 2"),
    ],
)
def test_grids_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_only_float32_has_two_precisions():
    assert [str(a) for a in TINY.arithmetics("cpu", "transformer")] == ["float64", "float32"]
    assert [str(a) for a in TINY.arithmetics("gpu", "transformer")] == [
        "float64",
        "float32 (default)",
        "float32",
    ]
    assert str(Arithmetic("bfloat16", "default")) == "bfloat16"


def test_page_is_whole_and_says_everything(tmp_path):
    from simgrad.validation.page import write_page

    result = found()
    page, *images = write_page(result, tmp_path)
    text = page.read_text()
    assert all(s.name in text for s in result.statements)
    assert "http" not in text.replace("http-equiv", "")
    assert all(image.stat().st_size > 1000 for image in images)
    broken = dataclasses.replace(
        result, statements=(dataclasses.replace(result.statements[0], holds=False),)
    )
    write_page(broken, tmp_path)
    assert "statements fail" in page.read_text()


@pytest.mark.parametrize("rates", [[0.5], [1e-9, 1e-8]])
def test_any_learning_rates_can_be_drawn(tmp_path, rates):
    from simgrad.validation.page import write_page

    n = len(rates)
    some = tuple(
        dataclasses.replace(
            c, multiples=rates, curve_first=[0.1] * n, curve_second=[0.0] * n, curve_signs=[0.0] * n
        )
        for c in found().cells
    )
    assert write_page(dataclasses.replace(found(), cells=some), tmp_path)[0].exists()


def test_large_steps_are_measured_by_the_difference():
    apply, theta, batch, step = ascent("float64")
    plain = difference(apply, theta, batch, step, jnp.asarray(3.0))
    assert np.abs(plain).min() > 1
    close(measured_along(apply, theta, batch, step, jnp.asarray([3.0]))[0], plain)


def test_tables_are_spared_low_precision_only_beside_others():
    tables = dataclasses.replace(TINY, dtypes=("bfloat16",))
    assert [str(a) for a in tables.arithmetics("cpu", "linear-softmax")] == ["bfloat16"]
    more = dataclasses.replace(
        TINY, models=("linear-softmax", "transformer"), dtypes=("float64", "bfloat16")
    )
    assert [str(a) for a in more.arithmetics("cpu", "linear-softmax")] == ["float64"]


def test_the_command_fails_when_a_statement_does(tmp_path, monkeypatch, capsys):
    from simgrad.cli import runtime
    from simgrad.cli.validate import Validate
    from simgrad.validation import validate as module

    result = found()
    broken = dataclasses.replace(
        result, statements=(dataclasses.replace(result.statements[0], holds=False),)
    )
    monkeypatch.setattr(runtime, "prepare", lambda *args, **kwargs: None)
    for answer, status in ((result, 0), (broken, 1)):
        monkeypatch.setattr(module, "validate", lambda grid, report, answer=answer: answer)
        assert Validate(out=tmp_path).run() == status
    assert f"failed: {result.statements[0].name}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="not both"):
        Validate(quick=True, full=True).run()
