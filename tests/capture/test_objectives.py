"""Objectives: values and gradients of each, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Case, nll, relative_error, training_loss
from torch import Tensor

from backward_lens_tl.capture.objectives import (
    logit_difference,
    next_token_loss,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import TargetError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.weight_patching import stepped

PROMPTS = ["Messi plays for", "The capital of France is", "Rome"]
EXACT = 1e-12
# Objectives treat the logits of every model equally; `test_capture.py` covers all models.
SOFTCAP_OR_NOT = pytest.mark.parametrize("case", ["bridge-gemma2", "hooked-gpt2"], indirect=True)


def assert_objective(
    case: Case, objective: Any, loss: Callable[[Tensor, Tensor], Tensor], n: int = 6
) -> None:
    """Value and gradient of an objective against the raw model's."""
    tokens = case.tokens(n, n)
    capture = capture_gradients(case.model, tokens, objective, matrices="mlp")
    with torch.no_grad():
        expected = loss(case.logits(tokens), tokens)
    # HF's RMS norms round to float32 in between, equally in both runs.
    torch.testing.assert_close(capture.loss, expected, rtol=1e-10, atol=1e-12)
    for prompt in range(2):
        gradients = case.weight_gradients(tokens[prompt : prompt + 1], loss)
        for key, gradient in gradients.items():
            assert relative_error(capture[key].dense(prompt), gradient) <= EXACT


@SOFTCAP_OR_NOT
def test_target_nll(case: Case) -> None:
    assert_objective(case, target_nll(11), nll(11))


@SOFTCAP_OR_NOT
def test_logit_difference(case: Case) -> None:
    assert_objective(
        case, logit_difference(3, 8), lambda logits, tokens: logits[:, -1, 8] - logits[:, -1, 3]
    )


@SOFTCAP_OR_NOT
def test_next_token_loss(case: Case) -> None:
    assert_objective(case, next_token_loss(), training_loss)


@SOFTCAP_OR_NOT
def test_callable(case: Case) -> None:
    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return (logits[:, 2] ** 2).sum(-1) + logits[:, 0, 1] * tokens[:, 3]

    assert_objective(case, loss, loss)


@SOFTCAP_OR_NOT
def test_own_answer(case: Case) -> None:
    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        last = logits[:, -1]
        return torch.logsumexp(last, -1) - last.max(-1).values

    assert_objective(case, target_nll(), loss)


def test_an_update_of_logit_difference_raises_the_first_and_lowers_the_second(
    one_gpt2: Case,
) -> None:
    model, tokens = one_gpt2.model, one_gpt2.tokens(4)
    capture = capture_gradients(model, tokens, logit_difference(3, 8))
    assert capture.targets is not None
    assert capture.targets.tolist() == [[3] * 4]
    host = host_of(model)
    with torch.no_grad():
        before = model(tokens)[0, -1]
        for site in find_editable(host, "mlp", None):
            step = capture[site.matrix, site.layer].dense()
            with stepped(site, -1e-4 * step / step.norm()):
                after = model(tokens)[0, -1]
            assert after[3] - after[8] > before[3] - before[8]
    # The last one is W_out of the last layer.
    assert after[3] > before[3]
    assert after[8] < before[8]


def text_ids(case: Case, text: str) -> list[int]:
    return case.model.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("answers", [" Paris", [" Paris is in Rome", " the", " runs to the dog"]])
def test_sequence_nll_reads_every_token_of_the_answer(gpt2: Case, answers: Any) -> None:
    capture = capture_gradients(gpt2.model, PROMPTS, sequence_nll(answers))
    texts = [answers] * 3 if isinstance(answers, str) else answers
    for b, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        start = gpt2.model.to_tokens(prompt)[0].tolist()
        answer = text_ids(gpt2, text)
        ids = torch.tensor([start + answer[:-1]])

        def loss(
            logits: Tensor, tokens: Tensor, first: int = len(start) - 1, answer: list = answer
        ) -> Tensor:
            total = torch.zeros(())
            for i, token in enumerate(answer):
                row = logits[0, first + i]
                total = total + torch.logsumexp(row, -1) - row[token]
            return total[None]

        assert torch.equal(capture.tokens[b][capture.mask[b]], ids[0])
        with torch.no_grad():
            torch.testing.assert_close(capture.loss[b : b + 1], loss(gpt2.logits(ids), ids))
        for key, gradient in gpt2.weight_gradients(ids, loss).items():
            assert relative_error(capture[key].dense(b), gradient) <= EXACT
        assert capture.targets is not None
        assert (
            capture.targets[b][capture.mask[b]].tolist() == answer[:1] * (len(start) - 1) + answer
        )


