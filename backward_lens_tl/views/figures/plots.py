"""From a table of a result or of an analysis to the description of one chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backward_lens_tl.views.appearance import number, running_text
from backward_lens_tl.views.figures.charts import (
    CATEGORICAL,
    DIVERGING,
    MARKERS,
    MOST_NAMES,
    SEQUENTIAL,
    Axis,
    Colors,
    Heatmap,
    Line,
    Lines,
    counting,
    floats,
    in_turn,
    ordered_colors,
    shortened,
)

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_LABEL = 16
_BESIDE = 0.18
"""From a point to the next one above the same label."""
_SEGMENT_STYLES: dict[str, tuple[str, str, str]] = {
    "before subject": ("#56b4e9", "dot", "circle"),
    "first subject token": ("#009e73", "dash", "square"),
    "middle subject tokens": ("#cc79a7", "dashdot", "diamond"),
    "last subject token": ("#d55e00", "solid", "triangle"),
    "after subject": ("#7a5c00", "dash", "cross"),
    "last token": ("#0072b2", "solid", "x"),
}
"""Solid where the paper finds that most is written. Colours are Okabe and Ito's."""


# --- cells of one matrix and prompt --------------------------------------------------------------


def shown_norms(table: pd.DataFrame) -> list[float]:
    """The norms of those cells that add something."""
    norms: list[float] = table.loc[~table["is_zero"].astype(bool), "norm"].tolist()
    return norms


def norm_map(table: pd.DataFrame, colors: Colors, n_tokens: int, title: str = "") -> Heatmap:
    """Norms by layer and position.

    Args:
        table: The cells of one matrix and prompt.
        colors: From norms to colours.
        n_tokens: Length of the prompt; where not all of its positions are in the table, tokens have
            theirs behind them.
        title: What the chart shows.

    Returns:
        A row per layer, a column per position in its order; blank where a cell adds nothing.
    """
    norms = _grid(table.assign(norm=table["norm"].mask(table["is_zero"].astype(bool))), "norm")
    tokens, layers = _tokens(table), norms.index.tolist()
    values, said = _rows(norms), [f"{token} at {position}" for position, token in tokens.items()]
    hover = _hover(values, said, [f"layer {layer}" for layer in layers], "norm ")
    if len(tokens) == n_tokens:
        columns = Axis("token", tuple(map(_label, tokens.values())))
    else:
        labels = (f"{_label(token)} ({position})" for position, token in tokens.items())
        columns = Axis("token (position)", tuple(labels))
    return Heatmap(values, hover, columns, Axis("layer", tuple(map(str, layers))), colors, title)


def layer_map(
    values: tuple[tuple[float, ...], ...],
    labels: Sequence[str],
    axes: tuple[str, str],
    colors: Colors,
    title: str,
) -> Heatmap:
    """Any numbers by layer and position, or by layer and whatever else has a label.

    Args:
        values: A row per layer, from layer 0.
        labels: Text of each column.
        axes: What the columns are, and what the rows are.
        colors: From values to colours.
        title: What the chart shows.

    Returns:
        A row per layer, a column per label; NaN is left blank.
    """
    texts, (columns, rows) = [_visible(label) for label in labels], axes
    said = [f"{text} at {place}" for place, text in enumerate(texts)]
    hover = _hover(values, said, [f"{rows} {index}" for index in range(len(values))])
    across = Axis(columns, tuple(map(_label, texts)))
    return Heatmap(
        values, hover, across, Axis(rows, tuple(map(str, range(len(values))))), colors, title
    )


def _hover(
    values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str], what: str = ""
) -> tuple[tuple[str, ...], ...]:
    """What is said of each cell: its column and row, and below them its number."""
    return tuple(
        tuple(
            f"{column}, {row}\n{what}{number(value)}"
            for column, value in zip(columns, numbers, strict=True)
        )
        for row, numbers in zip(rows, values, strict=True)
    )


