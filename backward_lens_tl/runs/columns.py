"""Columns of the tables that a run writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

_NULLABLE = {"int32": "Int64", "bool": "boolean"}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its name.
        dtype: Its Arrow type.
        meaning: What it holds.
        is_key: Whether it identifies rows; such a column is never left out.
        is_default: Whether it is written unless columns are chosen.
        may_miss: Whether a number or boolean may be missing.
    """

    name: str
    dtype: str
    meaning: str
    is_key: bool = False
    is_default: bool = True
    may_miss: bool = False

    @property
    def pandas_dtype(self) -> str | None:
        """The nullable pandas type if values may be missing; `None` leaves the type to pandas."""
        return _NULLABLE[self.dtype] if self.may_miss else None


key_column = partial(Column, is_key=True)

Tables = Mapping[str, tuple[Column, ...]]
"""Columns of each table, in the order in which a shard writes its tables."""
