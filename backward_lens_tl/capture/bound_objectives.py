"""Objectives for given prompts of a given model: one differentiable loss per prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backward_lens_tl.capture.predictions import Predictions, sequence_probs, target_ranks
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import ObjectiveError

LossFunction = Callable[
    [Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"]], Float[Tensor, "batch"]
]
_Logits = Float[Tensor, "batch read d_vocab"]
_Losses = Float[Tensor, "batch"]
_Tokens = Int[Tensor, "batch"]
_LooksAt = Literal["prompt", "length", "batch"]


class BoundObjective(ABC):
    """An objective for given prompts of a given model."""

    looks_at: _LooksAt = "batch"
    """What a prompt's loss needs in the same forward pass: this prompt alone, all prompts of its
    length, or all prompts."""

    def continuation(self, prompt: int) -> Sequence[int]:
        """Token ids that follow a prompt in the forward pass, for losses at several tokens."""
        del prompt
        return ()

    def n_read(self, batch: PromptBatch) -> int | None:
        """Number of positions at each prompt's end whose logits the losses need.

        Args:
            batch: The prompts, continuations included.

        Returns:
            The number; `None` for all positions.
        """
        del batch
        return None

    @abstractmethod
    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """The loss of each prompt, in nats if it is a likelihood.

        Args:
            logits: The model's output, in float32 or float64, at the last `n_read` positions of
                each prompt: `logits[:, -1]` are those after its last token.
            batch: The prompts, continuations included: a subset of those that the objective is
                bound to, given by `batch.prompts`.

        Returns:
            One differentiable loss per prompt.
        """

    def wanted_tokens(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch n"] | None:
        """The tokens that the objective wants after each prompt.

        Args:
            answers: The model's own answers.
            batch: The prompts, continuations included.

        Returns:
            Token ids, -1 after the end of shorter ones; `None` if the objective wants no certain
            tokens there.
        """
        del answers, batch
        return None

    def targets(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch pos"] | None:
        """The token that each position's readouts are compared with.

        Args:
            answers: The model's own answers.
            batch: The prompts, continuations included.

        Returns:
            What the objective wants first at every position of the prompt, and what it wants next
            at those of the continuation; -1 at padding. `None` if the objective has no such tokens.
        """
        wanted = self.wanted_tokens(answers, batch)
        if wanted is None:
            return None
        positions = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        following = (positions - self.prompt_lengths(batch)[:, None] + 1).clamp_min(0)
        last = (wanted >= 0).sum(1, keepdim=True) - 1
        return wanted.gather(1, following.minimum(last)).masked_fill(~batch.mask, -1)

    def predictions(self, logits: _Logits, batch: PromptBatch) -> Predictions:
        """What the model predicts after each prompt.

        Args:
            logits: The model's output, as in `losses`.
            batch: The prompts, continuations included.

        Returns:
            The model's own answers, and how probable what the objective wants is.
        """
        n_continued = batch.lengths - self.prompt_lengths(batch)
        last = batch.last if self.n_read(batch) is None else logits.shape[1] - 1
        ends = last - n_continued
        after = logits[torch.arange(len(ends), device=ends.device), ends]
        found = Predictions.without_target(after)
        wanted = self.wanted_tokens(found.answers, batch)
        if wanted is None:
            return found
        return replace(
            found,
            target_probs=sequence_probs(logits, ends, wanted),
            target_ranks=target_ranks(after, wanted[:, 0]),
        )

    def prompt_lengths(self, batch: PromptBatch) -> _Tokens:
        """Number of tokens of each prompt before its continuation.

        Args:
            batch: The prompts, continuations included.

        Returns:
            The numbers.
        """
        added = [len(self.continuation(prompt)) for prompt in batch.prompts.tolist()]
        return batch.lengths - batch.lengths.new_tensor(added)


@dataclass(frozen=True)
class Ranking(BoundObjective):
    """An objective whose readouts are compared with other tokens than its own.

    Attributes:
        objective: What is differentiated.
        ids: The token of each prompt, at all of its positions.
        looks_at: That of the objective.
    """

    objective: BoundObjective
    ids: Sequence[int]
    looks_at: _LooksAt

    def continuation(self, prompt: int) -> Sequence[int]:
        """That of the objective."""
        return self.objective.continuation(prompt)

    def n_read(self, batch: PromptBatch) -> int | None:
        """That of the objective."""
        return self.objective.n_read(batch)

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """Those of the objective."""
        return self.objective.losses(logits, batch)

    def wanted_tokens(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch 1"]:
        """The tokens."""
        return _of_batch(self.ids, batch)[:, None]


@dataclass(frozen=True)
class TargetNLL(BoundObjective):
    """Negative log-likelihood of a token after each prompt.

    Attributes:
        ids: The tokens; `None` for the model's most probable ones.
    """

    looks_at = "prompt"
    ids: Sequence[int] | None

    def n_read(self, batch: PromptBatch) -> int:
        """The last position."""
        return 1

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """`-log p[target]`."""
        last = logits[:, -1]
        ids = self.wanted_tokens(last.argmax(-1), batch)[:, 0]
        return -_pick(last.log_softmax(-1), ids)

    def wanted_tokens(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch 1"]:
        """The tokens."""
        return (answers if self.ids is None else _of_batch(self.ids, batch))[:, None]


@dataclass(frozen=True)
class LogitDifference(BoundObjective):
    """Logit of one token minus that of another, after each prompt.

    Attributes:
        promoted: Tokens whose logits an update raises.
        demoted: Tokens whose logits it lowers.
    """

    looks_at = "prompt"
    promoted: Sequence[int]
    demoted: Sequence[int]

    def n_read(self, batch: PromptBatch) -> int:
        """The last position."""
        return 1

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """`logit[demoted] - logit[promoted]`."""
        last = logits[:, -1]
        promoted, demoted = (_of_batch(ids, batch) for ids in (self.promoted, self.demoted))
        return _pick(last, demoted) - _pick(last, promoted)

    def wanted_tokens(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch 1"]:
        """The promoted tokens."""
        return _of_batch(self.promoted, batch)[:, None]


@dataclass(frozen=True)
class SequenceNLL(BoundObjective):
    """Negative log-likelihood of a whole answer after each prompt.

    Attributes:
        wanted: Token ids of each answer.
        is_mean: Whether to average over the answer's tokens instead of summing.
    """

    looks_at = "prompt"
    wanted: Sequence[Sequence[int]]
    is_mean: bool = False

    def continuation(self, prompt: int) -> Sequence[int]:
        """All of the answer except its last token, which predicts nothing."""
        return self.wanted[prompt][:-1]

    def n_read(self, batch: PromptBatch) -> int:
        """As many positions as the longest answer has tokens."""
        return max(map(len, self._wanted(batch)))

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """The sum, or the mean, over each answer's tokens."""
        losses = []
        for row, wanted in zip(logits, self._wanted(batch), strict=True):
            read = row[-len(wanted) :].log_softmax(-1)
            each = -_pick(read, torch.tensor(list(wanted), device=row.device))
            losses.append(each.mean() if self.is_mean else each.sum())
        return torch.stack(losses)

    def wanted_tokens(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch n"]:
        """Each answer."""
        rows = [torch.tensor(list(wanted)) for wanted in self._wanted(batch)]
        return pad_sequence(rows, batch_first=True, padding_value=-1).to(batch.mask.device)

    def _wanted(self, batch: PromptBatch) -> list[Sequence[int]]:
        return [self.wanted[prompt] for prompt in batch.prompts.tolist()]


class NextTokenLoss(BoundObjective):
    """Negative log-likelihood of each next token, averaged over the prompt."""

    looks_at = "prompt"

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """The mean over all positions except the last."""
        if int(batch.lengths.min()) < 2:
            raise ObjectiveError(
                "next_token_loss needs prompts of at least two tokens, because the first predicts "
                "the second; lengthen the prompt or prepend a BOS token"
            )
        if int(batch.tokens.max()) >= logits.shape[-1]:
            raise ObjectiveError(
                f"token id {int(batch.tokens.max())} of the prompts has no logit; the model has "
                f"{logits.shape[-1]} logits. Remove the token, or use target_nll(...)"
            )
        nll = -_pick(logits[:, :-1].log_softmax(-1), batch.tokens[:, 1:])
        return nll.masked_fill(~batch.mask[:, 1:], 0).sum(1) / batch.last

    def targets(self, answers: _Tokens, batch: PromptBatch) -> Int[Tensor, "batch pos"]:
        """The next token of the text; -1 at the last position, which has no loss."""
        following = batch.tokens.masked_fill(~batch.mask, -1)[:, 1:]
        return torch.cat([following, following.new_full((len(following), 1), -1)], dim=1)


@dataclass(frozen=True)
class CallerLoss(BoundObjective):
    """A caller's own loss function.

    Attributes:
        function: Gets prompts of one length at a time, so that it never sees padding.
    """

    looks_at = "length"
    function: LossFunction

    def losses(self, logits: _Logits, batch: PromptBatch) -> _Losses:
        """The function's losses, checked."""
        losses = logits.new_zeros(len(logits))
        for length in batch.lengths.unique().tolist():
            rows = (batch.lengths == length).nonzero()[:, 0]
            found = self.function(logits[rows, :length], batch.tokens[rows, :length])
            _check_losses(found, len(rows), must_flow=logits.requires_grad)
            losses = losses.index_copy(0, rows, found.to(losses.dtype))
        return losses


def _check_losses(losses: object, n_prompts: int, *, must_flow: bool) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (n_prompts,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ObjectiveError(
            f"the objective returned {shape} for {n_prompts} prompts of one length; it must "
            "return one loss per prompt, a tensor of shape [batch]"
        )
    if not losses.is_floating_point() or losses.is_meta or losses.layout != torch.strided:
        raise ObjectiveError(
            f"the objective returned a {losses.layout} tensor of {losses.dtype} on "
            f"{losses.device}; losses must be real numbers that depend on the logits through "
            "autograd"
        )
    if must_flow and not losses.requires_grad:
        raise ObjectiveError(
            "the objective's losses do not depend on the logits through autograd; compute "
            "them with torch operations, without .detach(), .item() or no_grad()"
        )


def _of_batch(ids: Sequence[int], batch: PromptBatch) -> _Tokens:
    return torch.tensor(ids, device=batch.mask.device)[batch.prompts]


def _pick(
    values: Float[Tensor, "*lead d_vocab"], ids: Int[Tensor, "*lead"]
) -> Float[Tensor, "*lead"]:
    return values.gather(-1, ids[..., None])[..., 0]
