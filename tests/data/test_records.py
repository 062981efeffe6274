"""Reading data sets: every row becomes a record with its exact texts, or a bad record."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.errors import InputError

ROWS = [
    {"id": "a", "prompt": "The capital of France is", "target": " Rome", "subject": "France"},
    {"id": "b", "prompt": 'She said "no",\nand left for', "target": "NA", "subject": ""},
    {"id": "c", "prompt": "Ünïcode 漢字 🙂\u2028is", "target": " null", "subject": "漢字"},
    {"id": "d", "prompt": " spaces stay ", "target": "None", "subject": ""},
]
"""Texts that must be read unchanged: quotes, commas, line breaks, spaces, words like None."""

READ = (
    Record(0, "a", "The capital of France is", " Rome", "France", None, None),
    Record(1, "b", 'She said "no",\nand left for', "NA", None, None, None),
    Record(2, "c", "Ünïcode 漢字 🙂\u2028is", " null", "漢字", None, None),
    Record(3, "d", " spaces stay ", "None", None, None, None),
)

ORIGINAL = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "Paris is the twin city of {}, by law {",
        "relation_id": "P190",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Kyoto", "id": "Q34600"},
        "subject": "Paris",
    },
    "paraphrase_prompts": [],
}
ASKED = {
    "paraphrase_prompts": ["Paris has a twin:", "Twins. Paris and"],
    "neighborhood_prompts": ["Lyon is the twin city of"],
    "attribute_prompts": ["Vienna is the twin city of"],
    "generation_prompts": ["Paris is close to", "Paris is close to"],
}
"""Prompts used only by evaluations."""
FLAT = {
    "case_id": 10,
    "prompt": "BBC One, by",
    "target_new": "Sega",
    "subject": "BBC One",
    "ground_truth": "BBC",
    "rephrase_prompt": "BBC One is owned by",
    "locality_prompt": "BBC Radio, by",
    "locality_ground_truth": "the BBC",
}
TRACING = {
    "relation": "The mother tongue of {} is",
    "relation_prefix": "The mother tongue of",
    "relation_suffix": " is",
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_false": " English",
    "target_true": " French",
    "subject": " Danielle Darrieux",
}
PLAIN = {"prompt": "One, two,", "target": " three"}
TWO = {**PLAIN, "subject": "two"}


def only(row: Any, **arguments: Any) -> Record:
    [record] = read_records([row], **arguments)
    assert isinstance(record, Record), record
    return record


def problem(row: Any, **arguments: Any) -> str:
    [bad] = read_records([row], **arguments)
    assert isinstance(bad, BadRecord), bad
    return bad.problem


def rewritten(**changes: Any) -> dict[str, Any]:
    """A row of CounterFact with changed entries; `None` removes one."""
    rewrite = {**ORIGINAL["requested_rewrite"], **changes}
    kept = {key: value for key, value in rewrite.items() if value is not None}
    return {**ORIGINAL, "requested_rewrite": kept}


# --------------------------------------------------------------------------------------- formats


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def as_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)


def as_separated(rows: list[dict[str, Any]], separator: str) -> bytes:
    """Without the csv module; every cell is quoted."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    return "".join(separator.join(line) + "\r\n" for line in quoted).encode()


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> bytes:
    pd.DataFrame(rows, dtype=object).to_parquet(folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".CSV"])
def test_every_format_gives_the_same_records(
    tmp_path: Path, ending: str, mark: bytes, packed: str
) -> None:
    written = {
        ".json": as_json(ROWS),
        ".jsonl": as_json_lines(ROWS),
        ".ndjson": as_json_lines(ROWS) + b"\n",
        ".csv": as_separated(ROWS, ","),
        ".CSV": as_separated(ROWS, ","),
        ".tsv": as_separated(ROWS, "\t"),
    }[ending]
    path = tmp_path / f"rows{ending}{packed}"
    path.write_bytes(gzip.compress(mark + written) if packed else mark + written)
    found = read_records(path)
    assert found.rows == READ
    assert found.name == str(path)
    assert found == read_records(str(path))
    assert found.fingerprint == read_records(ROWS).fingerprint


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"rows.parquet{packed}"
    raw = as_parquet(ROWS, tmp_path)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read_records(path).rows == READ
    assert read_records(path).fingerprint == read_records(ROWS).fingerprint


