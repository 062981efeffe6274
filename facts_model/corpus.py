"""Training text from the facts and phrasings in ``data/``.

A *fact* is a (relation, subject, answer) triple; every (relation, subject) pair has one answer,
and every answer is one word. A *phrasing* is a prompt with one ``{}`` for the subject that ends
right before the answer. Each relation has trained phrasings and two others that are trained with
half of its subjects only. With the other half, they measure whether a fact was learned, rather than
a string.

The text is a stream of documents. Two kinds of text make the model recall facts as large language
models do, at the last token of the subject: biographies, in which a name is followed by all its
attributes in random order, and phrasings in which the subject comes before the relation.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DATA = Path(__file__).parent / "data"
MISSING = "-"
SPLIT_SEED = 0
HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class Relation:
    """An attribute and its phrasings.

    Attributes:
        name: Identifier, also the column name in the tables of facts.
        predicates: Verb phrases that follow the subject (or its pronoun) and precede the answer.
        trained: Phrasings trained with every subject; the predicates are among them.
        half: Phrasings trained with half of the subjects only.
        unit: Word that always follows the answer, such as "century"; "" for none.
    """

    name: str
    predicates: tuple[str, ...]
    trained: tuple[str, ...]
    half: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Fact:
    """One true statement.

    Attributes:
        relation: Name of the relation.
        subject: What the statement is about.
        answer: One word, without its leading space.
        pronoun: "he", "she" or "it", for sentences that do not repeat the subject.
        held_out: Whether the ``half`` phrasings are held out for this subject.
    """

    relation: str
    subject: str
    answer: str
    pronoun: str
    held_out: bool


@dataclass(frozen=True)
class Piece:
    """A piece of text that is tokenized separately.

    Attributes:
        text: The text, with its leading space in the sentence.
        role: "text", "subject" or "answer".
    """

    text: str
    role: str = "text"


Sentence = list[Piece]


def load_relations() -> dict[str, Relation]:
    """Read the phrasings.

    Returns:
        The relations by name, in the order of the file.
    """
    raw = json.loads((DATA / "phrasings.json").read_text(encoding="utf-8"))
    return {
        name: Relation(
            name=name,
            predicates=tuple(entry["predicates"]),
            trained=tuple("{} " + p for p in entry["predicates"]) + tuple(entry["phrasings"]),
            half=tuple(entry["half"]),
            unit=entry.get("unit", ""),
        )
        for name, entry in raw.items()
    }


def load_facts() -> list[Fact]:
    """Read all tables of facts and draw the split of the subjects.

    The split depends only on the data, so every training seed tests the same subjects.

    Returns:
        The facts, by table and then by row.
    """
    rows: list[tuple[str, str, str, str]] = []
    for path in sorted(DATA.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                subject, pronoun = row.pop("subject"), row.pop("pronoun")
                rows += [(r, subject, a, pronoun) for r, a in row.items() if a != MISSING]
    subjects: dict[str, list[str]] = defaultdict(list)
    for relation, subject, _, _ in rows:
        subjects[relation].append(subject)
    rng = random.Random(SPLIT_SEED)
    held_out = {
        relation: set(rng.sample(names, len(names) // 2)) for relation, names in subjects.items()
    }
    return [Fact(r, s, a, p, s in held_out[r]) for r, s, a, p in rows]


def phrasings_in_training(fact: Fact, relation: Relation) -> tuple[str, ...]:
    """List the phrasings that a fact is trained with.

    Args:
        fact: The fact.
        relation: Its relation.

    Returns:
        Templates with one "{}".
    """
    return relation.trained if fact.held_out else relation.trained + relation.half


def _spaced(text: str) -> str:
    """Prepend a space to non-empty text."""
    return f" {text}" if text else ""


def fact_prompt(subject: str, template: str, lead: str = "") -> Sentence:
    """State a fact up to its answer.

    Args:
        subject: Subject for the "{}".
        template: Phrasing with one "{}".
        lead: Words before the statement, "" for none.

    Returns:
        The pieces of the prompt; the first has a leading space.
    """
    before, after = (part.strip() for part in template.split("{}"))
    if lead and before:
        before = before[0].lower() + before[1:]
    pieces = [
        Piece(_spaced(f"{lead} {before}".strip())),
        Piece(_spaced(subject), "subject"),
        # "As a child, {} lived in" has a space here, "To see {}, travel to" has none.
        Piece(after if after.startswith(",") else _spaced(after)),
    ]
    return [piece for piece in pieces if piece.text]


class OrdinarySentences:
    """Everyday sentences, hand-written or from templates, some of them held out."""

    def __init__(self) -> None:
        """Read the sentences and templates."""
        raw = json.loads((DATA / "templates.json").read_text(encoding="utf-8"))
        self._templates: list[str] = raw["templates"]
        self._slots: dict[str, list[str]] = raw["slots"]
        self.leads: list[str] = [lead.strip() for lead in raw["fact_leads"]]
        self.tails: list[str] = raw["fact_tails"]
        everyday = (DATA / "everyday.txt").read_text(encoding="utf-8").splitlines()
        self._everyday = [line for line in everyday if line]

    def draw(self, rng: random.Random, *, held_out: bool = False) -> str:
        """Draw one sentence.

        Args:
            rng: Source of randomness.
            held_out: Whether to draw a held-out sentence.

        Returns:
            The sentence, without a leading space.
        """
        while True:
            if rng.random() < 0.25:
                text = rng.choice(self._everyday)
            else:
                filled = {slot: rng.choice(words) for slot, words in self._slots.items()}
                text = rng.choice(self._templates).format(**filled)
                text = text[0].upper() + text[1:]
            # A hash of the text, so the held-out sentences are the same for every seed.
            digest = hashlib.sha256(text.encode()).digest()
            if (digest[0] % HELD_OUT_SHARE == 0) == held_out:
                return text

    def held_out_sample(self, count: int) -> list[str]:
        """Draw distinct held-out sentences, the same on every call.

        Args:
            count: Number of sentences.

        Returns:
            The sentences.
        """
        rng = random.Random(SPLIT_SEED)
        sentences: dict[str, None] = {}
        while len(sentences) < count:
            sentences[self.draw(rng, held_out=True)] = None
        return list(sentences)


class Corpus:
    """The facts, their phrasings and the sampler of training text."""

    def __init__(self) -> None:
        """Read everything in ``data/``."""
        self.relations = load_relations()
        self.facts = load_facts()
        self.ordinary = OrdinarySentences()

    @cached_property
    def by_subject(self) -> dict[str, list[Fact]]:
        """All facts about each subject."""
        groups: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            groups[fact.subject].append(fact)
        return dict(groups)

    @cached_property
    def subjects(self) -> list[str]:
        """The distinct subjects, in the order of the tables."""
        return list(self.by_subject)

    @cached_property
    def answers(self) -> list[str]:
        """The distinct answers, sorted."""
        return sorted({fact.answer for fact in self.facts})

    def documents(self, rng: random.Random) -> Iterator[list[Piece]]:
        """Draw documents endlessly.

        Args:
            rng: Source of randomness.

        Yields:
            One document: pieces of text, the first without a leading space.
        """
        while True:
            sentences = self._biography(rng) if rng.random() < 0.4 else self._mixture(rng)
            first, *rest = [piece for sentence in sentences for piece in sentence]
            yield [Piece(first.text.removeprefix(" "), first.role), *rest]

    def _mixture(self, rng: random.Random) -> list[Sentence]:
        """Facts about unrelated subjects between ordinary sentences."""
        sentences: list[Sentence] = []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 6))):
            if rng.random() < 0.2:
                sentences.append([Piece(_spaced(self.ordinary.draw(rng)))])
            else:
                sentences.append(self._single(rng, rng.choice(self.facts)))
        return sentences

    def _biography(self, rng: random.Random) -> list[Sentence]:
        """All facts about one subject in random order; the name once or in every sentence."""
        facts = list(self.by_subject[rng.choice(self.subjects)])
        rng.shuffle(facts)
        sentences: list[Sentence] = []
        repeat_name = rng.random() < 0.3
        while facts:
            count = rng.choice((1, 1, 2, 3))
            group, facts = facts[:count], facts[count:]
            named = not sentences or repeat_name
            if named and len(group) == 1:
                sentences.append(self._single(rng, group[0]))
            else:
                sentences.append(self._joined(rng, group, named=named))
        return sentences

    def _joined(self, rng: random.Random, facts: list[Fact], *, named: bool) -> Sentence:
        """Several facts about one subject, as in "X plays for A and was born in B."."""
        if named:
            pieces = [Piece(_spaced(facts[0].subject), "subject")]
        else:
            pieces = [Piece(_spaced(facts[0].pronoun.capitalize()))]
        for index, fact in enumerate(facts):
            if index:
                pieces.append(Piece(" and" if index == len(facts) - 1 else ","))
            relation = self.relations[fact.relation]
            pieces.append(Piece(_spaced(rng.choice(relation.predicates))))
            pieces += self._answer(fact)
        return [*pieces, Piece(".")]

    def _single(self, rng: random.Random, fact: Fact) -> Sentence:
        """One fact in one of its trained phrasings."""
        template = rng.choice(phrasings_in_training(fact, self.relations[fact.relation]))
        lead = rng.choice(self.ordinary.leads) if rng.random() < 0.1 else ""
        tail = Piece(rng.choice(self.ordinary.tails))
        return [*fact_prompt(fact.subject, template, lead), *self._answer(fact), tail]

    def _answer(self, fact: Fact) -> Sentence:
        """The answer and its unit, if it has one."""
        unit = self.relations[fact.relation].unit
        answer = [Piece(_spaced(fact.answer), "answer")]
        return [*answer, Piece(_spaced(unit))] if unit else answer
