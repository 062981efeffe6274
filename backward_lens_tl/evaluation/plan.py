"""Which records are evaluated, in tokens, and in which shards.

The plan depends only on the data, the model, the methods and the settings, so every process has the
same plan, and a resumed evaluation has the plan that it began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import EditRequest, target_ids
from backward_lens_tl.errors import EvaluationError, InputError, TargetError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.models import Host
from backward_lens_tl.runs.shards import Reject


@dataclass(frozen=True)
class Probe:
    """A prompt after which both answers are scored.

    Attributes:
        kind: `"rewrite"`, `"paraphrase"`, `"neighborhood"` or `"attribute"`.
        index: Its index among those of its kind.
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
class Shard:
    """Records that one method edits at once.

    Attributes:
        name: The name of the method.
        method: The method; `None` for the unedited model.
        block: The index of these records among those that are edited at once.
        items: The records.
        rejects: Rows that are left out; the first shard has them all.
    """

    name: str
    method: EditMethod | None
    block: int
    items: tuple[Item, ...]
    rejects: tuple[Reject, ...] = ()

    def __len__(self) -> int:
        return len(self.items)


def plan_shards(
    host: Host, records: Records, methods: Mapping[str, EditMethod], config: EvaluationConfig
) -> tuple[Shard, ...]:
    """Divide the work: the unedited model and each method, block by block.

    Args:
        host: The model.
        records: The data.
        methods: The methods by name.
        config: The settings.

    Returns:
        The shards, at least one.

    Raises:
        EvaluationError: If the data lack a row that is asked for, or have none.
    """
    planned = [_planned(host, row, config) for row in _chosen(records, config)]
    items = tuple(entry for entry in planned if isinstance(entry, Item))
    rejects = tuple(entry for entry in planned if isinstance(entry, Reject))
    size = config.edits_at_once
    blocks = [items[start : start + size] for start in range(0, len(items), size)]
    first, *others = blocks or [()]
    return (
        Shard(NONE, None, 0, first, rejects),
        *(Shard(NONE, None, block, some) for block, some in enumerate(others, 1)),
        *(
            Shard(name, method, block, some)
            for name, method in methods.items()
            for block, some in enumerate(blocks)
        ),
    )


def _chosen(records: Records, config: EvaluationConfig) -> Iterable[Record | BadRecord]:
    if not len(records):
        raise EvaluationError("the data have no rows; pass at least one record")
    if config.rows is None:
        return records.rows[: config.records]
    beyond = [row for row in config.rows if row >= len(records)]
    if beyond:
        raise EvaluationError(
            f"row {beyond[0]} does not exist; {records.name!r} has {len(records)} rows, counted "
            "from 0"
        )
    return [records.rows[row] for row in config.rows]


class _Refused(Exception):
    """The reason why a row is left out, and the problem."""


def _planned(host: Host, row: Record | BadRecord, config: EvaluationConfig) -> Item | Reject:
    if isinstance(row, BadRecord):
        return Reject(row.index, row.id, "row", row.problem)
    try:
        return _item(host, row, config)
    except _Refused as refusal:
        return Reject(row.index, row.id, *refusal.args)


def _item(host: Host, record: Record, config: EvaluationConfig) -> Item:
    true = record.answer
    neighbor = true if record.neighborhood_answer is None else record.neighborhood_answer
    attributes = record.attribute_prompts if config.attributes else ()
    asked = [
        ("rewrite", (record.prompt,), true),
        ("paraphrase", record.paraphrase_prompts, true),
        ("neighborhood", record.neighborhood_prompts[: config.neighbors], neighbor),
        ("attribute", attributes, true),
    ]
    probes = tuple(
        _probe(host, kind, index, _prompt(host, text, config), record.target, answer)
        for kind, texts, answer in asked
        for index, text in enumerate(texts)
    )
    wanted = record.generation_prompts if config.generation_length else ()
    generations = tuple(_prompt(host, text, config).ids for text in wanted)
    target = record.target
    text = target if isinstance(target, str) else host.vocabulary.text(target)
    return Item(record, text, probes, generations)


def _probe(
    host: Host, kind: str, index: int, prompt: Prompt, target: str | int, answer: str | None
) -> Probe:
    new = _answer_ids(prompt, target, host.n_ctx)
    true = None if answer is None else _answer_ids(prompt, answer, host.n_ctx)
    return Probe(kind, index, str(prompt.written), prompt.ids, new, true, answer)


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
    """Return the rows that methods may learn from, without anything that is evaluated.

    Neighbors of an evaluated record are often the subjects of others. So a row is left out if its
    prompt is evaluated or names an evaluated subject, and so is each of its paraphrases and
    neighbors.

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
