"""Widgets that colour the prompt's tokens by a number: norms, and several quantities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import torch

from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.norms import Quantity, check_quantity, meaning, symbol
from backward_lens_tl.views.widgets.captions import (
    analysed_positions,
    answer_line,
    prompt_line,
    reading,
    start_of_answer,
)
from backward_lens_tl.views.widgets.widget import Widget, literal, make_widget

_NO_RANK = -1.0

_TOOLTIP_ROWS, _TOOLTIP_COLUMNS = 8, 4
"""A tooltip of more layers than rows has columns; with four of them, it has more rows."""


def norms(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    quantity: Quantity = "norm",
) -> Widget:
    """A norm of every token, with a button per layer.

    CircuitsVis shows six decimals. If that is not enough, all numbers are divided by one power of
    ten, which every label names.

    Args:
        result: The result to show.
        matrix: Name of the matrix.
        batch: Index of the prompt.
        quantity: `"norm"` for `||delta_i||_2`, `"write_norm"` for `||x_i|| ||delta_i||`, the norm
            of the term that the position writes into the matrix, or `"input_norm"` for `||x_i||_2`.

    Returns:
        The widget, with one colour scale for all layers.

    Raises:
        InputError: If `result` is not a result, or the matrix, prompt or quantity does not exist.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.norms(result)
        <ColoredTokensMulti of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    check_result(result)
    check_quantity(quantity)
    rows = [result.cells(matrix, layer, batch) for layer in result.layers]
    values = [[float(getattr(cell, quantity)) for cell in row] for row in rows]
    power = power_for_decimals(norm for row in values for norm in row)
    times = f" ×1e{power}" if power else ""
    scaled = torch.tensor(values, dtype=torch.float64).T / 10.0**power
    start = start_of_answer(result, batch, rows[0])
    caption = (
        f"<b>{matrix}</b>, by token and layer: {meaning(quantity)}."
        f"{prompt_line(result, batch)}{answer_line(start)}<br>The darkest blue is the largest of "
        "all layers; hover over a token for its numbers."
        f"{analysed_positions(result, batch, rows[0])}"
    )
    # By default it keeps the first layer's scale when another layer is chosen.
    bounds = [float(scaled.max()) or 1.0] * len(result.layers)
    return make_widget(
        "ColoredTokensMulti",
        caption,
        tooltip_rows=min(len(rows), max(_TOOLTIP_ROWS, math.ceil(len(rows) / _TOOLTIP_COLUMNS))),
        answer_start=start,
        tokens=[literal(cell.token) for cell in rows[0]],
        values=scaled.tolist(),
        labels=[f"L{layer}{times}" for layer in result.layers],
        positiveBounds=bounds,
        negativeBounds=[-bound for bound in bounds],
    )


def quantities(result: BackwardLensResult, matrix: str = "W_out", batch: int = 0) -> Widget:
    """Five quantities of every token and layer, each on its own scale.

    They are the norm of `delta_i`, `||x_i|| ||delta_i||`, the norm of `x_i`, the rank of the
    target, if there is one, and the top score. With an objective over several positions, each
    position has its own target. A position that adds nothing has no rank and no score. It has a
    negative number instead that no other position has, in full red. An infinite top score is shown
    as a power of ten beyond all others, which the quantity's name states.

    Args:
        result: The result to show.
        matrix: Name of the matrix.
        batch: Index of the prompt.

    Returns:
        The widget.

    Raises:
        InputError: If `result` is not a result, or the matrix or prompt does not exist.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.quantities(result)
        <TextNeuronActivations of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    check_result(result)
    rows = [result.cells(matrix, layer, batch) for layer in result.layers]
    cells = [cell for row in rows for cell in row]
    by_name = {
        symbol(quantity): [float(getattr(cell, quantity)) for cell in cells]
        for quantity in get_args(Quantity)
    }
    target = _target_name(result, batch)
    if target is not None:
        by_name[f"rank of {target} (0 leads, {_NO_RANK:g}: no rank)"] = [
            _NO_RANK if cell.target_rank is None else float(cell.target_rank) for cell in cells
        ]
    name, scores = _top_scores(cells)
    by_name[name] = scores
    values = torch.tensor(list(by_name.values()), dtype=torch.float64)
    start = start_of_answer(result, batch, rows[0])
    caption = (
        f"<b>{matrix}</b>: one quantity of one layer at each token ({reading(result)})."
        f"{prompt_line(result, batch)}{answer_line(start)}<br>Blue is positive and red negative, "
        "darkest at the layer's largest; hover over a token for its number."
        f"{analysed_positions(result, batch, rows[0])}"
    )
    shape = len(by_name), len(rows), len(rows[0])
    return make_widget(
        "TextNeuronActivations",
        caption,
        answer_start=start,
        tokens=[literal(cell.token) for cell in rows[0]],
        activations=values.reshape(shape).permute(2, 1, 0).tolist(),
        firstDimensionName="Layer",
        secondDimensionName="Quantity",
        firstDimensionLabels=[str(layer) for layer in result.layers],
        secondDimensionLabels=list(by_name),
    )


def power_for_decimals(values: Iterable[float]) -> int:
    """The power of ten by which to divide norms so that six decimals show their digits.

    Args:
        values: The norms; zeros are ignored.

    Returns:
        The exponent; 0 if they need no scaling.
    """
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    smallest, largest = math.floor(min(logs)), math.floor(max(logs))
    if smallest >= -3 and largest <= 3:
        return 0
    # Four digits of the smallest, but at most four before the point: a float32 has seven.
    return max(min(largest, smallest + 3), largest - 3)


def number_below(scores: Iterable[float]) -> float:
    """A negative power of ten below all finite scores, to stand for a missing score."""
    least = min(filter(math.isfinite, scores), default=0.0)
    return -1.0 if least > -1 else -(10.0 ** (math.floor(math.log10(-least)) + 1))


def _target_name(result: BackwardLensResult, batch: int) -> str | None:
    """What the ranks of one prompt are of, if it has any."""
    if result.has_position_targets:
        return "the token that the position should say"
    target = result.target(batch)
    return None if target is None else literal(target)


def _top_scores(cells: Sequence[Cell]) -> tuple[str, list[float]]:
    """Name of the top scores, and the top score of each cell as a finite number."""
    scores = [cell.top[0].score if cell.top else None for cell in cells]
    there = [score for score in scores if score is not None]
    no_score = number_below(there)
    stand_ins = {math.inf: -number_below(-score for score in there), -math.inf: 10 * no_score}
    labels = [f"{no_score:g}: no score"]
    labels += [
        f"{stand_in:g}: {'∞' if infinite > 0 else '−∞'}"
        for infinite, stand_in in stand_ins.items()
        if infinite in there
    ]
    shown = [no_score if score is None else stand_ins.get(score, score) for score in scores]
    return f"top score ({', '.join(labels)})", shown
