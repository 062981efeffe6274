"""Select the rows of the data to analyse, and divide them into shards.

The plan depends only on the data, the model and the settings, so every process has the same plan,
and a resumed sweep has the plan that it began with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from backward_lens_tl.capture.likely_mistakes import warn_of_missing_space
from backward_lens_tl.capture.prompts import Prompt
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.data.segments import Subject, prompt_segments, subject_at, subject_span
from backward_lens_tl.errors import TargetError
from backward_lens_tl.models import Host
from backward_lens_tl.models.vocabulary import Span
from backward_lens_tl.runs.rejects import Reject, fitting_prompt, item_or_reject, refusing
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
        prompt: Its text and tokens; not in its `repr`, by which plans are compared.
    """

    record: Record
    tokens: tuple[int, ...]
    target: int
    subject: Span | None
    answer: int | None
    prompt: Prompt = field(repr=False)

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
    entries = [item_or_reject(row, partial(_item, host, config)) for row in rows]
    items = [entry for entry in entries if isinstance(entry, Item)]
    warn_of_missing_space(
        [item.prompt for item in items],
        [item.record.target for item in items],
        rows=[item.row for item in items],
    )
    entries.sort(key=lambda entry: (_length(entry), entry.row))
    size = config.shard_size
    return tuple(tuple(entries[start : start + size]) for start in range(0, len(entries), size))


def _length(entry: Item | Reject) -> int:
    return len(entry.tokens) if isinstance(entry, Item) else 0


def _item(host: Host, config: SweepConfig, record: Record) -> Item:
    prompt = fitting_prompt(host, record.prompt, config.prepend_bos)
    with refusing("target"):
        target = prompt.token_id(record.target, config.multi_token)
    with refusing("subject"):
        subject = _subject(prompt, record)
    answer = _first_token(prompt, record.answer)
    return Item(record, prompt.ids, target, subject, answer, prompt)


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
