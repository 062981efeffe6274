"""Tokenization of requests: the end of the subject, the target's tokens, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from models import N_CTX, build
from transformers import AutoTokenizer

from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import BadRecord
from backward_lens_tl.editing import EditRequest, ForwardPassShift
from backward_lens_tl.editing.requests import (
    TokenizedRequest,
    target_ids,
    tokenize_request,
    tokenize_requests,
)
from backward_lens_tl.errors import EditError, InputError
from backward_lens_tl.models import Host, host_of

pytestmark = pytest.mark.usefixtures("as_for_a_user")


@pytest.fixture(scope="module", params=["bridge-gpt2", "hooked-gpt2"])
def host(request: pytest.FixtureRequest) -> Host:
    """Its tokens are Messi | Ġplays | Ġfo | r, Rome | Ġis | Ġin | ĠRome, Ġbal | l."""
    return host_of(build(request.param).model)


def tokenized(host: Host, *args: Any, bos: bool | None = False, **kwargs: Any) -> TokenizedRequest:
    return tokenize_request(host, EditRequest(*args, **kwargs), bos)


def taught(asked: TokenizedRequest) -> tuple[int, ...]:
    """The token ids that the model reads for a prompt and its target."""
    return (*asked.prompt, *asked.target[:-1])


def ids(host: Host, text: str) -> list[int]:
    return host.tokenizer(text, add_special_tokens=False)["input_ids"]


# ----------------------------------------------------------------------------------------- subject


@pytest.mark.parametrize(
    ("prompt", "subject", "start", "last"),
    [
        ("Rome is in Rome and Rome", "Rome", None, 0),
        ("Rome is in Rome and Rome", "Rome", 0, 0),
        ("Rome is in Rome and Rome", "Rome", 11, 3),
        ("Rome is in Rome and Rome", "Rome", 20, 6),  # the end of the prompt
        ("Rome is in Rome and Rome", "Rome is", 0, 1),  # several tokens
        ("Rome is in Rome and Rome", "in Rome and", 8, 5),
        ("Rome is in Rome and Rome", "Rome is in Rome and Rome", None, 6),
        ("Rome is in Rome and Rome", "Rome and Rome", None, 6),
        ("Messi plays for", "Messi", None, 0),
        ("Messi plays for", "for", None, 3),  # two tokens, Ġfo | r
        ("Messi plays for", "fo", None, 2),
        ("Messi plays for", "plays f", None, 2),  # a part of a token
        ("Messi plays for", "Messi plays ", None, 1),  # surrounding spaces are ignored
        ("Messi plays for", None, None, None),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_the_subjects_last_token(
    host: Host, prompt: str, subject: str, start: int | None, last: int | None, bos: bool
) -> None:
    found = tokenized(host, prompt, " Paris", subject=subject, subject_start=start, bos=bos)
    front = [host.tokenizer.bos_token_id] if bos else []
    assert list(found.prompt) == [*front, *ids(host, prompt)]
    assert found.subject_last == (None if last is None else last + bos)
    if last is not None:
        assert found.needed_subject == found.subject_last


def test_the_models_own_default_of_bos(host: Host) -> None:
    found = tokenized(host, "Rome is in", " Paris", subject="Rome", bos=None)
    bos = bool(host.model.cfg.default_prepend_bos)
    assert len(found.prompt) == 3 + bos
    assert found.subject_last == int(bos)


def test_whole_words_are_preferred_to_parts_of_words(host: Host) -> None:
    found = tokenized(host, "Romeo is in Rome", " Paris", subject="Rome")
    at = len(ids(host, "Romeo is in"))
    assert found.subject_last == at


@pytest.mark.parametrize(
    ("subject", "start"),
    [
        ("Berlin", None),
        ("rome", None),
        ("", None),
        (" ", None),
        (5, None),
        (["Rome"], None),
        ("Rome", 1),  # it does not begin there
        ("Rome", 12),
        ("Rome", 100),
        ("Rome", -4),
        ("Rome", 11.0),
        ("Rome", "11"),
        ("Rome", True),
        (5, 11),
        (None, 11),
    ],
)
def test_a_subject_that_is_not_in_the_prompt(host: Host, subject: Any, start: Any) -> None:
    with pytest.raises(EditError):
        tokenized(host, "Rome is in Rome", " Paris", subject=subject, subject_start=start)


def test_a_method_that_needs_a_subject_refuses_requests_without_one(host: Host) -> None:
    with pytest.raises(EditError, match="has no subject"):
        _ = tokenized(host, "Rome is in", " Paris").needed_subject


def test_subjects_of_the_facts_model(facts_model: Any) -> None:
    """Compare with the tokenizer's offsets, which the package does not use here."""
    facts_host = host_of(facts_model)
    tokenizer = AutoTokenizer.from_pretrained(facts_host.model.tokenizer.name_or_path)
    records = [record for record in read_records("facts") if not isinstance(record, BadRecord)]
    for record in records[:60]:
        assert record.subject is not None
        start = record.subject_start
        start = record.prompt.index(record.subject) if start is None else start
        end = start + len(record.subject)
        offsets = tokenizer(record.prompt, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        last = max(at for at, (left, right) in enumerate(offsets) if left < end and right > start)
        for bos in (False, True):
            found = tokenize_request(facts_host, EditRequest.of(record), bos)
            assert found.subject_last == last + bos


# ------------------------------------------------------------------------------------------ target


def test_targets_are_used_unchanged(host: Host) -> None:
    """With or without their space: nothing is prepended, and no special token is added."""
    [prompt] = tokenize_prompts(host, "Rome is in")
    assert target_ids(prompt, " the") == [61]
    assert target_ids(prompt, "the") == [29, 36]
    assert target_ids(prompt, " Paris Rome") == [40, 85]
    assert target_ids(prompt, 7) == [7]
    assert tokenized(host, "Rome is in", "the", bos=True).target == (29, 36)


def test_the_models_input_for_prompt_and_target(host: Host) -> None:
    prompt = tuple(ids(host, "Rome is in"))
    assert taught(tokenized(host, "Rome is in", " Paris")) == prompt
    assert taught(tokenized(host, "Rome is in", " Paris Rome")) == (*prompt, 40)
    assert taught(tokenized(host, "Rome is in", " Paris Rome the")) == (*prompt, 40, 85)
    assert taught(tokenized(host, "Rome is in", 9)) == prompt


@pytest.mark.parametrize("target", ["", -1, 97, 10**30, None, 1.0, True, [" Paris"], b" Paris"])
def test_invalid_targets(host: Host, target: Any) -> None:
    with pytest.raises(EditError):
        tokenized(host, "Rome is in", target)


def test_prompt_and_target_must_fit_into_the_context(host: Host) -> None:
    prompt = "Rome" + " Rome" * (N_CTX - 2)
    assert len(taught(tokenized(host, prompt, " Paris Rome"))) == N_CTX
    with pytest.raises(EditError, match=f"{N_CTX + 1} tokens"):
        tokenized(host, prompt, " Paris Rome the")
    with pytest.raises(EditError, match="context"):
        tokenized(host, prompt, " Paris Rome", bos=True)


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "prompt", ["", None, 5, ["Rome is in"], ["Rome", "Paris"], b"Rome", "\ud800"]
)
def test_invalid_prompts(host: Host, prompt: Any) -> None:
    with pytest.raises(EditError):
        tokenized(host, prompt, " Paris")


