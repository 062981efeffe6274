"""Probabilities of answers, against one forward pass per token and prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import HAS_BRIDGE, N_CTX, Case, build
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of

NAMES = ("bridge-gpt2", "bridge-llama", "bridge-gemma2", "hooked-gpt2", "hooked-llama")
GPT2 = "bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2"
Rows = list[list[int]]


@pytest.fixture(scope="module", params=NAMES)
def each(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def rows(seed: int, lengths: list[int], case: Case) -> Rows:
    drawn = random.Random(seed)
    return [[drawn.randrange(case.d_vocab) for _ in range(length)] for length in lengths]


def slowly(case: Case, prompt: list[int], answer: list[int]) -> tuple[list[Tensor], bool]:
    """Log-probability of each token, and whether each is the most probable one."""
    found, said = [], True
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = case.logits(torch.tensor([[*prompt, *answer[:i]]]))[0, -1].double()
        found.append(logits[token] - torch.logsumexp(logits, -1))
        said = said and int(logits.argmax()) == token
    return found, said


def continuation_of(case: Case, prompt: list[int], n: int) -> list[int]:
    """The model's own continuation."""
    answer: list[int] = []
    for _ in range(n):
        with torch.no_grad():
            logits = case.logits(torch.tensor([[*prompt, *answer]]))[0, -1]
        answer.append(int(logits.argmax()))
    return answer


def measured(host: Host, prompts: Rows, answers: Rows) -> tuple[Tensor, Tensor, Tensor]:
    own = Continuations.of(host, prompts, answers)
    with torch.no_grad():
        logits = own.logits(host)
    return own.log_probs(logits), own.nll(logits), own.are_said(logits)


def near(case: Case) -> float:
    """Tolerance: Hugging Face's RMS norms round to float32."""
    return 1e-5 if case.logits_in_float32 else 1e-9


def test_against_a_loop(each: Case) -> None:
    """Combine prompts and answers of different lengths, shortest and longest."""
    prompts = rows(0, [1, 1, 7, 12, 3, 5, 2, 9], each)
    answers = rows(1, [1, 5, 1, 4, 5, 2, 3, 2], each)
    # Half are the model's answers; one of the others is wrong only in its last token.
    for at in (0, 1, 3, 4):
        answers[at] = continuation_of(each, prompts[at], len(answers[at]))
    answers[4] = [*answers[4][:-1], (answers[4][-1] + 1) % each.d_vocab]
    wrong_first = continuation_of(each, prompts[5], 1)[0] + 1
    answers[5] = [wrong_first % each.d_vocab, *continuation_of(each, [*prompts[5], wrong_first], 1)]
    log_probs, nll, said = measured(host_of(each.model), prompts, answers)
    assert log_probs.shape == (8, 5)
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected, is_predicted = slowly(each, prompt, answer)
        own = log_probs[at, 5 - len(answer) :]
        assert float((own - torch.stack(expected)).abs().max()) < near(each)
        assert not log_probs[at, : 5 - len(answer)].any()
        assert abs(float(nll[at]) + float(sum(expected)) / len(answer)) < near(each)
        assert bool(said[at]) is is_predicted
    assert said.tolist()[:6] == [True, True, False, True, False, False]


def test_a_pair_has_the_same_scores_alone_and_in_any_batch(each: Case) -> None:
    host = host_of(each.model)
    prompts, answers = rows(2, [4, 11, 1, 6, 8], each), rows(3, [2, 1, 6, 3, 2], each)
    _, together, said = measured(host, prompts, answers)
    order = [3, 0, 4, 2, 1]
    _, turned, turned_said = measured(
        host, [prompts[i] for i in order], [answers[i] for i in order]
    )
    assert torch.allclose(turned, together[order], rtol=0, atol=near(each))
    assert torch.equal(turned_said, said[order])
    for at in range(5):
        _, alone, _ = measured(host, prompts[at : at + 1], answers[at : at + 1])
        assert abs(float(alone[0] - together[at])) < near(each)
    # Where the answer begins matters: moving one token from prompt to answer changes the result.
    _, other, _ = measured(host, [prompts[0][:-1]], [[prompts[0][-1], *answers[0]]])
    assert abs(float(other[0] - together[0])) > 1e-3


def test_the_tokenizers_padding_side_does_not_matter() -> None:
    found = []
    for own in ("right", "left"):
        case = build(GPT2, padding_side=own)
        prompts, answers = rows(4, [3, 9, 5], case), rows(5, [2, 1, 3], case)
        found.append(measured(host_of(case.model), prompts, answers)[1])
    assert torch.equal(*found)


def test_gradients_flow_and_padding_has_none(each: Case) -> None:
    own = Continuations.of(host_of(each.model), [[3, 4], [5]], [[6], [7, 8, 9]])
    logits = torch.randn(2, 3, each.d_vocab, dtype=torch.float64, requires_grad=True)
    own.nll(logits).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0, :2].any()
    assert bool(logits.grad[0, 2].any())
    assert bool(logits.grad[1].any(-1).all())


def test_unused_logits_may_have_any_value(each: Case) -> None:
    """Unused logits before a short answer, including infinite ones."""
    own = Continuations.of(host_of(each.model), [[3, 4], [5]], [[6], [7, 8, 9]])
    logits = torch.randn(2, 3, each.d_vocab, dtype=torch.float64)
    nll, said = own.nll(logits), own.are_said(logits)
    logits[0, :2] = float("-inf")
    assert torch.equal(own.nll(logits), nll)
    assert torch.equal(own.are_said(logits), said)


def test_the_context_is_the_limit() -> None:
    case: Any = build(GPT2)
    host = host_of(case.model)
    _, nll, _ = measured(host, [[5] * (N_CTX - 1)], [[6, 7]])  # the last token is not read
    expected, _ = slowly(case, [5] * (N_CTX - 1), [6, 7])
    assert abs(float(nll) + float(sum(expected)) / 2) < 1e-9
    with pytest.raises(InputError, match="context"):
        Continuations.of(host, [[5] * (N_CTX - 1)], [[6, 7, 8]])
