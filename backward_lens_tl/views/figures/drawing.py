"""What all figures have in common: how they are drawn, and how they name tokens and targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from backward_lens_tl._checks import check_choice, shown, truncated
from backward_lens_tl.errors import InputError
from backward_lens_tl.views.figures import draw_matplotlib, draw_plotly
from backward_lens_tl.views.figures.charts import Grid, Heatmap, Lines
from backward_lens_tl.views.text import SPACE, running_text

if TYPE_CHECKING:
    import pandas as pd

Backend = Literal["plotly", "matplotlib"]
Scale = Literal["log", "linear"]


def draw(
    backend: Backend,
    title: str,
    *charts: Heatmap | Lines,
    subtitle: str = "",
    is_stacked: bool = False,
) -> Any:
    """Draw charts as one figure of a plotting library, which is imported here, on demand."""
    check_choice("backend", backend, ("plotly", "matplotlib"))
    library = draw_plotly if backend == "plotly" else draw_matplotlib
    return library.draw(Grid(charts, title, subtitle, is_stacked))


def is_log(scale: Scale) -> bool:
    """Whether a scale is logarithmic; refuses other names."""
    check_choice("scale", scale, ("log", "linear"))
    return scale == "log"


def check_matrix(matrix: object, table: pd.DataFrame) -> None:
    """Refuse a matrix that has no rows in a table."""
    there = table["matrix"].unique().tolist()
    if matrix not in there:
        raise InputError(
            f"{shown(matrix)} is not in this table; it has {', '.join(there)}; pass one of these"
        )


def token_text(token: str) -> str:
    """A token without the spaces around it; a space if it has nothing else."""
    return running_text(token).strip() or SPACE


def token_label(token: str) -> str:
    """A token as the label of an axis or a line."""
    return truncated(token_text(token), 16)


def tokens_of(table: pd.DataFrame) -> dict[int, str]:
    """The prompt's tokens by position."""
    once = table.drop_duplicates("position").sort_values("position")
    return dict(zip(once["position"].tolist(), once["token"], strict=True))