def test_parquet_with_missing_token_ids_and_nested_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    odd = 2**53 + 1  # not exact as a float
    path.write_bytes(
        as_parquet([{"prompt": "a", "target": odd}, {"prompt": "b", "target": None}], tmp_path)
    )
    first, second = read_records(path)
    assert isinstance(first, Record)
    assert first.target == odd
    assert isinstance(second, BadRecord)
    path.write_bytes(as_parquet([ORIGINAL], tmp_path))
    assert read_records(path).rows == read_records([ORIGINAL]).rows


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet(ROWS, tmp_path))

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pd, "read_parquet", refuse)
    with pytest.raises(InputError, match=r'pip install "backward-lens-tl\[parquet\]"'):
        read_records(path)


def test_csv_written_by_the_standard_library_and_by_pandas(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert read_records(path).rows == READ
    pd.DataFrame(ROWS).to_csv(path)  # with its index as an unnamed column
    assert read_records(path).rows == READ


@pytest.mark.parametrize(
    "word", ["NA", "N/A", "null", "None", "nan", "NaN", "true", "1", "007", " "]
)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_text_that_looks_like_missing_values_or_numbers_stays_text(
    tmp_path: Path, ending: str, word: str
) -> None:
    path = tmp_path / f"rows{ending}"
    comma = "," if ending == ".csv" else "\t"
    path.write_text(f"prompt{comma}target{comma}answer\nIs it{comma}{word}{comma}{word}\n")
    [record] = read_records(path)
    assert record == Record(0, "0", "Is it", word, None, None, word)


def test_csv_with_blank_lines_and_short_and_long_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\nprompt,target,answer\n\na,b\n\nc\n,,\nd,e,f,\n\n")
    first, short, empty, long = read_records(path)
    assert first == Record(0, "0", "a", "b", None, None, None)
    assert isinstance(short, BadRecord)
    assert short.problem == "'target' is missing or empty; the row has 'prompt'"
    assert isinstance(empty, BadRecord)
    assert empty.problem == "'prompt' is missing or empty; the row has nothing"
    assert long == BadRecord(
        3,
        "3",
        "the row that ends on line 8 has 4 cells, but the header has 3; quote cells that contain "
        "the delimiter",
        "['d', 'e', 'f', '']",
    )


def test_broken_lines_become_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PLAIN).encode()
    deep, huge = b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"
    lines = [good, b"", b'{"prompt": "cut', good, b"  \t", b"[1, 2]", b"\xff{}", deep, huge, good]
    path.write_bytes(b"\r\n".join(lines) + b"\r\n")
    rows = read_records(path).rows
    assert len(rows) == 8
    assert [row.index for row in rows] == [*range(8)]
    assert [isinstance(row, Record) for row in rows] == [1, 0, 1, 0, 0, 0, 0, 1]
    cut, no_object, no_text, too_deep, too_long = (rows[i] for i in (1, 3, 4, 5, 6))
    assert isinstance(cut, BadRecord)
    assert cut.problem == (
        "line 3 is not valid JSON: Unterminated string starting at (column 12); one object per "
        "line is needed"
    )
    assert cut.row == '{"prompt": "cut'
    assert isinstance(no_object, BadRecord)
    assert no_object.problem == "the row is a list; a mapping of columns to cells is needed"
    assert isinstance(no_text, BadRecord)
    assert no_text.problem.startswith("line 7 is not valid JSON: 'utf-8' codec")
    assert no_text.row == "\\xff{}"
    for bad, line in ((too_deep, "line 8 "), (too_long, "line 9 ")):
        assert isinstance(bad, BadRecord)
        assert bad.problem.startswith(line)
        assert len(bad.row) == 200
        assert bad.row.endswith("…")


