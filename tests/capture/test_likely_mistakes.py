"""Warnings about calls that probably do not do what was meant: once, and at the caller's line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from models import Case

import backward_lens_tl as blt
from backward_lens_tl.errors import BackwardLensWarning

pytestmark = pytest.mark.usefixtures("as_for_a_user")

PROMPT = "Lionel Messi plays for"


def warned(model: Any, prompts: Any, *args: Any, **options: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        blt.backward_lens(model, prompts, *args, layers=-1, **options)
    return [each for each in found if issubclass(each.category, BackwardLensWarning)]


def test_a_target_without_its_space(facts_model: Any) -> None:
    prompts = ["The capital of Italy is", PROMPT]
    [warning] = warned(facts_model, prompts, "Paris", multi_token="first")
    assert str(warning.message) == (
        "target 'Paris' of prompt 0 is read without a space, as in '... of Italy isParis'; "
        "' Paris' is probably meant: begin the target with the space, or pass a token id"
    )
    # The caller's line, or that of a wrapper which checks types.
    assert not Path(warning.filename).is_relative_to(Path(blt.__file__).parent)


def first(text: str) -> dict[str, Any]:
    return {"target": text, "multi_token": "first"}


@pytest.mark.parametrize(
    ("prompt", "options", "n"),
    [
        (PROMPT, {"objective": blt.sequence_nll("Paris Saint Germain")}, 1),
        (PROMPT, {"objective": blt.logit_difference("Paris", "Rome", "first")}, 1),
        (PROMPT, {"objective": blt.logit_difference(" Paris", "Rome", "first")}, 1),
        ([PROMPT] * 3, first("Paris"), 1),
        ("Messi plays for whom? Answer:", first("Paris"), 1),
        # Read as it was probably meant.
        (PROMPT, first(" Paris"), 0),
        (PROMPT + "\n", first("Paris"), 0),
        ("Messi plays for (", first("Paris"), 0),
        ("Messi said “", first("Paris"), 0),
        ("She saw two cat", first("s"), 0),
        ("It was 19", first("45"), 0),
        (PROMPT, first("."), 0),
        (PROMPT, {"target": 5}, 0),
        (PROMPT, {}, 0),
    ],
)
def test_which_targets_are_warned_about(
    facts_model: Any, prompt: Any, options: Any, n: int
) -> None:
    assert len(warned(facts_model, prompt, **options)) == n


def test_no_warning_in_a_chat(facts_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer begins without a space there."""
    template = "{{ messages[0]['content'] }} A:"
    monkeypatch.setattr(facts_model.tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "Messi plays for whom?"}]
    assert not warned(facts_model, messages, **first("Paris"))
    assert warned(facts_model, "Messi plays for whom? A:", **first("Paris"))


def test_a_second_bos(facts_model: Any) -> None:
    bos = facts_model.tokenizer.bos_token
    [warning] = warned(facts_model, [PROMPT, bos + PROMPT, bos + PROMPT], 5, prepend_bos=True)
    assert str(warning.message) == (
        "prompt 1 begins with two BOS tokens, '<|endoftext|>'; leave prepend_bos out if the text "
        "already begins with it"
    )
    assert not warned(facts_model, bos + PROMPT, 5)
    assert not warned(facts_model, PROMPT, 5, prepend_bos=True)


def test_a_second_bos_from_a_tokenizer(gpt2: Case) -> None:
    bos = gpt2.model.tokenizer.bos_token_id
    [warning] = warned(gpt2.model, {"input_ids": [[5, 6], [bos, bos, 7]]}, 5)
    assert "prompt 1" in str(warning.message)
    assert "add_special_tokens=False" in str(warning.message)
