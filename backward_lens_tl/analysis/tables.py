"""Check and group the tables that analyses read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.run import Sweep

if TYPE_CHECKING:
    import pandas as pd

    Source = pd.DataFrame | Sweep | BackwardLensResult
    GradientSource = Source | GradientCapture

SOURCES = {
    "positions": "a table of positions: a sweep, its positions(), or result.to_df(subject)",
    "gradients": "a table of gradients: a sweep, its gradients(), a result, its capture, or "
    "result.capture.gradient_df()",
}
"""Descriptions of the tables, for error messages."""


def table_of(
    source: GradientSource,
    name: Literal["positions", "gradients"],
    columns: Sequence[str],
    matrices: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The table that an analysis reads.

    Args:
        source: A sweep, a result, one of their tables, or, for gradients, a capture.
        name: Which table.
        columns: The columns that it must have.
        matrices: The only gradients of a result or a capture to decompose; none or `None` for all.
            Tables and sweeps are read whole.

    Returns:
        The table, with these columns and at least one row.

    Raises:
        InputError: If it is something else, lacks a column or is empty.
    """
    table: Any = source
    if isinstance(source, Sweep):
        table = getattr(source, name)(columns)
    elif isinstance(source, BackwardLensResult) and name == "positions":
        table = source.to_df()
    elif isinstance(source, BackwardLensResult | GradientCapture) and name == "gradients":
        capture = source if isinstance(source, GradientCapture) else source.capture
        table = capture.gradient_df(matrix=matrices or None)
    return checked_table(table, columns, SOURCES[name])


def checked_table(table: object, columns: Sequence[str], origin: str) -> pd.DataFrame:
    """Refuse anything but a table with some columns and at least one row.

    Args:
        table: What was passed.
        columns: The columns that it must have.
        origin: Where such a table comes from, for the message.

    Returns:
        The table.

    Raises:
        InputError: If it is something else, lacks a column or is empty.
    """
    import pandas as pd

    if not isinstance(table, pd.DataFrame):
        raise InputError(f"the table is a {type(table).__name__}; pass {origin}")
    lacking = [column for column in columns if column not in table.columns]
    if lacking:
        raise InputError(f"the table has no column {', '.join(map(repr, lacking))}; pass {origin}")
    if table.empty:
        raise InputError(f"the table has no rows; pass {origin}, of at least one prompt")
    return table


def grouped(table: pd.DataFrame, keys: Sequence[str]) -> Any:
    """Group rows by keys, with matrices and projections in order of appearance.

    Args:
        table: The table. In the groups, matrices and projections are categories; `with_types_of`
            undoes that.
        keys: The columns to group by.

    Returns:
        pandas' groups, without empty ones.
    """
    import pandas as pd

    texts = [key for key in keys if key in ("matrix", "projection")]
    categories = {key: pd.Categorical(table[key], table[key].unique(), True) for key in texts}
    return table.assign(**categories).groupby(list(keys), observed=True, sort=True)


def with_types_of(source: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The table of groups with the text dtypes of the table that was grouped."""
    texts = [key for key in ("matrix", "projection", "segment") if key in found.columns]
    return found.astype({key: source[key].dtype for key in texts})
