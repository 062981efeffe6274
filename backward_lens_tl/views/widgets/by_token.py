"""Widgets that colour the prompt's tokens by a number: norms, and several quantities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.widgets.captions import analysed_positions, of_prompt, reading
from backward_lens_tl.views.widgets.widget import Widget, literal, make_widget

_NO_RANK = -1.0


def norms(result: BackwardLensResult, matrix: str = "W_out", batch: int = 0) -> Widget:
    """`||delta_i||_2` of every token, with a button per layer.

    CircuitsVis shows six decimals. If that is not enough, all numbers are divided by one power of
    ten, which every label names.

    Args:
        result: The result to show.
        matrix: Name of the matrix.
        batch: Index of the prompt.

    Returns:
        The widget, with one colour scale for all layers.

    Raises:
        InputError: If `result` is not a result, or the matrix or prompt does not exist.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.norms(result)
        <ColoredTokensMulti of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    check_result(result)
    rows = [result.cells(matrix, layer, batch) for layer in result.layers]
    values = [[cell.norm for cell in row] for row in rows]
    power = power_for_decimals(norm for row in values for norm in row)
    times = f" (×1e{power})" if power else ""
    scaled = torch.tensor(values, dtype=torch.float64).T / 10.0**power
    caption = (
        f"<b>{matrix}</b>: norm of δ_i at each token{of_prompt(result, batch)}, by layer. The "
        "darkest blue is the largest norm of all layers; hover over a token for its numbers."
        f"{analysed_positions(result, batch, rows[0])}"
    )
    # By default it keeps the first layer's scale when another layer is chosen.
    bounds = [float(scaled.max()) or 1.0] * len(result.layers)
    return make_widget(
        "ColoredTokensMulti",
        caption,
        tokens=[literal(cell.token) for cell in rows[0]],
        values=scaled.tolist(),
        labels=[f"layer {layer}{times}" for layer in result.layers],
        positiveBounds=bounds,
        negativeBounds=[-bound for bound in bounds],
    )


def quantities(result: BackwardLensResult, matrix: str = "W_out", batch: int = 0) -> Widget:
    """Four quantities of every token and layer, each on its own scale.

    They are the norms of `delta_i` and `x_i`, the rank of the target, if there is one, and the top
    score. A position that adds nothing has no rank and no score. It has a negative number instead
    that no other position has, in full red. An infinite top score is shown as a power of ten beyond
    all others, which the quantity's name states.

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
        "norm of δ_i": [cell.norm for cell in cells],
        "norm of x_i": [cell.input_norm for cell in cells],
    }
    target = result.target(batch)
    if target is not None:
        by_name[f"rank of {literal(target)} (0 leads, {_NO_RANK:g}: no rank)"] = [
            _NO_RANK if cell.target_rank is None else float(cell.target_rank) for cell in cells
        ]
    name, scores = _top_scores(cells)
    by_name[name] = scores
    values = torch.tensor(list(by_name.values()), dtype=torch.float64)
    caption = (
        f"<b>{matrix}</b>: one quantity of one layer at each token{of_prompt(result, batch)} "
        f"({reading(result)}). Blue is positive and red negative, darkest at the layer's largest; "
        f"hover over a token for its number.{analysed_positions(result, batch, rows[0])}"
    )
    shape = len(by_name), len(rows), len(rows[0])
    return make_widget(
        "TextNeuronActivations",
        caption,
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
