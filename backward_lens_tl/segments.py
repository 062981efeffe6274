"""The segments of a prompt: before its subject, the subject's own tokens, after it, the last token.

The paper averages over them, because subjects differ in length and place (figures 6, 7, 16 to 18).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, get_args

from backward_lens_tl.arguments import listed
from backward_lens_tl.errors import InputError

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

_PARTIAL = "\ufffd"
"""What a token decodes to that holds only some bytes of a character."""


def prompt_segments(tokens: Sequence[str], subject: str) -> tuple[Segment, ...]:
    """The segment of each token of a prompt.

    The prompt's last token is `"last token"`, also where it belongs to the subject: the loss is
    read there, which outweighs all else. The only token of a subject is its `"last subject token"`,
    since there a model has read the whole name.

    A subject that occurs as a word of its own is looked for before one inside a longer word
    ("Rome" before "Romeo"), and of several the first is taken. It has to be written as in the
    prompt, but for spaces around it and for spaces inside it that the tokens have lost. Of a
    character that was split over tokens only the number of bytes can be compared.

    Args:
        tokens: Text of each token, as in `GradientCapture.str_tokens`; a BOS token counts as
            before the subject.
        subject: What the prompt is about, for example `"Lionel Messi"`.

    Returns:
        One of `SEGMENTS` per token.

    Raises:
        InputError: If the subject is no text, has only spaces, or is not in the prompt.
    """
    first, last = _subject_tokens(tokens, subject)
    segments: list[Segment] = [
        "before subject"
        if index < first
        else "middle subject tokens"
        if index < last
        else "after subject"
        for index in range(len(tokens))
    ]
    segments[first] = "first subject token"
    segments[last] = "last subject token"
    segments[-1] = "last token"
    return tuple(segments)


def batch_segments(
    prompts: Sequence[Sequence[str]], subject: str | Sequence[str]
) -> tuple[tuple[Segment, ...], ...]:
    """The segment of each token of several prompts.

    Args:
        prompts: Text of each token of each prompt.
        subject: One for all prompts, or one per prompt.

    Returns:
        One of `SEGMENTS` per token of each prompt.

    Raises:
        InputError: If there are not as many subjects as prompts, or a prompt lacks its subject.
    """
    subjects = [subject] * len(prompts) if isinstance(subject, str) else listed(subject)
    if len(subjects) != len(prompts):
        raise InputError(
            f"there are {len(subjects)} subjects and {len(prompts)} prompts; pass one per prompt, "
            "or one text for all"
        )
    return tuple(
        prompt_segments(tokens, own) for tokens, own in zip(prompts, subjects, strict=True)
    )


def _subject_tokens(tokens: Sequence[str], subject: str) -> tuple[int, int]:
    """Indices of the subject's first and last token."""
    if not isinstance(subject, str) or not subject.strip():
        raise InputError(f"subject is {subject!r}; pass a word or a name of the prompt")
    text, ends = "".join(tokens), list(accumulate(map(len, tokens)))
    edges = {0, *ends}
    spans = list(_occurrences(text, subject.strip()))
    if not spans:
        raise InputError(
            f"subject {subject!r} is not in the prompt {text!r}; write it as it stands there"
        )
    # The smallest key is taken, the first one of those that are equal.
    start, end = min(spans, key=lambda span: (_inside_word(text, *span), not {*span} <= edges))
    covered = [
        index
        for index, (left, right) in enumerate(zip([0, *ends], ends, strict=False))
        if left < end and start < right
    ]
    return covered[0], covered[-1]


def _occurrences(text: str, subject: str) -> Iterator[tuple[int, int]]:
    """Where the subject stands; where it stands nowhere as it is written, without its spaces."""
    found = False
    for space in (re.escape, lambda char: r"\s*"):
        pattern = "".join(space(char) if char.isspace() else _readable(char) for char in subject)
        # In a lookahead, so that occurrences may overlap.
        for match in re.finditer(f"(?=({pattern}))", text):
            found = True
            yield match.span(1)
        if found:
            return


def _readable(char: str) -> str:
    """A pattern for a character as it is, or split over tokens."""
    # The bytes up to a token's end decode to one mark, and each of those that follow to another.
    size = len(char.encode("utf-8", "replace"))
    if size == 1:
        return re.escape(char)
    return f"(?:{char}|{_PARTIAL}{{2,{size}}})"


def _inside_word(text: str, start: int, end: int) -> bool:
    """Whether a span cuts a word in two."""
    return _joined(text[start - 1 : start + 1]) or _joined(text[end - 1 : end + 1])


def _joined(pair: str) -> bool:
    """Whether two characters belong to one word."""
    return len(pair) == 2 and all(map(_in_words, pair))


def _in_words(char: str) -> bool:
    # Vowel signs are marks, and most characters that are split over tokens are letters.
    is_mark = unicodedata.category(char).startswith("M")
    return char.isalnum() or is_mark or char in ("_", _PARTIAL)
