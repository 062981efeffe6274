"""Which records are evaluated, in tokens, and in which parts.

The plan follows from the data, the model, the methods and the settings alone, so that every process
has the same one and an evaluation that goes on has the one that it began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import EditRequest, target_ids
from backward_lens_tl.errors import EvaluationError, InputError, TargetError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.files.shards import Reject
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class Probe:
    """A prompt behind which both answers are scored.

    Attributes:
        kind: `"rewrite"`, `"paraphrase"`, `"neighborhood"` or `"attribute"`.
        index: Which of its kind, from 0.
        prompt: Its text.
        ids: Ids of its tokens.
        new: Ids of the new answer.
        true: Ids of the original answer; `None` without one.
        true_text: The original answer.
    """

    kind: str
    index: int
    prompt: str
    ids: tuple[int, ...]
    new: tuple[int, ...]
    true: tuple[int, ...] | None
    true_text: str | None


@dataclass(frozen=True)
class Item:
    """A record that is evaluated.

    Attributes:
        record: Its row of the data.
        new_text: Its new answer.
        probes: What is scored; the rewrite is the first.
        generations: Ids of its generation prompts.
    """

    record: Record
    new_text: str
    probes: tuple[Probe, ...]
    generations: tuple[tuple[int, ...], ...]

    @property
    def request(self) -> EditRequest:
        """What the model is to be taught."""
        return EditRequest.of(self.record)


@dataclass(frozen=True)
class Part:
    """Records that are edited at once, by one method.

    Attributes:
        name: What the method is called.
        method: The method; `None` for the unedited model.
        block: Which records, from 0.
        items: The records.
        rejects: Rows that are left out; the first part has them all.
    """

    name: str
    method: EditMethod | None
    block: int
    items: tuple[Item, ...]
    rejects: tuple[Reject, ...] = ()


def plan_parts(
    host: Host, records: Records, methods: Mapping[str, EditMethod], config: EvaluationConfig
) -> tuple[Part, ...]:
    """Divide the work: for the unedited model and each method, block by block.

    Args:
        host: The model.
        records: The data.
        methods: The methods by name.
        config: The settings.

    Returns:
        The parts, at least one.

    Raises:
        EvaluationError: If a row is asked for that the data do not have, or there is none.
    """
    planned = [_planned(host, row, config) for row in _chosen(records, config)]
    items = tuple(entry for entry in planned if isinstance(entry, Item))
    rejects = tuple(entry for entry in planned if isinstance(entry, Reject))
    size = config.edits_at_once
    blocks = [items[start : start + size] for start in range(0, len(items), size)]
    parts = [
        Part(name, method, block, some)
        for name, method in ((NONE, None), *methods.items())
        for block, some in enumerate(blocks)
    ]
    first = parts[0] if parts else Part(NONE, None, 0, ())
    return (Part(first.name, None, 0, first.items, rejects), *parts[1:])


def plan_digest(parts: Sequence[Part]) -> str:
    """A checksum of what is evaluated, in tokens: of the tokenizer and whether it adds a BOS, too.

    Args:
        parts: The plan.

    Returns:
        SHA-256, in hexadecimal.
    """
    digest = sha256()
    for part in parts:
        if part.name == NONE:
            for item in part.items:
                ids = [(probe.ids, probe.new, probe.true) for probe in item.probes]
                digest.update(f"{item.record.index} {ids} {item.generations}\n".encode())
            for reject in part.rejects:
                digest.update(f"{reject.index} {reject.reason}\n".encode())
    return digest.hexdigest()


def _chosen(records: Records, config: EvaluationConfig) -> Iterable[Record | BadRecord]:
    if not len(records):
        raise EvaluationError("the data have no rows; pass at least one record")
    if config.rows is None:
        return records.rows[: config.records]
    beyond = [row for row in config.rows if row >= len(records)]
    if beyond:
        raise EvaluationError(
            f"row {beyond[0]} is asked for, and {records.name!r} has {len(records)} rows; they "
            "count from 0"
        )
    return [records.rows[row] for row in config.rows]


class _Refused(Exception):
    """Why a row is left out: a word and a sentence."""


def _planned(host: Host, row: Record | BadRecord, config: EvaluationConfig) -> Item | Reject:
    if isinstance(row, BadRecord):
        return Reject(row.index, row.id, "row", row.problem)
    try:
        return _item(host, row, config)
    except _Refused as refusal:
        reason, problem = refusal.args
        return Reject(row.index, row.id, reason, problem)


def _item(host: Host, record: Record, config: EvaluationConfig) -> Item:
    true = record.answer
    neighbor = true if record.neighborhood_answer is None else record.neighborhood_answer
    asked = [("rewrite", (record.prompt,), true), ("paraphrase", record.paraphrase_prompts, true)]
    asked.append(("neighborhood", record.neighborhood_prompts[: config.neighbors], neighbor))
    if config.attributes:
        asked.append(("attribute", record.attribute_prompts, true))
    probes = tuple(
        _probe(kind, index, _prompt(host, prompt, config), record.target, answer, host.n_ctx)
        for kind, prompts, answer in asked
        for index, prompt in enumerate(prompts)
    )
    wanted = record.generation_prompts if config.generation_length else ()
    generations = tuple(_prompt(host, prompt, config).ids for prompt in wanted)
    text = record.target if isinstance(record.target, str) else host.vocabulary.text(record.target)
    return Item(record, text, probes, generations)


def _probe(
    kind: str, index: int, prompt: Prompt, target: str | int, answer: str | None, n_ctx: int
) -> Probe:
    text = str(prompt.written)
    return Probe(
        kind,
        index,
        text,
        prompt.ids,
        new=_answer_ids(prompt, target, n_ctx),
        true=None if answer is None else _answer_ids(prompt, answer, n_ctx),
        true_text=answer,
    )


def _prompt(host: Host, text: str, config: EvaluationConfig) -> Prompt:
    try:
        [prompt] = tokenize_prompts(host, text, config.prepend_bos)
    except InputError as error:
        raise _Refused("prompt", str(error)) from error
    if len(prompt.ids) > host.n_ctx:
        raise _too_long(text, len(prompt.ids), host.n_ctx)
    return prompt


def _answer_ids(prompt: Prompt, answer: str | int, n_ctx: int) -> tuple[int, ...]:
    """The answer's tokens after a prompt."""
    try:
        ids = tuple(target_ids(prompt, answer))
    except TargetError as error:
        raise _Refused("target", str(error)) from error
    n_tokens = len(prompt.ids) + len(ids) - 1
    if n_tokens > n_ctx:
        raise _too_long(f"{prompt.written}{answer}", n_tokens, n_ctx)
    return ids


