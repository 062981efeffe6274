"""What the model predicts after each prompt, before any update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """The model's own answer after each prompt, and the target there, before any update.

    Attributes:
        answers: The model's most probable token.
        answer_probs: Its probability.
        target_probs: Probability of the target; of the whole answer for `sequence_nll`. NaN without
            a target.
        target_ranks: Number of tokens that are more probable than the target, or than the answer's
            first token; -1 without a target.
    """

    answers: Int[Tensor, "batch"]
    answer_probs: Float[Tensor, "batch"]
    target_probs: Float[Tensor, "batch"]
    target_ranks: Int[Tensor, "batch"]

    @classmethod
    def without_target(cls, logits: Float[Tensor, "batch d_vocab"]) -> Predictions:
        """Read the model's own answers.

        Args:
            logits: The model's output after each prompt.

        Returns:
            The answers and their probabilities.
        """
        log_probs, answers = logits.log_softmax(-1).max(-1)
        answer_probs = log_probs.exp()
        nothing = torch.full_like(answer_probs, torch.nan)
        return cls(answers, answer_probs, nothing, torch.full_like(answers, -1))


def target_ranks(
    logits: Float[Tensor, "batch d_vocab"], targets: Int[Tensor, "batch"]
) -> Int[Tensor, "batch"]:
    """Number of tokens with a larger logit than the target.

    Args:
        logits: The model's output.
        targets: One token per row.

    Returns:
        The ranks, 0 for the most probable token.
    """
    return (logits > logits.gather(-1, targets[:, None])).sum(-1)


def sequence_probs(
    logits: Float[Tensor, "batch pos d_vocab"],
    ends: Int[Tensor, "batch"],
    sequences: Int[Tensor, "batch n"],
) -> Float[Tensor, "batch"]:
    """Probability of a sequence of tokens, the product over its tokens.

    Args:
        logits: The model's output.
        ends: Where in `logits` the first token is predicted; the others follow.
        sequences: The tokens, -1 after the end.

    Returns:
        The probabilities.
    """
    rows = torch.arange(len(ends), device=ends.device)
    total = logits.new_zeros(len(ends))
    for at, tokens in enumerate(sequences.unbind(1)):
        here = (ends + at).clamp_max(logits.shape[1] - 1)
        log_probs = logits[rows, here].log_softmax(-1)
        own = log_probs.gather(-1, tokens.clamp_min(0)[:, None])[:, 0]
        total = total + own.masked_fill(tokens < 0, 0)
    return total.exp()
