"""Select the records to evaluate, tokenize them, and divide them into shards.

The plan depends only on the data, the model, the methods and the settings, so every process has the
same plan, and a resumed evaluation has the plan that it began with.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from backward_lens_tl.capture.prompts import Prompt
from backward_lens_tl.data.records import BadRecord, Record, Records
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import EditRequest, target_ids
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.models import Host
from backward_lens_tl.runs.rejects import (
    Reject,
    check_length,
    fitting_prompt,
    item_or_reject,
    refusing,
)


@dataclass(frozen=True)
class ScoredPrompt:
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
    probes: tuple[ScoredPrompt, ...]
    generations: tuple[tuple[int, ...], ...]

    @property
    def request(self) -> EditRequest:
        """The request for the edit."""
        return EditRequest.of(self.record)


@dataclass(frozen=True)
class Shard:
    """Records that one method edits together.

    Attributes:
        name: The name of the method.
        method: The method; `None` for the unedited model.
        block: The index of these records among those that are edited together.
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
        EvaluationError: If the data lack a requested row, or have no rows.
    """
    make = partial(_item, host, config)
    planned = [item_or_reject(row, make) for row in _chosen(records, config)]
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
    order = list(range(len(records)))
    if config.shuffle is not None:
        random.Random(config.shuffle).shuffle(order)
    places = range(len(order))[: config.records] if config.rows is None else config.rows
    beyond = [place for place in places if place >= len(order)]
    if beyond:
        raise EvaluationError(
            f"row {beyond[0]} does not exist; {records.name!r} has {len(records)} rows, counted "
            "from 0"
        )
    return [records.rows[order[place]] for place in places]


def _item(host: Host, config: EvaluationConfig, record: Record) -> Item:
    true, target = record.answer, record.target
    neighbor = true if record.neighborhood_answer is None else record.neighborhood_answer
    asked = [
        ("rewrite", (record.prompt,), true),
        ("paraphrase", record.paraphrase_prompts, true),
        ("neighborhood", record.neighborhood_prompts[: config.neighbors], neighbor),
        ("attribute", record.attribute_prompts if config.attributes else (), true),
    ]
    probes = []
    for kind, texts, answer in asked:
        for index, text in enumerate(texts):
            prompt = fitting_prompt(host, text, config.prepend_bos)
            new = _answer_ids(host, prompt, target)
            old = None if answer is None else _answer_ids(host, prompt, answer)
            probes.append(
                ScoredPrompt(kind, index, str(prompt.written), prompt.ids, new, old, answer)
            )
    wanted = record.generation_prompts if config.generation_length else ()
    generations = [fitting_prompt(host, text, config.prepend_bos).ids for text in wanted]
    text = target if isinstance(target, str) else host.vocabulary.text(target)
    return Item(record, text, tuple(probes), tuple(generations))


def _answer_ids(host: Host, prompt: Prompt, answer: str | int) -> tuple[int, ...]:
    """The answer's tokens after a prompt."""
    with refusing("target"):
        ids = tuple(target_ids(prompt, answer))
    check_length(host, f"{prompt.written}{answer}", len(prompt.ids) + len(ids) - 1)
    return ids


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
