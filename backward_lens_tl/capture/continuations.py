"""Prompts with answers, and the probability that a model assigns to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class Continuations:
    """Prompts, each with an answer, as a batch for one forward pass.

    The model gets the prompt and all of the answer except its last token (teacher forcing).

    Attributes:
        batch: The model's input.
        answers: Ids of each answer's tokens, padded on the left with 0.
        mask: False at this padding.
    """

    batch: PromptBatch
    answers: Int[Tensor, "batch n"]
    mask: Bool[Tensor, "batch n"]

    @classmethod
    def of(
        cls, host: Host, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Continuations:
        """Append answers to prompts.

        Args:
            host: The model.
            prompts: Token ids of each prompt.
            answers: Token ids of each answer, at least one.

        Returns:
            The batch, on the model's device.

        Raises:
            InputError: If one is longer than the model's context.
        """
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, answers))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, answer in enumerate(answers):
            ids[row, longest - len(answer) :] = torch.tensor(answer)
            mask[row, longest - len(answer) :] = True
        batch = pad_prompts(host, rows)
        device = batch.tokens.device
        return cls(batch, ids.to(device), mask.to(device))

    def logits(self, host: Host) -> Float[Tensor, "batch n d_vocab"]:
        """The logits that predict each answer's tokens, in float32 or float64.

        Args:
            host: The model.

        Returns:
            The logits; meaningless where `mask` is False.
        """
        return read_logits(host, self.batch, self.answers.shape[1])

    def log_probs(self, logits: Float[Tensor, "batch n d_vocab"]) -> Float[Tensor, "batch n"]:
        """Log-probability of each answer's tokens, in nats; 0 where `mask` is False.

        Args:
            logits: The result of `logits`.

        Returns:
            The log-probabilities.
        """
        chosen = logits.log_softmax(-1).gather(-1, self.answers[..., None])[..., 0]
        return chosen.masked_fill(~self.mask, 0)

    def nll(self, logits: Float[Tensor, "batch n d_vocab"]) -> Float[Tensor, "batch"]:
        """Negative log-likelihood of each answer in nats, averaged over its tokens.

        Args:
            logits: The result of `logits`.

        Returns:
            One number per prompt.
        """
        return -self.log_probs(logits).sum(1) / self.mask.sum(1)

    def are_said(self, logits: Float[Tensor, "batch n d_vocab"]) -> Bool[Tensor, "batch"]:
        """Whether every token of an answer is the most probable one at its position.

        Args:
            logits: The result of `logits`.

        Returns:
            One value per prompt.
        """
        return ((logits.argmax(-1) == self.answers) | ~self.mask).all(1)
