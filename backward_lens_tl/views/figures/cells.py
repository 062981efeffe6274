"""Figures of numbers by layer and position: norms, and any others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import listed, plain, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.colors import Colors
from backward_lens_tl.views.figures.charts import (
    Axis,
    Heatmap,
    Values,
    floats,
)
from backward_lens_tl.views.figures.drawing import (
    Backend,
    Scale,
    draw,
    is_log,
    token_label,
    token_text,
    tokens_of,
)
from backward_lens_tl.views.norms import Quantity, check_quantity, meaning, symbol
from backward_lens_tl.views.prompts import answer_start, prompt_title
from backward_lens_tl.views.text import number, running_text


def norms(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    quantity: Quantity = "norm",
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Norms by layer and position; those of `delta_i` are the colours of the paper's figure 5.

    Args:
        result: The result to plot.
        matrix: Name of the matrix.
        batch: Index of the prompt.
        quantity: `"norm"` for `||delta_i||_2`, `"write_norm"` for `||x_i|| ||delta_i||`, the norm
            of the term that the position writes into the matrix, or `"input_norm"` for `||x_i||_2`.
        scale: `"log"` for at most three decades, as in the layers x tokens table, or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap with the last layer on top; blank where a position adds nothing. If only some
        positions were analysed, each token is followed by its position. A line separates the prompt
        from an answer of several tokens.

    Raises:
        InputError: If `result` is not a result, or the matrix, prompt, quantity, scale or backend
            does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.norms(result)
        >>> figure.layout.title.text, figure.layout.title.subtitle.text
        ('W_out: ‖δ_i‖, norm of the gradient at the output', '“Lionel Messi plays for” → “Paris”')
    """
    check_result(result)
    check_quantity(quantity)
    title, subtitle = f"{matrix}: {meaning(quantity)}", prompt_title(result, batch)
    maps = _norm_maps(matrix, quantity, scale, (result, batch, ""))
    return draw(backend, title, *maps, subtitle=subtitle)