def target_lines(table: pd.DataFrame, *, is_log: bool) -> Lines:
    """The target's rank by layer, a line per position.

    Args:
        table: The cells of one matrix and prompt.
        is_log: Whether the axis of ranks is logarithmic.

    Returns:
        Lines at 1 + rank, the last token's on top; a gap where a cell adds nothing.
    """
    table = table.assign(place=1 + table["target_rank"].astype("float64"))
    places, tokens = _grid(table, "place"), _tokens(table)
    last = len(places.columns) - 1
    colors, many = ordered_colors(list(tokens), "position in the prompt"), last >= MOST_NAMES
    lines = tuple(
        Line(
            f"{position}: {_label(tokens[position])}",
            floats(places.index),
            floats(places[position]),
            colors.at(position),
            tuple(
                f"{tokens[position]} at {position}, layer {layer}\nrank {place - 1:.0f}"
                for layer, place in places[position].items()
            ),
            # Of many lines only the last token's is told apart at once.
            marker=in_turn(MARKERS, last - index) if index == last or not many else None,
            width=3.0 if index == last else 0.8 if many else 1.4,
        )
        for index, position in enumerate(tokens)
    )
    ranks = Axis("1 + rank of the target (1: top token)", is_log=is_log, is_reversed=True)
    return Lines(lines, _layer_axis(table), ranks, colors if many else None)


# --- edits ---------------------------------------------------------------------------------------


def score_points(summary: pd.DataFrame, metrics: Mapping[str, str], axis: str, title: str) -> Lines:
    """Means of metrics, a point per method, with their intervals.

    Args:
        summary: What `Evaluation.summary` returned.
        metrics: Names of the metrics, with what they are called.
        axis: What is counted, in per cent.
        title: What the chart shows.

    Returns:
        Points side by side above each method, and a line from one end of the interval to the other.
    """
    methods = [str(name) for name in summary["method"]]
    lines = []
    for index, (metric, name) in enumerate(metrics.items()):
        places = [at + _BESIDE * (index - (len(metrics) - 1) / 2) for at in range(len(methods))]
        means = floats(summary[metric])
        low, high = (floats(summary[f"{metric}_{end}"]) for end in ("low", "high"))
        hover = tuple(
            f"{method}: {name}\n{mean:.1f} ({least:.1f} to {most:.1f})"
            for method, mean, least, most in zip(methods, means, low, high, strict=True)
        )
        color, marker = in_turn(CATEGORICAL, index), in_turn(MARKERS, index)
        lines.append(Line(name, tuple(places), means, color, hover, dash=None, marker=marker))
        ends = [(least, most, math.nan) for least, most in zip(low, high, strict=True)]
        lines.append(
            Line(
                name,
                tuple(place for place in places for _ in range(3)),
                tuple(height for end in ends for height in end),
                color,
                marker=None,
            )
        )
    return Lines(tuple(lines), Axis("", tuple(methods)), Axis(axis), title=title)


# --- cells of several prompts --------------------------------------------------------------------


def segment_norms(table: pd.DataFrame, symbol: str, *, is_log: bool) -> Lines:
    """The mean norm by layer, a line per segment.

    Args:
        table: What `analysis.by_segment.norms_by_segment` returns, of one matrix.
        symbol: How the vectors are called.
        is_log: Whether the axis of means is logarithmic; then a mean of zero is left out.

    Returns:
        Lines in the order of a prompt.
    """
    shown = table.assign(place=table["mean"].where(table["mean"] > 0) if is_log else table["mean"])
    lines = _segment_lines(
        shown,
        lambda row: f"mean norm {number(row['mean'])} of {_counted(row['count'], 'token')}",
    )
    return Lines(lines, _layer_axis(table), Axis(f"mean norm of {symbol}", is_log=is_log))


def segment_ranks(table: pd.DataFrame, token: str, *, is_log: bool) -> Lines:
    """The median rank by layer, a line per segment, with a band from quartile to quartile.

    Args:
        table: What `analysis.by_segment.ranks_by_segment` returns, of one matrix and projection.
        token: Which token is ranked, in words.
        is_log: Whether the axis of ranks is logarithmic.

    Returns:
        Lines at 1 + rank, in the order of a prompt; a gap where no cell has a rank.
    """
    names = {"place": "median", "low": "lower_quartile", "high": "upper_quartile"}
    shown = table.assign(**{name: 1 + table[column] for name, column in names.items()})
    lines = _segment_lines(
        shown,
        lambda row: (
            f"median rank {row['median']:g}, quartiles {row['lower_quartile']:g} and "
            f"{row['upper_quartile']:g}, of {_counted(row['count'], 'token')}"
        ),
    )
    title = f"1 + rank of {token} (1: top token)"
    return Lines(lines, _layer_axis(table), Axis(title, is_log=is_log, is_reversed=True))


