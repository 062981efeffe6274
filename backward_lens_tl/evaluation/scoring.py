"""Likelihoods of answers to prompts, from which all of CounterFact's metrics are computed.

For a prompt `p` and an answer with tokens `o_1 ... o_k`, read in one pass (teacher forcing),

    nll(o | p) = -(1 / k) * sum_j log P(o_j | p, o_1 ... o_{j-1})

and the model says an answer if each `o_j` is the most probable token at its position. Padding is on
the right, where no token attends to it, so a score does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

import torch

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.models import Host

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A prompt and one of its answers.

    Attributes:
        prompt: Token ids of the prompt.
        answer: Token ids of the answer, at least one.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The score of an answer.

    Attributes:
        nll: Its negative log-likelihood in nats per token; infinite if the model returns NaN.
        is_predicted: Whether each of its tokens is the most probable one at its position.
        first: Id of the most probable token after the prompt.
    """

    nll: float
    is_predicted: bool
    first: int


@torch.no_grad()
def score(host: Host, questions: Sequence[Question], batch_size: int) -> list[Score]:
    """Score answers. Answers that differ in their last token only share a forward pass.

    Args:
        host: The model.
        questions: Prompts and answers.
        batch_size: The largest number of prompts per forward pass.

    Returns:
        The scores, in the order of the questions.
    """
    askers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for place, asked in enumerate(questions):
        askers.setdefault((asked.prompt, asked.answer[:-1]), []).append(place)
    # Prompts of similar length share a pass, which needs less padding.
    read = sorted(askers, key=lambda each: len(each[0]) + len(each[1]))
    found: dict[int, Score] = {}
    groups = host.length_groups([len(prompt) + len(answer) for prompt, answer in read])
    passes = [batches((read[at] for at in group), batch_size) for group in groups]
    for some in chain.from_iterable(passes):
        owners = [(row, place) for row, key in enumerate(some) for place in askers[key]]
        first = [questions[askers[key][0]] for key in some]
        own = [questions[place] for _, place in owners]
        scores = _scored(host, first, own, [row for row, _ in owners])
        found |= dict(zip((place for _, place in owners), scores, strict=True))
    return [found[place] for place in range(len(questions))]


def batches(rows: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Consecutive rows in batches."""
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


def _scored(
    host: Host, first: Sequence[Question], asked: Sequence[Question], rows: Sequence[int]
) -> list[Score]:
    """Scores of answers; `rows` are their rows in the batch of `first`."""
    shared = Continuations.of(
        host, [each.prompt for each in first], [each.answer for each in first]
    )
    place = torch.tensor(rows, device=shared.answers.device)
    answers = shared.answers[place]
    answers[:, -1] = torch.tensor([each.answer[-1] for each in asked], device=answers.device)
    own = replace(shared, answers=answers, mask=shared.mask[place])
    with host.own_precision():
        logits = shared.logits(host)[place]
    nll = own.nll(logits).nan_to_num(nan=torch.inf)
    best = logits.argmax(-1)
    start = (~own.mask).sum(1, keepdim=True)  # position of each answer's first token
    return [
        Score(*each)
        for each in zip(
            nll.tolist(),
            own.are_said(logits).tolist(),
            best.gather(1, start)[:, 0].tolist(),
            strict=True,
        )
    ]
