"""The report of a score table: its numbers against plain loops, its tokens against the token
kernel, its page."""

import base64
import json
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAIRS, close, model
from test_cli import in_one_process
from test_report_numbers import invent

import simgrad
from simgrad.bridge import Policy, ScoreTable, score
from simgrad.models import ModelConfig, create, only
from simgrad.pairs import packed, padded
from simgrad.report import tokens
from simgrad.report.numbers import read_score_table
from simgrad.report.page import write_report
from simgrad.report.scored import find_scored
from simgrad.theory import first_order, pair_kernel, token_kernel
from simgrad.theory.kernel import token_changes
from simgrad.theory.mitigation import contrastive_mask


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


ROWS = [
    {
        "prompt": "Say <b>",
        "chosen": " <script>alert('&')</script>",
        "rejected": " <script>alert(1)</script>",
        "source": "<a>",
    },
    {"prompt": "Go", "chosen": "ab\n🚀c", "rejected": "ab\nc", "source": "<a>"},
    {"prompt": "Count", "chosen": "one two", "rejected": "one", "source": "b"},
    {"prompt": "Count", "chosen": "", "rejected": "one", "source": "b"},
    {"prompt": "Nine", "chosen": "x", "rejected": "no, never", "source": "b"},
    {"prompt": "Numbers", "chosen": "1 2 3 4 5", "rejected": "1 2 3 4 6", "source": "b"},
]


@pytest.fixture(scope="module")
def policy():
    config = ModelConfig(vocab_size=256, width=8, depth=1, heads=2, max_length=64, dtype="float64")
    return Policy(*create(config), config, Bytes(), "<tiny> & model")


@pytest.fixture(scope="module")
def table(policy):
    return score(policy, ROWS, learning_rate=0.5)


def test_changes_of_tokens_are_the_token_kernel_contracted_and_add_up_to_the_first_order():
    apply, theta = model("rope_gqa_head_dim")
    force = jnp.array([[0.3, -0.5], [1.0, -0.9], [-0.2, -0.4], [0.7, 0.0]])
    for batch in (padded(PAIRS), packed(PAIRS)):
        kernel = np.asarray(token_kernel(apply, theta, batch, method="columns"))
        expected = np.zeros(kernel.shape[:3])
        for b in range(len(PAIRS)):
            for side in range(2):
                for i in range(kernel.shape[2]):
                    for source in range(2):
                        push = kernel[b, side, i, source].sum()
                        expected[b, side, i] += float(force[b, source]) * push
        changes = token_changes(apply, theta, batch, force)
        close(changes, expected)
        whole = first_order(pair_kernel(apply, theta, batch), force)
        close(changes.sum(-1), whole)
        # what only the tokens that differ contribute is not the change, and an unsigned push is
        # another step
        assert not np.allclose(
            (changes * contrastive_mask(batch).astype(changes.dtype)).sum(-1)[:, 0],
            whole[:, 0],
            rtol=1e-2,
        )
        other = token_changes(apply, theta, batch, jnp.abs(force))
        assert not np.allclose(other.sum(-1)[:, 0], whole[:, 0], rtol=1e-2)


def test_some_parameters_only():
    apply, theta = model("plain")
    force = jnp.array([[1.0, -1.0]] * 4)
    some = only(apply, "layers/attention/*")
    whole = first_order(pair_kernel(some, theta, padded(PAIRS)), force)
    close(token_changes(some, theta, padded(PAIRS), force).sum(-1), whole)


def test_pieces_shown_add_up_to_what_the_table_predicts(policy, table, monkeypatch):
    monkeypatch.setattr(tokens, "WINDOW", 5)
    views = tokens.pair_views(table, find_scored(table, policy, ROWS), range(len(table)))
    assert [v.row for v in views] == table["index"].tolist()
    changes = np.stack([table["predicted_dlogp_chosen"], table["predicted_dlogp_rejected"]], 1)
    for view, expected in zip(views, map(tuple, changes), strict=True):
        assert view.expected == expected
        for response, change in zip((view.chosen, view.rejected), expected, strict=True):
            np.testing.assert_allclose(response.change, change, rtol=1e-10)
            shown = sum(p.change for p in response.pieces)
            np.testing.assert_allclose(shown + response.outside, change, rtol=1e-10)
            assert response.shown <= 5
    numbers = views[-1].chosen
    assert numbers.tokens == 9
    assert abs(sum(p.change for p in numbers.pieces) - numbers.change) > 1e-3 * abs(
        numbers.change
    )  # some are outside


def test_what_the_responses_share_is_told_from_what_differs(policy, table):
    view = tokens.pair_views(
        table, find_scored(table, policy, ROWS), [table["index"].tolist().index(5)]
    )[0]
    assert [p.text for p in view.chosen.pieces if p.contrastive] == ["5"]
    assert [p.text for p in view.rejected.pieces if p.contrastive] == ["6"]
    assert view.prompt == "Numbers"


