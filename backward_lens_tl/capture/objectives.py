"""What is differentiated: one loss per prompt.

An update *lowers* its objective, as in training. The built-in objectives are made before any model
is known; binding turns their texts into token ids. A plain callable `(logits, tokens) -> loss` of
shape `[batch]` does as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl._checks import check_choice, plain, shown
from backward_lens_tl.capture.prompts import Prompt, PromptBatch, pad_prompts
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import ObjectiveError, TargetError
from backward_lens_tl.models import Host

_T = TypeVar("_T", str, str | int)

Target = str | int
Targets = Target | Sequence[Target] | Int[Tensor, "batch"]
LossFunction = Callable[
    [Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"]], Float[Tensor, "batch"]
]

_NAMED = 3
"""Targets that a title names."""


class BoundObjective(ABC):
    """An objective for given prompts of a given model."""

    def continuation(self, prompt: int) -> Sequence[int]:
        """Token ids that follow a prompt in the forward pass, for losses that are read there."""
        del prompt
        return ()

    def n_read(self, batch: PromptBatch) -> int | None:
        """At how many positions at each prompt's end the losses read the logits.

        Args:
            batch: The prompts, continuations included.

        Returns:
            The number; `None` for all positions, from the prompt's beginning.
        """
        del batch
        return None

    looks_at: Literal["prompt", "length", "batch"] = "batch"
    """What has to be there when a prompt's loss is taken: it alone, all prompts of its length, or
    all."""

    @abstractmethod
    def losses(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        """The loss of each prompt, in nats where it is a likelihood.

        Args:
            logits: The model's output, in float32 or float64, at the last `n_read` positions of
                each prompt: `logits[:, -1]` are those after its last token.
            batch: The prompts, continuations included; some of those that the objective is bound
                to, as `batch.prompts` says.

        Returns:
            One differentiable loss per prompt.
        """

    def targets(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"] | None:
        """The token of each prompt that its readouts are compared with.

        Args:
            logits: The model's output, as in `losses`.
            batch: The prompts, continuations included.

        Returns:
            Token ids, or `None` if the objective is not about one token.
        """
        del logits, batch
        return None

    def answers(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        """The model's own most probable token after each prompt.

        Args:
            logits: The model's output, as in `losses`.
            batch: The prompts, continuations included.

        Returns:
            Token ids.
        """
        last = batch.ends(logits, 1) if self.n_read(batch) is None else logits
        return last[:, -1].argmax(-1)


@dataclass(frozen=True)
class Objective:
    """An objective, before prompts and model are known.

    Attributes:
        name: How it was made, for titles and saved results.
        bind: Resolves texts into token ids, as they continue the prompts.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> objective = blt.logit_difference(" Paris", " Rome")
        >>> result = blt.backward_lens(model, "The capital of Italy is", objective=objective)
        >>> result.capture.objective, result.target()
        ("logit_difference(' Paris', ' Rome')", ' Paris')
    """

    name: str
    bind: Callable[[Sequence[Prompt]], BoundObjective]


def target_nll(target: Targets | None = None, multi_token: MultiToken | None = None) -> Objective:
    """Negative log-likelihood of a target right after the prompt (paper, equations 2 and 3).

    `L = -log p[t]`, where `p` is the softmax of the logits at the prompt's last position.

    Args:
        target: Text or token id, or one per prompt; `None` is the model's most probable token.
        multi_token: Which token of a text of several stands for it, `"first"` or `"last"`.

    Returns:
        The objective.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll([" Miami", " Paris"])
        >>> capture = blt.capture_gradients(model, ["Lionel Messi plays for"] * 2, loss)
        >>> bool(capture.loss[0] < capture.loss[1])  # the model's own answer is likelier
        True
    """
    check_multi_token(multi_token)

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        if target is None:
            return _OwnAnswerNLL()
        return _TargetNLL(target_ids(target, prompts, multi_token))

    name = "the model's own answer" if target is None else _name(target)
    return Objective(f"target_nll({name})", bind)


def logit_difference(
    promoted: Targets, demoted: Targets, multi_token: MultiToken | None = None
) -> Objective:
    """Difference between two logits right after the prompt; an update raises the first one.

    The loss is `logit[demoted] - logit[promoted]`, so `capture.loss` is *minus* the logit
    difference that circuit analyses report for `promoted` against `demoted`.

    Args:
        promoted: Text or token id whose logit an update raises, or one per prompt.
        demoted: Text or token id whose logit an update lowers, or one per prompt.
        multi_token: Which token represents a text of several tokens, `"first"` or `"last"`.

    Returns:
        The objective. Readouts are compared with `promoted`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> objective = blt.logit_difference(" Paris", " Rome")
        >>> result = blt.backward_lens(model, "The capital of Italy is", objective=objective)
        >>> result.top_tokens("W_out", layer=6, pos=-1, k=1)
        [' Paris']
        >>> bool(result.capture.loss > 0)  # the model says " Rome"
        True
    """
    check_multi_token(multi_token)

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        return _LogitDifference(
            target_ids(promoted, prompts, multi_token), target_ids(demoted, prompts, multi_token)
        )

    return Objective(f"logit_difference({_name(promoted)}, {_name(demoted)})", bind)


def sequence_nll(targets: str | Sequence[str]) -> Objective:
    """Negative log-likelihood of a whole answer, the sum over its tokens.

    The answer's tokens but the last are appended to the prompt, so that the forward pass covers
    them: the gradient has `n_prompt + n_answer - 1` positions.

    Args:
        targets: The answer's text, or one per prompt.

    Returns:
        The objective. Readouts are compared with the answer's first token.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "The cat is", blt.sequence_nll(" in the garden"))
        >>> capture.str_tokens[0]  # the answer, but for its last token
        ('<|endoftext|>', 'The', ' cat', ' is', ' in', ' the')
    """

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        texts = _one_per_prompt(targets, len(prompts))
        pairs = zip(prompts, texts, strict=True)
        return SequenceNLL([prompt.continuation(text) for prompt, text in pairs])

    return Objective(f"sequence_nll({_name(targets)})", bind)


def next_token_loss() -> Objective:
    """The training loss: mean over positions of the next token's negative log-likelihood.

    Returns:
        The objective. Every position but the last carries a loss, so unlike with a loss on the
        last position alone, the last layer's gradients have full rank.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "Lionel Messi plays for", blt.next_token_loss())
        >>> capture["W_out", 7].rank()  # in the last layer; 1 with a loss on the last position
        5
    """
    return Objective("next_token_loss()", lambda prompts: _NextTokenLoss())


def as_objective(objective: Objective | LossFunction) -> Objective:
    """Accept a plain callable as an objective.

    Args:
        objective: An objective, or a callable `(logits, tokens) -> loss`. The callable sees
            prompts of one length at a time, `[batch, pos, d_vocab]` and `[batch, pos]` without
            padding, and returns one loss per prompt. Under a memory budget these may be some of
            the prompts of that length.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If it is neither.
    """
    if isinstance(objective, Objective) and isinstance(objective.name, str):
        return objective
    if not callable(objective):
        raise ObjectiveError(
            f"objective is a {type(objective).__name__}; pass target_nll(...), "
            "logit_difference(...), sequence_nll(...), next_token_loss() or a callable "
            "(logits, tokens) -> losses of shape [batch]"
        )
    name = getattr(objective, "__name__", type(objective).__name__)
    return Objective(name, lambda prompts: _CallerLoss(objective))


def bind_to_prompts(
    objective: Objective, host: Host, prompts: Sequence[Prompt]
) -> tuple[BoundObjective, tuple[Prompt, ...], PromptBatch]:
    """Make the batch that a forward pass gets, and the objective for it.

    Args:
        objective: The objective.
        host: The model.
        prompts: The prompts.

    Returns:
        The objective with its token ids, and the prompts with its continuations, also as a batch.

    Raises:
        ObjectiveError: If the objective does not bind.
    """
    bound = objective.bind(prompts) if callable(objective.bind) else None
    if not isinstance(bound, BoundObjective):
        raise ObjectiveError(
            f"{objective!r} does not bind: its bind(prompts) gave {bound!r} and must "
            "return a BoundObjective; target_nll(...) and the others make such objectives"
        )
    continued = tuple(
        prompt.extended(bound.continuation(index)) for index, prompt in enumerate(prompts)
    )
    return bound, continued, pad_prompts(host, [prompt.ids for prompt in continued])


def target_ids(
    targets: Targets,
    prompts: Sequence[Prompt],
    multi_token: MultiToken | None = None,
) -> list[int]:
    """One target token per prompt.

    Args:
        targets: Text or token id, for all prompts or one per prompt.
        prompts: What they continue.
        multi_token: Which token of a text of several stands for it.

    Returns:
        Token ids.

    Raises:
        TargetError: If the number of targets is not that of the prompts, or one is not a token.
    """
    pairs = zip(prompts, _one_per_prompt(plain(targets), len(prompts)), strict=True)
    return [prompt.token_id(target, multi_token) for prompt, target in pairs]


def check_multi_token(multi_token: object) -> None:
    """Refuse a `multi_token` that does not exist.

    Args:
        multi_token: What was asked for.

    Raises:
        TargetError: If it is neither `"first"` nor `"last"` nor `None`.
    """
    check_choice("multi_token", multi_token, ("first", "last", None), TargetError)


def _one_per_prompt(targets: _T | Sequence[_T], n_prompts: int) -> list[_T]:
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        return [targets] * n_prompts
    if len(targets) != n_prompts:
        raise TargetError(
            f"there are {len(targets)} targets for {n_prompts} prompts; pass one for all, or one "
            "per prompt"
        )
    return list(targets)


def _name(targets: object) -> str:
    """Targets for a title: of many prompts', the first few."""
    listing = plain(targets)
    if not isinstance(listing, list | tuple) or len(listing) <= _NAMED:
        return shown(listing)
    first = ", ".join(map(shown, listing[:_NAMED]))
    return f"[{first}, ... {len(listing) - _NAMED} more]"


