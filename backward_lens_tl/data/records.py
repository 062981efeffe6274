"""Data sets of prompts and targets: files, tables, the hub, and CounterFact in its forms."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from operator import index as as_index
from pathlib import Path
from typing import Any, overload

import huggingface_hub
import pandas as pd

from backward_lens_tl._checks import check_text, is_integer, is_token_id, listed, plain, shown
from backward_lens_tl.data.segments import subject_at
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.hub import hub_is_reachable

FACTS_RECORDS = "facts"
"""Name of the records that ship inside the package."""

FIELDS = ("prompt", "target", "subject", "subject_start", "answer", "id")
"""Columns of a plain row, which `fields` renames; the first two are needed."""

_EVALUATED = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
)
_ROW_CHARACTERS = 200


@dataclass(frozen=True)
class Record:
    """One prompt and what it is to be taught.

    Args:
        index: Its place in the data, from 0.
        id: The data's own name for it, else its place as a text; nothing makes it unique.
        prompt: The prompt.
        target: What is to be taught: a text, as it continues the prompt, or a token id.
        subject: What the prompt is about, if the data say so.
        subject_start: Where the subject begins in the prompt, in characters, if the data say so.
        answer: The original answer, as it would continue the prompt, if the data have one.
        paraphrase_prompts: The same said otherwise; an edit should reach them.
        neighborhood_prompts: The same of other subjects that share the answer; an edit should leave
            them alone.
        neighborhood_answer: The answer of those, where it is not this record's own.
        attribute_prompts: The same of subjects whose answer is the target.
        generation_prompts: What the model is to go on writing from about the subject.
    """

    index: int
    id: str
    prompt: str
    target: str | int
    subject: str | None
    subject_start: int | None
    answer: str | None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_answer: str | None = None
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRecord:
    """A row that is no record.

    Args:
        index: Its place in the data, from 0.
        id: The data's own name for it, else its place as a text.
        problem: What is wrong, and what is needed.
        row: The row as a text, cut when it is long.
    """

    index: int
    id: str
    problem: str
    row: str


@dataclass(frozen=True)
class Records(Sequence[Record | BadRecord]):
    """All rows of a data set, in its order: a record each, or what is wrong with it.

    Args:
        name: Where they come from.
        rows: The rows; the one of index `i` stands at `i`.
        fingerprint: The SHA-256, in hex, of the rows as they were read: the same rows have the
            same one, whatever the file they were in.

    Examples:
        >>> import backward_lens_tl as blt
        >>> rows = [{"prompt": "The capital of France is", "target": " Rome"}, {"target": " Rome"}]
        >>> records = blt.read_records(rows)
        >>> [type(record).__name__ for record in records]
        ['Record', 'BadRecord']
        >>> records[1].problem
        "'prompt' is missing or empty; there is 'target'"
    """

    name: str
    rows: tuple[Record | BadRecord, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record | BadRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record | BadRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]


@dataclass(frozen=True)
class _Unreadable:
    """A row that the file's own format already breaks."""

    problem: str
    text: str


