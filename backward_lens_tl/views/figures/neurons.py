"""Figures of a gradient's neurons and the vectors that span them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.colors import DIVERGING, SEQUENTIAL, Colors
from backward_lens_tl.views.figures.charts import Axis, Heatmap, floats
from backward_lens_tl.views.figures.drawing import (
    Backend,
    draw,
    token_label,
    token_text,
    tokens_of,
)
from backward_lens_tl.views.prompts import answer_start, prompt_title
from backward_lens_tl.views.text import number

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("neuron", "neuron_norm", "norm_order", "position", "token", "similarity", "overlap")
_COLORS = {
    "similarity": Colors(-1.0, 1.0, DIVERGING, "cosine similarity"),
    "overlap": Colors(0.0, 1.0, SEQUENTIAL, "shared top tokens"),
}


def neuron_similarity(
    result: BackwardLensResult,
    matrix: str,
    layer: int,
    batch: int = 0,
    *,
    backend: Backend = "plotly",
) -> Any:
    """Cosine similarity of a gradient's neurons and its spanning vectors (figures 8 to 10).

    Args:
        result: The result to plot.
        matrix: Name of the matrix.
        layer: The layer, negative from the end of the model.
        batch: Index of the prompt.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap with a column per neuron, sorted by norm, largest first, and a row per token of
        the prompt. Blank where the neuron or the vector is zero.

    Raises:
        InputError: If `result` is not a result, the matrix, layer, prompt or backend does not
            exist, or heads or experts have separate factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.neuron_similarity(result, "W_out", layer=6)
        >>> figure.layout.title.text
        'W_out of layer 6: neurons of the gradient and the δ_i that span it'
    """
    check_result(result)
    chart = _neuron_map(
        result.capture.neuron_df(matrix, layer, batch),
        "similarity",
        boundary=answer_start(result, batch, range(len(result.capture.str_tokens[batch]))),
    )
    own = result.capture.layer_number(layer)
    vectors = "x_i" if result.capture[matrix, own].reads_residual else "δ_i"
    title = f"{matrix} of layer {own}: neurons of the gradient and the {vectors} that span it"
    return draw(backend, title, chart, subtitle=prompt_title(result, batch))


def neuron_overlap(
    table: pd.DataFrame,
    matrix: str | None = None,
    layer: int | None = None,
    *,
    backend: Backend = "plotly",
) -> Any:
    """Top tokens that a gradient's neurons share with its spanning vectors (figures 8 to 10).

    Args:
        table: What `analysis.neuron_overlap` returned.
        matrix: Name of its matrix, for the title.
        layer: Its layer, for the title.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two stacked heatmaps, with a column per neuron, sorted by norm, largest first, and a row per
        token of the prompt and for the zero vector: the fraction of top tokens that the two share,
        and their cosine similarity, blank where one of them is zero.

    Raises:
        InputError: If it is not such a table, or the backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> table = blt.analysis.neuron_overlap(model, result, "W_out", layer=6, k=10)
        >>> figure = blt.figures.neuron_overlap(table, "W_out", layer=6)
        >>> [title.text for title in figure.layout.annotations]
        ['Overlap of the top tokens', 'Cosine similarity']
    """
    checked_table(table, _COLUMNS, "what analysis.neuron_overlap returned")
    charts = (
        _neuron_map(table, "overlap", "Overlap of the top tokens"),
        _neuron_map(table, "similarity", "Cosine similarity"),
    )
    names = [] if matrix is None else [str(matrix)]
    names += [] if layer is None else [f"layer {layer}"]
    owner = f"{' of '.join(names)}: " if names else ""
    title = f"{owner}neurons of the gradient and what spans it"
    return draw(backend, title, *charts, is_stacked=True)


def _neuron_map(
    table: pd.DataFrame, column: str, title: str = "", boundary: int | None = None
) -> Heatmap:
    """A column per neuron and a row per position, the first on top; the zero vector comes last."""
    last = table["position"].max() + 1
    table = table.assign(position=table["position"].fillna(last).astype("int64"))
    tokens = tokens_of(table)
    grid = table.pivot(index="position", columns="norm_order", values=column)
    values = tuple(map(floats, grid.to_numpy(float).tolist()))
    neurons = table.drop_duplicates("norm_order").sort_values("norm_order")
    above = [
        f"neuron {neuron}, norm {number(norm)}"
        for neuron, norm in zip(neurons["neuron"], neurons["neuron_norm"], strict=True)
    ]
    below = [
        f"{token_text(token)}{'' if position == last else f' at {position}'}"
        for position, token in tokens.items()
    ]
    hover = tuple(
        tuple(f"{neuron}\n{token}: {value:.3f}" for neuron, value in zip(above, row, strict=True))
        for token, row in zip(below, values, strict=True)
    )
    name = "token" if boundary is None else "token, answer below the line"
    labels = tuple(map(token_label, tokens.values()))
    rows = Axis(name, labels, is_reversed=True, boundary=boundary)
    columns = Axis("neurons of the gradient, largest norm first")
    return Heatmap(values, hover, columns, rows, _COLORS[column], title)
