"""The facts that a model is trained on: their prompts, their answers, and the answers shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, requests: Sequence[TokenizedRequest]) -> TaughtFacts:
        """The facts of tokenized requests."""
        return cls(
            tuple(request.prompt for request in requests),
            tuple(request.target for request in requests),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The first token of each answer, which stands for it where vectors are read."""
        return tuple(answer[0] for answer in self.answers)

    def batch(self, host: Host, facts: Sequence[int]) -> Continuations:
        """Some of the facts for one forward pass.

        Args:
            host: The model.
            facts: Their indices.

        Returns:
            The prompts with their answers.
        """
        prompts, answers = ([own[fact] for fact in facts] for own in (self.prompts, self.answers))
        return Continuations.of(host, prompts, answers)

    def shuffled(self, seed: int) -> TaughtFacts:
        """The same prompts and answers, with the answers permuted.

        Args:
            seed: Seed of the permutation.

        Returns:
            The facts. Of many random permutations, it is the one after which the fewest facts keep
            the first token of their answer.

        Raises:
            InputError: If all answers begin with the same token.
        """
        tokens = torch.tensor(self.first_tokens)
        generator = torch.Generator().manual_seed(seed)
        best, fewest = torch.arange(len(self)), len(self)
        for _ in range(_TRIES):
            order = torch.randperm(len(self), generator=generator)
            kept = int((tokens[order] == tokens).sum())
            if kept < fewest:
                best, fewest = order, kept
            if not kept:
                break
        if fewest == len(self):
            raise InputError(
                f"the answers of the {len(self)} facts all begin with the same token, so shuffled "
                "answers are no control; pass data with several answers, or more prompts"
            )
        return TaughtFacts(self.prompts, tuple(self.answers[at] for at in best.tolist()))