def test_sequence_of_one_token_is_target_nll(gpt2: Case) -> None:
    sequence = capture_gradients(gpt2.model, PROMPTS, sequence_nll(" Paris"))
    single = capture_gradients(gpt2.model, PROMPTS, target_nll(" Paris"))
    for key, gradient in single.gradients.items():
        torch.testing.assert_close(sequence[key].vjps, gradient.vjps, rtol=1e-10, atol=1e-14)


def test_callable_sees_prompts_without_padding(gpt2: Case) -> None:
    seen: list[tuple[int, int]] = []

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        assert logits.shape == (*tokens.shape, 97)
        seen.append(tuple(tokens.shape))
        return logits[:, -1].logsumexp(-1) - logits[:, -1, 7]

    prompts = [*PROMPTS, "Paris is", "Messi plays the"]
    own = capture_gradients(gpt2.model, prompts, loss)
    builtin = capture_gradients(gpt2.model, prompts, target_nll(7))
    assert sum(rows for rows, _ in seen) == 5
    torch.testing.assert_close(own.loss, builtin.loss)
    for key, gradient in builtin.gradients.items():
        torch.testing.assert_close(own[key].vjps, gradient.vjps, rtol=1e-10, atol=1e-14)


def test_ragged_next_token_loss_is_each_prompts_own_mean(gpt2: Case) -> None:
    capture = capture_gradients(gpt2.model, PROMPTS, next_token_loss())
    for b, prompt in enumerate(PROMPTS):
        tokens = gpt2.model.to_tokens(prompt)
        with torch.no_grad():
            expected = training_loss(gpt2.logits(tokens), tokens)[0]
        torch.testing.assert_close(capture.loss[b], expected)


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("last", -1)])
def test_target_of_several_tokens_by_position(gpt2: Case, position: Any, index: int) -> None:
    text = " river of Rome"
    ids = text_ids(gpt2, text)
    assert len(ids) > 1
    result = backward_lens(gpt2.model, PROMPTS, text, multi_token=position)
    expected = backward_lens(gpt2.model, PROMPTS, ids[index])
    assert torch.equal(result.capture.loss, expected.capture.loss)
    assert torch.equal(result.target_rank("W_out"), expected.target_rank("W_out"))
    capture = capture_gradients(gpt2.model, PROMPTS, target_nll(text, position))
    assert torch.equal(capture.loss, expected.capture.loss)


def test_sentencepiece_targets(stories: Case) -> None:
    """The tokenizer prepends a space to every text; `" time"` must not get two."""
    tokenizer = stories.model.tokenizer
    wanted = tokenizer.convert_tokens_to_ids("▁the")
    result = backward_lens(stories.model, "Once upon a time", " the")
    assert result.capture.targets is not None
    assert result.capture.targets.unique().tolist() == [wanted]
    assert result.target() == " the"
    with pytest.raises(TargetError, match="tokens"):
        backward_lens(stories.model, "Once upon a time", " Barcelona")


def test_greedy_answer_of_a_trained_model(stories: Case) -> None:
    result = backward_lens(stories.model, "Once upon a", layers=-1)
    tokens = stories.model.to_tokens("Once upon a")
    with torch.no_grad():
        answer = int(stories.logits(tokens)[0, -1].argmax())
    assert result.capture.targets is not None
    assert result.capture.targets.unique().tolist() == [answer]


def test_names_abbreviate_long_lists_of_targets() -> None:
    assert target_nll([" a", " b", " c"]).name == "target_nll([' a', ' b', ' c'])"
    assert target_nll([" a"] * 40).name == "target_nll([' a', ' a', ' a', ... 37 more])"
    assert logit_difference(" a", [3, 4]).name == "logit_difference(' a', [3, 4])"
