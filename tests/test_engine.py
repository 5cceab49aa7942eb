"""Scoring end to end: right numbers, in order, resumable, honest about what it leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import close

import simgrad
from simgrad import objectives
from simgrad.bridge import Encoded, InputError, Policy, RunMismatchError, ScoreTable, encode
from simgrad.bridge.engine import columns
from simgrad.bridge.engine import score as score_module
from simgrad.bridge.engine.plan import kernel_works, plan
from simgrad.models import TransformerApply
from simgrad.pairs import Pair
from simgrad.report import numbers
from simgrad.report.scored import find_scored
from simgrad.report.summary import summarise
from simgrad.store import load_arrays, naming
from simgrad.theory import Regime
from simgrad.theory.kernel.cost import Shapes

RNG = np.random.default_rng(3)
WORDS = ["yes", "no", "never", "maybe", "is", "it", "so", "?", "good"]


def sentence(low, high):
    return " ".join(RNG.choice(WORDS, RNG.integers(low, high)))


ROWS = [
    {"prompt": sentence(1, 8), "chosen": " " + sentence(1, 9), "rejected": " " + sentence(1, 9)}
    for _ in range(14)
]
ROWS[4] = {"prompt": "is it", "chosen": " so", "rejected": " so"}
ROWS[9] = {"prompt": "is it", "chosen": "", "rejected": " so"}


@pytest.fixture(scope="module")
def policy(checkpoint):
    return simgrad.load(checkpoint, "float64")


@pytest.fixture(scope="module")
def table(policy):
    return simgrad.score(policy, ROWS, objective="simpo", learning_rate=1e-3)


def test_every_column_against_its_definition(policy, table):
    pairs = encode(ROWS, policy.tokenizer).pairs
    objective = objectives.get("simpo")
    for k, pair in enumerate(pairs[:5]):
        (logp_w, logits_w, w, last_w), (logp_l, logits_l, l, last_l) = (  # noqa: E741
            reference.sequence(policy.apply, policy.theta, pair.prompt, r)
            for r in (pair.chosen, pair.rejected)
        )
        g_w, g_l = (
            reference.gradient(policy.apply, policy.theta, pair.prompt, r)
            for r in (pair.chosen, pair.rejected)
        )
        ww, wl, ll = reference.dot(g_w, g_w), reference.dot(g_w, g_l), reference.dot(g_l, g_l)
        h_w = reference.head_gradient(logits_w, w, pair.chosen)
        h_l = reference.head_gradient(logits_l, l, pair.rejected)
        a, b = logp_w.sum(), logp_l.sum()
        logp = jnp.array([[a, b]])
        force = objective.force(logp, logp, jnp.array([[len(pair.chosen), len(pair.rejected)]]))
        d_w, d_l = float(force[0, 0]), -float(force[0, 1])
        plain, normal = reference.ches(w, l)
        expected = {
            "n_prompt": len(pair.prompt),
            "n_chosen": len(pair.chosen),
            "n_rejected": len(pair.rejected),
            "logp_chosen": a,
            "logp_rejected": b,
            "ches": plain,
            "ln_ches": normal,
            "last_hidden_inner": last_w @ last_l,
            "edit_distance": reference.edit_distance(pair.chosen, pair.rejected)
            / max(len(pair.chosen), len(pair.rejected)),
            "embedding_cosine": w.sum(0)
            @ l.sum(0)
            / np.linalg.norm(w.sum(0))
            / np.linalg.norm(l.sum(0)),
            "head_gap": (h_w * h_l).sum() - (h_w * h_w).sum(),
            "grad_inner": wl,
            "grad_sq_chosen": ww,
            "grad_sq_rejected": ll,
            "grad_cosine": wl / np.sqrt(ww * ll),
            "d_chosen": d_w,
            "d_rejected": d_l,
            "predicted_dlogp_chosen": 1e-3 * (d_w * ww - d_l * wl),
            "predicted_dlogp_rejected": 1e-3 * (d_w * wl - d_l * ll),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(table[name][k], value, rtol=1e-9, atol=1e-9, err_msg=name)
        assert set(table) == {"index", "regime", *expected}
    changes = zip(table["predicted_dlogp_chosen"], table["predicted_dlogp_rejected"], strict=True)
    for label, (up, down) in zip(table["regime"], changes, strict=True):
        expected = {(True, True): "ideal", (False, True): "both_fall", (True, False): "both_rise"}
        assert label == expected.get((up >= 0, down <= 0), "reversed")
        assert label in {r.label for r in Regime}


def test_rows_in_input_order_and_the_rest_with_reasons(table):
    assert table["index"].tolist() == [i for i in range(14) if i not in (4, 9)]
    assert [(s.index, s.reason) for s in table.skipped] == [
        (4, "chosen and rejected are identical"),
        (9, "empty chosen response"),
    ]
    assert table.metadata["counts"] == {"scored": 12, "skipped": 2, "merged": 0, "truncated": 0}


def test_batching_and_gradients_do_not_change_the_numbers(policy, table):
    small = simgrad.score(policy, ROWS, objective="simpo", learning_rate=1e-3, batch_tokens=1)
    forward = simgrad.score(policy, ROWS, objective="simpo", gradients=False)
    assert "regime" not in forward
    assert not any(name.startswith(("grad", "predicted")) for name in forward)
    for name in table:
        if name != "regime":
            close(small[name], table[name])
        if name in forward:
            close(forward[name], table[name])


def test_objectives_that_couple_pairs_see_each_pair_alone(policy):
    """TRL's SFT term divides by the tokens of the batch; scores must not depend on how pairs were
    batched."""
    coupled, plain = (
        simgrad.score(policy, ROWS, objective=name, gradients=False) for name in ("trl:sft", "sft")
    )
    np.testing.assert_allclose(
        coupled["d_chosen"] * coupled["n_chosen"], plain["d_chosen"], rtol=1e-6
    )


def test_limit_and_pairs_from_python(policy, table):
    pairs = encode(ROWS, policy.tokenizer).pairs
    bare = Policy(policy.apply, policy.theta, policy.config)
    again = simgrad.score(
        bare, [*pairs[:3], Pair([1], [2], [2])], objective="simpo", learning_rate=1e-3
    )
    close(again["grad_inner"], table["grad_inner"][:3])
    assert again.skipped[0].index == 3
    assert len(simgrad.score(policy, ROWS, limit=2, gradients=False)) == 2
    impossible = [Pair([1], [99], [2]), Pair([-1], [3], [2]), Pair([1] * 40, [3], [2])]
    reasons = [s.reason for s in simgrad.score(bare, impossible).skipped]
    assert [r.split(" is outside")[0] for r in reasons[:2]] == ["token id 99", "token id -1"]
    assert reasons[2] == "41 tokens, but at most 32 are read"
    assert len(simgrad.score(bare, Encoded([7], [Pair([1] * 9, [3], [2])]), max_length=5)) == 0
    with pytest.raises(ValueError, match="no tokenizer: pass simgrad.pairs.Pair"):
        simgrad.score(bare, ROWS)
    with pytest.raises(ValueError, match="the model reads 1 to 32 tokens"):
        simgrad.score(policy, ROWS, max_length=33)


def test_non_finite_rows_are_kept_out(policy):
    """A token whose embedding is infinite spoils its own pairs only."""
    table = policy.theta["embedding"]["table"].at[7].set(jnp.inf)
    broken = dataclasses.replace(policy, theta=policy.theta | {"embedding": {"table": table}})
    result = simgrad.score(broken, [Pair([1], [2, 3], [3, 3]), Pair([1, 7], [2, 3], [3, 3])])
    assert result["index"].tolist() == [0]
    assert result.skipped[0].reason.startswith("non-finite logp_chosen")


class _Killed(Exception):
    pass


def test_interrupted_runs_continue_and_end_up_equal(policy, tmp_path):
    whole, part = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    simgrad.score(policy, ROWS, out=whole, batch_tokens=1)

    def kill(done, total):
        if done >= 5:
            raise _Killed

    with pytest.raises(_Killed):
        simgrad.score(policy, ROWS, out=part, batch_tokens=1, progress=kill)
    arrays, _ = load_arrays(tmp_path / "part.parquet.partial.npz")
    assert arrays["__done__"].sum() == 5
    seen = []
    simgrad.score(
        policy,
        ROWS,
        out=part,
        batch_tokens=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (12, 12)
    assert part.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "part.parquet", "part.skipped.jsonl", "whole.parquet", "whole.skipped.jsonl",
    ]  # fmt: skip


def test_finished_work_is_not_done_again(policy, tmp_path, monkeypatch):
    out = tmp_path / "scores.parquet"
    first = simgrad.score(policy, ROWS, out=out)
    monkeypatch.setattr(score_module, "score_batch", None)
    again = simgrad.score(policy, ROWS, out=out)
    assert again.skipped == first.skipped
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_other_arguments_refuse_to_mix(policy, tmp_path):
    out = tmp_path / "scores.parquet"

    def kill(done, total):
        if done:
            raise _Killed

    with pytest.raises(_Killed):
        simgrad.score(policy, ROWS, out=out, progress=kill)
    with pytest.raises(
        RunMismatchError, match=r"objective: DPO\(beta=0.1\) there, IPO\(beta=0.1\) now"
    ):
        simgrad.score(policy, ROWS, out=out, objective="ipo")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet.partial.npz"]
    simgrad.score(policy, ROWS, out=out)
    with pytest.raises(RunMismatchError, match="data: .*pairs: 12 there, 3 now"):
        simgrad.score(policy, ROWS[:3], out=out)
    other = dataclasses.replace(policy, theta=jax.tree.map(lambda x: x * 1.001, policy.theta))
    with pytest.raises(RunMismatchError, match="data"):
        simgrad.score(policy, ROWS[:4] + ROWS[5:], out=out)
    with pytest.raises(RunMismatchError, match="weights"):
        simgrad.score(other, ROWS, out=out)
    (tmp_path / "alien.parquet").write_text("not ours")
    with pytest.raises(
        RunMismatchError, match="is not a score table of simgrad: choose another --out"
    ):
        simgrad.score(policy, ROWS, out=tmp_path / "alien.parquet")


def test_a_damaged_store_is_named(policy, tmp_path):
    out = tmp_path / "scores.parquet"
    (tmp_path / "scores.parquet.partial.npz").write_text("rubbish")
    with pytest.raises(InputError, match=r"partial\.npz is not a file that simgrad wrote"):
        simgrad.score(policy, ROWS, out=out)


@pytest.mark.parametrize(
    ("field", "value"), [("norm_eps", 1e-2), ("activation", "relu"), ("rope.theta", 500.0)]
)
def test_scores_of_another_configuration_are_not_handed_back(policy, tmp_path, field, value):
    """The weights alone do not make a model: what config.json says makes it too."""
    out = tmp_path / "scores.parquet"
    first = simgrad.score(policy, ROWS, out=out)
    if field == "rope.theta":
        changes = {"rope": dataclasses.replace(policy.config.rope, theta=value)}
    else:
        changes = {field: value}
    config = dataclasses.replace(policy.config, **changes)
    other = dataclasses.replace(policy, config=config, apply=TransformerApply(config))
    with pytest.raises(RunMismatchError, match=rf"another run \(model.config.{field}: .* now\)"):
        simgrad.score(other, ROWS, out=out)
    assert (simgrad.score(other, ROWS)["logp_chosen"] != first["logp_chosen"]).all()
    assert "model.config." + field in find_scored(first, other, ROWS).problems[0]


def test_every_part_of_the_identity_counts(policy, tmp_path, monkeypatch):
    """A weight between two that a sample would look at; other code; another version of optax."""
    out = tmp_path / "scores.parquet"
    simgrad.score(policy, ROWS, out=out)
    table = policy.theta["embedding"]["table"].at[3, 5].add(1e-12)
    nearly = dataclasses.replace(policy, theta=policy.theta | {"embedding": {"table": table}})
    with pytest.raises(RunMismatchError, match=r"another run \(weights: "):
        simgrad.score(nearly, ROWS, out=out)
    with monkeypatch.context() as other, pytest.raises(RunMismatchError, match=r"run \(code: "):
        other.setattr(naming, "code", lambda *modules: "other")
        simgrad.score(policy, ROWS, out=out)
    installed = naming.metadata.version
    with monkeypatch.context() as other, pytest.raises(RunMismatchError, match=r"run \(optax: "):
        newer = {"optax": "99.0"}
        other.setattr(naming.metadata, "version", lambda name: newer.get(name) or installed(name))
        simgrad.score(policy, ROWS, out=out)
    with pytest.raises(RunMismatchError, match=r"run \(tokenizer: "):
        simgrad.score(
            dataclasses.replace(policy, tokenizer=None), encode(ROWS, policy.tokenizer, 32), out=out
        )
    moved = dataclasses.replace(policy, name="the same, elsewhere")
    assert len(simgrad.score(moved, ROWS, out=out)) == 12


def test_columns_are_declared_once(table):
    assert tuple(table) == tuple(c.name for c in columns.SCORE_COLUMNS)
    for column in columns.SCORE_COLUMNS:
        assert f"{column.name:<25} {column.meaning}" in simgrad.score.__doc__
    assert {c.needs for c in columns.score_columns(gradients=False)} == {"row", "tokens", "forward"}


def test_a_score_is_added_by_its_declaration(policy, monkeypatch):
    """Engine, help, report and summary know no list of columns of their own."""
    more = columns.Column(
        "margin", "margin of log-probs", "log π(chosen) - log π(rejected)", "forward",
        lambda e: e.logp[:, 0] - e.logp[:, 1], "nats", risk=-1,
    )  # fmt: skip
    monkeypatch.setattr(columns, "SCORE_COLUMNS", (*columns.SCORE_COLUMNS, more))
    monkeypatch.setattr(numbers, "RISKS", (*columns.RISKS, more))
    jax.clear_caches()
    found = simgrad.score(policy, ROWS)
    np.testing.assert_allclose(found["margin"], found["logp_chosen"] - found["logp_rejected"])
    assert [(s.label, s.unit, s.risk) for s in numbers.scores(found) if s.name == "margin"] == [
        ("margin of log-probs", "nats", -1)
    ]
    jax.clear_caches()


def test_table_survives_saving(table, tmp_path):
    table.save(tmp_path / "t.parquet")
    back = ScoreTable.load(tmp_path / "t.parquet")
    assert back.skipped == table.skipped
    assert back.metadata == table.metadata
    for name in table:
        np.testing.assert_array_equal(back[name], table[name])
    assert len(back.to_pandas()) == len(table)
    with pytest.raises(KeyError, match="no column 'chess'; there are: index"):
        table["chess"]


def test_a_damaged_table_is_named(table, tmp_path):
    table.save(tmp_path / "t.parquet")
    (tmp_path / "t.skipped.jsonl").write_text("garbage")
    with pytest.raises(InputError, match=r"t\.skipped\.jsonl is damaged"):
        ScoreTable.load(tmp_path / "t.parquet")


def test_a_table_shows_itself_in_a_line(table):
    assert repr(table).startswith("<score table of 12 pairs, 2 skipped: index, n_prompt, ")
    assert "\n" not in repr(table)


def test_summary_counts_and_advises(table):
    s = summarise(table, worst=3)
    assert s.scored == 12
    assert sum(s.regimes.values()) == 12
    assert s.skipped == {"chosen and rejected are identical": 1, "empty chosen response": 1}
    changes = table["predicted_dlogp_chosen"]
    assert changes[s.worst].tolist() == sorted(changes)[:3]
    falling = changes < 0
    assert (s.needed is None) == (not falling.any())


def test_empty_result(policy):
    nothing = simgrad.score(policy, Encoded())
    assert len(nothing) == 0
    assert summarise(nothing).advice == ("No pair could be scored: see the reasons above.",)


@pytest.mark.parametrize("budget", [512, 1000, 1024, 2047])
def test_a_smaller_budget_takes_fewer_pairs_at_once_but_more_than_one(budget):
    works = plan([Pair([1] * 40, [2] * 8, [3] * 8)] * 64, True, budget, 512)
    assert max(len(work.members) for work in works) == budget // 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"limit": -1}, "limit=-1"),
    ],
)
def test_numbers_that_make_no_scores_are_refused_before_any(policy, given, message):
    with pytest.raises(InputError, match=message):
        simgrad.score(policy, [Pair([1, 2], [3], [4])], **given)


@pytest.mark.parametrize("packed", [True, False])
def test_plan_covers_every_pair_once_and_fits(packed):
    lengths = RNG.integers(1, 400, (200, 3))
    pairs = [Pair([1] * a, [1] * b, [2] * c) for a, b, c in lengths]
    works = plan(pairs, packed, 2048)
    assert sorted(i for work in works for i in work.members) == list(range(200))
    for work in works:
        assert (
            len(work.members) == 1 or len(work.members) * work.length * (1 if packed else 2) <= 2048
        )
        for i in work.members:
            p = pairs[i]
            sizes = (len(p.chosen), len(p.rejected))
            assert len(p.prompt) + (sum(sizes) if packed else max(sizes)) <= work.length
            assert max(sizes) <= work.rows
    assert plan(pairs, packed, 2048) == works
    assert len({(w.length, w.rows) for w in works}) <= 12


def test_layouts_give_the_same_scores_and_are_chosen_by_cost(policy, table):
    for layout in ("packed", "padded"):
        again = simgrad.score(policy, ROWS, objective="simpo", learning_rate=1e-3, layout=layout)
        for name in (
            "logp_chosen",
            "grad_inner",
            "grad_sq_chosen",
            "grad_sq_rejected",
            "predicted_dlogp_rejected",
        ):
            np.testing.assert_allclose(again.columns[name], table.columns[name], rtol=1e-10)


def test_pairs_are_divided_between_layouts_where_that_saves_more_than_it_compiles(policy):
    shapes = Shapes.of(policy.apply, policy.theta)
    long, short = Pair([1] * 200, [2] * 8, [3] * 8), Pair([1], [2] * 120, [3] * 120)
    works = kernel_works([long, short] * 400, shapes, 4096)
    assert {(w.packed, i % 2) for w in works for i in w.members} == {(True, 0), (False, 1)}
    assert sorted(i for w in works for i in w.members) == list(range(800))
    assert len({w.packed for w in kernel_works([long, short], shapes, 4096)}) == 1
    assert {w.packed for w in kernel_works([long, short] * 400, shapes, 4096, "padded")} == {False}