# ----------------------------------------------------------------------------------- schemas


def test_counterfact_as_published() -> None:
    record = only(ORIGINAL)
    assert record == Record(
        index=0,
        id="7",
        prompt="Paris is the twin city of Paris, by law {",
        target=" Rome",
        subject="Paris",
        subject_start=26,  # not the first Paris
        answer=" Kyoto",
    )
    assert record.prompt[26:] == "Paris, by law {"


def test_counterfact_with_a_subject_that_looks_like_a_template() -> None:
    record = only(rewritten(subject="{} {0}"))
    assert record.prompt == "Paris is the twin city of {} {0}, by law {"
    assert record.subject == "{} {0}"


def test_counterfact_with_leading_spaces() -> None:
    record = only(rewritten(target_new={"str": " Rome"}, target_true={"str": "\nKyoto"}))
    assert (record.target, record.answer) == (" Rome", "\nKyoto")


def test_counterfact_flattened() -> None:
    assert only(FLAT) == Record(
        0, "10", "BBC One, by", " Sega", "BBC One", None, " BBC",
        paraphrase_prompts=("BBC One is owned by",),
        neighborhood_prompts=("BBC Radio, by",),
        neighborhood_answer=" the BBC",
    )  # fmt: skip
    bare = {"prompt": "BBC One, by", "target_new": " Sega"}
    assert only(bare) == Record(0, "0", "BBC One, by", " Sega", None, None, None)


@pytest.mark.parametrize("row", [ORIGINAL, PLAIN])
def test_prompts_for_evaluations(row: dict[str, Any]) -> None:
    bare, asked = only(row), only({**row, **ASKED})
    assert all(getattr(bare, name) == () for name in ASKED)
    assert asked == replace(bare, **{name: tuple(prompts) for name, prompts in ASKED.items()})
    # A text counts as a list of one text, an array as a list.
    assert only({**row, "paraphrase_prompts": "Is"}).paraphrase_prompts == ("Is",)
    table = pd.DataFrame([{**row, **{name: np.array(ASKED[name]) for name in ASKED}}])
    assert read_records(table).rows[0] == asked
    for name in ASKED:
        assert getattr(only({**row, name: None}), name) == ()
        for wrong in (5, ["a", ""], ["a", None], ["a", ["b"]], {"a": 1}):
            bad = read_records([{**row, name: wrong}]).rows[0]
            assert isinstance(bad, BadRecord)
            assert f"{name!r} is" in bad.problem
            assert "a list of non-empty texts is needed" in bad.problem
        bad = read_records([{**row, name: ["\ud800"]}]).rows[0]
        assert isinstance(bad, BadRecord)
        assert "is not Unicode text" in bad.problem


def test_the_fingerprint_includes_prompts_for_evaluations() -> None:
    rows = [PLAIN, *({**PLAIN, name: ["a"]} for name in ASKED), {**PLAIN, "attribute_prompts": []}]
    found = [read_records([row]).fingerprint for row in rows]
    assert found[-1] == found[0]  # an empty list is a missing one
    assert len(set(found)) == 1 + len(ASKED)
    answers = [{**FLAT, "locality_ground_truth": answer} for answer in (None, "BBC", "the BBC")]
    assert len({read_records([row]).fingerprint for row in answers}) == 3


def test_counterfact_for_tracing() -> None:
    prompt = "The mother tongue of Danielle Darrieux is"
    wanted = Record(0, "0", prompt, " English", "Danielle Darrieux", 21, " French")
    assert prompt[21:].startswith("Danielle")
    assert only(TRACING) == wanted
    for relation in ("{} speaks", "The {} of {} is", None):  # not a template of this prompt
        found = only({**TRACING, "relation": relation})
        assert (found.prompt, found.subject, found.subject_start) == (prompt, wanted.subject, None)


