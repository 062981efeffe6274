"""The figure of steps of gradient descent: predicted and measured change of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.views.figures.charts import GREY, Axis, Line, Lines, floats, style_at
from backward_lens_tl.views.figures.drawing import Backend, Scale, draw, is_log
from backward_lens_tl.views.text import counted, display_order, number

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("prompt", "matrix", "layer", "learning_rate", "loss_change", "predicted_loss_change")


def step_changes(
    table: pd.DataFrame, *, scale: Scale = "linear", backend: Backend = "plotly"
) -> Any:
    """Change of the loss by one step of gradient descent, predicted and measured.

    Args:
        table: What `analysis.step_changes` returned, for any number of prompts.
        scale: `"linear"`, or `"log"` for decreases of the loss, which leaves out steps that raise
            the loss or were predicted to.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A point per prompt, matrix, layer and learning rate, coloured by matrix, and the line on
        which the two changes are equal. For small steps the prediction is correct to first order.
        With the default learning rates of the analysis, the predictions of a prompt are all equal.

    Raises:
        InputError: If it is not such a table, or the scale or backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> table = blt.analysis.step_changes(model, "Lionel Messi plays for", " Paris", layers=6)
        >>> figure = blt.figures.step_changes(table)
        >>> [points.name for points in figure.data]
        ['predicted = measured', 'W_out', 'W_in']
    """
    checked_table(table, _COLUMNS, "what analysis.step_changes returned")
    sign, what = (-1, "decrease") if is_log(scale) else (1, "change")
    points = table.assign(
        measured=sign * table["loss_change"], predicted=sign * table["predicted_loss_change"]
    )
    if is_log(scale):
        points = points[(points["measured"] > 0) & (points["predicted"] > 0)]
    both = [*points["measured"].dropna(), *points["predicted"].dropna()]
    ends = floats((min(both), max(both))) if both else ()
    lines = [Line("predicted = measured", ends, ends, GREY, dash="dash", marker=None)]
    for index, matrix in enumerate(display_order(table["matrix"].unique())):
        own = points[points["matrix"] == matrix]
        style = style_at(index)
        lines.append(
            Line.of_rows(str(matrix), own, "measured", "predicted", _hover, dash=None, **style)
        )
    x, y = (
        Axis(f"{name} {what} of the loss, in nats", is_log=is_log(scale))
        for name in ("measured", "predicted")
    )
    prompts = counted(table["prompt"].nunique(), "prompt")
    title = f"One step on one matrix: change of the loss, {prompts}"
    return draw(backend, title, Lines(tuple(lines), x, y))


def _hover(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['matrix']} of layer {row['layer']}, prompt {row['prompt'] + 1}, "
        f"learning rate {number(row['learning_rate'])}\n"
        f"measured {number(row['loss_change'])}, predicted {number(row['predicted_loss_change'])}"
    )
