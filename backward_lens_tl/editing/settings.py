"""Settings that are checked against the annotations of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from backward_lens_tl._checks import check_choice, check_number, is_integer, shown
from backward_lens_tl.errors import EditError

Check = Callable[[str, object], None]


def _check_count(name: str, value: object) -> None:
    if not is_integer(value) or int(value) < 1:
        raise EditError(f"{name} is {shown(value)}; pass an integer from 1 on")


Positive = Annotated[float, partial(check_number, zero=False, error=EditError)]
"""A finite number above 0."""

NonNegative = Annotated[float, partial(check_number, zero=True, error=EditError)]
"""A finite number from 0."""

Count = Annotated[int, _check_count]
"""An integer from 1."""


@dataclass(frozen=True)
class Settings:
    """Base class of frozen dataclasses whose values are checked when they are created.

    Fields annotated with `Positive`, `NonNegative`, `Count`, `Literal[...]` or `bool`, also with
    `| None`, are checked; other fields are not.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, check in _checks_of(kind).items():
            check(name, getattr(self, name))


@cache
def _checks_of(kind: type) -> dict[str, Check]:
    found = {
        name: _check_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()
    }
    return {name: check for name, check in found.items() if check is not None}


def _check_of(hint: Any) -> Check | None:
    origin, args = get_origin(hint), get_args(hint)
    if hint is bool:
        return _check_among((True, False))
    if origin is Literal:
        return _check_among(args)
    if origin is Annotated:
        check: Check = args[1]
        return check
    if origin in (Union, UnionType) and NoneType in args and len(args) == 2:
        [other] = (arg for arg in args if arg is not NoneType)
        if other is bool:
            return _check_among((True, False, None))
        check_other = _check_of(other)
        return None if check_other is None else partial(_check_unless_none, check_other)
    return None


def _check_among(allowed: tuple[object, ...]) -> Check:
    return partial(check_choice, allowed=allowed, error=EditError)


def _check_unless_none(check: Check, name: str, value: object) -> None:
    if value is not None:
        check(name, value)
