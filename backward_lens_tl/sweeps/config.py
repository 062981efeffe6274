"""What a sweep computes: its settings, as a file and as an object."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from backward_lens_tl._checks import (
    check_choice,
    check_settings,
    is_integer,
    listed,
    plain,
    shown,
)
from backward_lens_tl.errors import SweepError
from backward_lens_tl.lens import Direction, VjpsAt
from backward_lens_tl.models.vocabulary import MultiToken
from backward_lens_tl.sweeps.columns import TABLES

Lens = Literal["logit_lens", "normalized"]


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep; those that `backward_lens` has too mean the same here.

    Where several values may stand, one is taken as well, and held as a tuple.

    Attributes:
        matrices: Names or groups of matrices.
        layers: Layers, negative ones from the end; `None` for all.
        projection: `"logit_lens"`, `"normalized"`, or both.
        direction: `"update"`, or `"gradient"` for the paper's raw gradients.
        vjps_at: `"matrix"` or `"residual"`.
        k: Tokens kept at either end.
        position_columns: Columns of the table of positions beside its keys, in any order; `None`
            for all, none to leave the table out. docs/sweeps.md has their names and meanings.
        gradient_columns: Likewise of the table of gradients; `None` for all but the list of
            singular values.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        multi_token: Which token of a target of several stands for it; `None` rejects such a
            target.
        prompts: How many rows of the data are taken, at random; `None` for all.
        seed: Of that choice.
        part_size: Prompts that are written together, and that share the passes over the model.
            Their factors are in memory at once.
        budget: Bytes that a part may take beyond the model, as in `Memory`; `None` for no limit.

    Raises:
        SweepError: If a value is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.SweepConfig(matrices="mlp", k=3).matrices
        ('mlp',)
    """

    matrices: str | Sequence[str] = "mlp"
    layers: int | Sequence[int] | None = None
    projection: Lens | Sequence[Lens] = ("logit_lens",)
    direction: Direction = "update"
    vjps_at: VjpsAt = "matrix"
    k: int = 10
    position_columns: str | Sequence[str] | None = None
    gradient_columns: str | Sequence[str] | None = None
    prepend_bos: bool | None = None
    multi_token: MultiToken | None = None
    prompts: int | None = None
    seed: int = 0
    part_size: int = 64
    budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("matrices", "layers", "projection", "position_columns", "gradient_columns"):
            value = getattr(self, name)
            # One value is as good as a list of it, and equal settings are to compare equal.
            values = None if value is None else tuple(plain(each) for each in listed(value))
            object.__setattr__(self, name, values)
        for lens in self.projection:
            check_choice("projection", lens, get_args(Lens), SweepError)
        if not self.projection or len(set(self.projection)) < len(self.projection):
            raise SweepError(
                f"projection is {self.projection!r}; pass one or both of "
                f"{', '.join(map(repr, get_args(Lens)))}"
            )
        check_choice("direction", self.direction, get_args(Direction), SweepError)
        check_choice("vjps_at", self.vjps_at, get_args(VjpsAt), SweepError)
        check_choice("prepend_bos", self.prepend_bos, (True, False, None), SweepError)
        positions = (*get_args(MultiToken), None)
        check_choice("multi_token", self.multi_token, positions, SweepError)
        for name in ("positions", "gradients"):
            _check_columns(name, self._asked(name))
        for name in ("part_size", "prompts", "budget", "k"):
            _check_positive(name, getattr(self, name), or_none=name in ("prompts", "budget"))
        if not is_integer(self.seed):
            raise SweepError(f"seed is {shown(self.seed)}; pass an integer, such as 0")
        for name in ("part_size", "prompts", "budget", "k", "seed"):
            # JSON holds no integers of numpy.
            object.__setattr__(self, name, plain(getattr(self, name)))

    def columns(self, table: str) -> tuple[str, ...]:
        """Names of a table's columns, keys first, in the order of the schema.

        Args:
            table: `"positions"`, `"gradients"`, `"prompts"` or `"rejects"`.

        Returns:
            The names; none if the table is left out.

        Examples:
            >>> blt.SweepConfig(position_columns=["norm"]).columns("positions")
            ('prompt', 'matrix', 'layer', 'position', 'token', 'segment', 'projection', 'norm')
        """
        schema, asked = TABLES[table], self._asked(table)
        if asked is None:
            return tuple(column.name for column in schema if column.is_default)
        if not asked:
            return ()
        return tuple(column.name for column in schema if column.is_key or column.name in asked)

    def measures(self, column: str) -> bool:
        """Whether a column of the table of positions is asked for.

        Args:
            column: Its name.

        Returns:
            Whether it is.

        Examples:
            >>> config = blt.SweepConfig(position_columns=["norm"])
            >>> config.measures("norm"), config.measures("entropy")
            (True, False)
        """
        return column in self.columns("positions")

    def _asked(self, table: str) -> str | Sequence[str] | None:
        return {"positions": self.position_columns, "gradients": self.gradient_columns}.get(table)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them.

        Returns:
            Every attribute by name.

        Examples:
            >>> blt.SweepConfig(matrices="mlp", k=3).to_json()["matrices"]
            ('mlp',)
        """
        return asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> SweepConfig:
        """Settings out of JSON.

        Args:
            settings: Some of the attributes by name; the others have their defaults.

        Returns:
            The settings.

        Raises:
            SweepError: If there is no such setting.

        Examples:
            >>> blt.SweepConfig.from_json({"matrices": "mlp", "k": 3}).k
            3
        """
        check_settings(settings, [field.name for field in fields(cls)], SweepError)
        return cls(**settings)

    @classmethod
    def load(cls, path: str | Path) -> SweepConfig:
        """Read settings from a JSON file.

        Args:
            path: A file with some of the attributes by name, or the `run.json` of another sweep.

        Returns:
            The settings.

        Raises:
            SweepError: If the file cannot be read.

        Examples:
            >>> blt.SweepConfig.load(sweep.folder / "run.json").prompts  # as in that sweep
            20
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SweepError(f"config {os.fspath(path)!r} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise SweepError(f"config {os.fspath(path)!r} holds no JSON object; write {{...}}")
        settings = found.get("config", found)
        if not isinstance(settings, dict):
            raise SweepError(
                f"config {os.fspath(path)!r} has {shown(settings)} under 'config'; an object with "
                "settings is needed"
            )
        return cls.from_json(settings)


def _check_columns(table: str, asked: str | Sequence[str] | None) -> None:
    names = [column.name for column in TABLES[table]]
    for name in asked or ():
        if name not in names:
            raise SweepError(
                f"the table of {table} has no column {name!r}; it has {', '.join(names)}"
            )


def _check_positive(name: str, value: object, *, or_none: bool) -> None:
    if value is None and or_none:
        return
    if not is_integer(value) or int(value) < 1:
        raise SweepError(f"{name} is {shown(value)}; pass an integer from 1 on")
