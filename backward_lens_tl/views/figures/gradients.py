"""Figures of gradients as a whole: their ranks and singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backward_lens_tl._checks import listed
from backward_lens_tl.analysis.tables import table_of
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.colors import Colors
from backward_lens_tl.views.figures.charts import (
    GREY,
    MOST_NAMES,
    Axis,
    Line,
    Lines,
    floats,
    marker_at,
    style_at,
)
from backward_lens_tl.views.figures.drawing import (
    Backend,
    check_matrix,
    draw,
)
from backward_lens_tl.views.prompts import prompt_title
from backward_lens_tl.views.text import counted, display_order, number

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.analysis.tables import GradientSource

_COLUMNS = ("prompt", "matrix", "layer", "n_tokens", "rank")


def gradient_ranks(
    source: GradientSource,
    matrices: str | Sequence[str] | None = None,
    *,
    backend: Backend = "plotly",
) -> Any:
    """Rank of each gradient against the length of its prompt (paper, figure 4).

    Lemma 4.1 bounds the rank by the line `rank = n`; the last layer has rank 1 if the loss is on
    the last token. `analysis.rank_exceptions` explains points elsewhere.

    Args:
        source: A result or a capture, all of whose prompts count, or a table of gradients of any
            number of prompts: a sweep, its `gradients()`, or `GradientCapture.gradient_df()`.
        matrices: One or more names; by default all matrices, `W_out` first.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A chart per matrix, at most three in a row, with a point for each layer and prompt. Layers
        with the same ranks everywhere share their points. A matrix whose heads or experts have
        separate factors has no points.

    Raises:
        InputError: If `source` is none of these, or a matrix or the backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.gradient_ranks(result, matrices="W_out")
        >>> [line.name for line in figure.data]
        ['rank = n', 'layers 0–6', 'layer 7']
    """
    names = None if matrices is None else listed(matrices)
    table = table_of(source, "gradients", _COLUMNS, names)
    there = table["matrix"].unique().tolist()
    if names is None:
        names = display_order(there)
    if not names:
        raise InputError(f"matrices is {matrices!r}; pass some of {', '.join(there)}")
    for name in names:
        check_matrix(name, table)
    table = table[table["matrix"].isin(names)]
    prompts = counted(table["prompt"].nunique(), "prompt")
    title = f"Rank of each layer's gradient, {prompts}"
    return draw(backend, title, *_rank_charts(table, names))


def singular_values(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    backend: Backend = "plotly",
) -> Any:
    """Singular values of each layer's gradient, as many as its rank.

    Args:
        result: The result to plot.
        matrix: Name of the matrix.
        batch: Index of the prompt.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per layer, largest value first, on a logarithmic axis.

    Raises:
        InputError: If `result` is not a result, the matrix, prompt or backend does not exist, or
            heads or experts have separate factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.singular_values(result)
        >>> [len(line.y) for line in figure.data]
        [6, 6, 6, 6, 6, 6, 6, 1]
    """
    check_result(result)
    result.readout(matrix)
    title = f"{matrix}: singular values of the gradient"
    table = result.capture.gradient_df(matrix=matrix, batch=batch)
    if table["rank"].isna().any():
        raise InputError(
            f"heads or experts of {matrix} have separate factors, so it has no singular values as "
            "a whole; use .head(index) or .expert(index) of result.capture[matrix, layer]"
        )
    layers = table["layer"].tolist()
    colors, many = Colors.of_order(layers, "layer"), len(layers) > MOST_NAMES
    lines = []
    for index, row in enumerate(table.to_dict("records")):
        values, name = row["singular_values"][: row["rank"]], f"layer {row['layer']}"
        hover = (
            f"{name}, singular value {place}\n{number(value)}"
            for place, value in enumerate(values, start=1)
        )
        lines.append(
            Line(
                name,
                floats(range(1, len(values) + 1)),
                floats(values),
                colors.at(row["layer"]),
                tuple(hover),
                # A single value is a line of no length.
                marker=None if many and len(values) > 1 else marker_at(index),
                width=0.8 if many else 1.4,
            )
        )
    x = Axis.counting("index, from the largest", [1, *table["rank"].tolist()])
    y = Axis("singular value", is_log=True)
    chart = Lines(tuple(lines), x, y, colors if many else None)
    return draw(backend, title, chart, subtitle=prompt_title(result, batch))


def _rank_charts(table: pd.DataFrame, matrices: Sequence[str]) -> list[Lines]:
    """A chart per matrix with the points of each group of layers, and the line `rank = n`."""
    ranked = table[table["rank"].notna()]
    groups = _layers_alike(ranked)
    colors = Colors.of_order(sorted(set(table["layer"])), "layer")
    many = len(groups) > MOST_NAMES
    longest = int(table["n_tokens"].max())
    bound = (0.0, float(longest))
    diagonal = Line("rank = n", bound, bound, GREY, dash="dash", marker=None)
    x, y = (
        Axis.counting(title, [0, longest])
        for title in ("tokens of the prompt, n", "rank of the gradient")
    )
    charts = []
    for matrix in matrices:
        lines = [diagonal]
        for index, layers in enumerate(groups):
            style = style_at(index) | ({"color": colors.at(layers[0])} if many else {})
            own = ranked[(ranked["matrix"] == matrix) & ranked["layer"].isin(layers)]
            lines.append(_rank_points(own.drop_duplicates(["n_tokens", "rank"]), layers, style))
        charts.append(Lines(tuple(lines), x, y, colors if many else None, matrix))
    return charts


def _rank_points(table: pd.DataFrame, layers: Sequence[int], style: Mapping[str, Any]) -> Line:
    name = _layers_name(layers)
    return Line.of_rows(
        name,
        table,
        "n_tokens",
        "rank",
        lambda row: f"{name}\n{row['n_tokens']} tokens, rank {row['rank']}",
        dash=None,
        **style,
    )


def _layers_alike(table: pd.DataFrame) -> list[list[int]]:
    """Groups of layers that have equal ranks in every matrix and prompt."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer in sorted(set(table["layer"].tolist())):
        own = table[table["layer"] == layer]
        points = own.sort_values(["matrix", "prompt"])[["matrix", "prompt", "rank"]]
        key = tuple(points.itertuples(index=False, name=None))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _layers_name(layers: Sequence[int]) -> str:
    """Such as `layer 7` or `layers 0–2, 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {names}"
