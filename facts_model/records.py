"""Records in CounterFact's schema, built from facts that the shipped model recalls."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from facts_model.evaluate import Prompt, Shipped, answered

SEED = 0
WANTED = 600
NEIGHBOURS = 10
FEWEST_OTHERS = 4
GENERATION_PROMPTS = 5

Record = dict[str, Any]
FactEntry = dict[str, Any]


def _fill(template: str, fact: FactEntry) -> str:
    """Fill the subject into a template."""
    return template.replace("{}", fact["subject"])


def recalled_facts(shipped: Shipped) -> list[FactEntry]:
    """Select the facts that are recalled in every trained phrasing, with and without BOS.

    Args:
        shipped: The shipped folder.

    Returns:
        Entries of ``shipped.facts``.
    """
    prompts, owners = [], []
    for index, fact in enumerate(shipped.facts):
        for template in shipped.relations[fact["relation"]]["trained"]:
            prompts.append(Prompt(_fill(template, fact), fact["answer"], fact["relation"]))
            owners.append(index)
    wrong: set[int] = set()
    for bos in (True, False):
        right = answered(shipped, prompts, bos=bos)
        wrong |= {owner for owner, ok in zip(owners, right, strict=True) if not ok}
    return [fact for index, fact in enumerate(shipped.facts) if index not in wrong]


class RecordBuilder:
    """Builds records from recalled facts, from a fixed seed."""

    def __init__(self, shipped: Shipped) -> None:
        """Group the recalled facts.

        Args:
            shipped: The shipped folder.
        """
        self._shipped = shipped
        self._rng = random.Random(SEED)
        self._facts = recalled_facts(shipped)
        self._by_answer: dict[tuple[str, str], list[FactEntry]] = defaultdict(list)
        self._by_subject: dict[str, list[FactEntry]] = defaultdict(list)
        for fact in self._facts:
            self._by_answer[fact["relation"], fact["answer"]].append(fact)
            self._by_subject[fact["subject"]].append(fact)

    def build(self) -> list[Record]:
        """Build all records.

        Facts with untrained paraphrases come first, then the others, both in random order. A fact
        needs enough other subjects with the same answer.

        Returns:
            At most ``WANTED`` records.
        """
        usable = [fact for fact in self._facts if len(self._others(fact)) >= FEWEST_OTHERS]
        self._rng.shuffle(usable)
        usable.sort(key=lambda fact: not fact["held_out"])
        return [self._record(case, fact) for case, fact in enumerate(usable[:WANTED])]

    def _others(self, fact: FactEntry) -> list[FactEntry]:
        """Facts of other subjects with the same relation and answer."""
        same = self._by_answer[fact["relation"], fact["answer"]]
        return [other for other in same if other["subject"] != fact["subject"]]

    def _record(self, case_id: int, fact: FactEntry) -> Record:
        """Build one record."""
        rng = self._rng
        relation = self._shipped.relations[fact["relation"]]
        answers = [a for r, a in self._by_answer if r == fact["relation"] and a != fact["answer"]]
        target_new = rng.choice(answers)
        starts = [template for template in relation["trained"] if template.startswith("{}")]
        prompt, other_prompt = rng.sample(starts, 2)
        first, second = (_fill(template, fact) for template in relation["half"])
        return {
            "case_id": case_id,
            "requested_rewrite": {
                "prompt": prompt,
                "relation_id": fact["relation"],
                "target_new": self._target(target_new),
                "target_true": self._target(fact["answer"]),
                "subject": fact["subject"],
            },
            # As in CounterFact, a paraphrase may follow an unrelated sentence.
            "paraphrase_prompts": [first, f"{rng.choice(self._shipped.ordinary)} {second}"],
            "neighborhood_prompts": self._prompts(self._others(fact), prompt, other_prompt),
            "attribute_prompts": self._prompts(
                self._by_answer[fact["relation"], target_new], prompt, other_prompt
            ),
            "generation_prompts": self._generation_prompts(fact["subject"]),
        }

    def _target(self, answer: str) -> dict[str, str]:
        """An answer and an identifier for it: its token id."""
        (token,) = self._shipped.tokenizer(f" {answer}")["input_ids"]
        return {"str": answer, "id": f"T{token}"}

    def _prompts(self, facts: list[FactEntry], *templates: str) -> list[str]:
        """Prompts about the subjects of facts, in more phrasings if there are too few subjects."""
        facts = self._rng.sample(facts, len(facts))
        return [_fill(template, fact) for template in templates for fact in facts][:NEIGHBOURS]

    def _generation_prompts(self, subject: str) -> list[str]:
        """Prompts of various relations about one subject."""
        templates = [
            template
            for fact in self._by_subject[subject]
            for template in self._shipped.relations[fact["relation"]]["trained"]
        ]
        chosen = self._rng.sample(templates, min(GENERATION_PROMPTS, len(templates)))
        return [template.replace("{}", subject) for template in chosen]


def build_records(shipped: Shipped) -> list[Record]:
    """Build the records that are shipped with the model.

    Args:
        shipped: The shipped folder.

    Returns:
        Records in CounterFact's schema.
    """
    return RecordBuilder(shipped).build()