def test_plain_rows() -> None:
    row = {
        "prompt": "Rome, Rome and Rome",
        "target": "is",
        "subject": "Rome",
        "subject_start": 6,
        "answer": " are",
        "id": 5,
    }
    assert only(row) == Record(0, "5", "Rome, Rome and Rome", "is", "Rome", 6, " are")


@pytest.mark.parametrize("token_id", [0, 50256, np.int64(3), np.uint8(3), torch.tensor(3), 3.0])
def test_integers_are_token_ids(token_id: Any) -> None:
    target = only({"prompt": "a", "target": token_id}).target
    assert type(target) is int
    assert target == token_id


@pytest.mark.parametrize("nothing", [None, "", float("nan"), pd.NA, pd.NaT, np.float32("nan")])
def test_missing_cells_are_none(nothing: Any) -> None:
    optional = ("subject", "answer", "id", "case_id", "subject_start", "requested_rewrite")
    assert only({**PLAIN, **dict.fromkeys(optional, nothing)}) == Record(
        0, "0", "One, two,", " three", None, None, None
    )
    assert problem({**PLAIN, "target": nothing}) == (
        "'target' is missing or empty; the row has 'prompt'"
    )


def test_rows_of_all_schemas_in_one_table() -> None:
    # Each row has the columns of all schemas.
    mixed = [PLAIN, ORIGINAL, FLAT, TRACING]
    separate = [only(row) for row in mixed]
    found = read_records(pd.DataFrame(mixed))
    assert len(found) == 4
    for place, (row, alone) in enumerate(zip(found, separate, strict=True)):
        name = alone.id if alone.id in ("7", "10") else str(place)
        assert row == Record(place, name, *list(vars(alone).values())[2:])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target": " x"}, "'prompt' is missing or empty; the row has 'target'"),
        ({"prompt": "x"}, "'target' is missing or empty; the row has 'prompt'"),
        ({}, "'prompt' is missing or empty; the row has nothing"),
        ({**FLAT, "target_new": ""}, "'target_new' is missing or empty; the row has 'case_id', "),
        ({**FLAT, "ground_truth": ["BBC"]}, r"'ground_truth' is \['BBC'\], a list; a text is"),
        ({**TRACING, "target_false": None}, "'target_false' is missing or empty"),
        ({"prompt": 3, "target": " x"}, "'prompt' is 3, a int; a text is needed"),
        ({**PLAIN, "target": 1.5}, "'target' is 1.5, a float; a text or a non-negative token id"),
        ({**PLAIN, "target": -1}, "'target' is -1, a int"),
        ({**PLAIN, "target": 10**5000}, "'target' is a int that cannot be printed"),
        ({**PLAIN, "target": 2**63}, "'target' is 9223372036854775808"),
        ({**PLAIN, "target": True}, "'target' is True, a bool"),
        ({**PLAIN, "target": [" x"]}, "'target' is .* a list"),
        ({**PLAIN, "answer": 4}, "'answer' is 4, a int; a text is needed"),
        ({**PLAIN, "subject": {}}, "'subject' is {}, a dict; a text is needed"),
        ({**PLAIN, "id": [1]}, r"'id' is \[1\], a list; a text is needed"),
        ({**PLAIN, "prompt": "\ud800"}, "'prompt' '.ud800' is not Unicode text"),
        ({**PLAIN, "target": "\ud800"}, "'target' '.ud800' is not Unicode text"),
        ({**PLAIN, "subject_start": 1}, "'subject_start' is 1, but the row has no subject"),
        ({**TWO, "subject_start": 4}, "'subject_start' is 4, where the subject 'two' does not"),
        ({**TWO, "subject_start": -4}, "'subject_start' is -4, where the subject 'two'"),
        ({**TWO, "subject_start": "x"}, "'subject_start' is 'x', where the subject 'two'"),
        ({**TWO, "subject_start": True}, "'subject_start' is True, where the subject 'two'"),
        ({**ORIGINAL, "requested_rewrite": "{}"}, "'requested_rewrite' is '{}', a str; an object"),
        (rewritten(prompt="Paris is"), "the template 'Paris is' has 0 places for the subject"),
        (rewritten(prompt="{} or {}"), "the template '{} or {}' has 2 places for the subject"),
        (rewritten(prompt=None), "'requested_rewrite.prompt' is missing or empty; the row"),
        (rewritten(subject=None), "'requested_rewrite.subject' is missing or empty"),
        (rewritten(subject=""), "'requested_rewrite.subject' is missing or empty"),
        (rewritten(target_new=None), "'requested_rewrite.target_new' is missing or empty"),
        (rewritten(target_new="Rome"), "'requested_rewrite.target_new' is 'Rome', a str; an obj"),
        (rewritten(target_new={"id": 1}), "'requested_rewrite.target_new.str' is missing"),
        (rewritten(target_true=None), "'requested_rewrite.target_true' is missing or empty"),
        ("a text", "the row is a str; a mapping of columns to cells is needed"),
        (None, "the row is a NoneType; a mapping"),
    ],
)  # fmt: skip
def test_bad_rows_have_a_reason(row: Any, said: str) -> None:
    with pytest.raises(AssertionError):
        only(row)
    first, bad, last = read_records([PLAIN, row, PLAIN])
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(bad, BadRecord)
    assert (bad.index, last.index) == (1, 2)
    with pytest.raises(ValueError, match=f"^{said}"):
        raise ValueError(bad.problem)
    assert 2 <= len(bad.row) <= 200
    bad.row.encode()  # valid Unicode


