"""One row of a training record, as views show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.sites import MatrixName

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("step", "process", "matrix", "layer", "positions", "norm", "energy"),
    *("top_tokens", "bottom_tokens", "reference_cosine"),
    *("change_norm", "change_cosine", "change_outside", "change_tokens"),
)


@dataclass(frozen=True)
class Recorded:
    """What a step wrote into one matrix. Numbers that were not recorded are NaN.

    Attributes:
        step: The optimizer step.
        matrix: The matrix.
        layer: Its layer.
        norm: Norm of the gradient.
        share: Share of the main direction in the squared norm.
        top: Top tokens of the main direction, with the sign of gradient descent.
        bottom: Bottom tokens of the same direction.
        reference_cosine: Cosine of the gradient and that of the reference prompt.
        change_norm: Norm of the optimizer's change.
        change_cosine: Cosine of the change and minus the gradient.
        change_outside: Share of the change outside of the gradient's rows and columns.
        change_tokens: Top tokens of the change's main direction.
    """

    step: int
    matrix: MatrixName
    layer: int
    norm: float
    share: float
    top: tuple[str, ...]
    bottom: tuple[str, ...]
    reference_cosine: float
    change_norm: float
    change_cosine: float
    change_outside: float
    change_tokens: tuple[str, ...]

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Recorded:
        """Read a row of the table."""
        return cls(
            step=int(row["step"]),
            matrix=row["matrix"],
            layer=int(row["layer"]),
            norm=float(row["norm"]),
            share=float(_first(row["energy"], math.nan)),
            top=_texts(_first(row["top_tokens"], ())),
            bottom=_texts(_first(row["bottom_tokens"], ())),
            reference_cosine=float(row["reference_cosine"]),
            change_norm=float(row["change_norm"]),
            change_cosine=float(row["change_cosine"]),
            change_outside=float(row["change_outside"]),
            change_tokens=_texts(row["change_tokens"]),
        )


def checked_record(table: object) -> pd.DataFrame:
    """Refuse anything but the table of a training record with at least one watched step.

    Args:
        table: What was passed.

    Returns:
        The table.

    Raises:
        InputError: If it is something else, or has no rows.
    """
    import pandas as pd

    if isinstance(table, pd.DataFrame) and table.empty:
        raise InputError("the training record has no watched step yet; record one first")
    return checked_table(table, _COLUMNS, "what TrainingRecord.to_dataframe returned")


def _first(values: Any, otherwise: Any) -> Any:
    """The entry of the main direction, if there is one."""
    return next(iter(values), otherwise) if isinstance(values, Iterable) else otherwise


def _texts(values: Any) -> tuple[str, ...]:
    # A list that was not recorded may be None or NaN.
    return tuple(map(str, values)) if isinstance(values, Iterable) else ()
