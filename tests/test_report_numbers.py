"""The report's numbers against definitions written out: objectives, strengths, filters, ranks, the
plane, sources."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from simgrad.bridge import ScoreTable
from simgrad.drawing.draw import number
from simgrad.objectives import get
from simgrad.report.mitigations import filtered, needed, objective_fates, strength
from simgrad.report.numbers import associations, by_source, regime_map, report_numbers, scores
from simgrad.report.summary import summarise
from simgrad.report.words import objectives_sentence, strength_sentence

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def invented():
    """A table of 40 pairs with random gradients, the way score writes it."""
    return invent()


def invent(pairs=40, ratio=lambda rng, n: np.ones(n), gradients=True):
    rng = np.random.default_rng(3)
    sq = rng.uniform(0.3, 3.0, (2, pairs))
    cosine = np.where(
        np.arange(pairs) % 4 == 0, rng.uniform(-0.5, 0.3, pairs), rng.uniform(0.6, 0.99, pairs)
    )
    d_l = np.full(pairs, 0.05)
    columns = {"index": np.arange(pairs)}
    columns |= {f"n_{k}": rng.integers(2, 30, pairs) for k in ("prompt", "chosen", "rejected")}
    columns |= {f"logp_{k}": -rng.uniform(1, 50, pairs) for k in ("chosen", "rejected")}
    names = "ches ln_ches last_hidden_inner edit_distance embedding_cosine head_gap"
    columns |= {name: rng.normal(size=pairs) for name in names.split()}
    columns |= {"d_chosen": d_l * ratio(rng, pairs), "d_rejected": d_l}
    if gradients:
        d_w, inner = columns["d_chosen"], cosine * np.sqrt(sq[0] * sq[1])
        up, down = d_w * sq[0] - d_l * inner, d_w * inner - d_l * sq[1]
        labels = [["ideal", "both_rise"], ["both_fall", "reversed"]]
        columns |= {
            "grad_inner": inner,
            "grad_sq_chosen": sq[0],
            "grad_sq_rejected": sq[1],
            "grad_cosine": cosine,
        }
        columns |= {"predicted_dlogp_chosen": up, "predicted_dlogp_rejected": down}
        columns["regime"] = np.array(
            [labels[int(a < 0)][int(b > 0)] for a, b in zip(up, down, strict=True)], object
        )
    run = {
        "model": "m",
        "objective": "DPO(beta=0.1)",
        "learning_rate": None,
        "gradients": gradients,
        "dtype": "float32",
    }
    counts = {"scored": pairs, "skipped": 0, "merged": 0, "truncated": 0}
    return ScoreTable(
        columns,
        (),
        {
            "kind": "score",
            "run": run,
            "identity": {"weights": "w", "data": "d"},
            "counts": counts,
            "provenance": {},
        },
    )


RATIOS = {  # d_w/d_l at the start of training, by hand
    "dpo": lambda w, y_l: 1.0,
    "simpo": lambda w, y_l: y_l / w,
    "dpo_shift": lambda w, y_l: 1 / get("dpo_shift").rejected_weight,
    "dpo_sft": lambda w, y_l: 1 + 1.0 / (w * 0.1 * 0.5),
}


def test_objectives_against_the_conditions_written_out(invented):
    fates = objective_fates(invented)
    names = [name for fate in fates for name in fate.names]
    assert len(names) == len(set(names))
    c = invented.columns
    for name, ratio in RATIOS.items():
        counts = {"ideal": 0, "both_fall": 0, "both_rise": 0, "reversed": 0}
        for i in range(len(invented)):
            r = ratio(c["n_chosen"][i], c["n_rejected"][i])
            falls = c["grad_inner"][i] > r * c["grad_sq_chosen"][i]
            rises = c["grad_inner"][i] > c["grad_sq_rejected"][i] / r
            counts["both_fall" if falls else "both_rise" if rises else "ideal"] += 1
        fate = next(f for f in fates if name in f.names)
        assert fate.regimes == counts, name
    dpo = next(f for f in fates if "dpo" in f.names)
    assert {"ipo", "hinge"} <= set(dpo.names)
    assert dpo.ratio == (1.0, 1.0)
    calibrated = next(f for f in fates if "as scored + calibration" in f.names)
    assert calibrated.regimes["ideal"] == len(invented) > dpo.regimes["ideal"]
    assert next(f for f in fates if "discopop" in f.names).pushed_down == len(invented)
    assert dpo.pushed_down == 0
    away = int(
        invented["grad_cosine"].argmin()
    )  # ideal under nearly everything: mitigations keep a line of their own
    alone = dataclasses.replace(invented, columns={k: v[away : away + 1] for k, v in c.items()})
    first, second = objective_fates(alone)[:2]
    assert first.regimes == second.regimes
    assert {"dpo", "simpo"} <= set(first.names)
    assert all(name.startswith("as scored") for name in second.names)


def test_strength_is_the_share_of_pairs_with_the_factor_in_their_range(invented):
    found, c = strength(invented), invented.columns
    for k in (0, 40, 80, 120, 160):
        m = found.multiplier[k]
        falls = [
            m * sq < inner for sq, inner in zip(c["grad_sq_chosen"], c["grad_inner"], strict=True)
        ]
        rises = [
            m * inner > sq for sq, inner in zip(c["grad_sq_rejected"], c["grad_inner"], strict=True)
        ]
        assert found.chosen_falls[k] == np.mean(falls)
        assert found.rejected_rises[k] == np.mean(rises)
        assert found.ideal[k] == np.mean([not (a or b) for a, b in zip(falls, rises, strict=True)])
    assert found.at(1.0)[0] == (c["regime"] == "ideal").mean()
    assert found.at(found.best)[0] == found.ideal.max()
    assert found.pull == (0.05, 0.05)
    varies = invent(ratio=lambda rng, n: rng.uniform(0.5, 2, n))
    np.testing.assert_allclose(strength(varies).pull, np.quantile(varies["d_chosen"], [0.5, 0.9]))
    assert strength(invent(ratio=lambda rng, n: rng.uniform(-1, 2, n))).pull is None


@pytest.mark.parametrize("low", [1.0, 0.3, -0.5])
def test_what_falling_pairs_need_keeps_them_from_falling(low):
    """For any d_w and d_l: with the printed λ, half and 90 % of the falling pairs rise again.

    λ = (ratio - 1) d_l and DPO-Shift's λ = 1/ratio hold for d_w = d_l only.
    """
    table = invent(60, ratio=lambda rng, n: rng.uniform(low, 1.0, n))
    c, need = table.columns, needed(table)
    falls = c["predicted_dlogp_chosen"] < 0
    d_w, d_l, square, inner = (
        c[name][falls] for name in ("d_chosen", "d_rejected", "grad_sq_chosen", "grad_inner")
    )

    def saved(d_w, d_l):
        return np.mean(d_w * square - d_l * inner >= -1e-12)

    for k, share in enumerate((0.5, 0.9)):
        assert share <= saved(need.ratio[k] * d_l, d_l) <= share + 0.2
        assert share <= saved(d_w + need.sft[k], d_l) <= share + 0.2
        if need.shift[k] > 0:
            assert share <= saved(d_w, need.shift[k] * d_l) <= share + 0.2
        assert saved(d_w + 0.9 * need.sft[k], d_l) < saved(d_w + need.sft[k], d_l)
    usual = (need.ratio[1] - 1) * np.median(d_l), 1 / need.ratio[1]
    if low == 1.0:
        np.testing.assert_allclose((need.sft[1], need.shift[1]), usual)
    else:  # where d_w is smaller, these are not enough
        assert saved(d_w + usual[0], d_l) < 0.9
        assert saved(d_w, usual[1] * d_l) < 0.9
    said = " ".join(summarise(table).advice)
    assert f"λ of at least {need.sft[0]:.3g} keeps half, and {need.sft[1]:.3g} keeps 90 %" in said
    if need.shift[0] > 0:
        assert f"to {need.shift[0]:.3g} of what it is keeps half of them" in said


def pulled_up(pairs=40):
    """d_w = d_l < 0: chosen pushed down, rejected pulled up, as by DiscoPOP at the start."""
    table = invent(pairs)
    change = {"d_chosen": -table["d_chosen"], "d_rejected": -table["d_rejected"]}
    change |= {f"predicted_dlogp_{k}": -table[f"predicted_dlogp_{k}"] for k in SIDES}
    return dataclasses.replace(table, columns=table.columns | change)


def test_no_ratio_is_asked_for_where_the_rejected_is_pulled_up():
    table = pulled_up()
    need, c = needed(table), table.columns
    assert need is not None
    assert need.ratio is None
    assert "a ratio of at least" not in " ".join(summarise(table).advice)
    falls = c["predicted_dlogp_chosen"] < 0
    for k, share in enumerate((0.5, 0.9)):
        rate = (c["d_chosen"] + need.sft[k]) * c["grad_sq_chosen"]
        rate = (rate - c["d_rejected"] * c["grad_inner"])[falls]
        assert share <= np.mean(rate >= -1e-12) <= share + 0.2


@pytest.mark.parametrize("equal", [True, False])
def test_a_factor_on_the_push_is_dpo_shifts_only_from_equal_forces(equal):
    """DPO-Shift starts from d_w = d_l: from other forces its λ is another number."""
    table = invent(ratio=lambda rng, n: np.ones(n) if equal else np.full(n, 0.8))
    numbers = report_numbers(table)
    assert numbers.equal_forces == equal
    said = " ".join(summarise(table).advice)
    assert "shrink the push on the rejected" in said
    assert ("DPO-Shift" in said) == equal
    assert ("DPO-Shift" in strength_sentence(numbers)) == (equal and numbers.strength.best > 1)
    assert ("gap" in numbers.by_construction) == equal
    filters = {f.score: f.kept[0.5][1] for f in numbers.filters}
    best = min(filters.values())
    assert all(filters[name] == best for name in numbers.by_construction)


def test_as_scored_means_the_scored_objective():
    table = invent(ratio=lambda rng, n: np.full(n, 0.8))
    numbers = report_numbers(table)
    ideal = int((table["regime"] == "ideal").sum())
    assert 0 < ideal < len(table)
    assert f"as scored it is {ideal}." in objectives_sentence(numbers)
    calibrated = next(o for o in numbers.objectives if "as scored + calibration" in o.names)
    assert calibrated.regimes["ideal"] > ideal


def test_nothing_is_needed_where_nothing_falls():
    assert needed(invent(ratio=lambda rng, n: np.full(n, 50.0))) is None


def test_filters_keep_the_lowest(invented):
    change = invented["predicted_dlogp_chosen"].copy()
    risk = invented["ches"].copy()
    risk[3], change[5] = np.inf, np.nan
    (found,) = filtered([("CHES", "ches", risk)], change)
    usable = [i for i in range(40) if i not in (3, 5)]
    for fraction, (kept, falling) in found.kept.items():
        mine = sorted(usable, key=lambda i: risk[i])[: math.ceil(fraction * len(usable))]
        assert (kept, falling) == (len(mine), sum(change[i] < 0 for i in mine))
    by_change = filtered([("Δ", "d", -change)], change)[0].kept[0.25]
    assert by_change == (10, 0)


def test_rank_correlations_and_what_is_left_of_them_without_lengths(invented):
    found = {a.score: a for a in associations(invented, scores(invented))}
    c = invented.columns
    lengths = [c[f"n_{k}"] for k in ("prompt", "chosen", "rejected")]
    for name in ("ches", "head_gap", "grad_cosine"):
        a = found[name]
        for value, other in zip(
            (a.prompt, a.chosen, a.rejected, a.difference, a.change),
            (*lengths, lengths[1] - lengths[2], c["predicted_dlogp_chosen"]),
            strict=True,
        ):
            np.testing.assert_allclose(value, stats.spearmanr(c[name], other).statistic, rtol=1e-10)
        ranks = np.stack(
            [stats.rankdata(x) for x in (c[name], c["predicted_dlogp_chosen"], *lengths)]
        )
        inverse = np.linalg.inv(np.corrcoef(ranks))
        np.testing.assert_allclose(
            a.partial, -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]), rtol=1e-8
        )
        assert abs(a.partial - a.change) > 1e-4
    assert math.isnan(
        associations(invent(5), scores(invent(5)))[0].partial
    )  # too few to partial anything out
    constant = dataclasses.replace(invented, columns={**c, "edit_distance": np.ones(40)})
    assert math.isnan(
        {a.score: a for a in associations(constant, scores(constant))}["edit_distance"].change
    )


@pytest.mark.parametrize("varies", [False, True])
def test_the_plane_puts_every_pair_in_its_regime(varies):
    table = invent(
        ratio=(lambda rng, n: rng.uniform(0.4, 2.5, n))
        if varies
        else lambda rng, n: np.full(n, 1.3)
    )
    found = regime_map(table)
    r = 1.0 if varies else 1.3
    assert (found.ratio is None) == varies
    if not varies:
        np.testing.assert_allclose(found.ratio, 1.3)
    falls, rises = found.x > r, found.y > 1 / r
    assert (
        np.where(falls, "both_fall", np.where(rises, "both_rise", "ideal")) == found.regime
    ).all()
    assert len(set(found.regime)) == 3
    np.testing.assert_allclose(found.x * found.y, table["grad_cosine"] ** 2, rtol=1e-10)
    table.columns["d_chosen"][4] = -0.1
    assert regime_map(table).left_out == 1


def test_shares_by_data_source(invented):
    rows = [{"prompt": "p", "category": None, "source": ["a", "b", "c"][i % 3]} for i in range(40)]
    field, found = by_source(invented, rows)
    assert field == "source"
    falls = invented["predicted_dlogp_chosen"] < 0
    assert {s.source: (s.pairs, s.falling) for s in found} == {
        name: (len(falls[k::3]), falls[k::3].sum()) for k, name in enumerate("abc")
    }
    assert by_source(invented, [{"source": "same"}] * 40) == (None, ())
    assert by_source(invented, [{"source": f"each its own {i}"} for i in range(40)]) == (None, ())
    with pytest.raises(ValueError, match="the table speaks of row 39, but there are 7 rows"):
        by_source(invented, rows[:7])


def test_numbers_for_people():
    given = [0.0, 1234567.0, -98582.0, 0.5, -0.000012, 1.0, math.inf, math.nan, -0.0, 99.96]
    assert [number(x) for x in given] == [
        "0",
        "1.23 × 10⁶",
        "−98582",
        "0.5",
        "−1.2 × 10⁻⁵",
        "1",
        "∞",
        "–",
        "0",
        "100",
    ]


def test_headline_counts_the_falling_and_says_how_sure(invented):
    numbers = report_numbers(invented)
    falling, low, high = numbers.falling
    assert falling == (invented["regime"] == "both_fall").sum() > 0
    exact = stats.binomtest(falling, 40).proportion_ci(method="wilson")
    np.testing.assert_allclose((low, high), (exact.low, exact.high), rtol=1e-6)
