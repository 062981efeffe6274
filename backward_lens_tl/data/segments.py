"""The segments of a prompt: before its subject, the subject's tokens, after it, the last token.

The paper averages over segments, because subjects differ in length and position (figures 6, 7 and
16 to 18).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from operator import index
from typing import Literal, get_args

from backward_lens_tl._checks import is_integer, listed, plain, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.vocabulary import Span

Segment = Literal[
    "before subject",
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "after subject",
    "last token",
]

SEGMENTS: tuple[Segment, ...] = get_args(Segment)
"""The segments in the order of a prompt."""

Subject = str | Span
"""What a prompt is about: text that occurs in the prompt, or the span of its characters."""


def prompt_segments(text: str, spans: Sequence[Span], subject: Subject) -> tuple[Segment, ...]:
    """The segment of each token of a prompt.

    The last token of the prompt is always the `"last token"`, even if it belongs to the subject,
    because the loss is computed there. The only token of a subject is its `"last subject token"`,
    because the model has read the whole name there. A token belongs to the subject if any of its
    characters does.

    Args:
        text: The prompt, as in `GradientCapture.prompts`.
        spans: The span of each token, as in `GradientCapture.spans`. A BOS token is before the
            subject.
        subject: What the prompt is about, as in `subject_span`.

    Returns:
        The segment of each token.

    Raises:
        InputError: If the subject is not in the prompt, or no token has a character of it.
    """
    covered = covered_tokens(text, spans, subject)
    first, last = covered[0], covered[-1]
    segments: list[Segment] = [
        "before subject"
        if at < first
        else "middle subject tokens"
        if at < last
        else "after subject"
        for at in range(len(spans))
    ]
    segments[first] = "first subject token"
    segments[last] = "last subject token"
    segments[-1] = "last token"
    return tuple(segments)


def turn_segments(turns: Sequence[str], prompt: int) -> tuple[str, ...]:
    """The segment of each token of a chat: its turn.

    The last token is the `"last token"`, as in `prompt_segments`.

    Args:
        turns: The turn of each token, as in `GradientCapture.turns`.
        prompt: Which prompt it is, for the error's message.

    Returns:
        The segment of each token.

    Raises:
        InputError: If the prompt is not a chat.
    """
    if not turns:
        raise InputError(
            f"turns=True is for chats, but prompt {prompt} is not a list of messages; pass "
            "[{'role': 'user', 'content': ...}] as the prompt, or its subject instead of turns"
        )
    return (*turns[:-1], "last token")


def covered_tokens(text: str, spans: Sequence[Span], subject: Subject) -> list[int]:
    """Find the tokens of a subject.

    Args:
        text: The prompt.
        spans: The span of each token.
        subject: What the prompt is about.

    Returns:
        Indices of the tokens with a character of the subject, at least one, in order.

    Raises:
        InputError: If the subject is not in the prompt, or no token has a character of it.
    """
    start, end = subject_span(text, subject)
    # An empty span has no character, even inside the subject.
    covered = [at for at, (left, right) in enumerate(spans) if max(left, start) < min(right, end)]
    if not covered:
        raise InputError(
            f"subject {shown(subject)} has no token in the prompt {text!r}; pass another part of it"
        )
    return covered


def batch_segments(
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    subject: Subject | Sequence[Subject | None],
) -> tuple[tuple[Segment | None, ...], ...]:
    """The segment of each token of several prompts.

    Args:
        texts: The prompts.
        spans: The span of each token in its prompt.
        subject: One subject for all prompts, or one per prompt, `None` for prompts without one.

    Returns:
        The segment of each token of each prompt; `None` if the prompt has no subject.

    Raises:
        InputError: If the numbers of subjects and prompts differ, or a subject is not in its
            prompt.
    """
    is_one = isinstance(subject, str) or _as_span(subject) is not None
    subjects = [subject] * len(texts) if is_one else listed(subject)
    if len(subjects) != len(texts):
        raise InputError(
            f"there are {len(subjects)} subjects and {len(texts)} prompts; pass one per prompt, "
            "or one for all"
        )
    return tuple(
        (None,) * len(own_spans) if own is None else prompt_segments(text, own_spans, own)
        for text, own_spans, own in zip(texts, spans, subjects, strict=True)
    )


def subject_span(text: str, subject: Subject) -> Span:
    """Find the subject of a prompt.

    The first occurrence counts, and whole words take precedence over parts of longer words ("Rome"
    over "Romeo"). Pass a span for another occurrence. If the exact text is not in the prompt, it is
    compared after Unicode's NFKC normalization, in which "é" is the same as one character or two.

    Args:
        text: The prompt.
        subject: Text in the prompt, such as `"Lionel Messi"`, or a half-open span of its
            characters, such as `(4, 16)`. Spaces around it are ignored.

    Returns:
        The span of the subject's characters, without surrounding spaces.

    Raises:
        InputError: If the subject is neither text nor a span, has only spaces, or is not in the
            prompt.
    """
    if not isinstance(subject, str):
        return _checked_span(text, subject)
    name = subject.strip()
    if not name:
        raise InputError(f"subject is {subject!r}; {_ALLOWED}")
    # A lookahead also finds overlapping occurrences.
    starts = [match.start() for match in re.finditer(f"(?={re.escape(name)})", text)]
    spans = [(start, start + len(name)) for start in starts] or _normalised_spans(text, name)
    if not spans:
        raise InputError(
            f"subject {subject!r} is not in the prompt {text!r}; write it exactly as there"
        )
    return min(spans, key=lambda span: _inside_word(text, *span))


def subject_at(text: str, subject: str, start: int) -> Span | None:
    """Find a subject that begins at a given character.

    Args:
        text: The prompt.
        subject: The subject, which is compared after normalization as in `subject_span`.
        start: Index of its first character.

    Returns:
        The span; `None` if the subject does not begin there.
    """
    if subject and start >= 0 and text[start:].startswith(subject):
        return start, start + len(subject)
    return next((span for span in _normalised_spans(text, subject) if span[0] == start), None)


def _normalised_spans(text: str, name: str) -> list[Span]:
    """Spans of a name in a text after normalization."""
    wanted = unicodedata.normalize("NFKC", name)
    if not wanted or wanted not in unicodedata.normalize("NFKC", text):
        return []
    spans: list[Span] = []
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            piece = unicodedata.normalize("NFKC", text[start:end])
            # A combining mark belongs to the character before it.
            if piece == wanted and not unicodedata.combining(text[end : end + 1] or " "):
                spans.append((start, end))
                break
            if len(piece) > len(wanted) + _COMPOSED:
                break
    return spans


_COMPOSED = 4
"""Number of characters by which normalization may shorten a text when marks are added to it."""

_ALLOWED = "pass text of the prompt, or the span (start, end) of its characters"


def _checked_span(text: str, subject: object) -> Span:
    span = _as_span(subject)
    if span is None:
        raise InputError(f"subject is {shown(subject)}; {_ALLOWED}")
    start, end = span
    if not 0 <= start < end <= len(text):
        raise InputError(
            f"subject is {shown(subject)}, which is not in the prompt {text!r}; allowed: "
            f"spans (start, end) with 0 <= start < end <= {len(text)}"
        )
    piece = text[start:end]
    if piece.isspace():
        raise InputError(
            f"subject is {shown(subject)}, which has only spaces in the prompt {text!r}; {_ALLOWED}"
        )
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def _as_span(subject: object) -> Span | None:
    """A pair of integers of any type; `None` for anything else."""
    pair = plain(subject)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_integer, pair)):
        return None
    return index(pair[0]), index(pair[1])


def _inside_word(text: str, start: int, end: int) -> bool:
    """Whether a span begins or ends inside a word."""
    return _joined(text[start - 1 : start + 1]) or _joined(text[end - 1 : end + 1])


def _joined(pair: str) -> bool:
    """Whether two characters are in the same word."""
    return len(pair) == 2 and all(map(_in_words, pair))


def _in_words(char: str) -> bool:
    # Vowel signs are marks.
    is_mark = unicodedata.category(char).startswith("M")
    return char.isalnum() or is_mark or char == "_"
