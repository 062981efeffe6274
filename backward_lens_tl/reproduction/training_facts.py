"""The facts that a model is trained on: their prompts, their answers, and the answers shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host

_TRIES = 1000


@dataclass(frozen=True)
class TaughtFacts:
    """Prompts, each with the answer that it is trained to have.

    Attributes:
        prompts: Token ids of each prompt.
        answers: Token ids of each answer.
        relations: The relation of each fact, such as the mother tongue of persons.
        before: The first token of the answer that each fact had before; `None` if not known.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    relations: tuple[str, ...]
    before: tuple[int | None, ...]

    @classmethod
    def of(
        cls,
        requests: Sequence[TokenizedRequest],
        relations: Sequence[str],
        before: Sequence[int | None],
    ) -> TaughtFacts:
        """The facts of tokenized requests."""
        return cls(
            tuple(request.prompt for request in requests),
            tuple(request.target for request in requests),
            tuple(relations),
            tuple(before),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The first token of each answer, which stands for it where vectors are read."""
        return tuple(answer[0] for answer in self.answers)

    def first(self, n: int) -> TaughtFacts:
        """The first facts that can be shuffled within their relation.

        Args:
            n: How many, at most.

        Returns:
            Facts of which each has another one of its relation, with an answer that begins with
            another token.
        """
        chosen: list[int] = []
        waiting: dict[str, list[int]] = {}
        tokens: dict[str, set[int]] = {}
        for fact, (relation, token) in enumerate(
            zip(self.relations, self.first_tokens, strict=True)
        ):
            own = waiting.setdefault(relation, [])
            own.append(fact)
            tokens.setdefault(relation, set()).add(token)
            if len(tokens[relation]) > 1 and len(chosen) + len(own) <= n:
                chosen += waiting.pop(relation)
        return self._those(sorted(chosen))

    def _those(self, facts: Sequence[int]) -> TaughtFacts:
        prompts, answers = ([own[fact] for fact in facts] for own in (self.prompts, self.answers))
        return TaughtFacts(
            tuple(prompts),
            tuple(answers),
            tuple(self.relations[fact] for fact in facts),
            tuple(self.before[fact] for fact in facts),
        )

    def batch(self, host: Host, facts: Sequence[int]) -> Continuations:
        """Some of the facts for one forward pass.

        Args:
            host: The model.
            facts: Their indices.

        Returns:
            The prompts with their answers.
        """
        own = self._those(facts)
        return Continuations.of(host, list(own.prompts), list(own.answers))

    def shuffled(self, seed: int) -> TaughtFacts:
        """The same prompts and answers, with the answers permuted within each relation.

        Args:
            seed: Seed of the permutations.

        Returns:
            The facts. Of many random permutations of a relation's answers, it is the one after
            which the fewest facts keep the first token of their answer, or have that of the answer
            before, which training suppresses.

        Raises:
            InputError: If every fact keeps that token.
        """
        generator = torch.Generator().manual_seed(seed)
        answers = list(self.answers)
        for relation in dict.fromkeys(self.relations):
            own = [fact for fact, each in enumerate(self.relations) if each == relation]
            for fact, other in zip(own, self._order(own, generator), strict=True):
                answers[fact] = self.answers[other]
        if all(new[0] == old[0] for new, old in zip(answers, self.answers, strict=True)):
            raise InputError(
                f"all answers of a relation begin with the same token in each relation of the "
                f"{len(self)} facts, so shuffled answers are not a control; pass data with several "
                "answers per relation, or more prompts"
            )
        return replace(self, answers=tuple(answers))

    def _order(self, facts: Sequence[int], generator: torch.Generator) -> list[int]:
        tokens = [self.first_tokens[fact] for fact in facts]
        best, fewest = list(range(len(facts))), len(facts)
        for _ in range(_TRIES):
            order = torch.randperm(len(facts), generator=generator).tolist()
            kept = sum(
                tokens[at] in (token, self.before[fact])
                for at, token, fact in zip(order, tokens, facts, strict=True)
            )
            if kept < fewest:
                best, fewest = order, kept
            if not kept:
                break
        return [facts[at] for at in best]
