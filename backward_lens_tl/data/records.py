"""Records: prompts with targets to teach, and the rows that are not records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

ASKED = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "neighborhood_answer",
    "attribute_prompts",
    "generation_prompts",
)
"""Fields of a record that only evaluations use."""


@dataclass(frozen=True)
class Record:
    """A prompt and its target.

    Args:
        index: Row number in the data, from 0.
        id: The row's `case_id` or `id`, otherwise its row number as text. Ids need not be unique.
        prompt: The prompt.
        target: The answer to teach: text as it continues the prompt, or a token id.
        subject: What the prompt is about.
        subject_start: Index of the subject's first character in the prompt.
        answer: The original answer, as it continues the prompt.
        paraphrase_prompts: Paraphrases, which an edit should affect.
        neighborhood_prompts: Prompts about other subjects with the same answer, which an edit
            should not affect.
        neighborhood_answer: The answer of the neighborhood prompts; `None` if it is `answer`.
        attribute_prompts: Prompts about subjects whose answer is the target.
        generation_prompts: Beginnings of texts about the subject, for the model to continue.
    """

    index: int
    id: str
    prompt: str
    target: str | int
    subject: str | None = None
    subject_start: int | None = None
    answer: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_answer: str | None = None
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be read as a record.

    Args:
        index: Row number in the data, from 0.
        id: The row's `case_id` or `id`, otherwise its row number as text.
        problem: What is wrong and what is needed.
        row: The row as text, truncated.
    """

    index: int
    id: str
    problem: str
    row: str


@dataclass(frozen=True)
class Records(Sequence[Record | BadRecord]):
    """All rows of a data set in order, each a `Record` or a `BadRecord`.

    Args:
        name: Where the rows come from.
        rows: The rows.
        fingerprint: SHA-256 of the rows in hex. It depends on their contents only, not on the file
            format.

    Examples:
        >>> import backward_lens_tl as blt
        >>> rows = [{"prompt": "The capital of France is", "target": " Rome"}, {"target": " Rome"}]
        >>> records = blt.read_records(rows)
        >>> [type(record).__name__ for record in records]
        ['Record', 'BadRecord']
        >>> records[1].problem
        "'prompt' is missing or empty; the row has 'target'"
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


def fingerprint(rows: Iterable[Record | BadRecord]) -> str:
    """SHA-256 of the contents of rows.

    Args:
        rows: The rows.

    Returns:
        The digest in hex.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([type(row).__name__, *_contents(row)]).encode() + b"\n")
    return digest.hexdigest()


def _contents(row: Record | BadRecord) -> list[object]:
    if isinstance(row, BadRecord):
        # Not its problem, which may quote another library's message.
        return [row.index, row.id, row.row]
    asked = {name: value for name in ASKED if (value := getattr(row, name))}
    own = [row.index, row.id, row.prompt, row.target, row.subject, row.subject_start, row.answer]
    return [*own, asked] if asked else own
