"""Requests for edits: a prompt, its new answer, and the subject that it is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

from backward_lens_tl._checks import is_integer, listed, shown
from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import Record
from backward_lens_tl.data.segments import covered_tokens, subject_at
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.models import Host
from backward_lens_tl.models.vocabulary import Span


@dataclass(frozen=True)
class EditRequest:
    """One fact to teach a model.

    Attributes:
        prompt: The prompt, such as `"Lionel Messi plays for"`.
        target: The new answer: a text as it continues the prompt, with its leading space, or a
            token id.
        subject: The part of the prompt that the fact is about, for methods that edit there.
        subject_start: The index of the subject's first character in the prompt, needed only if the
            subject occurs several times and the first is not meant.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris", "Lionel Messi")
        >>> blt.editing.GradientStep("sgd", lr=1.0, layers=6)(model, request)
        WeightDelta(GradientStep, W_out of layer 6)
    """

    prompt: str
    target: str | int
    subject: str | None = None
    subject_start: int | None = None

    @classmethod
    def of(cls, record: Record) -> EditRequest:
        """Create the request of a row of a data set.

        Args:
            record: The row.

        Returns:
            Its prompt, target and subject.

        Raises:
            EditError: If it is not a record.

        Examples:
            >>> record = blt.read_records("facts").rows[0]
            >>> blt.editing.EditRequest.of(record)
            EditRequest(prompt='Porsche was set up in', target=' Spain', subject='Porsche',
            subject_start=0)
        """
        if not isinstance(record, Record):
            raise EditError(
                f"{shown(record)} is a {type(record).__name__}; pass a Record, such as the rows of "
                "read_records(data) that are not BadRecords"
            )
        return cls(record.prompt, record.target, record.subject, record.subject_start)


@dataclass(frozen=True)
class TokenizedRequest:
    """A tokenized request.

    Attributes:
        request: The request.
        prompt: Token ids of the prompt, including BOS if there is one.
        target: Token ids of the target.
        subject_last: Index of the subject's last token in the prompt; `None` without a subject.
        text: The prompt's text, to which the spans refer.
        spans: The span of each token in the text.
    """

    request: EditRequest
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject_last: int | None
    text: str
    spans: tuple[Span, ...]

    @property
    def needed_subject(self) -> int:
        """Index of the subject's last token; an `EditError` without a subject."""
        if self.subject_last is None:
            raise EditError(
                f"the request for {self.request.prompt!r} has no subject, but the edit is made at "
                "its last token; pass EditRequest(prompt, target, subject=...), or "
                "fact_token='last' for the prompt's last token"
            )
        return self.subject_last


def tokenize_requests(
    host: Host, requests: EditRequest | Iterable[EditRequest], prepend_bos: bool | None
) -> list[TokenizedRequest]:
    """Tokenize one request or several.

    Args:
        host: The model.
        requests: What a caller passed.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

    Returns:
        At least one request.

    Raises:
        EditError: If there is no request, something is not a request, or as for
            `tokenize_request`.
    """
    asked = [requests] if isinstance(requests, EditRequest) else listed(requests)
    if not asked:
        raise EditError("requests is empty; pass EditRequest(prompt, target), or several")
    for request in asked:
        if not isinstance(request, EditRequest):
            raise EditError(
                f"{shown(request)} is a {type(request).__name__}; pass an EditRequest(prompt, "
                "target), or EditRequest.of(record) for a row of read_records"
            )
    return [tokenize_request(host, request, prepend_bos) for request in asked]


def tokenize_request(
    host: Host, request: EditRequest, prepend_bos: bool | None
) -> TokenizedRequest:
    """Tokenize a request.

    Args:
        host: The model.
        request: The request.
        prepend_bos: Whether the prompt gets a BOS token; `None` is the model's own default.

    Returns:
        The tokenized request.

    Raises:
        EditError: If the prompt or the target is not usable, both together are longer than the
            model's context, or the subject is not in the prompt.
    """
    if not isinstance(request.prompt, str):
        raise EditError(
            f"prompt {shown(request.prompt)} is a {type(request.prompt).__name__}; pass a text"
        )
    with raised_as(EditError):
        [prompt] = tokenize_prompts(host, request.prompt, prepend_bos)
        target = target_ids(prompt, request.target)
        subject_last = _subject_last(prompt, request)
    n_tokens = len(prompt.ids) + len(target) - 1
    if n_tokens > host.n_ctx:
        raise EditError(
            f"prompt {request.prompt!r} and target {request.target!r} have {n_tokens} tokens; the "
            f"model's context holds {host.n_ctx}"
        )
    return TokenizedRequest(
        request, prompt.ids, tuple(target), subject_last, prompt.text, prompt.spans
    )


def target_ids(prompt: Prompt, target: str | int) -> list[int]:
    """Token ids of an answer to a prompt: a text that continues it, or one token id."""
    if isinstance(target, str):
        return prompt.continuation(target)
    return [prompt.token_id(target)]


def _subject_last(prompt: Prompt, request: EditRequest) -> int | None:
    subject, start = request.subject, request.subject_start
    if subject is None:
        if start is not None:
            raise EditError(f"subject_start is {shown(start)}, but there is no subject")
        return None
    if start is None:
        return covered_tokens(prompt.text, prompt.spans, subject)[-1]
    is_text = is_integer(start) and isinstance(subject, str)
    span = subject_at(request.prompt, subject, index(start)) if is_text else None
    if span is None:
        raise EditError(
            f"subject_start is {shown(start)}, where the subject {shown(subject)} does not begin "
            f"in the prompt {request.prompt!r}; it counts characters from 0 and may be left out"
        )
    return covered_tokens(prompt.placed_text, prompt.spans, span)[-1]
