"""The widget of top and bottom tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from backward_lens_tl._checks import listed
from backward_lens_tl.errors import InputError
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.text import ADDS_NOTHING, display_order, faint_note
from backward_lens_tl.views.widgets.captions import (
    prompt_line,
    quoted,
    reading,
    start_of_answer,
)
from backward_lens_tl.views.widgets.widget import Widget, literal, make_widget

_COLUMNS = 5
"""Columns of CircuitsVis's table at first, even if there are fewer positions."""

_INFINITE = 10.0
"""Replaces an infinite score, with its sign; finite scores are scaled to lie from -1 to 1."""

_FAINTEST = 1e-45
"""A score below every positive float32."""

Entries = list[tuple[str, float]]
Column = tuple[Entries, Entries]
"""The top tokens of one cell, and its bottom tokens, with scores, highest score first."""


def top_tokens(
    result: BackwardLensResult, batch: int = 0, matrices: str | Sequence[str] | None = None
) -> Widget:
    """The most and least promoted tokens of every matrix, layer and position.

    CircuitsVis colours scores from 0 to 1. Those of a matrix are divided by a round number, which
    the matrix's label names, to lie in this range. An infinite score is shown as 10 or -10, and the
    caption says so.

    Args:
        result: The result to show.
        batch: Index of the prompt.
        matrices: Names of the matrices; by default all, `W_out` first.

    Returns:
        The widget; its samples are the matrices, and its columns the analysed positions.

    Raises:
        InputError: If `result` is not a result, or a matrix or the prompt does not exist.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.top_tokens(result, matrices="W_out")
        <TopkTokens of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    check_result(result)
    names = display_order(result.matrices) if matrices is None else listed(matrices)
    if not names:
        raise InputError(f"matrices is {matrices!r}; pass some of {', '.join(result.matrices)}")
    cells = {name: [result.cells(name, layer, batch) for layer in result.layers] for name in names}
    shown = next(iter(cells.values()))[0]
    samples = {}
    for name, rows in cells.items():
        factor = round_number_above(max(filter(math.isfinite, _sizes(rows)), default=0.0))
        label = name if factor == 1 else f"{name} (score ×{factor:g})"
        samples[label] = [[_column(cell, result.k, factor) for cell in row] for row in rows]
    if len(samples) == 1:
        # With a single sample, CircuitsVis shows the first column only.
        columns = [_message(literal(cell.token), result.k) for cell in shown]
        samples["the prompt's tokens"] = [columns] * len(result.layers)
    positions = [cell.position for cell in shown]
    complete = positions == list(range(len(positions)))
    caption = (
        f"<b>{', '.join(cells)}</b>: the {result.k} most and least promoted tokens "
        f"({reading(result)}).{prompt_line(result, batch)}<br>Blue is a large score, and white a "
        "score of 0 or less; hover over a token for its score.<br>"
        f"{'Positions' if complete else 'Columns'}: "
        f"{_legend(result, batch, shown, is_complete=complete)}"
    )
    every = [row for rows in cells.values() for row in rows]
    if math.inf in _sizes(every):
        caption += f"<br>A score of ∞ or −∞ is shown as {_INFINITE:g} or −{_INFINITE:g}."
    faint = faint_note(every, result.faint_norm)
    if faint:
        caption += f"<br>{escape(faint)}"
    return make_widget(
        "TopkTokens",
        caption,
        **_entries(list(samples.values()), result.k),
        firstDimensionName="Layer",
        thirdDimensionName="Position" if complete else "Column",
        sampleLabels=list(samples),
        firstDimensionLabels=[str(layer) for layer in result.layers],
    )


def _legend(
    result: BackwardLensResult, batch: int, cells: Sequence[Cell], *, is_complete: bool
) -> str:
    """The token of each column and, if targets differ, its target."""
    start, parts = start_of_answer(result, batch, cells), []
    for column, cell in enumerate(cells):
        part = f"{column} {quoted(cell.token)}"
        if not is_complete:
            part += f" (position {cell.position})"
        if result.has_position_targets and cell.target is not None:
            part += f" → {quoted(cell.target)}"
        parts.append(f"<b>answer:</b> {part}" if column == start else part)
    note = "; → the token that a position should say" if result.has_position_targets else ""
    return f"{', '.join(parts)}{note}"


def round_number_above(largest: float) -> float:
    """The round number by which to divide scores so that the largest has almost the full colour.

    Args:
        largest: The largest absolute score.

    Returns:
        1, 2 or 5 times a power of ten; 1 if a scale from 0 to 1 shows the scores as they are.
    """
    if 0.2 < largest <= 1 or largest < _FAINTEST:
        return 1.0
    power = math.floor(math.log10(largest))
    candidates = (float(f"{step}e{power}") for step in (1, 2, 5, 10))
    return next(candidate for candidate in candidates if candidate >= largest)


def _sizes(rows: Sequence[Sequence[Cell]]) -> list[float]:
    """The absolute scores of all tokens."""
    return [abs(entry.score) for row in rows for cell in row for entry in cell.top + cell.bottom]


def _column(cell: Cell, k: int, factor: float) -> Column:
    if cell.is_zero:
        return _message(f"{ADDS_NOTHING} adds nothing", k)
    top, bottom = (
        [(literal(entry.token), _scaled(entry.score, factor)) for entry in entries]
        for entries in (cell.top, cell.bottom[::-1])
    )
    return top, bottom


def _scaled(score: float, factor: float) -> float:
    return score / factor if math.isfinite(score) else math.copysign(_INFINITE, score)


def _message(text: str, k: int) -> Column:
    """A text in place of the first token, and dots in place of the others."""
    dots = [(ADDS_NOTHING, 0.0)] * k
    return [(text, 0.0), *dots[1:]], dots


def _entries(samples: Sequence[Sequence[Sequence[Column]]], k: int) -> dict[str, Any]:
    """Properties of the table's entries, by sample, layer, place and column.

    Args:
        samples: The columns of each layer of each sample.
        k: How many tokens are shown at either end.

    Returns:
        The words of each sample, and indices of its words and scores at either end.
    """
    props: dict[str, Any] = {"tokens": []}
    for layers in samples:
        empty = [_message(f"{ADDS_NOTHING} no position", k)] * (_COLUMNS - len(layers[0]))
        words: dict[str, int] = {}
        for side, name in enumerate(("topk", "bottomk")):
            places = [
                list(zip(*(column[side] for column in (*columns, *empty)), strict=True))
                for columns in layers
            ]
            indices = [
                [[words.setdefault(text, len(words)) for text, _ in row] for row in rows]
                for rows in places
            ]
            scores = [[[score for _, score in row] for row in rows] for rows in places]
            props.setdefault(f"{name}Idxs", []).append(indices)
            props.setdefault(f"{name}Vals", []).append(scores)
        props["tokens"].append(list(words))
    return props