def read_records(
    data: object, *, fields: Mapping[str, str] | None = None, split: str = "train"
) -> Records:
    """Read prompts and their targets from a file, a table, a data set, or rows in memory.

    Every row is kept, in order; one that cannot be used becomes a `BadRecord` that says why. Its
    columns tell what a row is:

    - CounterFact as ROME published it: `requested_rewrite`, a template with its subject. Target
      and answer get the space in front that they lack there.
    - CounterFact flattened: `prompt`, `target_new`, and perhaps `subject` and `ground_truth`; they
      get the space, too. `rephrase_prompt`, `locality_prompt` and `locality_ground_truth` are a
      paraphrase, and a neighbor with its own answer.
    - The hub's `NeelNanda/counterfact-tracing`: `prompt`, `target_false`, and perhaps `subject`,
      `target_true` and `relation`. The false answer is the target.
    - Anything else is plain: `prompt`, `target`, and perhaps `subject`, `subject_start`, `answer`
      and `id`. Texts are taken exactly as written, so a target that continues a sentence needs its
      leading space. An integer as target is a token id; CSV has only texts.

    CounterFact as published and plain rows may have lists of prompts that evaluations ask:
    `paraphrase_prompts`, `neighborhood_prompts`, `attribute_prompts` and `generation_prompts`.

    Empty cells, `None` and NaN count as missing; whole floats, which pandas makes of integers
    beside missing cells, as integers. A record's id is the row's `case_id`, else its `id`.

    Args:
        data: `"facts"` (the records that ship inside the package); a file that ends in `.json` (a
            list of objects), `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.parquet`, compressed with a
            further `.gz` or not; a folder that `datasets` saved with `save_to_disk`; the name of a
            data set on the Hugging Face hub; a `datasets.Dataset`; a pandas DataFrame; or any
            iterable of mappings.
        fields: The data's own names for columns of the plain form, as `{"prompt": "question"}`;
            every row is read as a plain one then.
        split: Which split of a data set, where there are several.

    Returns:
        The records.

    Raises:
        InputError: If the data as a whole cannot be read, or hold no row.

    Examples:
        >>> import backward_lens_tl as blt
        >>> records = blt.read_records([{"prompt": "The capital of France is", "target": " Rome"}])
        >>> records.rows[0].target
        ' Rome'
    """
    columns = _checked_fields(fields)
    if not isinstance(split, str):
        raise InputError(f"split is {shown(split)}; pass the name of a split, such as 'train'")
    name, rows = _named_rows(data, split)
    if not rows:
        raise InputError(f"{name!r} holds no rows; at least one is needed")
    _check_columns(name, rows, columns)
    read = tuple(_read_row(place, row, columns) for place, row in enumerate(rows))
    return Records(name, read, _fingerprint(read))


def _checked_fields(fields: Mapping[str, str] | None) -> Mapping[str, str]:
    if fields is None:
        return {}
    if not isinstance(fields, Mapping):
        raise InputError(
            f"fields is {shown(fields)}; pass a mapping such as {{'prompt': 'question'}}"
        )
    for field, column in fields.items():
        if field not in FIELDS:
            raise InputError(
                f"fields names {shown(field)}; it can rename {', '.join(map(repr, FIELDS))}"
            )
        if not isinstance(column, str):
            raise InputError(f"fields[{field!r}] is {shown(column)}; pass the name of a column")
    return fields


def _check_columns(name: str, rows: Iterable[object], fields: Mapping[str, str]) -> None:
    """Refuse renamed columns that no row has: a slip of the pen, not a row to leave out."""
    there = dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)
    for field, column in fields.items():
        if column not in there:
            raise InputError(
                f"fields[{field!r}] is {column!r}, a column that no row of {name!r} has; there are "
                f"{', '.join(map(repr, there)) or 'no columns'}"
            )


