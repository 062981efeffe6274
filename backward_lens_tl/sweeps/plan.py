"""Which rows of the data are analysed, and in which parts they are written.

The plan follows from the data, the model and the settings alone, so that every process has the
same one and a sweep that goes on has the one that it began with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain

from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.data.segments import Subject, prompt_segments, subject_at, subject_span
from backward_lens_tl.errors import InputError, TargetError
from backward_lens_tl.files.shards import Reject
from backward_lens_tl.models import Host
from backward_lens_tl.models.vocabulary import Span
from backward_lens_tl.sweeps.config import SweepConfig


@dataclass(frozen=True)
class Item:
    """A prompt that is analysed.

    Attributes:
        record: Its row of the data.
        tokens: Ids of its tokens.
        target: Id of the target token.
        subject: Where in the prompt's text its subject stands, if it has one.
        answer: Id of the first token of the original answer, if there is one.
    """

    record: Record
    tokens: tuple[int, ...]
    target: int
    subject: Span | None
    answer: int | None

    @property
    def index(self) -> int:
        """Its row of the data."""
        return self.record.index

    @property
    def n_tokens(self) -> int:
        """Its length."""
        return len(self.tokens)


Part = tuple[Item | Reject, ...]


def plan_parts(host: Host, records: Records, config: SweepConfig) -> tuple[Part, ...]:
    """Divide the data into parts of prompts of similar length.

    Args:
        host: The model.
        records: The data.
        config: The settings.

    Returns:
        The parts; every chosen row of the data is in one of them. Those that cannot be analysed
        come first, and then the shortest prompts.
    """
    chosen = [_planned(host, row, config) for row in _sample(records.rows, config)]
    chosen.sort(key=lambda entry: (_length(entry), entry.index))
    size = config.part_size
    return tuple(tuple(chosen[start : start + size]) for start in range(0, len(chosen), size))


def plan_digest(parts: Sequence[Part]) -> str:
    """A checksum of what is analysed, in tokens: of the tokenizer and whether it adds a BOS, too.

    Args:
        parts: The plan.

    Returns:
        SHA-256, in hexadecimal.
    """
    digest = sha256()
    for entry in chain.from_iterable(parts):
        said = (
            (entry.tokens, entry.target, entry.subject, entry.answer)
            if isinstance(entry, Item)
            else entry.reason
        )
        digest.update(f"{entry.index} {said}\n".encode())
    return digest.hexdigest()


def _length(entry: Item | Reject) -> int:
    return entry.n_tokens if isinstance(entry, Item) else 0


def _sample(
    rows: Sequence[Record | BadRecord], config: SweepConfig
) -> Sequence[Record | BadRecord]:
    if config.prompts is None or config.prompts >= len(rows):
        return rows
    return random.Random(config.seed).sample(rows, config.prompts)


def _planned(host: Host, row: Record | BadRecord, config: SweepConfig) -> Item | Reject:
    if isinstance(row, BadRecord):
        return Reject(row.index, row.id, "row", row.problem)

    def reject(reason: str, problem: object) -> Reject:
        return Reject(row.index, row.id, reason, str(problem))

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
    """Where in the prompt's text its subject stands; an error if it has no token there."""
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