def test_one_request_or_several(host: Host) -> None:
    request = EditRequest("Rome is in", " Paris")
    for requests, n in ((request, 1), ([request, request], 2), (iter([request]), 1)):
        found = tokenize_requests(host, requests, False)
        assert [each.request for each in found] == [request] * n


@pytest.mark.parametrize(
    "requests", [[], (), "Rome is in", [("Rome", " Paris")], [None], [EditRequest], {"prompt": "a"}]
)
def test_objects_that_are_not_requests(host: Host, requests: Any) -> None:
    with pytest.raises(EditError):
        tokenize_requests(host, requests, False)


@pytest.mark.parametrize("requests", [None, 5])
def test_objects_that_are_not_lists(host: Host, requests: Any) -> None:
    with pytest.raises(EditError):
        ForwardPassShift(layer=0, size=1)(host.model, requests)


# ------------------------------------------------------------------------------------------ records


def test_requests_of_records() -> None:
    rows = [
        {"prompt": "Rome is in Rome", "target": " Paris", "subject": "Rome", "subject_start": 11},
        {"prompt": "Rome is in", "target": 7},
        {
            "requested_rewrite": {
                "prompt": "{} plays for",
                "subject": "Messi",
                "target_new": {"str": "Paris"},
                "target_true": {"str": "Rome"},
            }
        },
    ]
    found = [EditRequest.of(next(iter(read_records([row])))) for row in rows]
    assert found == [
        EditRequest("Rome is in Rome", " Paris", "Rome", 11),
        EditRequest("Rome is in", 7),
        EditRequest("Messi plays for", " Paris", "Messi", 0),
    ]


def test_a_bad_record_is_not_a_request() -> None:
    (bad,) = read_records([{"prompt": 5, "target": " Paris"}])
    assert isinstance(bad, BadRecord)
    with pytest.raises(EditError, match="BadRecord"):
        EditRequest.of(bad)  # type: ignore[arg-type]
    with pytest.raises(EditError):
        EditRequest.of({"prompt": "Rome", "target": " Paris"})  # type: ignore[arg-type]


def test_errors_are_input_errors() -> None:
    assert issubclass(EditError, InputError)
    assert issubclass(EditError, ValueError)
