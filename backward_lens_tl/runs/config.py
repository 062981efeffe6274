"""Settings of runs, which can be stored as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from backward_lens_tl._checks import shown
from backward_lens_tl.settings import Checked

_Own = TypeVar("_Own", bound="Config")  # Python 3.10 has no Self


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