def _segment_lines(
    table: pd.DataFrame, said: Callable[[Mapping[Any, Any]], str]
) -> tuple[Line, ...]:
    """A line per segment through the column `place`, with a band from `low` to `high` if there."""
    lines = []
    for segment, (color, dash, marker) in _SEGMENT_STYLES.items():
        part = table[table["segment"] == segment].sort_values("layer")
        if part.empty:
            continue
        places = floats(part["layer"]), floats(part["place"])
        hover = tuple(
            f"{segment}, layer {row['layer']}\n{said(row)}" for row in part.to_dict("records")
        )
        band = (floats(part["low"]), floats(part["high"])) if "low" in part else None
        lines.append(Line(segment, *places, color, hover, dash, marker, band=band))
    return tuple(lines)


# --- one step of gradient descent ----------------------------------------------------------------


def step_points(table: pd.DataFrame, *, is_log: bool) -> Lines:
    """The change of the loss as predicted against that measured, in a colour per matrix.

    Args:
        table: What `analysis.steps.step_changes` returns.
        is_log: Whether decreases are shown on logarithmic axes, and increases left out.

    Returns:
        A point per step, and the line on which both are equal.
    """
    sign, what = (-1, "decrease") if is_log else (1, "change")
    shown = table.assign(
        measured=sign * table["loss_change"], predicted=sign * table["predicted_loss_change"]
    )
    if is_log:
        shown = shown[(shown["measured"] > 0) & (shown["predicted"] > 0)]
    both = [*shown["measured"].dropna(), *shown["predicted"].dropna()]
    ends = floats((min(both), max(both))) if both else ()
    lines = [Line("predicted = measured", ends, ends, "#6b7280", dash="dash", marker=None)]
    for index, matrix in enumerate(table["matrix"].unique()):
        part = shown[shown["matrix"] == matrix]
        lines.append(
            Line(
                str(matrix),
                floats(part["measured"]),
                floats(part["predicted"]),
                in_turn(CATEGORICAL, index),
                tuple(map(_step_in_words, part.to_dict("records"))),
                dash=None,
                marker=in_turn(MARKERS, index),
            )
        )
    x, y = (
        Axis(f"{name} {what} of the loss, in nats", is_log=is_log)
        for name in ("measured", "predicted")
    )
    return Lines(tuple(lines), x, y)


def _step_in_words(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['matrix']} of layer {row['layer']}, prompt {row['prompt']}, "
        f"learning rate {number(row['learning_rate'])}\n"
        f"measured {number(row['loss_change'])}, predicted {number(row['predicted_loss_change'])}"
    )


# --- gradients as a whole ------------------------------------------------------------------------


def rank_charts(table: pd.DataFrame, matrices: Sequence[str]) -> tuple[Lines, ...]:
    """Rank against length of the prompt, a chart per matrix.

    Args:
        table: The table of gradients.
        matrices: Names of the matrices.

    Returns:
        Points for each group of layers that have the same points in all charts, and the line
        `rank = n`.
    """
    table = table[table["matrix"].isin(matrices)]
    groups = _layers_alike(table[table["rank"].notna()])
    colors = ordered_colors(sorted(set(table["layer"])), "layer")
    many = len(groups) > MOST_NAMES
    longest = int(table["n_tokens"].max())
    bound = (0.0, float(longest))
    diagonal = Line("rank = n", bound, bound, "#6b7280", dash="dash", marker=None)
    return tuple(
        Lines(
            (
                diagonal,
                *(
                    _rank_points(
                        table[(table["matrix"] == matrix) & table["layer"].isin(layers)],
                        layers,
                        colors.at(layers[0]) if many else in_turn(CATEGORICAL, index),
                        in_turn(MARKERS, index),
                    )
                    for index, layers in enumerate(groups)
                ),
            ),
            counting("tokens of the prompt, n", [0, longest]),
            counting("rank of the gradient", [0, longest]),
            colors if many else None,
            matrix,
        )
        for matrix in matrices
    )