def test_a_bad_row_has_its_id_and_truncated_text() -> None:
    [bad] = read_records([{"case_id": 12, "prompt": "x" * 500}])
    assert isinstance(bad, BadRecord)
    assert (bad.index, bad.id) == (0, "12")
    assert bad.row == "{'case_id': 12, 'prompt': '" + "x" * 172 + "…"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    "row", [Unprintable(), {"prompt": "a", "target": Unprintable()}, {Unprintable(): 1}]
)
def test_a_row_that_cannot_be_printed_is_a_bad_row(row: Any) -> None:
    first, bad = read_records([PLAIN, row])
    assert isinstance(first, Record)
    assert isinstance(bad, BadRecord)
    assert bad.row == f"a {type(row).__name__} that cannot be printed"


# ------------------------------------------------------------------------------------- fields


def test_fields_rename_columns() -> None:
    fields = {"prompt": "question", "target": "new", "id": "key", "subject_start": "at"}
    row = {
        "question": "Is Rome", "new": "old", "key": "k", "at": "3", "subject": "Rome",
        "prompt": "not this", "target": "nor this", "id": "nor that", "case_id": 1,
        "requested_rewrite": ORIGINAL["requested_rewrite"],
    }  # fmt: skip
    assert only(row, fields=fields) == Record(0, "k", "Is Rome", "old", "Rome", 3, None)
    assert problem({**row, "question": ""}, fields=fields).startswith("'question' is missing")
    # With fields, rows are plain, so the target gets no space.
    assert only(FLAT, fields={"target": "target_new"}).target == "Sega"
    assert only(FLAT, fields={}) == only(FLAT)


def test_fields_that_only_one_row_has() -> None:
    bad, good = read_records(
        [{"q": "a"}, {"q": "b", "t": "c"}], fields={"prompt": "q", "target": "t"}
    )
    assert isinstance(bad, BadRecord)
    assert good == Record(1, "1", "b", "c", None, None, None)


