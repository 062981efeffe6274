"""What a model is to be taught: a prompt, its new answer, and the subject that it is about."""

from __future__ import annotations

from collections.abc import Sequence
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
    """One fact that a model is to be taught.

    Attributes:
        prompt: The prompt, such as `"Lionel Messi plays for"`.
        target: What is to follow it: a text as it continues the prompt, with its leading space, or
            a token id.
        subject: What the prompt is about, a part of it, for the methods that edit there.
        subject_start: Where the subject begins in the prompt, in characters, if it occurs there
            several times and another than the first is meant.

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
        """The request of a row of a data set.

        Args:
            record: The row.

        Returns:
            Its prompt, target and subject.

        Raises:
            EditError: If it is no record.

        Examples:
            >>> record = blt.read_records("facts").rows[0]
            >>> blt.editing.EditRequest.of(record)
            EditRequest(prompt='Porsche was set up in', target=' Spain', subject='Porsche',
            subject_start=0)
        """
        if not isinstance(record, Record):
            raise EditError(
                f"{shown(record)} is a {type(record).__name__}; pass a Record, as those of "
                "read_records(data) that are no BadRecord"
            )
        return cls(record.prompt, record.target, record.subject, record.subject_start)


@dataclass(frozen=True)
class TokenizedRequest:
    """A request in tokens.

    Attributes:
        request: The request.
        prompt: Ids of the prompt, BOS included where there is one.
        target: Ids of the target.
        subject_last: Index of the subject's last token in the prompt; `None` without a subject.
        text: The prompt's text, in which its tokens have their spans.
        spans: Where in the text each token stands.
    """

    request: EditRequest
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    subject_last: int | None
    text: str
    spans: tuple[Span, ...]

    @property
    def taught(self) -> tuple[int, ...]:
        """The prompt and all of the target but its last token: what the model reads."""
        return (*self.prompt, *self.target[:-1])

    @property
    def needed_subject(self) -> int:
        """Index of the subject's last token.

        Raises:
            EditError: If the request names no subject.
        """
        if self.subject_last is None:
            raise EditError(
                f"the request for {self.request.prompt!r} has no subject, and the edit is made at "
                "its last token; pass EditRequest(prompt, target, subject=...), or "
                "fact_token='last' for the prompt's last token"
            )
        return self.subject_last


def listed_requests(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    """One request or several, as a list.

    Args:
        requests: What a caller passed.

    Returns:
        At least one request.

    Raises:
        EditError: If there is none, or something else among them.
    """
    asked = listed(requests)
    if not asked:
        raise EditError("there is no request; pass EditRequest(prompt, target), or several")
    for request in asked:
        if not isinstance(request, EditRequest):
            raise EditError(
                f"{shown(request)} is a {type(request).__name__}; pass an EditRequest(prompt, "
                "target), or EditRequest.of(record) for a row of read_records"
            )
    return asked


def tokenize_request(
    host: Host, request: EditRequest, prepend_bos: bool | None
) -> TokenizedRequest:
    """Bring a request into tokens.

    Args:
        host: The model.
        request: The request.
        prepend_bos: Whether the prompt gets a BOS token; `None` is the model's own default.

    Returns:
        Its tokens.

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
    """Token ids of an answer.

    Args:
        prompt: The prompt.
        target: A text that continues it, or a token id.

    Returns:
        The ids, at least one.
    """
    if isinstance(target, str):
        return prompt.continuation(target)
    return [prompt.token_id(target)]


def _subject_last(prompt: Prompt, request: EditRequest) -> int | None:
    subject, start = request.subject, request.subject_start
    if subject is None:
        if start is not None:
            raise EditError(f"subject_start is {shown(start)}, and there is no subject to begin")
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
