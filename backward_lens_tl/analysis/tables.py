"""The tables that analyses are made from, and their rows in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.run import Sweep

if TYPE_CHECKING:
    import pandas as pd

    Source = pd.DataFrame | Sweep | BackwardLensResult

SOURCES = {
    "positions": "a table of positions: a sweep, its positions(), or result.to_df(subject)",
    "gradients": "a table of gradients: a sweep, its gradients(), a result or its gradient_df()",
}
"""What analyses take, for messages."""


def table_of(
    source: Source, name: Literal["positions", "gradients"], columns: Sequence[str]
) -> pd.DataFrame:
    """The rows that an analysis is made from.

    Args:
        source: A sweep, a result, or a table with the columns that these give.
        name: Which of their tables.
        columns: The columns that are needed.

    Returns:
        The table, at least with these columns and one row.

    Raises:
        InputError: If it is something else, lacks a column or is empty.
    """
    table: Any = source
    if isinstance(source, Sweep):
        table = getattr(source, name)(columns)
    elif isinstance(source, BackwardLensResult):
        table = source.to_df() if name == "positions" else source.capture.gradient_df()
    return checked_table(table, columns, SOURCES[name])


def checked_table(table: object, columns: Sequence[str], origin: str) -> pd.DataFrame:
    """Refuse what is no table with some columns and at least one row.

    Args:
        table: What was passed.
        columns: The columns that it needs.
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
    """Rows with the same keys, in the order of a table's matrices and projections.

    Args:
        table: The table. Its matrices and projections become categories in order of appearance;
            `with_types_of` undoes that.
        keys: What the rows of one group have in common, outermost first.

    Returns:
        pandas' groups, without those that have no rows.
    """
    import pandas as pd

    texts = [key for key in keys if key in ("matrix", "projection")]
    categories = {key: pd.Categorical(table[key], table[key].unique(), True) for key in texts}
    return table.assign(**categories).groupby(list(keys), observed=True, sort=True)


def with_types_of(source: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """A table of groups whose texts have the types of the table that was grouped.

    Args:
        source: The table that was grouped.
        found: The table of its groups.

    Returns:
        `found` without categories, unless `source` has them.
    """
    texts = [key for key in ("matrix", "projection", "segment") if key in found.columns]
    return found.astype({key: source[key].dtype for key in texts})
