"""A target per position, and the model's own prediction, against slow loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case
from torch import Tensor

from backward_lens_tl.capture.objectives import (
    logit_difference,
    next_token_loss,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.errors import InputError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

pytestmark = pytest.mark.usefixtures("as_for_a_user")

# With BOS 5, 17, 2 and 4 tokens, and answers of 4, 1, 6 and 1: several padded microbatches.
PROMPTS = ["Messi plays for", "The capital of France is the dog of the king in", "Rome", "Paris is"]
ANSWERS = [" Paris is in Rome", " Paris", " runs to the dog", " the"]
BOTH_CLASSES = pytest.mark.parametrize("case", ["bridge-gpt2", "hooked-llama"], indirect=True)


def ids_of(case: Case, text: str) -> list[int]:
    return case.model.tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(case: Case, prompt: str) -> list[int]:
    return case.model.to_tokens(prompt, prepend_bos=True)[0].tolist()


def lens(case: Case, objective: Any, target: Any = None, prompts: Any = PROMPTS) -> Any:
    return backward_lens(case.model, prompts, target, objective=objective, k=3, prepend_bos=True)


def answer_targets(case: Case, batch: int) -> list[int]:
    """The first token of the answer up to the prompt's last token, then the others."""
    prompt, answer = prompt_ids(case, PROMPTS[batch]), ids_of(case, ANSWERS[batch])
    return [answer[0]] * (len(prompt) - 1) + answer


def next_tokens(case: Case, batch: int) -> list[int]:
    return [*prompt_ids(case, PROMPTS[batch])[1:], -1]


def single_target(case: Case, batch: int) -> list[int]:
    return [7] * len(prompt_ids(case, PROMPTS[batch]))


def one_target_with_an_answer(case: Case, batch: int) -> list[int]:
    return [7] * len(answer_targets(case, batch))


OBJECTIVES = {
    "sequence_nll": (sequence_nll(ANSWERS), None, answer_targets),
    "next_token_loss": (next_token_loss(), None, next_tokens),
    "target_nll": (target_nll(7), None, single_target),
    "logit_difference": (logit_difference(7, 9), None, single_target),
    "sequence_nll and target": (sequence_nll(ANSWERS), 7, one_target_with_an_answer),
    "next_token_loss and target": (next_token_loss(), 7, single_target),
}


def slow_rank(case: Case, vector: Tensor, target: int) -> int:
    scores = case.lens(vector[None])[0].tolist()
    return sum(score > scores[target] for score in scores)


@pytest.mark.versions
@pytest.mark.parametrize("name", OBJECTIVES)
@BOTH_CLASSES
def test_each_position_is_ranked_by_its_own_target(case: Case, name: str) -> None:
    objective, target, expected = OBJECTIVES[name]
    result = lens(case, objective, target)
    targets = [expected(case, batch) for batch in range(4)]
    lengths = result.capture.mask.sum(1).tolist()
    assert lengths == [len(own) for own in targets]
    text = case.model.tokenizer.decode
    for batch, own in enumerate(targets):
        assert result.capture.targets[batch, : lengths[batch]].tolist() == own
        assert bool((result.capture.targets[batch, lengths[batch] :] == -1).all())
        texts = tuple(None if token < 0 else text([token]) for token in own)
        assert result.position_targets(batch) == texts
    for matrix, batch in product(result.matrices, range(4)):
        ranks = result.target_rank(matrix)[:, batch]
        assert bool((ranks[:, lengths[batch] :] == -1).all())
        for layer in (0, result.layers[-1]):
            gradient = result.capture[matrix, layer]
            raw = -gradient.vjps if matrix == "W_out" else gradient.inputs
            cells = result.cells(matrix, layer, batch)
            for cell, token, vector in zip(cells, targets[batch], raw[batch], strict=False):
                assert cell.target == (None if token < 0 else text([token]))
                if token < 0:
                    assert int(ranks[layer, cell.position]) == -1
                    assert cell.target_rank is None
                elif not cell.is_zero:
                    assert cell.target_rank == slow_rank(case, vector, token)
                    assert int(ranks[layer, cell.position]) == cell.target_rank


