"""Figures of many prompts' gradients: similarities, and the main directions of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_index, check_kind, listed
from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.capture.similarity import Similarity
from backward_lens_tl.errors import InputError
from backward_lens_tl.views.colors import DIVERGING, Colors
from backward_lens_tl.views.figures.charts import Axis, Heatmap, floats
from backward_lens_tl.views.figures.drawing import Backend, draw, token_label, token_text
from backward_lens_tl.views.text import number

if TYPE_CHECKING:
    import pandas as pd

_MOST_CELLS = 40_000
"""More cells of a figure would make a page of several MB."""

_COSINES = Colors(-1.0, 1.0, DIVERGING, "cosine")
_COLUMNS = (
    *("matrix", "layer", "part", "direction", "energy", "singular_value"),
    *("top_tokens", "bottom_tokens", "neurons", "prompt_shares", "token", "prompt", "position"),
)
_SHOWN_TOKENS = 3


def similarity(
    similarity: Similarity,
    labels: Sequence[str] | None = None,
    other_labels: Sequence[str] | None = None,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    title: str = "Cosine of weight gradients",
    backend: Backend = "plotly",
) -> Any:
    """Cosines of the gradients of prompts, as a heatmap.

    Args:
        similarity: What `GradientCapture.similarity` returned.
        labels: A text per prompt `a`, such as `capture.prompts`; by default its number.
        other_labels: A text per prompt `b`; by default `labels` if there are as many.
        rows: The prompts `a` to show, in this order; `None` for all.
        columns: The prompts `b` to show, in this order; `None` for all.
        title: Title of the figure.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap with a row per prompt `a`, the first one on top, and a column per prompt `b`; one
        for each matrix or layer if there are several. Blank where a gradient is zero.

    Raises:
        InputError: If an argument is not usable, or there are more than 40,000 cells.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["The capital of France is", "The capital of Italy is", "Messi plays for"]
        >>> capture = blt.capture_gradients(model, prompts, blt.target_nll(" Paris"))
        >>> figure = blt.figures.similarity(capture.similarity(), capture.prompts)
        >>> len(figure.data[0].z), figure.layout.yaxis.ticktext[0]
        (3, 'The capital of …')
    """
    check_kind("similarity", similarity, Similarity, "capture.similarity()")
    cosines = similarity.cosine
    n_rows, n_columns = cosines.shape[-2:]
    down, across = _chosen("rows", rows, n_rows), _chosen("columns", columns, n_columns)
    cells = cosines[..., down, :][..., across]
    if cells.numel() > _MOST_CELLS:
        raise InputError(
            f"the figure would have {cells.numel():,} cells; at most {_MOST_CELLS:,} are drawn, so "
            "select prompts with rows=[...] and columns=[...]"
        )
    names = _labels("labels", labels, n_rows)
    if other_labels is None and n_rows == n_columns:
        other_labels = labels
    other_names = _labels("other_labels", other_labels, n_columns)
    axes = [names[each] for each in down], [other_names[each] for each in across]
    if not similarity.parts:
        return draw(backend, title, _cosine_map(cells, *axes))
    kind = "layer " if isinstance(similarity.parts[0], int) else ""
    maps = (
        _cosine_map(part, *axes, f"{kind}{name}")
        for name, part in zip(similarity.parts, cells, strict=True)
    )
    return draw(backend, title, *maps)


def principal_directions(
    table: pd.DataFrame, labels: Sequence[str] | None = None, *, backend: Backend = "plotly"
) -> Any:
    """The main directions of a batch's gradient, and the prompts that carry them.

    Args:
        table: What `analysis.principal_directions` returned, or some of its rows; or several such
            tables of different matrices, joined.
        labels: A text per prompt, such as `capture.prompts`; by default its number.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap with a row per layer and direction, the first layer on top, and a column per
        prompt; one for each matrix if there are several. Rows are labelled with the share of the
        direction in the squared norm of the layer's gradient, and with its top tokens. Colours are
        the fractions of the direction that the prompts contribute; they are negative for prompts
        that weaken it.

    Raises:
        InputError: If it is not such a table, there is not one label per prompt, or the backend
            does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts, targets = ["Messi plays for", "Rome is in"], [" Paris", " Greece"]
        >>> result = blt.backward_lens(model, prompts, targets)
        >>> table = blt.analysis.principal_directions(model, result, k=2)
        >>> figure = blt.figures.principal_directions(table, prompts)
        >>> figure.layout.yaxis.ticktext[-2][:20]
        'layer 7: 55 % Greece'
    """
    checked_table(table, _COLUMNS, "what analysis.principal_directions returned")
    of_matrix = {
        str(matrix): own.to_dict("records") for matrix, own in table.groupby("matrix", sort=False)
    }
    shares = [share for own in table["prompt_shares"] for share in floats(own)]
    colors = Colors.of_values(shares, "share of the direction")
    title = "main directions of the gradient"
    if len(of_matrix) == 1:
        [(matrix, rows)] = of_matrix.items()
        return draw(backend, f"{matrix}: {title}", _directions_map(rows, labels, colors))
    maps = (_directions_map(rows, labels, colors, matrix) for matrix, rows in of_matrix.items())
    return draw(backend, title.capitalize(), *maps)


def _directions_map(
    rows: Sequence[Mapping[Any, Any]],
    labels: Sequence[str] | None,
    colors: Colors,
    title: str = "",
) -> Heatmap:
    """The directions of one matrix."""
    values = tuple(floats(row["prompt_shares"]) for row in rows)
    names = _labels("labels", labels, len(values[0]))
    hover = tuple(
        tuple(
            f"{token_text(name)}: {100 * share:.3g} % of the direction\n{_described(row)}"
            for name, share in zip(names, shares, strict=True)
        )
        for row, shares in zip(rows, values, strict=True)
    )
    return Heatmap(
        values,
        hover,
        Axis("prompt", tuple(map(token_label, names))),
        Axis(
            "layer: share of its squared norm, top tokens",
            tuple(map(_row_label, rows)),
            is_reversed=True,
        ),
        colors,
        title,
    )


def _row_label(row: Mapping[Any, Any]) -> str:
    part = "" if row["part"] == "whole" else f", {row['part']}"
    tokens = " ".join(map(token_label, row["top_tokens"][:_SHOWN_TOKENS]))
    return f"layer {row['layer']}{part}: {100 * row['energy']:.0f} % {tokens}"


def _described(row: Mapping[Any, Any]) -> str:
    """What a direction is, for the hover text."""
    top, bottom = (" ".join(map(token_text, row[end])) for end in ("top_tokens", "bottom_tokens"))
    neurons = ", ".join(map(str, row["neurons"]))
    return (
        f"{_row_label(row)}\nsingular value {number(row['singular_value'])}\ntop: {top}\n"
        f"bottom: {bottom}\nneurons: {neurons}\n"
        f"most from {token_text(row['token'])} at {row['position']} of prompt {row['prompt']}"
    )


def _cosine_map(
    cosines: Float[Tensor, "a b"], down: Sequence[str], across: Sequence[str], title: str = ""
) -> Heatmap:
    values = tuple(map(floats, cosines.tolist()))
    hover = tuple(
        tuple(
            f"{token_text(row)}\n{token_text(column)}\ncosine {value:.3f}"
            for column, value in zip(across, own, strict=True)
        )
        for row, own in zip(down, values, strict=True)
    )
    x, y = (Axis("prompt", tuple(map(token_label, names))) for names in (across, down))
    return Heatmap(values, hover, x, replace(y, is_reversed=True), _COSINES, title)


def _labels(name: str, labels: Sequence[str] | None, n: int) -> list[str]:
    if labels is None:
        return list(map(str, range(n)))
    given = list(map(str, listed(labels)))
    if len(given) != n:
        raise InputError(f"{name} has {len(given)} texts, but there are {n} prompts; pass one each")
    return given


def _chosen(name: str, chosen: Sequence[int] | None, n: int) -> list[int]:
    if chosen is None:
        return list(range(n))
    numbers = listed(chosen)
    if not numbers:
        raise InputError(f"{name} is empty; omit it to select all of them")
    for each in numbers:
        check_index("prompt", each, n)
    return numbers
