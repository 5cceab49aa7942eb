"""Preference rows of every kind, and what happens at their edges."""

import csv
import gzip
import json

import pytest
from helpers import WORDS, write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simgrad.bridge import InputError, PreferenceDataError, encode, read_rows
from simgrad.pairs import Pair

ROWS = [
    {"prompt": "is it so ?", "chosen": " yes", "rejected": " no never"},
    {"prompt": "is it good ?", "chosen": " maybe", "rejected": " no"},
]
ID = {word: i for i, word in enumerate(WORDS)}


def ids(text):
    return tuple(ID[word] for word in text.split())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_file_kind_gives_the_same_rows(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert read_rows(tmp_path / f"d.{kind}") == ROWS
        assert read_rows(tmp_path / f"d.{kind}", limit=1) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"d\.jsonl, line 2: not JSON"),
        ("d.jsonl", "[1]\n", r"line 1: a row must be an object, not list"),
        ("d.json", '{"a": 1}', "must hold a list of objects"),
        ("d.json", "[{]", r"line 1: not JSON"),
        ("d.csv", "prompt,chosen\na,b,c\n", "line 2"),
        ("d.parquet", "nonsense", "not a parquet file"),
        ("d.txt", "nonsense", "unknown ending '.txt'"),
        ("d.jsonl", "\n", "no rows"),
        ("n.jsonl", '{"a": ' + "9" * 5000 + "}", r"n\.jsonl, line 1: not JSON that can be read"),
        ("d.json", "[" * 100_000 + "]" * 100_000, r"d\.json: nested too deeply"),
        ("d.jsonl", '{"a": ' * 9999 + "1" + "}" * 9999, r"d\.jsonl, line 1: nested too deeply"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PreferenceDataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_files_that_are_no_text_are_named_with_the_remedy(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("prompt,chosen,rejected\né,b,c\n".encode("latin-1"))
    with pytest.raises(PreferenceDataError, match=rf"{name}: not text in UTF-8 .*: save it as UTF"):
        read_rows(path)
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    with pytest.raises(PreferenceDataError, match=rf"{name}: compressed with gzip: unpack it"):
        read_rows(path)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="there is no tokenizer: pass simgrad.pairs.Pair objects"):
        encode(ROWS, None)


def test_byte_order_marks_do_not_hide_the_prompt(tmp_path):
    for name, text in (
        ("d.csv", "prompt,chosen,rejected\nis it,so,good\n"),
        ("d.jsonl", json.dumps(ROWS[0])),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert "prompt" in read_rows(tmp_path / name)[0]


def test_json_lines_in_a_json_file_get_a_hint(tmp_path):
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(PreferenceDataError, match=r"call it \.jsonl"):
        read_rows(tmp_path / "d.json")


def test_a_template_that_refuses_a_row_skips_it(tmp_path):
    strict = write_tokenizer(tmp_path, template=False)
    refusal = "{{ raise_exception('no system role') }}"
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}" + refusal + "{% endif %}x"
    turn = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    row = {
        "prompt": [{"role": "system", "content": "is it"}],
        "chosen": turn[0],
        "rejected": turn[1],
    }
    assert "refuses this row: no system role" in encode([row], strict).skipped[0].reason


def test_missing_sources(tmp_path):
    with pytest.raises(PreferenceDataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.filterwarnings("ignore")
def test_unreachable_hub_data_set():
    with pytest.raises(PreferenceDataError, match="could not load"):
        read_rows("nobody/nothing")


def test_standard_rows(tokenizer):
    encoded = encode(ROWS, tokenizer)
    assert encoded.pairs[0] == Pair(ids("is it so ?"), ids("yes </s>"), ids("no never </s>"))
    assert encoded.indices == [0, 1]
    assert not encoded.skipped


def test_a_response_that_ends_with_eos_gets_no_second_one(tokenizer):
    (pair,) = encode(
        [{"prompt": "is it", "chosen": " so </s>", "rejected": " good"}], tokenizer
    ).pairs
    assert pair.chosen == ids("so </s>")


def test_conversational_rows(tokenizer):
    user, yes, no = (
        {"role": r, "content": c}
        for r, c in (("user", "is it"), ("assistant", "yes"), ("assistant", "no"))
    )
    explicit = {"prompt": [user], "chosen": [yes], "rejected": [no]}
    implicit = {"chosen": [user, yes], "rejected": [user, no]}
    mixed = {"prompt": "is it", "chosen": [user, yes], "rejected": [user, no]}
    responses_only = {"prompt": "is it", "chosen": [yes], "rejected": [no]}
    expected = Pair(ids("<|user|> is it </s> <|assistant|>"), ids("yes </s>"), ids("no </s>"))
    assert encode([explicit, implicit, mixed, responses_only], tokenizer).pairs == [expected] * 4
    system = {"role": "system", "content": "good"}
    (pair,) = encode(
        [{"prompt": "is it", "chosen": [system, yes], "rejected": [system, no]}], tokenizer
    ).pairs
    assert pair.prompt[-5:] == expected.prompt


def test_implicit_prompt_in_transcripts(tokenizer):
    start = "\n\nHuman: is it so ?\n\nAssistant: maybe\n\nHuman: so ?\n\nAssistant:"
    row = {"chosen": start + " no never", "rejected": start + " no"}
    (pair,) = encode([row], tokenizer).pairs
    assert (pair.chosen, pair.rejected) == (ids("no never </s>"), ids("no </s>"))
    assert pair.prompt == tuple(tokenizer(start)["input_ids"])


def test_merges_across_the_boundary_fall_back_and_are_counted():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "<e>": 4}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    encoded = encode([{"prompt": "ca", "chosen": "b", "rejected": "c"}], tokenizer)
    assert encoded.pairs == [Pair((3, 0), (1, 4), (3, 4))]
    assert encoded.merged == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "is it", "chosen": "", "rejected": " no"}, "empty chosen response"),
        ({"prompt": "is it", "chosen": " no", "rejected": ""}, "empty rejected response"),
        (
            {"prompt": "is it", "chosen": " no", "rejected": " no"},
            "chosen and rejected are identical",
        ),
        ({"prompt": "", "chosen": " no", "rejected": " yes"}, "empty prompt"),
        ({"prompt": "is it", "chosen": None, "rejected": " no"}, "empty chosen response"),
        ({"prompt": "is it", "chosen": "  ", "rejected": " no"}, "empty chosen response"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}],
                "rejected": [{"role": "user", "content": "so"}],
            },
            "no prompt",
        ),
        (
            {"prompt": "is it so is it so", "chosen": " yes", "rejected": " no"},
            "nothing left of the responses: prompt has 6",
        ),
        (
            {"prompt": "is it", "chosen": " yes yes so", "rejected": " yes yes no"},
            "identical after truncation to 4",
        ),
    ],
)
def test_unusable_rows_are_skipped_with_a_reason(tokenizer, row, reason):
    encoded = encode([ROWS[0] | {"prompt": "is"}, row], tokenizer, max_length=4)
    assert encoded.indices == [0]
    assert [s.index for s in encoded.skipped] == [1]
    assert reason in encoded.skipped[0].reason