@pytest.mark.versions
@BOTH_CLASSES
def test_the_table_has_the_target_of_each_row(case: Case) -> None:
    result = lens(case, sequence_nll(ANSWERS))
    ranked = 0
    for row in result.to_df().itertuples():
        token = answer_targets(case, row.prompt)[row.position]
        assert row.target == case.model.tokenizer.decode([token])
        gradient = result.capture[row.matrix, row.layer]
        factors = gradient.inputs[row.prompt, row.position], gradient.vjps[row.prompt, row.position]
        assert row.write_norm == pytest.approx(float(torch.outer(*factors).norm()), rel=1e-10)
        ranked += not row.is_zero
    assert ranked > 100


# ----------------------------------------------------------------------------------- the prediction


@pytest.mark.versions
@pytest.mark.parametrize("name", OBJECTIVES)
@BOTH_CLASSES
def test_predictions_against_a_softmax_of_the_models_own_logits(case: Case, name: str) -> None:
    objective, target, _ = OBJECTIVES[name]
    result = lens(case, objective, target)
    for batch, prompt in enumerate(PROMPTS):
        start = prompt_ids(case, prompt)
        wanted = [7]
        if name == "sequence_nll":
            wanted = ids_of(case, ANSWERS[batch])
        with torch.no_grad():
            logits = case.logits(torch.tensor([[*start, *wanted[:-1]]]))[0].double()
        after = logits[len(start) - 1].tolist()
        total = sum(math.exp(each) for each in after)
        answer = max(range(len(after)), key=after.__getitem__)
        seen = result.prediction(batch)
        assert seen.answer == case.model.tokenizer.decode([answer])
        # Hugging Face's RMS norms round to float32.
        assert seen.answer_prob == pytest.approx(math.exp(after[answer]) / total, rel=1e-5)
        assert int(result.capture.prompt_lengths[batch]) == len(start)
        if name == "next_token_loss":
            assert (seen.target, seen.target_prob, seen.target_rank) == (None, None, None)
            continue
        prob = 1.0
        for row, token in zip(logits[len(start) - 1 :].tolist(), wanted, strict=True):
            prob *= math.exp(row[token]) / sum(math.exp(each) for each in row)
        assert seen.target == case.model.tokenizer.decode(wanted)
        assert seen.target_prob == pytest.approx(prob, rel=1e-5)
        assert seen.target_rank == sum(each > after[wanted[0]] for each in after)


