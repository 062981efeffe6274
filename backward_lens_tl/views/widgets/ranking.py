"""Top and bottom tokens as scores over a vocabulary of their own.

CircuitsVis ranks a whole vocabulary itself. A result keeps only the `k` tokens at either end of it,
so here every other word lies strictly between the two ends, where it is never among the first `k`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.views.text import ADDS_NOTHING
from backward_lens_tl.views.widgets.embedding import literal
from backward_lens_tl.views.widgets.scales import round_number_above

NOTHING = f"{ADDS_NOTHING} adds nothing"
NO_POSITION = f"{ADDS_NOTHING} no position"
TIED = f"{ADDS_NOTHING} scores tie"

INFINITE = 10.0
"""Stands, with its sign, for an infinite score: the others are divided to lie from -1 to 1."""

# What stands in for words has no score. CircuitsVis orders by score, though, so each has one that
# differs from zero by less than any float32 does, and is shown as 0.
_HARDLY = 1e-300


class Word(NamedTuple):
    """A word that CircuitsVis may rank: a token, or (with a negative id) what stands in for one."""

    text: str
    token_id: int


class Column(NamedTuple):
    """The scores of one cell, and the score of all other words."""

    scores: dict[Word, float]
    others: float


@dataclass(frozen=True)
class Ranking:
    """What CircuitsVis ranks.

    Attributes:
        words: The words.
        scores: Their scores, divided by `factor`; `INFINITE` with a sign where that is infinite.
        factor: A round number.
        has_infinite: Whether a score is infinite.
    """

    words: list[str]
    scores: Float[Tensor, "layer word column"]
    factor: float = 1.0
    has_infinite: bool = False


def rank_cells(layers: Sequence[Sequence[Cell]], k: int, width: int) -> Ranking:
    """Rank the tokens of cells.

    Args:
        layers: The cells of each layer, by position.
        k: How many tokens are shown at either end; `shown_at_either_end` says how many can be.
        width: Number of columns; those without a position say so.

    Returns:
        The ranking; a cell without words of its own has a reason in their place. Where the lowest
        at the top and the highest at the bottom have the same score, those of that score are no
        ranking, and have a reason in their place, too.
    """
    entries = [entry for cells in layers for cell in cells for entry in cell.top + cell.bottom]
    finite = [abs(entry.score) for entry in entries if math.isfinite(entry.score)]
    factor = round_number_above(max(finite, default=0.0))
    words, scores = _ranking(
        [
            [_column(cell, k, factor) for cell in cells]
            + [_stand_in(NO_POSITION, k)] * (width - len(cells))
            for cells in layers
        ]
    )
    return Ranking(words, scores, factor, has_infinite=len(finite) < len(entries))


def rank_prompt(tokens: Sequence[str], layers: int, k: int, width: int) -> Ranking:
    """The prompt's own tokens in the place of top tokens.

    Args:
        tokens: The tokens.
        layers: Number of layers, which are all the same.
        k: How many tokens are shown at either end.
        width: Number of columns; those without a position say so.

    Returns:
        The ranking.
    """
    shown = [literal(token) for token in tokens] + [NO_POSITION] * (width - len(tokens))
    return Ranking(*_ranking([[_stand_in(text, k) for text in shown]] * layers))


def shown_at_either_end(cells: Sequence[Cell]) -> int:
    """How many tokens can be shown at either end, no token at both.

    Args:
        cells: All cells.

    Returns:
        The `k` that was kept, but half of a vocabulary that is smaller than twice that.
    """
    counts = [
        min(len(cell.top), len({entry.token_id for entry in cell.top + cell.bottom}) // 2)
        for cell in cells
        if not cell.is_zero
    ]
    return max(counts, default=1) or 1


def _column(cell: Cell, k: int, factor: float) -> Column:
    if cell.is_zero:
        return _stand_in(NOTHING, k)
    top, bottom = (_scores(entries, factor) for entries in (cell.top, cell.bottom))
    least, most = list(top.values())[:k][-1], list(bottom.values())[:k][-1]
    if most < least:
        return Column(top | bottom, most + (least - most) / 2)
    above = {word: score for word, score in top.items() if score > least}
    below = {word: score for word, score in bottom.items() if score < least}
    tied = _stand_in(TIED, k - len(above), k - len(below), at=least)
    return Column(above | tied.scores | below, tied.others)


def _scores(entries: Sequence[TokenScore], factor: float) -> dict[Word, float]:
    return {
        Word(literal(entry.token), entry.token_id): entry.score / factor
        if math.isfinite(entry.score)
        else math.copysign(INFINITE, entry.score)
        for entry in entries
    }


def _stand_in(reason: str, up: int, down: int | None = None, at: float = 0.0) -> Column:
    """A reason on top, and dots down to the bottom, all of hardly another score than `at`."""
    down = up if down is None else down
    heights = [*range(up, 0, -1), *range(-1, -down - 1, -1)]
    words = [Word(reason, -1)] + [Word(ADDS_NOTHING, -1 - index) for index in range(1, up + down)]
    step = max(_HARDLY, math.ulp(at))
    scores = (at + height * step for height in heights)
    return Column(dict(zip(words, scores, strict=True)), at)


def _ranking(
    layers: Sequence[Sequence[Column]],
) -> tuple[list[str], Float[Tensor, "layer word column"]]:
    words = list(dict.fromkeys(word for row in layers for column in row for word in column.scores))
    scores = torch.tensor(
        [
            [[column.scores.get(word, column.others) for column in row] for word in words]
            for row in layers
        ],
        dtype=torch.float64,
    )
    return [word.text for word in words], scores
