"""Reading data sets: files, tables, folders and data sets of `datasets`, the hub, and memory.

CSV and JSON are read with the standard library: pandas and `datasets` refuse a whole file for one
broken line, guess types, and do not report the line that a row is on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backward_lens_tl._checks import shown, truncated
from backward_lens_tl.data.records import Records, fingerprint
from backward_lens_tl.data.schemas import FIELDS, BrokenRow, read_row
from backward_lens_tl.errors import InputError, first_line

if TYPE_CHECKING:
    import pandas as pd

FACTS_RECORDS = "facts"
"""Name of the records that ship with the package."""


def read_records(
    data: object, *, fields: Mapping[str, str] | None = None, split: str = "train"
) -> Records:
    """Read prompts and targets from a file, a table, a data set, or rows in memory.

    Every row is kept, in order. A row that cannot be used becomes a `BadRecord` that says why. The
    columns determine how a row is read:

    - CounterFact as published with ROME: `requested_rewrite`, a template with its subject. Target
      and answer get a leading space if they have none.
    - CounterFact, flattened: `prompt`, `target_new`, and optionally `subject` and `ground_truth`,
      also with a leading space. `rephrase_prompt`, `locality_prompt` and `locality_ground_truth`
      are a paraphrase, and a neighborhood prompt with its answer.
    - `NeelNanda/counterfact-tracing` on the hub: `prompt`, `target_false`, and optionally
      `subject`, `target_true` and `relation`. The false answer is the target.
    - Plain rows: `prompt`, `target`, and optionally `subject`, `subject_start`, `answer` and `id`.
      Texts are used exactly as written, so a target that continues a sentence needs its leading
      space. An integer target is a token id; in CSV all targets are texts.

    Plain rows and CounterFact as published may have lists of prompts for evaluations:
    `paraphrase_prompts`, `neighborhood_prompts`, `attribute_prompts` and `generation_prompts`.

    Empty cells, `None` and NaN are missing values. Whole floats, which pandas makes of integers in
    columns with missing values, are read as integers. The id of a record is the row's `case_id` or
    `id`.

    Args:
        data: `"facts"` (the records that ship with the package); a `.json` file (a list of
            objects), or a `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.parquet` file, optionally
            compressed with a further `.gz`; a folder written by `datasets`' `save_to_disk`; the
            name of a data set on the Hugging Face hub; a `datasets.Dataset`; a pandas DataFrame; or
            any iterable of mappings.
        fields: Column names in the data for the fields of plain rows, such as
            `{"prompt": "question"}`. All rows are then read as plain rows.
        split: The split to read if a data set has several.

    Returns:
        The records.

    Raises:
        InputError: If the data cannot be read or have no rows.

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
        raise InputError(f"{name!r} has no rows; at least one is needed")
    _check_columns(name, rows, columns)
    read = tuple(read_row(index, row, columns) for index, row in enumerate(rows))
    return Records(name, read, fingerprint(read))


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
    """Refuse a column in `fields` that no row has, which is probably a typo."""
    columns = dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)
    for field, column in fields.items():
        if column not in columns:
            raise InputError(
                f"fields[{field!r}] is {column!r}, a column that no row of {name!r} has; "
                f"available: {', '.join(map(repr, columns)) or 'no columns'}"
            )


def _named_rows(data: object, split: str) -> tuple[str, list[object]]:
    import pandas as pd

    if isinstance(data, str | Path):
        return str(data), _rows_by_name(data, split)
    if hasattr(data, "with_format"):
        return "datasets.Dataset", _rows_of_dataset(data, split, "datasets.DatasetDict")
    if isinstance(data, pd.DataFrame):
        return "table", _rows_of_table(data, "table")
    if isinstance(data, Mapping | bytes | bytearray) or not isinstance(data, Iterable):
        raise InputError(
            f"data is a {type(data).__name__}; pass {FACTS_RECORDS!r}, a file, a folder, a name on "
            "the hub, a datasets.Dataset, a DataFrame, or a list of dicts, one per row"
        )
    return "rows", list(data)


def _rows_by_name(data: str | Path, split: str) -> list[object]:
    name = str(data)
    if data == FACTS_RECORDS:
        file = files("backward_lens_tl") / "facts_model" / "records.json"
        return _rows_of_json(file.read_bytes(), name)
    if os.path.isdir(name):
        return _rows_of_folder(name, split)
    if os.path.exists(name):
        return _rows_of_file(name)
    if isinstance(data, Path) or _suffix(name) in _FORMATS:
        raise InputError(f"file {name!r} does not exist; the current folder is {os.getcwd()!r}")
    return _rows_from_hub(name, split)


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


# --- files --------------------------------------------------------------------------------------


def _rows_of_file(name: str) -> list[object]:
    suffix = _suffix(name)
    if suffix not in _FORMATS:
        raise InputError(
            f"{name!r} ends in {suffix!r}, which is not a known format; allowed: "
            f"{', '.join(_FORMATS)}, each also with .gz"
        )
    try:
        with (gzip.open if name.lower().endswith(".gz") else open)(name, "rb") as file:
            raw: bytes = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name!r} cannot be read: {error}") from error
    return _FORMATS[suffix](raw, name)


