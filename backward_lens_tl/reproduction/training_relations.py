"""Which facts are of one relation, such as the mother tongue of persons.

Data have no names of relations, but each relation has its own phrasings. Records that share one are
of the same relation, and so are those that are connected through other records. A phrasing that
fits two relations, such as where something is located, joins them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from backward_lens_tl.data.records import Record

_END_OF_SENTENCE = re.compile(r"[.!?]\s+")


def relations(records: Sequence[Record]) -> list[str]:
    """Name the relation of each record.

    Args:
        records: The records.

    Returns:
        One of the relation's phrasings for each record, with `{}` for the subject. Records without
        a subject all have the same empty name.
    """
    phrasings = [tuple(_phrasings(record)) for record in records]
    parents: dict[str, str] = {}
    for own in phrasings:
        for other in own:
            parents[_root(parents, other)] = _root(parents, own[0])
    return [_root(parents, own[0]) if own else "" for own in phrasings]


def _root(parents: dict[str, str], phrasing: str) -> str:
    while (parent := parents.setdefault(phrasing, phrasing)) != phrasing:
        phrasing = parent
    return phrasing


def _phrasings(record: Record) -> Iterator[str]:
    """The prompt and its paraphrases, without the sentences before the one with the subject."""
    for text in (record.prompt, *record.paraphrase_prompts):
        if record.subject and record.subject in text:
            at = text.rindex(record.subject)
            ends = [found.end() for found in _END_OF_SENTENCE.finditer(text, 0, at)]
            yield text[max(ends, default=0) :].replace(record.subject, "{}")