def _layers_alike(table: pd.DataFrame) -> list[list[int]]:
    """Layers that have equal ranks in every matrix and prompt."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer in sorted(set(table["layer"].tolist())):
        part = table[table["layer"] == layer]
        points = part.sort_values(["matrix", "prompt"])[["matrix", "prompt", "rank"]]
        key = tuple(points.itertuples(index=False, name=None))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _rank_points(table: pd.DataFrame, layers: Sequence[int], color: str, marker: str) -> Line:
    points = table[table["rank"].notna()].drop_duplicates(["n_tokens", "rank"])
    places = list(zip(points["n_tokens"].tolist(), points["rank"].tolist(), strict=True))
    name = _layers_in_words(layers)
    return Line(
        name,
        floats(length for length, _ in places),
        floats(rank for _, rank in places),
        color,
        tuple(f"{name}\n{length} tokens, rank {rank}" for length, rank in places),
        dash=None,
        marker=marker,
    )


def spectrum_lines(table: pd.DataFrame) -> Lines:
    """Singular values by index, a line per layer.

    Args:
        table: The gradients of one matrix and prompt.

    Returns:
        Lines of as many values as the rank; those below are rounding.
    """
    layers = table["layer"].tolist()
    colors, many = ordered_colors(layers, "layer"), len(layers) > MOST_NAMES
    lines = []
    for index, row in enumerate(table.to_dict("records")):
        values, name = row["singular_values"][: row["rank"]], f"layer {row['layer']}"
        lines.append(
            Line(
                name,
                floats(range(1, len(values) + 1)),
                floats(values),
                colors.at(row["layer"]),
                tuple(
                    f"{name}, singular value {place}\n{number(value)}"
                    for place, value in enumerate(values, start=1)
                ),
                # A single value is a line without length.
                marker=None if many and len(values) > 1 else in_turn(MARKERS, index),
                width=0.8 if many else 1.4,
            )
        )
    places = counting("index, from the largest", [1, *table["rank"].tolist()])
    values_axis = Axis("singular value", is_log=True)
    return Lines(tuple(lines), places, values_axis, colors if many else None)


def similarity_map(table: pd.DataFrame, title: str = "") -> Heatmap:
    """Cosines of a gradient's neurons, sorted by norm, and what spans them.

    Args:
        table: The table of neurons.
        title: What the chart shows.

    Returns:
        A column per neuron, the longest first, and a row per position, the first on top; a row for
        the zero vector, where the table has it, below them.
    """
    colors = Colors(-1.0, 1.0, DIVERGING, "cosine similarity")
    return _neuron_map(table, "similarity", colors, title)


def overlap_map(table: pd.DataFrame, title: str = "") -> Heatmap:
    """Which part of their top tokens a gradient's neurons share with what spans them.

    Args:
        table: What `analysis.neurons.neuron_overlap` returns.
        title: What the chart shows.

    Returns:
        A chart with rows and columns as those of `similarity_map`.
    """
    return _neuron_map(table, "overlap", Colors(0.0, 1.0, SEQUENTIAL, "shared top tokens"), title)


def _neuron_map(table: pd.DataFrame, column: str, colors: Colors, title: str) -> Heatmap:
    # The zero vector, which has no position, comes last.
    last = table["position"].max() + 1
    table = table.assign(position=table["position"].fillna(last).astype("int64"))
    tokens = _tokens(table)
    grid = table.pivot(index="position", columns="norm_rank", values=column)
    neurons = table.drop_duplicates("norm_rank").sort_values("norm_rank")
    said = [
        f"neuron {neuron}, norm {number(norm)}"
        for neuron, norm in zip(neurons["neuron"], neurons["neuron_norm"], strict=True)
    ]
    values = _rows(grid)
    hover = tuple(
        tuple(
            f"{neuron}\n{tokens[position]}{'' if position == last else f' at {position}'}: "
            f"{value:.3f}"
            for neuron, value in zip(said, row, strict=True)
        )
        for position, row in zip(tokens, values, strict=True)
    )
    rows = Axis("token", tuple(map(_label, tokens.values())), is_reversed=True)
    return Heatmap(
        values, hover, Axis("neurons of the gradient, the longest first"), rows, colors, title
    )


# --- parts ---------------------------------------------------------------------------------------


def _grid(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column by layer and position; a position that was asked for twice counts once."""
    once = table.drop_duplicates(["layer", "position"])
    return once.pivot(index="layer", columns="position", values=column)


def _tokens(table: pd.DataFrame) -> dict[int, str]:
    """The visible text of the token at each position."""
    once = table.drop_duplicates("position").sort_values("position")
    return dict(zip(once["position"].tolist(), map(_visible, once["token"]), strict=True))


def _visible(token: str) -> str:
    """A token as a label; one of spaces alone would be invisible."""
    return running_text(token).strip() or "␣"


def _label(token: str) -> str:
    return shortened(token, _LONGEST_LABEL)


def _rows(grid: pd.DataFrame) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, grid.to_numpy(float).tolist()))


def _layer_axis(table: pd.DataFrame) -> Axis:
    return counting("layer", table["layer"].tolist())


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _layers_in_words(layers: Sequence[int]) -> str:
    """Layers as `layer 7` or `layers 0–2, 5`, with runs joined."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {words}"