def test_bytes_of_one_character_stay_together():
    text = "ab é 🚀👩‍🚀 <x>"
    found = tokens.pieces(Bytes(), list("…".encode())[1:], list(text.encode()))
    assert [t for t, _ in found] == list(text)
    assert [n for _, n in found] == [len(c.encode()) for c in text]
    broken = "🚀".encode()[:3]
    assert sum(n for _, n in tokens.pieces(Bytes(), [65], list(broken))) == 3


def outside(text):
    """Everything in a page that would be fetched or run."""
    found = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]*)""", text)
    return [x for x in found if not x.startswith("data:image/png;base64,")] + re.findall(
        r"<(?:script|link|iframe|object)", text
    )


def test_page_is_self_contained_escaped_and_the_same_twice(policy, table, tmp_path):
    table.save(tmp_path / "scores.parquet")
    first = write_report(tmp_path / "scores.parquet", policy=policy, rows=ROWS)
    assert first.page == tmp_path / "scores.report.html"
    assert sorted(p.name for p in first.images) == [
        "distributions.png",
        "regime_plane.png",
        "strength.png",
    ]
    assert {p.parent for p in first.images} == {tmp_path / "scores.report_files"}
    text = first.page.read_text(encoding="utf-8")
    assert outside(text) == []
    assert "http" not in text
    assert "&lt;tiny&gt; &amp; model" in text
    assert "<tiny>" not in text
    assert "<td>&lt;a&gt;</td>" in text
    assert first.problems == ()
    assert "1 of 6 rows skipped: 1 × empty chosen response." in " ".join(text.split())
    embedded = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]*)", text)]
    assert sorted(embedded) == sorted(p.read_bytes() for p in first.images)
    plain = "".join(re.findall(r'<p class="tokens">(.*?)</p>', text, re.DOTALL))
    assert "&lt;" in plain
    assert "🚀" in plain
    assert "↵\n" in plain
    assert 'class="d"' in plain
    second = write_report(table, tmp_path / "b" / "again.html", policy, ROWS)
    assert second.page.read_bytes() == first.page.read_bytes()
    assert [p.read_bytes() for p in second.images] == [p.read_bytes() for p in first.images]
    shown = first._repr_html_()
    assert shown.count("<") == 2
    assert shown.startswith("<iframe srcdoc=")


def test_other_data_and_other_weights_are_refused_by_name(policy, table, tmp_path):
    changed = [*ROWS[:4], {**ROWS[4], "chosen": "y"}, ROWS[5]]
    report = write_report(table, tmp_path / "a.html", policy, changed)
    assert len(report.problems) == 1
    assert "not those that were scored: token ids differ" in report.problems[0]
    text = report.page.read_text(encoding="utf-8")
    assert "Tokens are not shown." in text
    assert '<p class="tokens">' not in text
    assert report.numbers.source_field is None
    other = Policy(*create(policy.config, seed=1), policy.config, Bytes(), "another")
    assert (
        "another, float64) is not the one that scored (weights: "
        in find_scored(table, other, ROWS).problems[0]
    )
    problems = find_scored(table).problems
    assert "The table does not say where its data were read: name them with --data." in problems
    assert any("The model cannot be loaded: '<tiny> & model'" in p for p in problems)
    missing = write_report(table, tmp_path / "b.html", policy, tmp_path / "gone.jsonl")
    assert "gone.jsonl: no such file" in missing.problems[0]
    short = write_report(table, tmp_path / "d.html", rows=ROWS[:3], tokens=False)
    assert short.problems == (
        "The data have 3 rows, but 6 were read for scoring: name them with --data.",
    )
    trusted = write_report(table, tmp_path / "c.html", rows=[*ROWS, {"more": 1}], tokens=False)
    assert trusted.problems == ()
    assert trusted.numbers.source_field == "source"
    assert "rows taken on trust" in trusted.page.read_text(encoding="utf-8")


def test_tables_remember_where_their_data_were_read(checkpoint, tmp_path):
    rows = [
        {"prompt": "is it", "chosen": f" {a} so", "rejected": " never so"}
        for a in ("yes", "good", "maybe")
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    policy = simgrad.load(checkpoint, "float64")
    table = score(policy, data, limit=3, max_length=9)
    assert table.metadata["source"] == {"data": str(data), "split": "train", "max_length": 9}
    found = find_scored(table)
    assert found.problems == ()
    assert list(found.pairs) == [0, 1, 2]
    assert score(policy, rows).metadata["source"] == {
        "data": None,
        "split": None,
        "max_length": policy.config.max_length,
    }


def test_without_gradients(tmp_path, policy):
    table = score(policy, ROWS, gradients=False)
    report = write_report(table, tmp_path / "a.html", policy, ROWS, worst=2)
    n, text = report.numbers, report.page.read_text(encoding="utf-8")
    assert (n.map, n.strength, n.objectives, n.filters, n.sources) == (None, None, (), (), ())
    assert "5 pairs scored without gradients" in text
    assert text.count('<section class="pair">') == 2
    exact = score(policy, ROWS)
    position = int(n.summary.worst[0])
    view = tokens.pair_views(table, find_scored(table, policy, ROWS), [position])[0]
    np.testing.assert_allclose(
        view.chosen.change, exact["predicted_dlogp_chosen"][position], rtol=1e-10
    )


def test_no_rows_one_row_and_numbers_that_are_none(tmp_path, policy):
    nothing = write_report(score(policy, [ROWS[3]]), tmp_path / "zero.html", policy, [ROWS[3]])
    assert "No pair could be scored" in nothing.page.read_text(encoding="utf-8")
    assert nothing.images == ()
    one = write_report(score(policy, [ROWS[2]]), tmp_path / "one.html", policy, [ROWS[2]])
    assert one.page.read_text(encoding="utf-8").count('<section class="pair">') == 1
    assert one.numbers.associations == ()
    table = invent()
    table.columns["ches"][2], table.columns["ln_ches"][:] = np.inf, np.nan
    table.columns["predicted_dlogp_chosen"][0], table.columns["grad_sq_chosen"][1] = np.nan, np.inf
    broken = write_report(table, tmp_path / "broken.html", tokens=False)
    assert broken.numbers.not_finite == {
        "ches": 1,
        "ln_ches": 40,
        "gap": 1,
        "predicted_dlogp_chosen": 1,
    }
    assert sum(broken.numbers.objectives[0].regimes.values()) == 39
    assert broken.numbers.map.left_out == 1


def test_other_files_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "text.parquet").write_text("no")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}.parquet is not a score table"):
            read_score_table(tmp_path / f"{name}.parquet")
    ScoreTable({"index": np.arange(2)}, (), {"run": {}}).save(tmp_path / "predicted.parquet")
    with pytest.raises(
        ValueError, match="predicted.parquet is not a table of simgrad score: it has no n_prompt"
    ):
        write_report(tmp_path / "predicted.parquet")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_score_table(tmp_path / "gone.parquet")
    (tmp_path / "begun.parquet.partial.npz").write_text("")
    with pytest.raises(FileNotFoundError, match="is not finished"):
        read_score_table(tmp_path / "begun.parquet")
    with pytest.raises(ValueError, match="path: where to write"):
        write_report(invent())
    with pytest.raises(ValueError, match="worst=-1"):
        write_report(invent(), tmp_path / "x.html", worst=-1)


def test_the_command(checkpoint, tmp_path):
    rows = [
        {"prompt": "is it", "chosen": f" {a} so", "rejected": " never so"}
        for a in ("yes", "good", "maybe")
    ]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "scores.parquet"
    data.write_text("\n".join(map(json.dumps, rows)))
    scored, written, elsewhere, wrong = in_one_process(
        ("score", "--model", checkpoint, "--data", data, "--out", out, "--dtype", "float64"),
        ("report", out, "--worst", 2),
        ("report", out, "--data", tmp_path / "gone.jsonl", "--out", tmp_path / "b.html"),
        ("report", data),
        cache=tmp_path,
    )
    assert [x.returncode for x in (scored, written, elsewhere, wrong)] == [0, 0, 0, 2], (
        written.stderr
    )
    page = tmp_path / "scores.report.html"
    assert written.stdout.splitlines()[0] == str(page)
    assert written.stderr.strip() == ""
    assert page.read_text(encoding="utf-8").count('<section class="pair">') == 2
    assert "gone.jsonl: no such file" in " ".join(elsewhere.stderr.split())
    assert "Tokens are not shown." in (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "is not a score table" in wrong.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_it(policy, table, tmp_path):
    from matplotlib.image import imread

    page = write_report(table, tmp_path / "page.html", policy, ROWS).page
    parts = "gpu background-networking component-update sync quic".split()
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{x}" for x in parts)]
    command = [
        "chromium",
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1100,1400",
    ]
    dumped = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    heading = re.search(r"<h1>(.*?)</h1>", page.read_text(encoding="utf-8")).group(1)
    assert heading in dumped.stdout
    assert "<script>" not in dumped.stdout
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1400, 1100)
    inked = (pixels < 0.9).any(-1)
    assert 0.01 < inked.mean() < 0.5
    assert inked[:, 550:].any()
