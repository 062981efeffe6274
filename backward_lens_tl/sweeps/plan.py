"""Which rows of the data are analysed, and in which shards.

The plan depends only on the data, the model and the settings, so every process has the same plan,
and a resumed sweep has the plan that it began with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.data.segments import Subject, prompt_segments, subject_at, subject_span
from backward_lens_tl.errors import InputError, TargetError
from backward_lens_tl.models import Host
from backward_lens_tl.models.vocabulary import Span
from backward_lens_tl.runs.shards import Reject
from backward_lens_tl.sweeps.config import SweepConfig


@dataclass(frozen=True)
class Item:
    """A prompt that is analysed.

    Attributes:
        record: Its row of the data.
        tokens: Its token ids.
        target: The id of the target token.
        subject: The span of its subject in the prompt's text, if it has one.
        answer: The id of the first token of the original answer, if there is one.
    """

    record: Record
    tokens: tuple[int, ...]
    target: int
    subject: Span | None
    answer: int | None

    @property
    def row(self) -> int:
        """Its row of the data."""
        return self.record.index


Shard = tuple[Item | Reject, ...]


def plan_shards(host: Host, records: Records, config: SweepConfig) -> tuple[Shard, ...]:
    """Divide the data into shards of prompts of similar length.

    Args:
        host: The model.
        records: The data.
        config: The settings.

    Returns:
        The shards, which hold every chosen row of the data once: first those that cannot be
        analysed, then the shortest prompts.
    """
    rows: Sequence[Record | BadRecord] = records.rows
    if config.prompts is not None and config.prompts < len(rows):
        rows = random.Random(config.seed).sample(rows, config.prompts)
    entries = [_planned(host, row, config) for row in rows]
    entries.sort(key=lambda entry: (_length(entry), entry.row))
    size = config.shard_size
    return tuple(tuple(entries[start : start + size]) for start in range(0, len(entries), size))


def _length(entry: Item | Reject) -> int:
    return len(entry.tokens) if isinstance(entry, Item) else 0


def _planned(host: Host, row: Record | BadRecord, config: SweepConfig) -> Item | Reject:
    def reject(reason: str, problem: object) -> Reject:
        return Reject(row.index, row.id, reason, str(problem))

    if isinstance(row, BadRecord):
        return reject("row", row.problem)
    try:
        [prompt] = tokenize_prompts(host, row.prompt, config.prepend_bos)
    except InputError as error:
        return reject("prompt", error)
    if len(prompt.ids) > host.n_ctx:
        return reject(
            "length",
            f"{len(prompt.ids)} tokens; the model's context holds {host.n_ctx}: shorten it",
        )
    try:
        target = prompt.token_id(row.target, config.multi_token)
    except TargetError as error:
        return reject("target", error)
    try:
        subject = _subject(prompt, row)
    except InputError as error:
        return reject("subject", error)
    return Item(row, prompt.ids, target, subject, _first_token(prompt, row.answer))


def _subject(prompt: Prompt, record: Record) -> Span | None:
    """The span of the subject in the prompt's text; an error if it has no token there."""
    if record.subject is None:
        return None
    wanted: Subject = record.subject
    text = prompt.text
    if record.subject_start is not None:  # a template says which of several occurrences it is
        text = prompt.placed_text
        wanted = subject_at(text, record.subject, record.subject_start) or record.subject
    prompt_segments(text, prompt.spans, wanted)
    return subject_span(text, wanted)


def _first_token(prompt: Prompt, answer: str | None) -> int | None:
    try:
        return None if answer is None else prompt.token_id(answer, "first")
    except TargetError:
        return None