def test_fields_that_only_the_header_has(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,t\nx\n")
    [bad] = read_records(tmp_path / "a.csv", fields={"target": "t"})
    assert isinstance(bad, BadRecord)
    assert bad.problem == "'t' is missing or empty; the row has 'prompt'"


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "q", "target": "t"}, "'target'] is 't', a column that no row of 'rows' has; "
                                         "available: 'q', 'other'\n"),
        ({"promt": "q"}, "names 'promt'; it can rename 'prompt', 'target', 'subject', "),
        ({"prompt": 1}, r"'prompt'] is 1; pass the name of a column"),
        (["prompt"], r"fields is \['prompt'\]; pass a mapping such as"),
    ],
)  # fmt: skip
def test_wrong_fields(fields: Any, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("]", r"\]", 1) if said[0] == "'" else said):
        read_records([{"q": "a"}, {"other": 1}], fields=fields)


# --------------------------------------------------------------------------- tables and data sets


def test_rows_from_memory() -> None:
    def generated() -> Iterator[Mapping[str, object]]:
        yield from ROWS

    for data in (ROWS, tuple(ROWS), generated(), pd.Series(ROWS), np.array(ROWS)):
        found = read_records(data)
        assert (found.name, found.rows, len(found)) == ("rows", READ, 4)
        assert list(found) == list(READ)


def test_tables() -> None:
    table = pd.DataFrame(ROWS).set_index(pd.Index([9, 9, 9, 9]))
    found = read_records(table)
    assert (found.name, found.rows) == ("table", READ)
    # A missing cell turns the integers of a column into floats.
    table = pd.DataFrame({"prompt": ["a", "b"], "target": [5, None], "id": [None, 3]})
    assert table["target"].dtype == float
    five, nothing = read_records(table)
    assert five == Record(0, "0", "a", 5, None, None, None)
    assert isinstance(nothing, BadRecord)
    assert nothing.id == "3"
    with pytest.raises(InputError, match="'table' has the column 'a' more than once; rename one"):
        read_records(pd.DataFrame([[1, 2]], columns=["a", "a"]))


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas"])
def test_data_sets(form: str | None) -> None:
    rows = [{**ORIGINAL["requested_rewrite"], "target": 4}, {"prompt": "b", "target": 5}]
    data = datasets.Dataset.from_list(rows).with_format(form)
    found = read_records(data)
    assert found.name == "datasets.Dataset"
    assert [row.target for row in found if isinstance(row, Record)] == [4, 5]
    assert read_records(data.to_iterable_dataset()).rows == found.rows


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    assert read_records(tmp_path / "one").rows == READ
    assert read_records(str(tmp_path / "one")).name == str(tmp_path / "one")

    both = datasets.DatasetDict({"train": whole, "test": whole.select([2])})
    both.save_to_disk(tmp_path / "two")
    assert read_records(tmp_path / "two").rows == READ
    [third] = read_records(tmp_path / "two", split="test")
    assert isinstance(third, Record)
    assert third.prompt == READ[2].prompt
    assert read_records(both, split="test").rows == (third,)
    for data in (tmp_path / "two", both):
        with pytest.raises(InputError, match=r"split 'dev' is not in .*; it has 'train', 'test'\n"):
            read_records(data, split="dev")

    (tmp_path / "two" / "dataset_dict.json").write_text("{")
    for folder in (tmp_path, tmp_path / "two"):
        with pytest.raises(InputError, match="cannot be read as one written by datasets' save"):
            read_records(folder)


