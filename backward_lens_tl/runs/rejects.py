"""Rows of the data that a run leaves out, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from backward_lens_tl.capture.prompts import Prompt, tokenize_prompts
from backward_lens_tl.data.records import BadRecord, Record
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host

_T = TypeVar("_T")


class Reject(NamedTuple):
    """A row of the data that is left out.

    Attributes:
        row: Its index in the data.
        id: The data's own name for it.
        reason: One word, as the schema lists them.
        problem: One sentence.
    """

    row: int
    id: str
    reason: str
    problem: str


class Refusal(Exception):
    """A row cannot be used: the reason and the problem."""


def item_or_reject(row: Record | BadRecord, make: Callable[[Record], _T]) -> _T | Reject:
    """Plan one row of the data.

    Args:
        row: The row.
        make: Function from a record to its item; may raise `Refusal`.

    Returns:
        The item, or why there is none.
    """
    if isinstance(row, BadRecord):
        return Reject(row.index, row.id, "row", row.problem)
    try:
        return make(row)
    except Refusal as refusal:
        return Reject(row.index, row.id, *refusal.args)


@contextmanager
def refusing(reason: str) -> Iterator[None]:
    """Turn an unusable input into a refusal of the row.

    Args:
        reason: The reason for the table of rejects.

    Yields:
        Nothing.

    Raises:
        Refusal: If the block raises an `InputError`.
    """
    try:
        yield
    except InputError as error:
        raise Refusal(reason, str(error)) from error


def fitting_prompt(host: Host, text: str, prepend_bos: bool | None) -> Prompt:
    """Tokenize a prompt; it must fit the model's context.

    Args:
        host: The model.
        text: The prompt.
        prepend_bos: Whether it gets a BOS token.

    Returns:
        The prompt.

    Raises:
        Refusal: If it has no token, or too many.
    """
    with refusing("prompt"):
        [prompt] = tokenize_prompts(host, text, prepend_bos)
    check_length(host, text, len(prompt.ids))
    return prompt


def check_length(host: Host, text: str, n_tokens: int) -> None:
    """Refuse a row with a text that is longer than the model's context.

    Args:
        host: The model.
        text: The text.
        n_tokens: Its number of tokens.

    Raises:
        Refusal: If it is too long.
    """
    if n_tokens > host.n_ctx:
        raise Refusal(
            "length",
            f"{text!r} has {n_tokens} tokens, more than the model's context of {host.n_ctx}",
        )
