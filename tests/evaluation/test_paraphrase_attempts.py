"""Attempts at paraphrases: combinations of methods write what their parts write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from models import relative_error
from torch import Tensor, nn

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.editing import EditRequest, ForwardPassShift, WeightDelta, facts_moments
from backward_lens_tl.editing.methods.rome import ROME
from benchmarks import paraphrases
from benchmarks.editing_subjects import SUBJECTS, Methods
from benchmarks.paraphrases import ATTEMPTS, HalfBefore, InTexts, Remembered, ValueInKey

RECORD: Any = read_records("facts").rows[260]
REQUEST = EditRequest.of(RECORD)


def rome(**settings: Any) -> ROME:
    return ROME(layer=2, moments=facts_moments(), steps=3, prepend_bos=False, **settings)


def dense(delta: WeightDelta, layer: int) -> Tensor:
    return delta["W_out", layer].dense()


@pytest.mark.parametrize("key", ["plain", "contrast"])
def test_a_value_is_written_where_the_other_key_responds(
    facts_model: Any, key: Literal["plain", "contrast"]
) -> None:
    found = ValueInKey(method=rome(), key=key, prepend_bos=False)(facts_model, REQUEST)
    ids = facts_model.to_tokens(
        RECORD.prompt[: RECORD.prompt.index(RECORD.subject) + len(RECORD.subject)],
        prepend_bos=False,
    )
    _, cache = facts_model.run_with_cache(ids)
    reads = cache["post", 2][0, -1].detach()
    wanted = reads @ dense(rome()(facts_model, REQUEST), 2)
    assert relative_error(reads @ dense(found, 2), wanted) < 1e-4
    assert found.rank == 1
    shift = ForwardPassShift(layer=2, size=1.0, key=key, fact_token="subject_last")
    edit: Any = replace(shift, prepend_bos=False)(facts_model, REQUEST)["W_out", 2]
    own: Any = found["W_out", 2]
    assert torch.equal(own.left, edit.left)


def test_half_of_an_edit_precedes_the_shift(facts_model: nn.Module) -> None:
    shift = ForwardPassShift(layer=6, prepend_bos=False)
    found = HalfBefore(method=rome(), shift=shift, prepend_bos=False)(facts_model, REQUEST)
    half = rome()(facts_model, REQUEST).scale(0.5)
    assert torch.equal(dense(found, 2), dense(half, 2))
    with half.applied(facts_model):
        wanted = dense(shift(facts_model, REQUEST), 6)
    assert torch.equal(dense(found, 6), wanted)
    assert relative_error(dense(shift(facts_model, REQUEST), 6), wanted) > 0.1


def test_the_prompt_is_edited_in_other_texts_too(facts_model: nn.Module) -> None:
    shift = ForwardPassShift(layer=6, prepend_bos=False)
    found = InTexts(shift=shift, prepend_bos=False)(facts_model, REQUEST)
    longer = [
        EditRequest(before + REQUEST.prompt, REQUEST.target, REQUEST.subject)
        for before in paraphrases._BEFORE
    ]
    assert torch.equal(dense(found, 6), dense(shift(facts_model, [REQUEST, *longer]), 6))
    assert relative_error(dense(shift(facts_model, REQUEST), 6), dense(found, 6)) > 0.01


def test_an_edit_is_computed_once(facts_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Remembered(method=rome(), prepend_bos=False)
    first = method(facts_model, REQUEST)
    monkeypatch.setattr(ROME, "compute", None)
    assert torch.equal(dense(method(facts_model, REQUEST), 2), dense(first, 2))
    with pytest.raises(TypeError):
        method(facts_model, replace(REQUEST, target=" Rome"))


def test_every_attempt_can_be_created(facts_model: nn.Module, tmp_path: Path) -> None:
    methods = Methods(facts_model, SUBJECTS["facts"], tmp_path)
    made: dict[str, Any] = {name: make(methods) for name, make in ATTEMPTS.items()}
    assert all(each.settings() for each in made.values())
    assert made["`rome`'s value, plain key"].method is made["`rome`"]
