"""The segments of a prompt: before its subject, the subject's own tokens, after it, the last token.

The paper averages over them, because subjects differ in length and place (figures 6, 7, 16 to 18).
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
"""Names of the segments, in the order of a prompt."""

Subject = str | Span
"""What a prompt is about: a part of its text, as it is written or by where it stands."""


def prompt_segments(text: str, spans: Sequence[Span], subject: Subject) -> tuple[Segment, ...]:
    """The segment of each token of a prompt.

    The prompt's last token is `"last token"`, also where it belongs to the subject: the loss is
    read there, which outweighs all else. The only token of a subject is its `"last subject token"`,
    since there a model has read the whole name. A token of which only some characters are the
    subject's belongs to it.

    Args:
        text: The prompt, as in `GradientCapture.prompts`.
        spans: Where in it each token stands, as in `GradientCapture.spans`; a BOS token counts as
            before the subject.
        subject: What the prompt is about; `subject_span` says which of several is taken.

    Returns:
        One of `SEGMENTS` per token.

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


def covered_tokens(text: str, spans: Sequence[Span], subject: Subject) -> list[int]:
    """Which tokens of a prompt are its subject's.

    Args:
        text: The prompt.
        spans: Where in it each token stands.
        subject: What the prompt is about.

    Returns:
        Indices of the tokens that have a character of the subject, at least one, in order.

    Raises:
        InputError: If the subject is not in the prompt, or no token has a character of it.
    """
    start, end = subject_span(text, subject)
    # A span of no width has no character, also where it lies inside of the subject.
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
        spans: Where in its prompt each token stands.
        subject: One for all prompts, or one per prompt, `None` for a prompt that has none.

    Returns:
        One of `SEGMENTS` per token of each prompt; `None` for all tokens of one without a subject.

    Raises:
        InputError: If there are not as many subjects as prompts, or a prompt lacks its subject.
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
    """Where in a prompt its subject stands.

    A subject that occurs as a word of its own is looked for before one inside a longer word
    ("Rome" before "Romeo"), and of several the first is taken; a span says that another is meant.
    One that is not there as it is written is looked for up to Unicode's compatibility
    normalisation, NFKC: "é" may be one character or two.

    Args:
        text: The prompt.
        subject: Text of the subject, for example `"Lionel Messi"`, written as in the prompt; or a
            half-open span of the prompt's characters, such as `(4, 16)`. Spaces around it do not
            count.

    Returns:
        The span of its characters, without spaces around it.

    Raises:
        InputError: If the subject is neither text nor span, has only spaces, or is not in the
            prompt.
    """
    if not isinstance(subject, str):
        return _checked_span(text, subject)
    name = subject.strip()
    if not name:
        raise InputError(f"subject is {subject!r}; {_ALLOWED}")
    # In a lookahead, so that occurrences may overlap.
    starts = [match.start() for match in re.finditer(f"(?={re.escape(name)})", text)]
    spans = [(start, start + len(name)) for start in starts] or _normalised_spans(text, name)
    if not spans:
        raise InputError(
            f"subject {subject!r} is not in the prompt {text!r}; write it as it stands there"
        )
    # The smallest key is taken, the first one of those that are equal.
    return min(spans, key=lambda span: _inside_word(text, *span))


def subject_at(text: str, subject: str, start: int) -> Span | None:
    """Where a subject that begins at a character of a text ends.

    Args:
        text: The prompt.
        subject: Text of the subject, up to normalisation as it is written there.
        start: Its first character.

    Returns:
        The span; `None` if the subject does not begin there.
    """
    if subject and start >= 0 and text[start:].startswith(subject):
        return start, start + len(subject)
    return next((span for span in _normalised_spans(text, subject) if span[0] == start), None)


def _normalised_spans(text: str, name: str) -> list[Span]:
    """Where a text holds a name up to normalisation."""
    wanted = unicodedata.normalize("NFKC", name)
    if not wanted or wanted not in unicodedata.normalize("NFKC", text):
        return []
    spans: list[Span] = []
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            piece = unicodedata.normalize("NFKC", text[start:end])
            # A mark that follows belongs to the last character.
            if piece == wanted and not unicodedata.combining(text[end : end + 1] or " "):
                spans.append((start, end))
                break
            if len(piece) > len(wanted) + _COMPOSED:
                break
    return spans


_COMPOSED = 4
"""How many characters a piece of text may still lose when more marks are added to it."""

_ALLOWED = "pass a word or a name of the prompt, or the span (start, end) of its characters"


def _checked_span(text: str, subject: object) -> Span:
    span = _as_span(subject)
    if span is None:
        raise InputError(f"subject is {shown(subject)}; {_ALLOWED}")
    start, end = span
    if not 0 <= start < end <= len(text):
        raise InputError(
            f"subject is {shown(subject)}, which is no part of the prompt {text!r}; allowed are "
            f"spans (start, end) with 0 <= start < end <= {len(text)}"
        )
    part = text[start:end]
    if part.isspace():
        raise InputError(
            f"subject is {shown(subject)}, which has only spaces in the prompt {text!r}; {_ALLOWED}"
        )
    return start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _as_span(subject: object) -> Span | None:
    """A pair of integers, of any kind; nothing else is a span."""
    pair = plain(subject)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_integer, pair)):
        return None
    return index(pair[0]), index(pair[1])


def _inside_word(text: str, start: int, end: int) -> bool:
    """Whether a span cuts a word in two."""
    return _joined(text[start - 1 : start + 1]) or _joined(text[end - 1 : end + 1])


def _joined(pair: str) -> bool:
    """Whether two characters belong to one word."""
    return len(pair) == 2 and all(map(_in_words, pair))


def _in_words(char: str) -> bool:
    # Vowel signs are marks.
    is_mark = unicodedata.category(char).startswith("M")
    return char.isalnum() or is_mark or char == "_"
