"""What views show of each matrix of a watched step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from backward_lens_tl.views.training.recorded import Recorded

MISSING = "–"
"""Replaces a value that was not recorded."""


def _norm(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _cosine(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


class Column(NamedTuple):
    """A number, or the tokens, of each matrix.

    Attributes:
        name: The attribute of `Recorded`.
        group: `"gradient"` or `"change"`.
        head: Its name within the group.
        meaning: What it is.
        write: From a number to its text; `None` for tokens.
    """

    name: str
    group: str
    head: str
    meaning: str
    write: Callable[[float], str] | None = None

    def number(self, row: Recorded) -> str:
        """The text of a row's number; empty if it was not recorded."""
        if self.write is None:
            return ""
        value = getattr(row, self.name)
        # A gradient whose norm is NaN was recorded, and is worth seeing.
        return "" if math.isnan(value) and self.name != "norm" else self.write(value)

    def tokens(self, row: Recorded) -> tuple[str, ...]:
        """The tokens of a row; none in a column of numbers."""
        return getattr(row, self.name) if self.write is None else ()

    def is_recorded(self, row: Recorded) -> bool:
        """Whether a row has a value."""
        return bool(self.number(row) or self.tokens(row))


COLUMNS = (
    Column("norm", "gradient", "norm", "Frobenius norm of the gradient", _norm),
    Column(
        "share",
        "gradient",
        "share",
        "share of the main direction in the squared norm of the gradient",
        _share,
    ),
    Column("top", "gradient", "top tokens", "of minus the main direction of the gradient"),
    Column("bottom", "gradient", "bottom tokens", "of minus the main direction of the gradient"),
    Column(
        "reference_cosine",
        "gradient",
        "reference",
        "cosine of the gradient and that of the reference prompt",
        _cosine,
    ),
    Column("change_norm", "change", "norm", "Frobenius norm of the optimizer's change", _norm),
    Column(
        "change_cosine",
        "change",
        "cosine",
        "cosine of the optimizer's change and minus the gradient",
        _cosine,
    ),
    Column(
        "change_outside",
        "change",
        "outside",
        "share of the squared norm of the change outside of the gradient's rows and columns",
        _share,
    ),
    Column("change_tokens", "change", "top tokens", "of the main direction of the change"),
)


def recorded_columns(rows: Sequence[Recorded]) -> list[Column]:
    """The columns that have a value in any row."""
    return [column for column in COLUMNS if any(map(column.is_recorded, rows))]
