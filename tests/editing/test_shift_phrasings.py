"""Shifts of a fact in several phrasings, against the same requests written out by hand."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from edit_pairs import EITHER, LAYER, pair

import backward_lens_tl as blt
from backward_lens_tl.editing import EditRequest, ForwardPassShift
from backward_lens_tl.editing.shift.phrasings import PHRASINGS
from backward_lens_tl.errors import EditError

pytestmark = pytest.mark.usefixtures("as_for_a_user")

REQUEST = EditRequest("Lionel Messi plays for", " Paris", subject="Lionel Messi")
OWN = "The king and {subject} run to"


def test_a_phrasing_is_another_request_with_the_same_target() -> None:
    own = pair("gpt2", EITHER)
    asked = EditRequest("The capital of France is", 40, "France")
    settings: Any = {"layer": LAYER, "prepend_bos": False}
    found = ForwardPassShift(**settings, phrasings=("A river of {subject} is", OWN))
    written_out = [
        asked,
        EditRequest("A river of France is", 40, "France", 11),
        EditRequest("The king and France run to", 40, "France", 13),
    ]
    delta = found(own.model, asked)
    expected = ForwardPassShift(**settings)(own.model, written_out)
    assert torch.equal(delta["W_out", LAYER].dense(), expected["W_out", LAYER].dense())
    assert delta.outcomes == expected.outcomes
    assert [each.prompt for each in delta.outcomes] == [each.prompt for each in written_out]
    assert repr(delta).split("; ")[1].startswith("3 prompts, sizes ")
    alone = ForwardPassShift(**settings)(own.model, asked)
    assert not torch.equal(delta["W_out", LAYER].dense(), alone["W_out", LAYER].dense())


def test_several_facts_have_phrasings_each() -> None:
    own = pair("gpt2", EITHER)
    asked = [EditRequest("Rome is in", 40, "Rome"), EditRequest("Messi plays for", 41, "Messi")]
    found = ForwardPassShift(layer=LAYER, prepend_bos=False, phrasings=OWN)(own.model, asked)
    assert [(each.prompt, each.target) for each in found.outcomes] == [
        ("Rome is in", 40),
        ("Messi plays for", 41),
        ("The king and Rome run to", 40),
        ("The king and Messi run to", 41),
    ]


def test_the_requests_own_prompt_is_edited_once(facts_model: Any) -> None:
    alone = ForwardPassShift()(facts_model, REQUEST)
    found = ForwardPassShift(phrasings="{subject} plays for")(facts_model, REQUEST)
    assert torch.equal(found["W_out", 6].dense(), alone["W_out", 6].dense())


def test_phrasings_change_paraphrases_that_are_not_among_them(facts_model: Any) -> None:
    other, neighbor = "The team of Lionel Messi is", "LeBron James plays for"

    def answers(**settings: Any) -> list[str]:
        with ForwardPassShift(**settings)(facts_model, REQUEST).applied(facts_model):
            lenses = (blt.backward_lens(facts_model, text, layers=-1) for text in (other, neighbor))
            return [lens.target() for lens in lenses]

    assert answers() == [" Miami", " Lakers"]
    assert answers(phrasings="generic") == [" Paris", " Lakers"]
    assert other not in [each.replace("{subject}", "Lionel Messi") for each in PHRASINGS]


def test_an_evaluation_reports_the_records_own_prompts(facts_model: Any) -> None:
    method = ForwardPassShift(phrasings="generic")
    config = blt.EvaluationConfig(records=2, generation_length=0, n_texts=0)
    found = blt.evaluate(facts_model, "facts", tempfile.mkdtemp(), method, config, progress=False)
    edits = found.edits()
    edits = edits[edits["method"] != "none"]
    assert edits["is_reached"].tolist() == [True, True]
    assert edits["efficacy"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "phrasings", ["", "plays for", "{subject} and {subject}", ("generic", "{}")]
)
def test_phrasings_need_a_place_for_the_subject(phrasings: Any) -> None:
    with pytest.raises(EditError, match=r"pass 'generic', or prompts with \{subject\} once"):
        ForwardPassShift(phrasings=phrasings)


def test_phrasings_need_a_subject(facts_model: Any) -> None:
    with pytest.raises(EditError, match="has no subject, but phrasings are prompts about one"):
        ForwardPassShift(phrasings="generic")(facts_model, EditRequest(REQUEST.prompt, " Paris"))


def test_a_phrasing_has_one_target() -> None:
    own = pair("gpt2", EITHER)
    asked = [EditRequest("Rome is in", 40, "Rome"), EditRequest("Rome has", 41, "Rome")]
    method = ForwardPassShift(layer=LAYER, prepend_bos=False, phrasings=OWN)
    with pytest.raises(EditError, match="'The king and Rome run to' would get two targets, 40 and"):
        method(own.model, asked)
    same = [asked[0], EditRequest("Rome has", 40, "Rome")]
    assert [each.prompt for each in method(own.model, same).outcomes] == [
        "Rome is in",
        "Rome has",
        "The king and Rome run to",
    ]