def _of_batch(ids: Sequence[int], batch: PromptBatch) -> Int[Tensor, "batch"]:
    return torch.tensor(ids, device=batch.mask.device)[batch.prompts]


def _pick(
    values: Float[Tensor, "*lead d_vocab"], ids: Int[Tensor, "*lead"]
) -> Float[Tensor, "*lead"]:
    return values.gather(-1, ids[..., None])[..., 0]


class _LastPosition(BoundObjective):
    looks_at = "prompt"

    def n_read(self, batch: PromptBatch) -> int:
        return 1


@dataclass(frozen=True)
class _TargetNLL(_LastPosition):
    ids: Sequence[int]

    def losses(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        return -_pick(logits[:, -1].log_softmax(-1), self.targets(logits, batch))

    def targets(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        return _of_batch(self.ids, batch)


class _OwnAnswerNLL(_TargetNLL):
    def __init__(self) -> None:
        super().__init__(ids=())

    def targets(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        return self.answers(logits, batch)


@dataclass(frozen=True)
class _LogitDifference(_LastPosition):
    promoted: Sequence[int]
    demoted: Sequence[int]

    def losses(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        last = logits[:, -1]
        demoted = _pick(last, _of_batch(self.demoted, batch))
        return demoted - _pick(last, self.targets(logits, batch))

    def targets(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        return _of_batch(self.promoted, batch)


@dataclass(frozen=True)
class SequenceNLL(BoundObjective):
    """Negative log-likelihood of each prompt's answer.

    Attributes:
        wanted: Token ids of each answer.
        is_mean: Whether it is the mean over the answer's tokens, instead of the sum.
    """

    looks_at = "prompt"

    wanted: Sequence[Sequence[int]]
    is_mean: bool = False

    def continuation(self, prompt: int) -> Sequence[int]:
        """All of the answer but its last token, which nothing is read behind."""
        return self.wanted[prompt][:-1]

    def n_read(self, batch: PromptBatch) -> int:
        """As many positions as the longest answer has tokens."""
        return max(map(len, self._wanted(batch)))

    def losses(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        """The sum, or the mean, over each answer's tokens."""
        losses = []
        for row, wanted in zip(logits, self._wanted(batch), strict=True):
            read = row[-len(wanted) :].log_softmax(-1)
            each = -_pick(read, torch.tensor(list(wanted), device=row.device))
            losses.append(each.mean() if self.is_mean else each.sum())
        return torch.stack(losses)

    def targets(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        """The first token of each answer."""
        return _of_batch([wanted[0] for wanted in self.wanted], batch)

    def answers(
        self, logits: Float[Tensor, "batch read d_vocab"], batch: PromptBatch
    ) -> Int[Tensor, "batch"]:
        """What the model says right after the prompt, before the wanted answer."""
        rows = zip(logits, self._wanted(batch), strict=True)
        return torch.stack([row[-len(wanted)].argmax() for row, wanted in rows])

    def _wanted(self, batch: PromptBatch) -> list[Sequence[int]]:
        return [self.wanted[prompt] for prompt in batch.prompts.tolist()]


class _NextTokenLoss(BoundObjective):
    looks_at = "prompt"

    def losses(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        if int(batch.lengths.min()) < 2:
            raise ObjectiveError(
                "next_token_loss needs prompts of at least two tokens, because the first predicts "
                "the second; lengthen the prompt or prepend a BOS token"
            )
        if int(batch.tokens.max()) >= logits.shape[-1]:
            raise ObjectiveError(
                f"token id {int(batch.tokens.max())} of the prompts has no logit, the model gives "
                f"{logits.shape[-1]}; leave it out, or differentiate target_nll(...)"
            )
        nll = -_pick(logits[:, :-1].log_softmax(-1), batch.tokens[:, 1:])
        return nll.masked_fill(~batch.mask[:, 1:], 0).sum(1) / batch.last


@dataclass(frozen=True)
class _CallerLoss(BoundObjective):
    looks_at = "length"

    function: LossFunction

    def losses(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: PromptBatch
    ) -> Float[Tensor, "batch"]:
        losses = logits.new_zeros(len(logits))
        for length in batch.lengths.unique().tolist():
            rows = (batch.lengths == length).nonzero()[:, 0]
            found = self.function(logits[rows, :length], batch.tokens[rows, :length])
            self._check(found, len(rows), must_flow=logits.requires_grad)
            losses = losses.index_copy(0, rows, found.to(losses.dtype))
        return losses

    @staticmethod
    def _check(losses: object, n_prompts: int, *, must_flow: bool) -> None:
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
