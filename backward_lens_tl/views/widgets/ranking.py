"""The widget of top and bottom tokens.

CircuitsVis ranks a whole vocabulary itself, but a result keeps only `k` tokens at either end. So
each cell gets a vocabulary of all tokens kept anywhere, in which tokens of other cells score
strictly between its two ends and are never among the first `k`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import listed
from backward_lens_tl.errors import InputError
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.text import ADDS_NOTHING, faint_note
from backward_lens_tl.views.widgets.captions import of_prompt, quoted, reading
from backward_lens_tl.views.widgets.widget import Widget, embedded, literal

_NOTHING = f"{ADDS_NOTHING} adds nothing"
_NO_POSITION = f"{ADDS_NOTHING} no position"
_TIED = f"{ADDS_NOTHING} scores tie"

_COLUMNS = 5
"""Columns of CircuitsVis's table at first, even if there are fewer positions."""

_INFINITE = 10.0
"""Replaces an infinite score, with its sign; finite scores are scaled to lie from -1 to 1."""

# Stand-ins for tokens have no score, but CircuitsVis orders by score. So they differ from zero by
# less than any float32 does, and are shown as 0.
_HARDLY = 1e-300

_FAINTEST = 1e-45
"""Below every positive float32."""


class Word(NamedTuple):
    """Text that CircuitsVis may rank: a token, or (with a negative id) a stand-in."""

    text: str
    token_id: int


class Column(NamedTuple):
    """The scores of one cell, and the score of all other words."""

    scores: dict[Word, float]
    others: float


class Sample(NamedTuple):
    """What CircuitsVis ranks: the words and their scores in each layer and column."""

    words: list[str]
    scores: Float[Tensor, "layer word column"]


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
        matrices: Names of the matrices; by default all.

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
    from circuitsvis.topk_tokens import topk_tokens

    check_result(result)
    names = list(result.matrices) if matrices is None else listed(matrices)
    if not names:
        raise InputError(f"matrices is {matrices!r}; pass some of {', '.join(result.matrices)}")
    cells = {name: [result.cells(name, layer, batch) for layer in result.layers] for name in names}
    every = [cell for rows in cells.values() for row in rows for cell in row]
    shown = next(iter(cells.values()))[0]
    k = _kept(every)
    samples = {}
    for name, rows in cells.items():
        factor = round_number_above(max(_finite_scores(rows), default=0.0))
        label = name if factor == 1 else f"{name} (score ×{factor:g})"
        samples[label] = _sample([[_column(cell, k, factor) for cell in row] for row in rows], k)
    if len(samples) == 1:
        # With a single sample, CircuitsVis shows the first column only.
        columns = [_stand_in(literal(cell.token), k) for cell in shown]
        samples["the prompt's tokens"] = _sample([columns] * len(result.layers), k)
    positions = [cell.position for cell in shown]
    complete = positions == list(range(len(positions)))
    rendered = topk_tokens(
        [sample.words for sample in samples.values()],
        [sample.scores.numpy() for sample in samples.values()],
        max_k=k,
        third_dimension_name="Position" if complete else "Column",
        sample_labels=list(samples),
        first_dimension_labels=[str(layer) for layer in result.layers],
    )
    legend = ", ".join(
        f"{column} {quoted(cell.token)}" + ("" if complete else f" (position {cell.position})")
        for column, cell in enumerate(shown)
    )
    caption = (
        f"<b>{', '.join(cells)}</b>: the {k} most and least promoted tokens"
        f"{of_prompt(result, batch)} ({reading(result)}). Blue is a large score, and white "
        "a score of 0 or less; hover over a token for its score.<br>"
        f"{'Positions' if complete else 'Columns'}: {legend}"
    )
    if len(_finite_scores([every])) < sum(len(cell.top + cell.bottom) for cell in every):
        caption += f"<br>A score of ∞ or −∞ is shown as {_INFINITE:g} or −{_INFINITE:g}."
    faint = faint_note([every], result.faint_norm)
    if faint:
        caption += f"<br>{escape(faint)}"
    return embedded(rendered, caption)


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


def _kept(cells: Sequence[Cell]) -> int:
    """How many tokens can be shown at either end, none at both ends of a small vocabulary."""
    counts = [
        min(len(cell.top), len({entry.token_id for entry in cell.top + cell.bottom}) // 2)
        for cell in cells
        if not cell.is_zero
    ]
    return max(counts, default=1) or 1


def _finite_scores(rows: Sequence[Sequence[Cell]]) -> list[float]:
    """The absolute scores of all tokens, without infinite ones."""
    entries = (entry for row in rows for cell in row for entry in cell.top + cell.bottom)
    return [abs(entry.score) for entry in entries if math.isfinite(entry.score)]


def _column(cell: Cell, k: int, factor: float) -> Column:
    """The tokens of a cell; those of a tied score at which its two ends meet are replaced."""
    if cell.is_zero:
        return _stand_in(_NOTHING, k)
    top, bottom = (_scores(entries, factor) for entries in (cell.top, cell.bottom))
    least, most = list(top.values())[:k][-1], list(bottom.values())[:k][-1]
    if most < least:
        return Column(top | bottom, most + (least - most) / 2)
    above = {word: score for word, score in top.items() if score > least}
    below = {word: score for word, score in bottom.items() if score < least}
    tied = _stand_in(_TIED, k - len(above), k - len(below), at=least)
    return Column(above | tied.scores | below, tied.others)


def _scores(entries: Sequence[TokenScore], factor: float) -> dict[Word, float]:
    return {
        Word(literal(entry.token), entry.token_id): entry.score / factor
        if math.isfinite(entry.score)
        else math.copysign(_INFINITE, entry.score)
        for entry in entries
    }


def _stand_in(reason: str, up: int, down: int | None = None, at: float = 0.0) -> Column:
    """A reason on top, and dots down to the bottom, whose scores hardly differ from `at`."""
    down = up if down is None else down
    heights = [*range(up, 0, -1), *range(-1, -down - 1, -1)]
    words = [Word(reason, -1)] + [Word(ADDS_NOTHING, -1 - index) for index in range(1, up + down)]
    step = max(_HARDLY, math.ulp(at))
    scores = (at + height * step for height in heights)
    return Column(dict(zip(words, scores, strict=True)), at)


def _sample(layers: Sequence[Sequence[Column]], k: int) -> Sample:
    """The columns of each layer, at least `_COLUMNS` of them, over all of their words."""
    empty = [_stand_in(_NO_POSITION, k)] * (_COLUMNS - len(layers[0]))
    rows = [[*columns, *empty] for columns in layers]
    words = list(dict.fromkeys(word for row in rows for column in row for word in column.scores))
    scores = [
        [[column.scores.get(word, column.others) for column in row] for word in words]
        for row in rows
    ]
    return Sample([word.text for word in words], torch.tensor(scores, dtype=torch.float64))