def compare(
    one: BackwardLensResult,
    other: BackwardLensResult,
    matrix: str = "W_out",
    batch: tuple[int, int] = (0, 0),
    names: tuple[str, str] | None = None,
    *,
    quantity: Quantity = "norm",
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Norms of two prompts, or of two models, side by side with one colour scale.

    Args:
        one: The result on the left.
        other: The result on the right; it may be the same one.
        matrix: Name of the matrix.
        batch: Index of the prompt in each result.
        names: Titles of the two heatmaps; by default their prompts, with the models if those
            differ.
        quantity: Which norm, as in `norms`.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two heatmaps, each like that of `norms`.

    Raises:
        InputError: If `one` or `other` is not a result, the matrix, a prompt, the quantity, scale
            or backend does not exist, or `batch` or `names` does not have two entries.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
        >>> result = blt.backward_lens(model, prompts, " Rome")
        >>> figure = blt.figures.compare(result, result, batch=(0, 1))
        >>> [heatmap.type for heatmap in figure.data]
        ['heatmap', 'heatmap']
    """
    check_result(one)
    check_result(other)
    check_quantity(quantity)
    left, right = _two("batch", batch)
    titles = [prompt_title(one, left), prompt_title(other, right)]
    models = [one.capture.model_name, other.capture.model_name]
    if models[0] != models[1]:
        titles = [f"{model}: {title}" for model, title in zip(models, titles, strict=True)]
    first, second = titles if names is None else _two("names", names)
    maps = _norm_maps(matrix, quantity, scale, (one, left, first), (other, right, second))
    return draw(backend, f"{matrix}: {meaning(quantity)}", *maps)


def layer_maps(
    maps: Mapping[str, Float[Tensor, "layer pos"]],
    labels: Sequence[str],
    units: str | Sequence[str],
    *,
    columns: str = "token",
    rows: str = "layer",
    title: str = "",
    backend: Backend = "plotly",
) -> Any:
    """Any numbers by layer and position, as heatmaps stacked so that their columns line up.

    Use it to compare what other tools measure, such as the tensors of
    `transformer_lens.patching`, with attributions and norms. Heads may replace positions or
    layers.

    Args:
        maps: The numbers by title; row 0 is layer 0.
        labels: Label of each column: tokens, as in `GradientCapture.str_tokens`, or heads.
        units: What the numbers are: one text for all maps, or one per map. Maps of the same unit
            share a colour scale, which starts at 0, or is symmetric if a number is negative.
        columns: What the columns are.
        rows: What the rows are.
        title: Title of the figure.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap per map, the first one on top, each with the last layer on top; blank where a
        number is NaN.

    Raises:
        InputError: If the backend does not exist, there is no map, a map is not a tensor with
            these columns or has infinite numbers, or `units` is neither one text nor one per map.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> measured = torch.tensor([[0.5, -1.0], [0.0, 0.25]])
        >>> maps = {"measured": measured, "predicted": 2 * measured}
        >>> figure = blt.figures.layer_maps(maps, ["Rome", " is"], "change of the loss, in nats")
        >>> figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax  # of both maps
        (-2.0, 2.0)
    """
    tokens = dict(enumerate(map(str, listed(labels))))
    if not isinstance(maps, Mapping) or not maps:
        found = "an empty" if isinstance(maps, Mapping) else "a"
        raise InputError(
            f"maps is {found} {type(maps).__name__}; pass a dict from titles to tensors "
            "[layer, pos]"
        )
    values = {str(name): _map_values(str(name), given, len(tokens)) for name, given in maps.items()}
    given = listed(units)
    by_map = given * len(values) if len(given) == 1 else given
    if len(by_map) != len(values):
        raise InputError(
            f"units is {shown(units)}; pass one for all {len(values)} maps, or one per map"
        )
    numbers: dict[str, list[float]] = {}
    for unit, own in zip(by_map, values.values(), strict=True):
        numbers.setdefault(unit, []).extend(chain.from_iterable(own))
    colors = {unit: Colors.of_values(every, str(unit)) for unit, every in numbers.items()}
    charts = (
        _layer_map(own, tokens, range(len(own)), colors[unit], running_text(name), columns, rows)
        for unit, (name, own) in zip(by_map, values.items(), strict=True)
    )
    return draw(backend, title, *charts, is_stacked=True)


def _norm_maps(
    matrix: str, quantity: Quantity, scale: Scale, *panels: tuple[BackwardLensResult, int, str]
) -> list[Heatmap]:
    """Heatmaps of several prompts (result, index and title) with one colour scale."""
    tables = [result.to_df(matrix=matrix, batch=batch) for result, batch, _ in panels]
    tables = [
        table.assign(shown=table[quantity].mask(table["is_zero"].astype(bool))) for table in tables
    ]
    every = chain.from_iterable(table["shown"] for table in tables)
    colors = Colors.of_norms(every, symbol(quantity), is_log(scale))
    maps = []
    for table, (result, batch, title) in zip(tables, panels, strict=True):
        cells = table.drop_duplicates(["layer", "position"])
        grid = cells.pivot(index="layer", columns="position", values="shown")
        maps.append(
            _layer_map(
                tuple(map(floats, grid.to_numpy(float).tolist())),
                tokens_of(table),
                grid.index.tolist(),
                colors,
                title and running_text(str(title)),
                what=f"{symbol(quantity)}: ",
                is_partial=grid.shape[1] < len(result.capture.str_tokens[batch]),
                boundary=answer_start(result, batch, list(tokens_of(table))),
            )
        )
    return maps


def _layer_map(
    values: Values,
    tokens: Mapping[int, str],
    layers: Sequence[int],
    colors: Colors,
    title: str,
    columns: str = "token",
    rows: str = "layer",
    *,
    what: str = "",
    is_partial: bool = False,
    boundary: int | None = None,
) -> Heatmap:
    """Numbers by layer and position; `is_partial` labels each token with its position, too."""
    hover = tuple(
        tuple(
            f"{token_text(token)} at {position}, {rows} {layer}\n{what}{number(value)}"
            for (position, token), value in zip(tokens.items(), own, strict=True)
        )
        for layer, own in zip(layers, values, strict=True)
    )
    labels = tuple(
        f"{token_label(token)} ({position})" if is_partial else token_label(token)
        for position, token in tokens.items()
    )
    title_across = f"{columns} (position)" if is_partial else columns
    if boundary is not None:
        title_across += ", answer right of the line"
    across = Axis(title_across, labels, boundary=boundary)
    return Heatmap(values, hover, across, Axis(rows, tuple(map(str, layers))), colors, title)


def _map_values(name: str, values: object, width: int) -> Values:
    found = f"a {type(values).__name__}"
    if isinstance(values, Tensor):
        found = f"of shape {list(values.shape)}"
    if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != width:
        raise InputError(
            f"map {name!r} is {found}; pass a tensor [layer, pos] with a column for each of the "
            f"{width} labels"
        )
    if not values.numel() or bool(values.isinf().any()):
        raise InputError(
            f"map {name!r} {found} is empty or has infinite numbers; use NaN to leave a cell blank"
        )
    return tuple(map(floats, plain(values)))


def _two(name: str, values: object) -> list[Any]:
    pair = listed(values)
    if len(pair) != 2:
        raise InputError(f"{name} is {values!r}; pass one for each of the two results")
    return pair
