"""Intervals, tidy tables, and runs spread over devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from simgrad.dynamics import spread
from simgrad.experiments.findings import Table, interval


def test_the_interval_is_students():
    x = np.random.default_rng(0).normal(size=7)
    found = interval(x)
    low, high = stats.t.interval(0.95, 6, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert interval([2.0, np.nan]).mean == 2.0
    assert np.isnan(interval([2.0]).low)
    assert np.isnan(interval([]).mean)


def test_tables_know_their_settings():
    rows = [
        {"arm": a, "seed": s, "x": float(s), "word": w}
        for a in "ba"
        for s, w in enumerate(("u", "v", "v"))
    ]
    table = Table.of("t", "caption", ("arm",), rows)
    assert table.settings() == [{"arm": "b"}, {"arm": "a"}]
    assert table.measured == ("x", "word")
    first = table.summary()[0]
    assert (first["x"].mean, first["word"]) == (1.0, "v (2/3)")
    assert table.where(arm="a", seed=2)["x"].tolist() == [2.0]


@pytest.mark.parametrize(("at_once", "rounds"), [(1, 8), (1, 2), (3, 1), (4, 2)])
def test_runs_come_back_in_order_however_they_are_cut(at_once, rounds):
    x, y = np.arange(11.0), np.arange(22.0).reshape(11, 2)
    found = spread(
        lambda x, y, c: (x + c, (x * y).sum()),
        x,
        y,
        shared=jnp.ones(()),
        at_once=at_once,
        rounds=rounds,
    )
    np.testing.assert_array_equal(found[0], x + 1)
    np.testing.assert_allclose(found[1], (x[:, None] * y).sum(1))
    with pytest.raises(ValueError, match=r"common leading length"):
        spread(lambda x, y: x, x, y[:3])