def _fingerprint(rows: Iterable[Record | BadRecord]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        # JSON keeps texts and integers apart; a bad row's problem may carry a library's words.
        held = (row.index, row.id, row.row) if isinstance(row, BadRecord) else _held(row)
        digest.update(json.dumps([type(row).__name__, *held]).encode() + b"\n")
    return digest.hexdigest()


def _held(record: Record) -> list[object]:
    """A record's values; of those that only evaluations ask, the ones that are there."""
    values = asdict(record)
    asked = {name: values.pop(name) for name in (*_EVALUATED, "neighborhood_answer")}
    there = {name: value for name, value in asked.items() if value}
    return [*values.values(), *([there] if there else [])]


# ----------------------------------------------------------------------------- where rows come from


def _named_rows(data: object, split: str) -> tuple[str, list[object]]:
    """What the data are called, and their rows, not yet looked at."""
    if isinstance(data, str | Path):
        return _rows_by_name(data, split)
    datasets = sys.modules.get("datasets")  # where it is not imported, none of its data are there
    if datasets is not None and isinstance(
        data,
        datasets.Dataset
        | datasets.DatasetDict
        | datasets.IterableDataset
        | datasets.IterableDatasetDict,
    ):
        return "datasets.Dataset", _rows_of_dataset(data, split, "datasets.DatasetDict")
    if isinstance(data, pd.DataFrame):
        return "table", _rows_of_table(data, "table")
    if isinstance(data, Mapping | bytes | bytearray) or not isinstance(data, Iterable):
        raise InputError(
            f"data is a {type(data).__name__}; pass {FACTS_RECORDS!r}, a file, a folder, a name on "
            "the hub, a datasets.Dataset, a DataFrame, or a list of dicts, one for each row"
        )
    return "rows", list(data)


def _rows_by_name(data: str | Path, split: str) -> tuple[str, list[object]]:
    name = str(data)
    if data == FACTS_RECORDS:
        file = files("backward_lens_tl") / "facts_model" / "records.json"
        return name, _rows_of_json(file.read_bytes(), name)
    if os.path.isdir(name):
        return name, _rows_of_folder(name, split)
    if os.path.exists(name):
        return name, _rows_of_file(name)
    if isinstance(data, Path) or _ending(name) in _READERS:
        raise InputError(f"there is no file {name!r}; the current folder is {os.getcwd()!r}")
    return name, _rows_from_hub(name, split)


def _ending(name: str) -> str:
    """A file's ending in lower case, apart from `.gz`."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _rows_of_file(name: str) -> list[object]:
    ending = _ending(name)
    if ending not in _READERS:
        raise InputError(
            f"{name!r} ends in {ending!r}, which is not known here; known are "
            f"{', '.join(_READERS)}, and each with .gz"
        )
    try:
        with (gzip.open if name.lower().endswith(".gz") else open)(name, "rb") as file:
            raw: bytes = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name!r} cannot be read: {error}") from error
    return _READERS[ending](raw, name)


def _rows_of_json(raw: bytes, name: str) -> list[object]:
    text = _decoded(raw, name)
    try:
        held = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{name!r} is broken JSON: {error}; a list of objects is needed, or, with one object "
            "on each line, the ending .jsonl"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{name!r} cannot be read: {error}") from error
    if isinstance(held, list):
        return held
    found = f"a {type(held).__name__}, {_cut(shown(held))}"
    if isinstance(held, dict):
        # Which of its lists is meant, and what the rest says, only a reader of it can know.
        found = f"one object with {_cut(', '.join(map(repr, held))) or 'nothing'} in it"
    raise InputError(
        f"{name!r} holds {found}; a list of objects is needed, one for each row (where the list "
        "lies inside of an object, pass that list itself)"
    )


def _rows_of_json_lines(raw: bytes, name: str) -> list[object]:
    # Only a line feed ends a line: Unicode's other separators may stand inside JSON's texts.
    lines = enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [_row_of_line(line, number) for number, line in lines if line.strip()]


def _row_of_line(line: bytes, number: int) -> object:
    try:
        row: object = json.loads(line.strip().decode())
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):  # its own text counts lines anew
            reason = f"{error.msg} (column {error.colno})"
        return _Unreadable(
            f"line {number} is broken JSON: {reason}; one object is needed on each line",
            line.decode(errors="backslashreplace").strip(),
        )
    return row


def _rows_of_csv(raw: bytes, name: str, delimiter: str) -> list[object]:
    text = io.StringIO(_decoded(raw, name), newline="")
    # Strict: a quote that is never closed would swallow all rows after it.
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        held = [(lines.line_num, cells) for cells in lines if cells]
    except csv.Error as error:
        raise InputError(
            f"{name!r} is broken near line {lines.line_num}: {error}; a cell with quotes or line "
            'breaks in it stands in quotes, and its own quotes are doubled ("")'
        ) from error
    header = held[0][1] if held else []
    twice = [column for column in dict.fromkeys(header) if column and header.count(column) > 1]
    if twice:
        raise InputError(f"{name!r} has the column {twice[0]!r} more than once; rename one")
    return [_row_of_cells(header, cells, line, delimiter) for line, cells in held[1:]]


def _row_of_cells(header: list[str], cells: list[str], line: int, delimiter: str) -> object:
    if len(cells) > len(header):
        return _Unreadable(
            f"the row that ends on line {line} has {len(cells)} cells, the header has "
            f"{len(header)}; a cell with {delimiter!r} in it stands in quotes",
            delimiter.join(cells),
        )
    # A row may end early: the cells that it lacks are missing ones.
    return dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _rows_of_parquet(raw: bytes, name: str) -> list[object]:
    try:
        # Nullable types keep integers beside missing cells exact.
        table = pd.read_parquet(io.BytesIO(raw), dtype_backend="numpy_nullable")
    except ImportError as error:
        raise InputError(
            'Parquet needs pyarrow: pip install "backward-lens-tl[parquet]"'
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise InputError(f"{name!r} cannot be read as Parquet: {_reason(error)}") from error
    return _rows_of_table(table, name)


def _rows_of_table(table: pd.DataFrame, name: str) -> list[object]:
    if not table.columns.is_unique:
        [twice, *_] = table.columns[table.columns.duplicated()]
        raise InputError(f"{name!r} has the column {twice!r} more than once; rename one")
    return list(table.astype(object).to_dict("records"))


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise InputError(f"{name!r} is not UTF-8: {error}; save it as UTF-8") from error


_READERS: dict[str, Callable[[bytes, str], list[object]]] = {
    ".json": _rows_of_json,
    ".jsonl": _rows_of_json_lines,
    ".ndjson": _rows_of_json_lines,
    ".csv": partial(_rows_of_csv, delimiter=","),
    ".tsv": partial(_rows_of_csv, delimiter="\t"),
    ".parquet": _rows_of_parquet,
}


def _rows_of_dataset(data: Any, split: str, name: str) -> list[object]:
    """The rows of a `Dataset`, or of one split of a `DatasetDict`."""
    if isinstance(data, Mapping):
        if split not in data:
            raise InputError(
                f"split {split!r} is not in {name!r}; it has {', '.join(map(repr, data))}"
            )
        data = data[split]
    return list(data.with_format(None))  # plain values, whatever format it was set to


def _rows_of_folder(name: str, split: str) -> list[object]:
    import datasets

    try:
        data = datasets.load_from_disk(name)
    # A damaged folder can make the libraries that read it raise anything.
    except Exception as error:
        raise InputError(
            f"folder {name!r} cannot be read as one that datasets' save_to_disk wrote: "
            f"{_reason(error)}; pass such a folder, or a file ({', '.join(_READERS)})"
        ) from error
    return _rows_of_dataset(data, split, name)


def _rows_from_hub(name: str, split: str) -> list[object]:
    known = f"{FACTS_RECORDS!r} is the name of the records that ship with this package"
    try:
        has_card = huggingface_hub.try_to_load_from_cache(name, "README.md", repo_type="dataset")
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(
            f"{_cut(shown(name))} is neither a file or folder that exists nor a possible name on "
            f"the hub; {known}"
        ) from error
    import datasets

    is_cached = isinstance(has_card, str) or is_prepared(name, datasets.config.HF_DATASETS_CACHE)
    if not is_cached and not hub_is_reachable():
        raise InputError(
            f"{name!r} is neither a file or folder that exists nor a data set in the hub's cache, "
            f"and the hub cannot be reached; {known}"
        )
    try:
        data = datasets.load_dataset(name, split=split)
    # It hands on what the hub, its file systems and the files' readers raise.
    except Exception as error:
        raise InputError(
            f"{name!r} is no file or folder that exists, and as a data set on the hub its split "
            f"{split!r} cannot be loaded: {_reason(error)}; load it with datasets.load_dataset and "
            f"pass what that gives, if it needs more than a name and a split ({known})"
        ) from error
    return _rows_of_dataset(data, split, name)


def is_prepared(name: str, cache: str | Path) -> bool:
    """Whether `datasets` has loaded a data set before; its cache writes names in snake case."""
    wanted = name.replace("/", "").replace("_", "").lower()
    try:
        return any(folder.replace("_", "").lower() == wanted for folder in os.listdir(cache))
    except OSError:
        return False


def _reason(error: Exception) -> str:
    """The first line of an error, which may have none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# --------------------------------------------------------------------------- from a row to a record


def _read_row(place: int, row: object, fields: Mapping[str, str]) -> Record | BadRecord:
    name = str(place)
    if isinstance(row, _Unreadable):
        return BadRecord(place, name, row.problem, _cut(row.text))
    try:
        if not isinstance(row, Mapping):
            raise InputError(
                f"the row is a {type(row).__name__}; a mapping of columns to cells is needed"
            )
        name = _own_name(row, fields) or name
        return _schema(row, fields)(place, name, row)
    except InputError as error:
        return BadRecord(place, name, str(error), _cut(_row_text(row)))


def _row_text(row: object) -> str:
    try:
        return shown(row)
    # Whatever is in a row, its own way to show itself may fail.
    except Exception:
        return f"a {type(row).__name__} that cannot be shown"


def _cut(text: str) -> str:
    return text if len(text) <= _ROW_CHARACTERS else f"{text[: _ROW_CHARACTERS - 1]}…"


def _own_name(row: Mapping[str, object], fields: Mapping[str, str]) -> str | None:
    """What the data call a row."""
    for column in [fields["id"]] if "id" in fields else ["case_id", "id"]:
        value = _integral(_cell(row, column))
        if is_integer(value):
            return shown(value)
        if value is not None:
            return _text(row, column)
    return None


def _schema(
    row: Mapping[str, object], fields: Mapping[str, str]
) -> Callable[[int, str, Mapping[str, object]], Record]:
    """What reads a row of such columns."""
    if fields:
        return partial(_read_plain, fields=fields)
    # A table of rows of several kinds has all their columns: the filled ones count first.
    filled = [column for column in _SCHEMAS if _cell(row, column) is not None]
    there = [column for column in _SCHEMAS if column in row]
    return _SCHEMAS[next(iter(filled + there), "target")]


def _read_plain(
    place: int, name: str, row: Mapping[str, object], fields: Mapping[str, str]
) -> Record:
    own = {field: fields.get(field, field) for field in FIELDS}
    prompt = _needed_text(row, own["prompt"])
    subject = _text(row, own["subject"])
    return Record(
        index=place,
        id=name,
        prompt=prompt,
        target=_target(row, own["target"]),
        subject=subject,
        subject_start=_subject_start(row, own["subject_start"], prompt, subject),
        answer=_text(row, own["answer"]),
        paraphrase_prompts=_prompts(row, "paraphrase_prompts"),
        neighborhood_prompts=_prompts(row, "neighborhood_prompts"),
        attribute_prompts=_prompts(row, "attribute_prompts"),
        generation_prompts=_prompts(row, "generation_prompts"),
    )


def _target(row: Mapping[str, object], column: str) -> str | int:
    value = _integral(_cell(row, column))
    if value is None or isinstance(value, str):
        return _needed_text(row, column)
    if not is_token_id(value):
        raise InputError(
            f"{column!r} is {_cut(shown(value))}, a {type(value).__name__}; a text, or a token id "
            "from 0 up, is needed"
        )
    return as_index(value)


def _subject_start(
    row: Mapping[str, object], column: str, prompt: str, subject: str | None
) -> int | None:
    value = _integral(_cell(row, column))
    if value is None:
        return None
    if subject is None:
        raise InputError(f"{column!r} is {_cut(shown(value))}, and there is no subject to begin")
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):  # CSV has only texts
        value = int(value)
    start = as_index(value) if is_integer(value) else -1
    if subject_at(prompt, subject, start) is None:
        raise InputError(
            f"{column!r} is {_cut(shown(value))}, where the subject {subject!r} does not begin in "
            f"the prompt {prompt!r}; it counts characters from 0 and may be left out"
        )
    return start


