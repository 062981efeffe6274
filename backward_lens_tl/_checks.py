"""Checks of arguments of any type."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex, TypeGuard

from backward_lens_tl.errors import InputError

_TOKEN_IDS = 2**63
"""Larger integers do not fit torch's int64."""

_LARGEST = sys.float_info.max


def plain(value: object) -> Any:
    """Convert tensors and arrays to numbers and lists; return anything else unchanged.

    Args:
        value: The value.

    Returns:
        The number, list or unchanged value.

    Raises:
        InputError: If a tensor has no values to read.
    """
    listing = getattr(value, "tolist", None)  # numpy's, pandas', torch's
    if isinstance(value, type) or not callable(listing):
        return value
    try:
        return listing()
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"a tensor of this kind has no values to read: {error}") from error


def listed(value: object) -> list[Any]:
    """Return a collection, or a single value such as a string, as a list."""
    value = plain(value)
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    return list(value)


def check_choice(
    name: str, value: object, allowed: Sequence[object], error: type[InputError] = InputError
) -> None:
    """Refuse a value that is not among those allowed.

    Args:
        name: The argument.
        value: Its value.
        allowed: Texts, booleans, `None`.
        error: The error to raise.

    Raises:
        InputError: If it is not among them.
    """
    # An array would compare entry by entry, and 1 is not True here.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise error(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_text(name: str, text: str, error: type[InputError] = InputError) -> None:
    """Refuse text that is not valid Unicode.

    Args:
        name: The argument.
        text: The text.
        error: The error to raise.

    Raises:
        InputError: If it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise error(f"{name} {text!r} is not Unicode text: {cause.reason}") from cause


def shown(value: object) -> str:
    """Return a value as text for a message."""
    try:
        return repr(value)
    except Exception:  # an integer with too many digits, or a `__repr__` that fails
        return f"a {type(value).__name__} that cannot be printed"


def truncated(text: str, length: int = 200) -> str:
    """Truncate a text to at most this many characters, with an ellipsis at the end."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def is_integer(value: object) -> TypeGuard[SupportsIndex]:
    """Whether a value is an integer, of Python or numpy, and not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_token_id(value: object) -> TypeGuard[SupportsIndex]:
    """Whether a value is an integer that can be a token id in torch."""
    return is_integer(value) and 0 <= index(value) < _TOKEN_IDS


def is_index(value: object, size: int) -> bool:
    """Whether a value is a valid index, which may be negative, into something of a size."""
    return is_integer(value) and -size <= index(value) < size


def check_index(kind: str, value: int, size: int) -> None:
    """Refuse an index that is not in `range(size)`.

    Args:
        kind: What is indexed.
        value: The index.
        size: The size.

    Raises:
        InputError: If it is out of range.
    """
    if not is_index(value, size) or value < 0:
        raise InputError(f"{kind} {shown(value)} does not exist; allowed: 0 to {size - 1}")


def checked_number(
    name: str,
    value: object,
    *,
    is_positive: bool = False,
    or_else: str = "",
    error: type[InputError] = InputError,
) -> float:
    """Refuse a value that is not a finite number, or not a positive one.

    Args:
        name: The argument.
        value: Its value.
        is_positive: Whether it must be positive.
        or_else: What else is allowed, for the message.
        error: The error to raise.

    Returns:
        The number.

    Raises:
        InputError: If it is not such a number.
    """
    number = plain(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not abs(number) <= _LARGEST or (is_positive and number <= 0):
        kind = "positive" if is_positive else "finite"
        raise error(f"{name} is {shown(value)}; pass a {kind} number{or_else}")
    return float(number)


def checked_count(name: str, value: object, error: type[InputError] = InputError) -> int:
    """Refuse a value that is not an integer of at least 1.

    Args:
        name: The argument.
        value: Its value.
        error: The error to raise.

    Returns:
        The integer.

    Raises:
        InputError: If it is not such an integer.
    """
    if not is_integer(value) or index(value) < 1:
        raise error(f"{name} is {shown(value)}; pass an integer of at least 1")
    return index(value)


def check_kind(
    name: str, value: object, kind: type, made_by: str, error: type[InputError] = InputError
) -> None:
    """Refuse a value of the wrong type.

    Args:
        name: The argument.
        value: Its value.
        kind: The required type.
        made_by: The call that returns such a value.
        error: The error to raise.

    Raises:
        InputError: If it has the wrong type.
    """
    if not isinstance(value, kind):
        raise error(f"{name} is {shown(value)}; pass {kind.__name__}, as returned by {made_by}")


def check_path(path: object, error: type[Exception]) -> None:
    """Refuse a value that is not a path.

    Args:
        path: The value.
        error: The error to raise.
    """
    if not isinstance(path, str | Path):
        raise error(f"path is {path!r}, a {type(path).__name__}; pass a text or a pathlib.Path")
