"""Any numbers by layer as lines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.views.figures.charts import Axis, Lines, lines_by
from backward_lens_tl.views.figures.drawing import Backend, Scale, draw, is_log
from backward_lens_tl.views.text import number

if TYPE_CHECKING:
    import pandas as pd


def layer_lines(
    table: pd.DataFrame,
    values: str,
    by: str,
    *,
    title: str,
    unit: str = "",
    scale: Scale = "linear",
    backend: Backend = "plotly",
) -> Any:
    """Any number by layer, with a line for each value of another column.

    Args:
        table: A table with a column `layer`, one row per layer and line.
        values: The column with the numbers.
        by: The column with the names of the lines.
        title: Title of the figure.
        unit: What the numbers are; by default the column's name.
        scale: `"linear"` or `"log"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        One chart.

    Raises:
        InputError: If the table lacks a column or is empty, or the scale or backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", positions=-1)
        >>> table = result.to_df(matrix="W_out")
        >>> figure = blt.figures.layer_lines(table, "norm", "token", title="Norms of the VJPs")
        >>> [line.name for line in figure.data]
        [' for']
    """
    checked_table(table, ("layer", values, by), "a table with one row per layer and line")
    lines = lines_by(table, by, "layer", values, partial(_hover, by, values))
    chart = Lines(
        lines,
        Axis.counting("layer", table["layer"]),
        Axis(unit or values.replace("_", " "), is_log=is_log(scale)),
    )
    return draw(backend, title, chart)


def _hover(by: str, values: str, row: Mapping[Any, Any]) -> str:
    return f"{row[by]}, layer {row['layer']}: {number(row[values])}"