def _too_long(text: str, n_tokens: int, n_ctx: int) -> _Refused:
    return _Refused("length", f"{text!r} has {n_tokens} tokens; the model's context holds {n_ctx}")


def unused_records(records: Records, config: EvaluationConfig) -> tuple[Record, ...]:
    """Rows of the data that methods may learn from: nothing of them is evaluated.

    Neighbors of an evaluated record are often the subjects of others, so a row is left out if its
    subject is evaluated, and its paraphrases and neighbors are, one by one, where they are prompts
    of the evaluation or hold one of its subjects.

    Args:
        records: The data.
        config: The settings.

    Returns:
        The records, in the order of the data.
    """
    chosen = list(_chosen(records, config))
    rows = {row.index for row in chosen}
    evaluated = [row for row in chosen if isinstance(row, Record)]
    subjects = {row.subject for row in evaluated if row.subject is not None}
    asked = {
        prompt
        for row in evaluated
        for prompt in (row.prompt, *row.paraphrase_prompts, *row.neighborhood_prompts)
    }

    def unused(prompts: Iterable[str]) -> tuple[str, ...]:
        return tuple(
            prompt
            for prompt in prompts
            if prompt not in asked and not any(subject in prompt for subject in subjects)
        )

    return tuple(
        replace(
            row,
            paraphrase_prompts=unused(row.paraphrase_prompts),
            neighborhood_prompts=unused(row.neighborhood_prompts),
            attribute_prompts=unused(row.attribute_prompts),
            generation_prompts=unused(row.generation_prompts),
        )
        for row in records.rows
        if isinstance(row, Record) and row.index not in rows and unused([row.prompt])
    )