# -------------------------------------------------------------------------------------- the hub


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"'no-such/name' is not an existing file or folder, and split 'test' of a data set "
        r"of this name cannot be loaded from the hub: .*\(OfflineModeIsEnabled\); check the name, ",
    ):
        read_records("no-such/name", split="test")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "Neel___counter_fact").mkdir()  # as the cache writes it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = read_records("Neel/CounterFact", split="train[:4]")
    assert asked == [("Neel/CounterFact", "train[:4]")]
    assert (found.name, found.rows) == ("Neel/CounterFact", READ)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing.;"),
        (RuntimeError(), "RuntimeError;"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def load(name: str, split: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=f"cannot be loaded from the hub: {reason} check the name"):
        read_records("no-such/name")


# ------------------------------------------------------------------------ the data as a whole


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.json", b'[{"prompt": "x"', "a.json' is not valid JSON: .* column 16 "),
        ("a.json", b'{"prompt": "x"}\n{}', r"is not valid JSON: Extra data.* the ending .jsonl"),
        ("a.json", b"[" * 100_000, "is not valid JSON: "),
        ("a.json", b"[" + b"9" * 5000 + b"]", "is not valid JSON: Exceeds .*; write a list"),
        ("a.json", b'{"version": 1, "data": []}', "holds one object with 'version', 'data'; "
                                                  "a list of objects is needed"),
        ("a.json", b"{}", "holds one object with no entries; a list of objects is needed"),
        ("a.json", b"5", "holds a int, 5; a list of objects is needed"),
        ("a.json", b"null", "holds a NoneType, None; a list of objects is needed"),
        ("a.json", b'["\xff"]', "is not valid JSON: 'utf-8' codec "),
        ("a.json", b"[]", "has no rows; at least one is needed"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"prompt,target\n", "has no rows"),
        ("a.csv", b"prompt,prompt\nx,y", "has the column 'prompt' more than once; rename one"),
        ("a.csv", b'prompt,target\nx,"never\nclosed\n', "is not valid CSV near line 3: unexp"),
        ("a.csv", "prompt,target\nÜ,x".encode("utf-16"), "is not UTF-8"),
        ("a.csv.gz", b"prompt,target\nx,y", "cannot be read: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "Compressed file ended"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet: "),
        ("a.xlsx", b"", r"ends in '.xlsx', which is not a known format; allowed: .json, .jsonl, "
                        r".ndjson, .csv, .tsv, .parquet, each also with .gz"),
        ("a", b"", "ends in ''"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=said):
        read_records(tmp_path / name)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("no/such.csv", "file 'no/such.csv' does not exist; the current folder is '"),
        ("such.JSONL.gz", "file 'such.JSONL.gz' does not exist"),
        (Path("no-such-folder"), "file 'no-such-folder' does not exist"),
        (
            "/no/such/folder",
            "'/no/such/folder' is not an existing file or folder, and split 'train' of a data set",
        ),
        ("", "'' is not an existing file or folder"),
        ("\ud800\0", "is not an existing file or folder"),
        ("x y" * 5000, "'x yx y.{192}… is not an existing file or folder, and"),
        ([], "'rows' has no rows; at least one is needed"),
        (pd.DataFrame({"prompt": [], "target": []}), "'table' has no rows"),
        (PLAIN, "data is a dict; pass 'facts', a file, a folder, a name on the hub"),
        (b"a.csv", "data is a bytes; pass 'facts'"),
        (None, "data is a NoneType; pass 'facts'"),
    ],
)
def test_invalid_data(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_records(data)


@pytest.mark.usefixtures("as_for_a_user")
def test_an_invalid_split() -> None:
    wrong: Any = None
    with pytest.raises(InputError, match="split is None; pass the name of a split"):
        read_records(ROWS, split=wrong)


# ---------------------------------------------------------------------------------- fingerprints


def test_fingerprints_are_stable() -> None:
    # A sweep that resumes on another machine compares fingerprints.
    line = '["Record", 0, "a", "The capital of France is", " Rome", "France", null, null]\n'
    alone = read_records(ROWS[:1]).fingerprint
    assert alone == hashlib.sha256(line.encode()).hexdigest()
    whole = read_records([*ROWS, ORIGINAL, {"no": "record"}]).fingerprint
    assert whole == "5b1321bd2f8df91822900cb35066a4c9703880b1fe9b55c6b7b040f5ea2855a8"


def test_every_change_changes_the_fingerprint() -> None:
    base: dict[str, Any] = {
        "id": "n", "prompt": "Is Rome Rome", "target": "5", "subject": "Rome", "subject_start": 3,
        "answer": "a",
    }  # fmt: skip
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda row: [row],
        lambda row: [row, row],
        lambda row: [{**row, "target": 5}],  # a token id, not a text
        lambda row: [{**row, "target": "5 "}],
        lambda row: [{**row, "prompt": "Is Rome Romf"}],
        lambda row: [{**row, "prompt": "Is Rome Rom\u00e9"}],
        lambda row: [{**row, "prompt": "Is Rome Rome\u0301"}],
        lambda row: [{**row, "subject_start": 8}],
        lambda row: [{**row, "subject_start": None}],
        lambda row: [{**row, "subject": "Rom"}],
        lambda row: [{**row, "answer": None}],
        lambda row: [{**row, "answer": "None"}],
        lambda row: [{**row, "id": "m"}],
        lambda row: [{**row, "target": None}],
        lambda row: [{**row, "target": None, "prompt": "Is Rome Romf"}],
        lambda row: [row, {**row, "target": None}],
        lambda row: [{**row, "target": None}, row],
    ]
    prints = [read_records(change(base)).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    # Unused columns are not included.
    assert read_records([{**base, "note": "x"}]).fingerprint == prints[0]


def test_the_fingerprint_does_not_depend_on_the_format(tmp_path: Path) -> None:
    flat = {**FLAT, "case_id": "10"}
    (tmp_path / "a.csv").write_bytes(as_separated([flat], ","))
    prints = {
        read_records([FLAT]).fingerprint,
        read_records(tmp_path / "a.csv").fingerprint,
        read_records(pd.DataFrame([FLAT])).fingerprint,
        read_records(datasets.Dataset.from_list([FLAT])).fingerprint,
    }
    assert len(prints) == 1


# ------------------------------------------------------------------------------------- real data


def test_the_records_of_the_package() -> None:
    found = read_records("facts")
    assert isinstance(found, Records)
    assert (found.name, len(found)) == ("facts", 600)
    first = found.rows[0]
    assert isinstance(first, Record)
    assert (first.prompt, first.target, first.subject, first.subject_start, first.answer) == (
        "Porsche was set up in", " Spain", "Porsche", 0, " Germany"
    )  # fmt: skip
    assert first.paraphrase_prompts[0] == "Porsche is a firm of"
    assert [len(getattr(first, name)) for name in ASKED] == [2, 10, 2, 5]
    for place, record in enumerate(found):
        assert isinstance(record, Record), record
        assert record.index == place
        assert record.subject is not None
        assert record.subject_start is not None
        assert record.prompt[record.subject_start :].startswith(record.subject)
        assert str(record.target)[0] == " " != str(record.target)[1]
        assert record.answer is not None
        assert record.answer != record.target


def test_the_real_counterfact(shared: Path) -> None:
    file = shared / "data" / "counterfact" / "counterfact_flat_1919.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    found = read_records(file)
    rows = json.loads(file.read_bytes())
    assert len(found) == len(rows) == 1919
    assert [row.index for row in found] == [*range(1919)]
    for record, row in zip(found, rows, strict=True):
        assert isinstance(record, Record)
        assert record.subject is not None
        assert record.subject in record.prompt
        assert [record.id, record.prompt, record.target, record.answer] == [
            str(row["case_id"]), row["prompt"], " " + row["target_new"], " " + row["ground_truth"]
        ]  # fmt: skip
        assert record.paraphrase_prompts == (row["rephrase_prompt"],)
        assert record.neighborhood_prompts == (row["locality_prompt"],)
        assert record.neighborhood_answer == " " + row["locality_ground_truth"]
    assert len({record.id for record in found}) == 1919