def test_truncation_is_counted(tokenizer):
    encoded = encode(
        [{"prompt": "is it", "chosen": " so good yes", "rejected": " no"}], tokenizer, max_length=4
    )
    assert encoded.pairs[0].chosen == ids("so good")
    assert encoded.truncated == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "is it", "chosen": " so"},
            "row 1 .*: no field rejected; the row has: prompt, chosen",
        ),
        (
            {"prompt": "is it", "chosen": " so", "rejected": [{"role": "a", "content": "b"}]},
            "row 1 .* both be strings",
        ),
        (
            {"question": "is it", "chosen": "it so", "rejected": "it good"},
            "row 1 .*the row has: question, .*Rename",
        ),
        (
            {"prompt": ["is"], "chosen": " so", "rejected": " no"},
            "row 1 .*: prompt must be a string",
        ),
        (
            {"prompt": "is", "chosen": ["so"], "rejected": ["no"]},
            "row 1 .*: chosen must be a string or a list of messages",
        ),
    ],
)
def test_rows_of_unknown_form_are_named(tokenizer, row, message):
    with pytest.raises(PreferenceDataError, match=message):
        encode([ROWS[0], row], tokenizer)


def test_messages_without_a_chat_template(tmp_path):
    bare = write_tokenizer(tmp_path, template=False)
    row = {
        "prompt": [{"role": "user", "content": "is it"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
    }
    with pytest.raises(PreferenceDataError, match="no chat template"):
        encode([row | {"rejected": [{"role": "assistant", "content": "no"}]}], bare)


def test_token_ids_beyond_the_model_are_refused(tokenizer):
    with pytest.raises(PreferenceDataError, match="outside the model's vocabulary of 6"):
        encode(ROWS, tokenizer, vocab_size=6)
