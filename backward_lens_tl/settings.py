"""Dataclasses of settings whose fields are checked when they are created."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from backward_lens_tl._checks import listed, plain, shown
from backward_lens_tl.errors import InputError

Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""

CountOrZero = Annotated[int, Field(ge=0)]
"""An integer of at least 0."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""

Positive = Annotated[Finite, Field(gt=0)]
"""A finite number above 0."""

NonNegative = Annotated[Finite, Field(ge=0)]
"""A finite number of at least 0."""

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)  # strict: no conversions


@dataclass(frozen=True)
class Checked:
    """Base class of frozen dataclasses whose fields are checked against their annotations.

    A field that allows a sequence also takes a single value, and holds a tuple. Fields that hold
    other dataclasses are not checked.

    Attributes:
        ERROR: The error that unusable settings raise.
    """

    ERROR: ClassVar[type[InputError]] = InputError

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, (kinds, check) in _field_checks(own).items():
            value = getattr(self, name)
            checked = plain(value)
            if checked is not None and any(get_origin(kind) is Sequence for kind in kinds):
                checked = tuple(plain(each) for each in listed(checked))
            try:
                object.__setattr__(self, name, check(checked))
            except ValidationError as error:
                message = error.errors()[-1]["msg"].removeprefix("Value error, ")
                expected = message.replace("Input", "it", 1)
                none = ", or None" if NoneType in kinds else ""
                raise self.ERROR(f"{name} is {shown(value)}; {expected}{none}") from None


@cache
def _field_checks(kind: type[Checked]) -> dict[str, tuple[list[Any], Callable[[Any], Any]]]:
    """The types of each field and what checks it, except for fields that hold dataclasses."""
    hints = get_type_hints(kind, include_extras=True)
    kinds = {field.name: members(hints[field.name]) for field in fields(kind)}
    return {
        name: (own, TypeAdapter(hints[name], config=_STRICT).validate_python)
        for name, own in kinds.items()
        if not any(map(is_dataclass, own))
    }


def members(hint: Any) -> list[Any]:
    """The types of a union, without annotations; any other type alone."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return [member for each in get_args(hint) for member in members(each)]
    return [hint]
