"""A prompt gives the same numbers in a batch as alone, for any padding of the tokenizer."""

from __future__ import annotations

import pytest
import torch
from models import Case, build, nll, relative_error
from torch import Tensor

from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.lens import backward_lens

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

PROMPTS = ["Messi plays for", "The capital of France is the dog of the king in", "Rome", "Paris is"]
TARGETS = [" Paris", " the", " is", " Paris"]
# Both runs compute the same sums in float64; in one of them attention also adds masked zeros.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(
    scope="module",
    params=[
        ("bridge-gpt2", "left"),
        ("bridge-gemma2", "right"),
        ("hooked-gpt2", "right"),
        ("hooked-llama", "left"),
        *(
            pytest.param(param, marks=pytest.mark.slow)
            for param in [
                ("bridge-gpt2", "right"),
                ("bridge-llama", "left"),
                ("bridge-neox", "left"),
                ("hooked-gpt2", "left"),
            ]
        ),
    ],
    ids=lambda param: "-".join(param),
)
def padding(request: pytest.FixtureRequest) -> Case:
    """Models whose tokenizers pad on either side."""
    name, side = request.param
    case = build(name, padding_side=side)
    assert case.model.tokenizer.padding_side == side
    return case


def test_a_batch_equals_its_prompts_one_by_one(padding: Case) -> None:
    model = padding.model
    options = {"matrices": "mlp", "k": 3}
    batch = backward_lens(model, PROMPTS, TARGETS, **options)
    # HF's norms round to float32, so a difference of one rounding there is 1e-7.
    close = {"rtol": 1e-4, "atol": 1e-6} if padding.logits_in_float32 else CLOSE
    for b, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        alone = backward_lens(model, prompt, target, **options)
        n = alone.capture.tokens.shape[1]
        mask = batch.capture.mask[b]
        assert int(mask.sum()) == n
        assert mask[:n].all(), "padding is on the right, whatever the tokenizer does"
        assert torch.equal(batch.capture.tokens[b, :n], alone.capture.tokens[0])
        assert batch.capture.str_tokens[b] == alone.capture.str_tokens[0]
        torch.testing.assert_close(batch.capture.loss[b], alone.capture.loss[0], **close)
        for gradient in alone.capture:
            key = gradient.matrix, gradient.layer
            found = batch.capture[key]
            for name in ("inputs", "vjps", "norms"):
                values = getattr(found, name)[b]
                torch.testing.assert_close(values[:n], getattr(gradient, name)[0], **close)
                assert (values[n:] == 0).all()
            assert found.is_zero[b, n:].all()
            assert found.rank(b) == gradient.rank(0)
        for matrix in padding.matrices:
            live = ~alone.is_zero(matrix)[:, 0]
            for name in ("target_rank", "top_ids"):
                values = getattr(batch.readout(matrix), name)[:, b]
                wanted = getattr(alone.readout(matrix), name)[:, 0]
                assert torch.equal(values[:, :n][live], wanted[live])
                assert (values[:, n:] == -1).all()
            assert (batch.norms(matrix)[:, b, n:] == 0).all()
            top = batch.top_tokens(matrix, 0, -1, batch=b)
            assert top == alone.top_tokens(matrix, 0, -1)
            assert len(top) == 3