def _rows_of_json(raw: bytes, name: str) -> list[object]:
    try:
        held = json.loads(raw)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise InputError(
            f"{name!r} is not valid JSON: {error}; write a list of objects in UTF-8, or one object "
            "per line with the ending .jsonl"
        ) from error
    if isinstance(held, list):
        return held
    found = f"a {type(held).__name__}, {truncated(shown(held))}"
    if isinstance(held, dict):
        found = f"one object with {truncated(', '.join(map(repr, held))) or 'no entries'}"
    raise InputError(
        f"{name!r} holds {found}; a list of objects is needed, one per row. If the list is inside "
        "an object, pass the list itself"
    )


def _rows_of_json_lines(raw: bytes, name: str) -> list[object]:
    # Only a line feed ends a line: JSON texts may contain Unicode's other line separators.
    lines = enumerate(raw.split(b"\n"), start=1)
    return [_row_of_line(line.strip(), number) for number, line in lines if line.strip()]


def _row_of_line(line: bytes, number: int) -> object:
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):  # its message would say line 1
            reason = f"{error.msg} (column {error.colno})"
        return BrokenRow(
            f"line {number} is not valid JSON: {reason}; one object per line is needed",
            line.decode(errors="backslashreplace"),
        )
    return row


def _rows_of_csv(raw: bytes, name: str, delimiter: str) -> list[object]:
    try:
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise InputError(f"{name!r} is not UTF-8: {error}; save it as UTF-8") from error
    # Strict, because a quote that is never closed would swallow all following rows.
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, lines), [])
        rows = [_row_of_cells(header, cells, lines.line_num) for cells in lines if cells]
    except csv.Error as error:
        raise InputError(
            f"{name!r} is not valid CSV near line {lines.line_num}: {error}; cells with quotes or "
            'line breaks must be quoted, and quotes inside them doubled ("")'
        ) from error
    _check_unique([column for column in header if column], name)
    return rows


def _row_of_cells(header: list[str], cells: list[str], line: int) -> object:
    if len(cells) > len(header):
        return BrokenRow(
            f"the row that ends on line {line} has {len(cells)} cells, but the header has "
            f"{len(header)}; quote cells that contain the delimiter",
            str(cells),
        )
    return dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _rows_of_parquet(raw: bytes, name: str) -> list[object]:
    import pandas as pd

    try:
        # Nullable types keep integers exact in columns with missing values.
        table = pd.read_parquet(io.BytesIO(raw), dtype_backend="numpy_nullable")
    except ImportError as error:
        raise InputError(
            'Parquet needs pyarrow: pip install "backward-lens-tl[parquet]"'
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise InputError(f"{name!r} cannot be read as Parquet: {first_line(error)}") from error
    return _rows_of_table(table, name)


def _rows_of_table(table: pd.DataFrame, name: str) -> list[object]:
    _check_unique(table.columns, name)
    return list(table.astype(object).to_dict("records"))


def _check_unique(columns: Iterable[object], name: str) -> None:
    for column, count in Counter(columns).items():
        if count > 1:
            raise InputError(f"{name!r} has the column {column!r} more than once; rename one")


_FORMATS: dict[str, Callable[[bytes, str], list[object]]] = {
    ".json": _rows_of_json,
    ".jsonl": _rows_of_json_lines,
    ".ndjson": _rows_of_json_lines,
    ".csv": partial(_rows_of_csv, delimiter=","),
    ".tsv": partial(_rows_of_csv, delimiter="\t"),
    ".parquet": _rows_of_parquet,
}


# --- datasets -----------------------------------------------------------------------------------


def _rows_of_dataset(data: Any, split: str, name: str) -> list[object]:
    if isinstance(data, Mapping):  # a DatasetDict
        if split not in data:
            raise InputError(
                f"split {split!r} is not in {name!r}; it has {', '.join(map(repr, data))}"
            )
        data = data[split]
    return list(data.with_format(None))  # Python values, whatever the format was


def _rows_of_folder(name: str, split: str) -> list[object]:
    import datasets

    try:
        data = datasets.load_from_disk(name)
    except Exception as error:  # a damaged folder can raise anything
        raise InputError(
            f"folder {name!r} cannot be read as one written by datasets' save_to_disk: "
            f"{first_line(error)}; pass such a folder, or a file ({', '.join(_FORMATS)})"
        ) from error
    return _rows_of_dataset(data, split, name)


def _rows_from_hub(name: str, split: str) -> list[object]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # errors of the hub, of file systems, and of file readers
        raise InputError(
            f"{truncated(shown(name))} is not an existing file or folder, and split {split!r} of a "
            f"data set of this name cannot be loaded from the hub: {first_line(error)}; check the "
            "name, or pass the data set that datasets.load_dataset returns. "
            f"{FACTS_RECORDS!r} names the records that ship with this package"
        ) from error
    return _rows_of_dataset(data, split, name)
