"""Settings that are checked when they are created and can be stored as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

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
_Own = TypeVar("_Own", bound="Config")  # Python 3.10 has no Self


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
        for name, (kinds, adapter) in _adapters(own).items():
            value = getattr(self, name)
            checked = plain(value)
            if checked is not None and any(get_origin(kind) is Sequence for kind in kinds):
                checked = tuple(plain(each) for each in listed(checked))
            try:
                object.__setattr__(self, name, adapter.validate_python(checked))
            except ValidationError as error:
                expected = error.errors()[-1]["msg"].replace("Input", "it", 1)
                none = ", or None" if NoneType in kinds else ""
                raise self.ERROR(f"{name} is {shown(value)}; {expected}{none}") from None


@dataclass(frozen=True)
class Config(Checked):
    """Base class of the settings of runs."""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values.

        Returns:
            Every setting by name.

        Examples:
            >>> blt.SweepConfig(layers=range(2)).to_json()["layers"]
            [0, 1]
        """
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return settings

    @classmethod
    def from_json(cls: type[_Own], settings: Mapping[str, Any]) -> _Own:
        """Create settings from JSON values.

        Args:
            settings: Some of the settings by name; the others have their defaults.

        Returns:
            The settings.

        Raises:
            InputError: If there is no such setting; a `SweepError` or `EvaluationError`.

        Examples:
            >>> blt.SweepConfig.from_json({"k": 3}).k
            3
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise cls.ERROR(f"unknown setting {name!r}; allowed: {', '.join(known)}")
        return cls(**settings)

    @classmethod
    def load(cls: type[_Own], path: str | Path) -> _Own:
        """Read settings from a JSON file.

        Args:
            path: A file with some of the settings by name, or the `run.json` of an earlier run.

        Returns:
            The settings.

        Raises:
            InputError: If the file cannot be read; a `SweepError` or `EvaluationError`.

        Examples:
            >>> blt.SweepConfig.load(sweep.folder / "run.json").prompts
            20
        """
        file = f"config {os.fspath(path)!r}"
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise cls.ERROR(f"{file} cannot be read: {error}") from error
        settings = found.get("config", found) if isinstance(found, dict) else found
        if not isinstance(settings, dict):
            raise cls.ERROR(f"{file} has {shown(settings)} for settings; write a JSON object")
        return cls.from_json(settings)


@cache
def _adapters(kind: type[Checked]) -> dict[str, tuple[list[Any], TypeAdapter[Any]]]:
    """The types of each field and what checks it, except for fields that hold dataclasses."""
    hints = get_type_hints(kind, include_extras=True)
    kinds = {field.name: members(hints[field.name]) for field in fields(kind)}
    return {
        name: (own, TypeAdapter(hints[name], config=_STRICT))
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