def test_each_prompt_of_a_ragged_batch_has_autograds_gradient(padding: Case) -> None:
    """Compare with the raw model on unpadded tokens, so a shared error cannot hide."""
    capture = capture_gradients(padding.model, PROMPTS, target_nll(TARGETS), matrices="mlp")
    tolerance = 1e-6 if padding.logits_in_float32 else 1e-12
    for b in range(len(PROMPTS)):
        tokens = capture.tokens[b][capture.mask[b]][None]
        target = padding.model.tokenizer(TARGETS[b], add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            loss = nll(target)(padding.logits(tokens), tokens)[0]
        torch.testing.assert_close(capture.loss[b], loss, rtol=1e-6, atol=0)
        for key, expected in padding.weight_gradients(tokens, nll(target)).items():
            assert relative_error(capture[key].dense(b), expected) <= tolerance


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_tokens_match_the_models_tokenization(padding: Case, prepend_bos: bool | None) -> None:
    capture = capture_gradients(
        padding.model, PROMPTS, target_nll(5), layers=0, prepend_bos=prepend_bos
    )
    asked = padding.model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    for b, prompt in enumerate(PROMPTS):
        ids = padding.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected = [padding.model.tokenizer.bos_token_id] * asked + ids
        assert capture.tokens[b][capture.mask[b]].tolist() == expected
        spelled = "".join(capture.str_tokens[b][int(asked) :])
        assert spelled == prompt


def test_order_of_the_prompts_changes_nothing(padding: Case) -> None:
    prompts = [prompt for prompt in PROMPTS if " " in prompt]  # has a next token even without BOS
    forwards = capture_gradients(padding.model, prompts, next_token_loss())
    backwards = capture_gradients(padding.model, prompts[::-1], next_token_loss())
    for key, gradient in forwards.gradients.items():
        torch.testing.assert_close(backwards[key].vjps.flip(0), gradient.vjps, **CLOSE)
        torch.testing.assert_close(backwards[key].inputs.flip(0), gradient.inputs, **CLOSE)


def test_the_tokenizers_padding_settings_are_unchanged(padding: Case) -> None:
    def habits() -> tuple:
        tokenizer = padding.model.tokenizer
        return (
            tokenizer.padding_side,
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            tokenizer(PROMPTS, padding=True)["input_ids"],
        )

    before = habits()
    capture_gradients(padding.model, PROMPTS, target_nll(5), prepend_bos=True)
    assert habits() == before


def test_the_pad_token_in_a_prompt_is_an_ordinary_token(padding: Case) -> None:
    pad = padding.model.tokenizer.pad_token_id
    tokens = torch.tensor([[pad, pad, 7, pad, 9, pad]])
    capture = capture_gradients(padding.model, tokens, target_nll(5), matrices="mlp")
    assert capture.mask.all()
    for key, expected in padding.weight_gradients(tokens, nll(5)).items():
        assert relative_error(capture[key].dense(), expected) <= 1e-12


def test_ragged_batch_of_the_stories_model(stories: Case) -> None:
    prompts = ["Once upon a time", "The dog", "Lily and her mom went to the park to play with a"]
    batch = capture_gradients(stories.model, prompts, target_nll(" dog", "first"), matrices="mlp")
    for b, prompt in enumerate(prompts):
        tokens = stories.model.to_tokens(prompt)
        assert torch.equal(batch.tokens[b][batch.mask[b]], tokens[0])
        alone = capture_gradients(
            stories.model, prompt, target_nll(" dog", "first"), matrices="mlp"
        )
        for key, gradient in alone.gradients.items():
            # float32; attention sums different numbers of zeros.
            close(batch[key].vjps[b, : tokens.shape[1]], gradient.vjps[0])
            close(batch[key].inputs[b, : tokens.shape[1]], gradient.inputs[0])


def close(found: Tensor, expected: Tensor) -> None:
    assert relative_error(found, expected) < 1e-5


def test_ragged_batch_of_the_facts_model(facts: Case) -> None:
    prompts = ["Lionel Messi plays for", "Paris is the capital of the country of France and"]
    batch = capture_gradients(facts.model, prompts, target_nll(" Paris"))
    for b, prompt in enumerate(prompts):
        alone = capture_gradients(facts.model, prompt, target_nll(" Paris"))
        n = alone.mask.shape[1]
        for key, gradient in alone.gradients.items():
            close(batch[key].vjps[b, :n], gradient.vjps[0])
            close(batch[key].inputs[b, :n], gradient.inputs[0])


def test_padding_beyond_a_sliding_window_is_harmless() -> None:
    """Such a position sees no real token, and masking the padding would give NaN."""
    case = build("bridge-gemma2")  # its window is 20
    prompts = ["Rome", "Paris is in France and " * 6]
    batch = capture_gradients(case.model, prompts, target_nll(5))
    assert int(batch.mask.sum(1)[1] - batch.mask.sum(1)[0]) > 20
    for b, prompt in enumerate(prompts):
        for gradient in capture_gradients(case.model, prompt, target_nll(5)):
            together = batch[gradient.matrix, gradient.layer]
            n = gradient.mask.shape[1]
            # HF's norms round to float32.
            torch.testing.assert_close(together.vjps[b, :n], gradient.vjps[0], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                together.inputs[b, :n], gradient.inputs[0], rtol=1e-3, atol=1e-5
            )
