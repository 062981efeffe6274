"""What is differentiated: one loss per prompt, which an update *lowers*, as in training.

Objectives are created without a model; binding turns their texts into token ids. A plain callable
`(logits, tokens) -> loss` of shape `[batch]` is an objective too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl._checks import check_choice, plain, shown
from backward_lens_tl.capture.bound_objectives import (
    BoundObjective,
    CallerLoss,
    LogitDifference,
    LossFunction,
    NextTokenLoss,
    SequenceNLL,
    TargetNLL,
)
from backward_lens_tl.capture.likely_mistakes import warn_of_missing_space
from backward_lens_tl.capture.prompts import Prompt, PromptBatch, pad_prompts
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import ObjectiveError, TargetError
from backward_lens_tl.models import Host

_T = TypeVar("_T", str, str | int)

Target = str | int
Targets = Target | Sequence[Target] | Int[Tensor, "batch"]

_NAMED = 3
"""Number of targets that a name lists."""


@dataclass(frozen=True)
class Objective:
    """An objective before prompts and model are known.

    Attributes:
        name: The call that created it, for titles and saved results.
        bind: Resolves texts to token ids, as continuations of the prompts.

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
    """Negative log-likelihood of a target after the prompt (paper, equations 2 and 3).

    `L = -log p[t]`, where `p` is the softmax of the logits at the prompt's last position.

    Args:
        target: Text or token id, or one per prompt; `None` is the model's most probable token.
        multi_token: Which token represents a text of several tokens, `"first"` or `"last"`.

    Returns:
        The objective.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll([" Miami", " Paris"])
        >>> capture = blt.capture_gradients(model, ["Lionel Messi plays for"] * 2, loss)
        >>> bool(capture.loss[0] < capture.loss[1])  # the model's own answer is more probable
        True
    """
    check_multi_token(multi_token)

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        return TargetNLL(None if target is None else target_ids(target, prompts, multi_token))

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
        >>> bool(result.capture.loss > 0)  # the model predicts " Rome"
        True
    """
    check_multi_token(multi_token)

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        both = [_one_per_prompt(plain(ids), len(prompts)) for ids in (promoted, demoted)]
        objective = LogitDifference(*(_ids(own, prompts, multi_token) for own in both))
        warn_of_missing_space(prompts, *both)
        return objective

    return Objective(f"logit_difference({_name(promoted)}, {_name(demoted)})", bind)


def sequence_nll(targets: str | Sequence[str]) -> Objective:
    """Negative log-likelihood of a whole answer, the sum over its tokens.

    All of the answer's tokens except the last are appended to the prompt, so the gradient has
    `n_prompt + n_answer - 1` positions.

    Args:
        targets: The answer's text, or one per prompt.

    Returns:
        The objective. Positions of the prompt are compared with the answer's first token, and those
        of the answer with its following tokens.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "The cat is", blt.sequence_nll(" in the garden"))
        >>> capture.str_tokens[0]  # prompt and answer, except the answer's last token
        ('<|endoftext|>', 'The', ' cat', ' is', ' in', ' the')
    """

    def bind(prompts: Sequence[Prompt]) -> BoundObjective:
        texts = _one_per_prompt(targets, len(prompts))
        pairs = zip(prompts, texts, strict=True)
        objective = SequenceNLL([prompt.continuation(text) for prompt, text in pairs])
        warn_of_missing_space(prompts, texts)
        return objective

    return Objective(f"sequence_nll({_name(targets)})", bind)


def next_token_loss() -> Objective:
    """The training loss: negative log-likelihood of each next token, averaged over positions.

    Returns:
        The objective. Every position except the last has a loss, so the last layer's gradients
        have full rank, unlike with a loss on the last position alone. Each position is compared
        with the next token of the text, and the last one with none.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "Lionel Messi plays for", blt.next_token_loss())
        >>> capture["W_out", 7].rank()  # the last layer; 1 with a loss on the last position alone
        5
    """
    return Objective("next_token_loss()", lambda prompts: NextTokenLoss())


def as_objective(objective: Objective | LossFunction) -> Objective:
    """Turn a plain callable into an objective.

    Args:
        objective: An objective, or a callable `(logits, tokens) -> loss`. The callable gets
            prompts of one length at a time, `[batch, pos, d_vocab]` and `[batch, pos]` without
            padding, and returns one loss per prompt. Under a memory budget it may get some of the
            prompts of a length.

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
    return Objective(name, lambda prompts: CallerLoss(objective))


def bind_to_prompts(
    objective: Objective, host: Host, prompts: Sequence[Prompt]
) -> tuple[BoundObjective, tuple[Prompt, ...], PromptBatch]:
    """Bind an objective, and append its continuations to the prompts.

    Args:
        objective: The objective.
        host: The model.
        prompts: The prompts.

    Returns:
        The bound objective, the continued prompts, and these as a batch.

    Raises:
        ObjectiveError: If the objective's `bind` returns something else.
    """
    bound = objective.bind(prompts) if callable(objective.bind) else None
    if not isinstance(bound, BoundObjective):
        raise ObjectiveError(
            f"{objective!r} does not bind: its bind(prompts) returned {bound!r} instead of a "
            "BoundObjective; use target_nll(...), logit_difference(...), sequence_nll(...) or "
            "next_token_loss()"
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
        targets: Text or token id, one for all prompts or one per prompt.
        prompts: The prompts that they continue.
        multi_token: Which token represents a text of several tokens.

    Returns:
        Token ids.

    Raises:
        TargetError: If there is not one target per prompt, or one is not a token.
    """
    each = _one_per_prompt(plain(targets), len(prompts))
    ids = _ids(each, prompts, multi_token)
    warn_of_missing_space(prompts, each)
    return ids


def _ids(
    targets: Sequence[Target], prompts: Sequence[Prompt], multi_token: MultiToken | None
) -> list[int]:
    pairs = zip(prompts, targets, strict=True)
    return [prompt.token_id(target, multi_token) for prompt, target in pairs]


def check_multi_token(multi_token: object) -> None:
    """Raise if `multi_token` is not `"first"`, `"last"` or `None`.

    Args:
        multi_token: The argument.
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
    """Targets for a name; only the first few if there are many."""
    listing = plain(targets)
    if not isinstance(listing, list | tuple) or len(listing) <= _NAMED:
        return shown(listing)
    first = ", ".join(map(shown, listing[:_NAMED]))
    return f"[{first}, ... {len(listing) - _NAMED} more]"