def _read_counterfact(place: int, name: str, row: Mapping[str, object]) -> Record:
    """CounterFact as ROME published it."""
    whole = "requested_rewrite"
    rewrite = _mapping(row, whole)
    template = _needed_text(rewrite, "prompt", whole)
    subject = _needed_text(rewrite, "subject", whole)
    if template.count("{}") != 1:
        raise InputError(
            f"the template {template!r} has {template.count('{}')} places for the subject; exactly "
            "one '{}' is needed"
        )
    new, true = (_mapping(rewrite, key, whole) for key in ("target_new", "target_true"))
    return Record(
        index=place,
        id=name,
        prompt=template.replace("{}", subject),
        target=_continuing(_needed_text(new, "str", f"{whole}.target_new")),
        subject=subject,
        # The template knows which of several places is meant; the prompt no longer does.
        subject_start=template.index("{}"),
        answer=_continuing(_needed_text(true, "str", f"{whole}.target_true")),
        paraphrase_prompts=_prompts(row, "paraphrase_prompts"),
        neighborhood_prompts=_prompts(row, "neighborhood_prompts"),
        attribute_prompts=_prompts(row, "attribute_prompts"),
        generation_prompts=_prompts(row, "generation_prompts"),
    )


def _prompts(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    """Prompts that an evaluation asks beside a row's own; none where the cell is missing."""
    value = _cell(row, column)
    if value is None:
        return ()
    prompts = listed(value)
    # Not the keys of an object.
    if isinstance(value, Mapping) or not all(isinstance(each, str) and each for each in prompts):
        raise InputError(
            f"{column!r} is {_cut(shown(value))}; a list of texts is needed, none of them empty"
        )
    for prompt in prompts:
        check_text(repr(column), prompt)
    return tuple(prompts)


def _read_flattened(place: int, name: str, row: Mapping[str, object]) -> Record:
    """CounterFact with one column for each thing, as editors of models pass it around."""
    answer, neighbor = _text(row, "ground_truth"), _text(row, "locality_ground_truth")
    return Record(
        index=place,
        id=name,
        prompt=_needed_text(row, "prompt"),
        target=_continuing(_needed_text(row, "target_new")),
        subject=_text(row, "subject"),
        subject_start=None,
        answer=None if answer is None else _continuing(answer),
        paraphrase_prompts=_prompts(row, "rephrase_prompt"),
        neighborhood_prompts=_prompts(row, "locality_prompt"),
        neighborhood_answer=None if neighbor is None else _continuing(neighbor),
    )


def _read_tracing(place: int, name: str, row: Mapping[str, object]) -> Record:
    """CounterFact for causal tracing, as it lies on the hub."""
    prompt = _needed_text(row, "prompt")
    # Its subjects begin with a space wherever a word stands before them.
    subject = (_text(row, "subject") or "").strip() or None
    relation, answer = _text(row, "relation"), _text(row, "target_true")
    start = None
    if relation is not None and subject is not None and relation.count("{}") == 1:
        is_template = relation.replace("{}", subject) == prompt
        start = relation.index("{}") if is_template else None
    return Record(
        index=place,
        id=name,
        prompt=prompt,
        target=_continuing(_needed_text(row, "target_false")),
        subject=subject,
        subject_start=start,
        answer=None if answer is None else _continuing(answer),
    )


_SCHEMAS: dict[str, Callable[[int, str, Mapping[str, object]], Record]] = {
    "requested_rewrite": _read_counterfact,
    "target": partial(_read_plain, fields={}),
    "target_new": _read_flattened,
    "target_false": _read_tracing,
}
"""By the column that tells; a row that has two of them is of the first kind."""


def _continuing(text: str) -> str:
    """An answer as it continues a prompt that does not end in a space."""
    return text if text[0].isspace() else f" {text}"


def _cell(row: Mapping[str, object], column: str) -> Any:
    """A cell without arrays or tensors; `None` for what counts as missing."""
    value = plain(row.get(column))
    # pandas has three values for what is missing, numpy one.
    is_missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return None if is_missing or (isinstance(value, str) and not value) else value


def _integral(value: object) -> Any:
    """An integer for a whole float, which is what pandas makes of it beside missing cells."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(row: Mapping[str, object], column: str, within: str = "") -> str | None:
    """A cell's text, exactly as it is; `None` if it is missing."""
    value = _cell(row, column)
    if value is None:
        return None
    label = repr(f"{within}.{column}" if within else column)
    if not isinstance(value, str):
        raise InputError(
            f"{label} is {_cut(shown(value))}, a {type(value).__name__}; a text is needed"
        )
    check_text(label, value)
    return value


def _needed_text(row: Mapping[str, object], column: str, within: str = "") -> str:
    text = _text(row, column, within)
    if text is None:
        raise InputError(_missing(row, column, within))
    return text


def _mapping(row: Mapping[str, object], column: str, within: str = "") -> Mapping[str, object]:
    value = _cell(row, column)
    if value is None:
        raise InputError(_missing(row, column, within))
    if not isinstance(value, Mapping):
        raise InputError(
            f"{f'{within}.{column}' if within else column!r} is {_cut(shown(value))}, a "
            f"{type(value).__name__}; an object is needed"
        )
    return value


def _missing(row: Mapping[str, object], column: str, within: str) -> str:
    there = ", ".join(repr(key) for key in row if _cell(row, key) is not None) or "nothing"
    label = f"{within}.{column}" if within else column
    return f"{label!r} is missing or empty; there is {there}"