def test_the_models_own_answer_leads(gpt2: Case) -> None:
    result = lens(gpt2, None)
    for batch in range(4):
        seen = result.prediction(batch)
        assert (seen.target, seen.target_prob) == (seen.answer, seen.answer_prob)
        assert seen.target_rank == 0
        assert seen.target_prob == pytest.approx(math.exp(-float(result.capture.loss[batch])))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_equals_its_prompts_alone(gpt2: Case, name: str) -> None:
    objective, target, _ = OBJECTIVES[name]
    together = lens(gpt2, objective, target)
    for batch, prompt in enumerate(PROMPTS):
        own = sequence_nll(ANSWERS[batch]) if name.startswith("sequence") else objective
        alone = lens(gpt2, own, target, prompt)
        assert together.position_targets(batch) == alone.position_targets()
        assert together.target(batch) == alone.target()
        assert together.capture.prompt_lengths[batch] == alone.capture.prompt_lengths[0]
        found, expected = together.prediction(batch), alone.prediction()
        assert (found.answer, found.target_rank) == (expected.answer, expected.target_rank)
        assert found.answer_prob == pytest.approx(expected.answer_prob, rel=1e-9)
        if name != "next_token_loss":
            assert found.target_prob == pytest.approx(expected.target_prob, rel=1e-9)
        n = len(alone.position_targets())
        for matrix in together.matrices:
            ranks = together.target_rank(matrix)[:, batch, :n]
            assert torch.equal(ranks, alone.target_rank(matrix)[:, 0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_and_predictions_are_saved(gpt2: Case, tmp_path: Path, name: str) -> None:
    objective, target, _ = OBJECTIVES[name]
    result = lens(gpt2, objective, target)
    result.save(tmp_path / "result")
    loaded = BackwardLensResult.load(tmp_path / "result")
    assert loaded.has_position_targets == result.has_position_targets
    for batch in range(4):
        assert loaded.position_targets(batch) == result.position_targets(batch)
        assert loaded.prediction(batch) == result.prediction(batch)
        assert loaded.cells("W_out", 1, batch) == result.cells("W_out", 1, batch)


# ------------------------------------------------------------------------------- what a target is


def test_the_target_is_the_whole_answer(gpt2: Case) -> None:
    result = lens(gpt2, sequence_nll(ANSWERS))
    assert [result.target(batch) for batch in range(4)] == ANSWERS
    assert lens(gpt2, next_token_loss()).target() is None
    assert lens(gpt2, sequence_nll(ANSWERS), 7).target(2) == gpt2.model.tokenizer.decode([7])


def test_an_answer_whose_characters_share_tokens(stories: Case) -> None:
    """ " é" is two byte tokens after a space; each alone is not a character."""
    text = " café ☃"
    result = backward_lens(stories.model, "Once upon a time", objective=sequence_nll(text))
    assert result.target() == text
    assert result.prediction().target == text


@pytest.mark.parametrize(
    ("objective", "target", "differ"),
    [
        (target_nll(7), None, False),
        (next_token_loss(), None, True),
        (sequence_nll(" Paris"), None, False),
        (sequence_nll(" Paris is"), None, True),
        (sequence_nll(" Paris is"), 7, False),
    ],
)
def test_whether_targets_differ(gpt2: Case, objective: Any, target: Any, differ: bool) -> None:
    assert lens(gpt2, objective, target).has_position_targets == differ


def test_position_targets_follow_the_chosen_positions(gpt2: Case) -> None:
    result = backward_lens(
        gpt2.model, PROMPTS, objective=sequence_nll(ANSWERS), positions=[-1, 0], prepend_bos=True
    )
    for batch in range(4):
        own = answer_targets(gpt2, batch)
        texts = tuple(gpt2.model.tokenizer.decode([own[place]]) for place in (-1, 0))
        assert result.position_targets(batch) == texts
        cells = result.cells("W_out", 0, batch)
        assert tuple(cell.target for cell in cells) == texts
        assert result.cell("W_out", 0, -1, batch).target == texts[0]


def own_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 9]


def test_a_callers_own_loss_has_no_targets_but_a_prediction(gpt2: Case) -> None:
    result = lens(gpt2, own_loss)
    assert result.capture.targets is None
    assert result.capture.target_texts is None
    assert not result.has_position_targets
    assert result.position_targets(2) == (None,) * 2
    seen = result.prediction(1)
    assert (seen.target, seen.target_prob, seen.target_rank) == (None, None, None)
    assert seen.answer == lens(gpt2, None).target(1)
    assert result.to_df()["target"].isna().all()
    with pytest.raises(InputError, match=r"own_loss has no target to rank; pass target="):
        result.target_rank("W_out")


METHODS: dict[str, Callable[[BackwardLensResult], object]] = {
    "target": lambda result: result.target(4),
    "position_targets": lambda result: result.position_targets(4),
    "prediction": lambda result: result.prediction(4),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_does_not_exist(gpt2: Case, method: str) -> None:
    result = backward_lens(gpt2.model, PROMPTS, 7, layers=0)
    with pytest.raises(InputError, match="prompt 4 does not exist"):
        METHODS[method](result)
