"""The columns that a row of a data set may have, and the record that they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index as as_index
from typing import Any

from backward_lens_tl._checks import (
    check_text,
    is_integer,
    is_token_id,
    listed,
    plain,
    shown,
    truncated,
)
from backward_lens_tl.data.records import BadRecord, Record
from backward_lens_tl.data.segments import subject_at
from backward_lens_tl.errors import InputError

FIELDS = ("prompt", "target", "subject", "subject_start", "answer", "id")
"""Columns of a plain row that `fields` can rename. The first two are required."""

_PROMPT_LISTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
)


@dataclass(frozen=True)
class BrokenRow:
    """A row that violates the file's format.

    Attributes:
        problem: What is wrong.
        text: The row as it is in the file.
    """

    problem: str
    text: str


def read_row(index: int, row: object, fields: Mapping[str, str]) -> Record | BadRecord:
    """Read one row of a data set.

    Args:
        index: Row number, from 0.
        row: The row: a mapping of columns to cells, a `BrokenRow`, or anything else, which is bad.
        fields: Columns to read instead of those in `FIELDS`; empty to detect the schema.

    Returns:
        The record, or why the row is not one.
    """
    name = str(index)
    if isinstance(row, BrokenRow):
        return BadRecord(index, name, row.problem, truncated(row.text))
    if not isinstance(row, Mapping):
        problem = f"the row is a {type(row).__name__}; a mapping of columns to cells is needed"
        return BadRecord(index, name, problem, truncated(shown(row)))
    cells = _Cells(row)
    try:
        name = _own_id(cells, fields) or name
        values = _read_plain(cells, fields) if fields else _reader(cells)(cells)
    except InputError as error:
        return BadRecord(index, name, str(error), truncated(shown(row)))
    return Record(index=index, id=name, **values)


@dataclass(frozen=True)
class _Cells:
    """The cells of a row, or of an object inside it at `path`."""

    row: Mapping[str, object]
    path: str = ""

    def __getitem__(self, column: str) -> Any:
        """A cell; `None` for an empty one, a Python integer for a whole float."""
        import pandas as pd

        value = plain(self.row.get(column))
        if isinstance(value, float) and value.is_integer():
            return int(value)  # pandas turns integers next to missing cells into floats
        # pandas has three values for missing cells.
        is_missing = pd.api.types.is_scalar(value) and pd.isna(value)
        return None if is_missing or value == "" else value

    def text(self, column: str) -> str | None:
        value = self[column]
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(column, "a text is needed")
        check_text(self._label(column), value)
        return value

    def required_text(self, column: str) -> str:
        text = self.text(column)
        if text is None:
            raise self._missing(column)
        return text

    def object(self, column: str) -> _Cells:
        value = self[column]
        if value is None:
            raise self._missing(column)
        if not isinstance(value, Mapping):
            raise self.wrong(column, "an object is needed")
        return _Cells(value, f"{self.path}{column}.")

    def prompts(self, column: str) -> tuple[str, ...]:
        value = self[column]
        prompts = [] if value is None else listed(value)
        if isinstance(value, Mapping) or not all(
            isinstance(prompt, str) and prompt for prompt in prompts
        ):
            raise self.wrong(column, "a list of non-empty texts is needed")
        for prompt in prompts:
            check_text(self._label(column), prompt)
        return tuple(prompts)

    def wrong(self, column: str, needed: str) -> InputError:
        value = self[column]
        given = f"{truncated(shown(value))}, a {type(value).__name__}"
        return InputError(f"{self._label(column)} is {given}; {needed}")

    def _missing(self, column: str) -> InputError:
        filled = ", ".join(shown(key) for key in self.row if self[key] is not None) or "nothing"
        return InputError(f"{self._label(column)} is missing or empty; the row has {filled}")

    def _label(self, column: str) -> str:
        return repr(self.path + column)


def _own_id(cells: _Cells, fields: Mapping[str, str]) -> str | None:
    for column in [fields["id"]] if "id" in fields else ["case_id", "id"]:
        value = cells[column]
        if value is not None:
            return shown(value) if is_integer(value) else cells.text(column)
    return None


def _reader(cells: _Cells) -> Callable[[_Cells], dict[str, Any]]:
    # A table with rows of several schemas has the columns of all of them: filled ones come first.
    filled = [column for column in _READERS if cells[column] is not None]
    present = [column for column in _READERS if column in cells.row]
    return _READERS[next(iter(filled + present), "target")]


def _read_plain(cells: _Cells, fields: Mapping[str, str] = {}) -> dict[str, Any]:
    column = {field: fields.get(field, field) for field in FIELDS}
    prompt, subject = cells.required_text(column["prompt"]), cells.text(column["subject"])
    return {
        "prompt": prompt,
        "target": _target(cells, column["target"]),
        "subject": subject,
        "subject_start": _subject_start(cells, column["subject_start"], prompt, subject),
        "answer": cells.text(column["answer"]),
        **{name: cells.prompts(name) for name in _PROMPT_LISTS},
    }


def _target(cells: _Cells, column: str) -> str | int:
    value = cells[column]
    if value is None or isinstance(value, str):
        return cells.required_text(column)
    if not is_token_id(value):
        raise cells.wrong(column, "a text or a non-negative token id is needed")
    return as_index(value)


def _subject_start(cells: _Cells, column: str, prompt: str, subject: str | None) -> int | None:
    value = cells[column]
    if value is None:
        return None
    given = f"{column!r} is {truncated(shown(value))}"
    if subject is None:
        raise InputError(f"{given}, but the row has no subject")
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):  # CSV has only texts
        value = int(value)
    start = as_index(value) if is_integer(value) else -1
    if subject_at(prompt, subject, start) is None:
        raise InputError(
            f"{given}, where the subject {subject!r} does not begin in the prompt {prompt!r}; it "
            "counts characters from 0 and may be omitted"
        )
    return start


def _read_counterfact(cells: _Cells) -> dict[str, Any]:
    """CounterFact as ROME published it."""
    rewrite = cells.object("requested_rewrite")
    template, subject = rewrite.required_text("prompt"), rewrite.required_text("subject")
    if template.count("{}") != 1:
        raise InputError(
            f"the template {template!r} has {template.count('{}')} places for the subject; exactly "
            "one '{}' is needed"
        )
    return {
        "prompt": template.replace("{}", subject),
        "target": _with_space(rewrite.object("target_new").required_text("str")),
        "subject": subject,
        # The subject may occur more than once; only the template says which one is meant.
        "subject_start": template.index("{}"),
        "answer": _with_space(rewrite.object("target_true").required_text("str")),
        **{name: cells.prompts(name) for name in _PROMPT_LISTS},
    }


def _read_flattened(cells: _Cells) -> dict[str, Any]:
    """CounterFact with one column per field, as libraries for model editing distribute it."""
    return {
        "prompt": cells.required_text("prompt"),
        "target": _with_space(cells.required_text("target_new")),
        "subject": cells.text("subject"),
        "answer": _with_space(cells.text("ground_truth")),
        "paraphrase_prompts": cells.prompts("rephrase_prompt"),
        "neighborhood_prompts": cells.prompts("locality_prompt"),
        "neighborhood_answer": _with_space(cells.text("locality_ground_truth")),
    }


def _read_tracing(cells: _Cells) -> dict[str, Any]:
    """CounterFact for causal tracing, `NeelNanda/counterfact-tracing` on the hub."""
    prompt, relation = cells.required_text("prompt"), cells.text("relation") or ""
    # Subjects have a leading space unless they begin the prompt.
    subject = (cells.text("subject") or "").strip() or None
    is_template = relation.count("{}") == 1 and relation.replace("{}", subject or "") == prompt
    return {
        "prompt": prompt,
        "target": _with_space(cells.required_text("target_false")),
        "subject": subject,
        "subject_start": relation.index("{}") if subject and is_template else None,
        "answer": _with_space(cells.text("target_true")),
    }


_READERS: dict[str, Callable[[_Cells], dict[str, Any]]] = {
    "requested_rewrite": _read_counterfact,
    "target": _read_plain,
    "target_new": _read_flattened,
    "target_false": _read_tracing,
}
"""Readers by the column that identifies the schema, in order of precedence."""


def _with_space(text: str | None) -> str | None:
    """An answer as it continues a prompt that does not end in a space."""
    return text if text is None or text[0].isspace() else f" {text}"
