"""Top and bottom tokens as scores over a vocabulary of their own.

CircuitsVis ranks a whole vocabulary itself. A result keeps only the `k` tokens at either end of it,
so here every other word lies strictly between the two ends, where it is never among the first `k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.cells import Cell
from backward_lens_tl.views.appearance import ADDS_NOTHING
from backward_lens_tl.views.widgets.embedding import literal

NOTHING = f"{ADDS_NOTHING} adds nothing"
NO_POSITION = f"{ADDS_NOTHING} no position"
TIED = f"{ADDS_NOTHING} scores tie"

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
        scores: Their scores.
    """

    words: list[str]
    scores: Float[Tensor, "layer word column"]


def rank_cells(layers: Sequence[Sequence[Cell]], k: int, width: int) -> Ranking:
    """Rank the tokens of cells.

    Args:
        layers: The cells of each layer, by position.
        k: How many tokens are shown at either end; `shown_at_either_end` says how many can be.
        width: Number of columns; those without a position say so.

    Returns:
        The ranking; a cell without words of its own has a reason in their place.
    """
    return _ranking(
        [
            [_column(cell, k) for cell in cells]
            + [_stand_in(NO_POSITION, k)] * (width - len(cells))
            for cells in layers
        ]
    )


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
    return _ranking([[_stand_in(text, k) for text in shown]] * layers)


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


def _column(cell: Cell, k: int) -> Column:
    if cell.is_zero:
        return _stand_in(NOTHING, k)
    top, bottom = cell.top[:k], cell.bottom[:k]
    least, most = top[-1].score, bottom[-1].score
    if not most < least:
        return _stand_in(TIED, k)
    entries = {
        Word(literal(entry.token), entry.token_id): entry.score
        for entry in (*cell.top, *cell.bottom)
    }
    return Column(entries, most + (least - most) / 2)


def _stand_in(reason: str, k: int) -> Column:
    """A reason on top, and dots down to the bottom."""
    words = [Word(reason, -1)] + [Word(ADDS_NOTHING, -2 - index) for index in range(2 * k - 1)]
    heights = [*range(k, 0, -1), *range(-1, -k - 1, -1)]
    scores = (height * _HARDLY for height in heights)
    return Column(dict(zip(words, scores, strict=True)), 0.0)


def _ranking(layers: Sequence[Sequence[Column]]) -> Ranking:
    words = list(dict.fromkeys(word for row in layers for column in row for word in column.scores))
    scores = torch.tensor(
        [
            [[column.scores.get(word, column.others) for column in row] for word in words]
            for row in layers
        ],
        dtype=torch.float64,
    )
    return Ranking([word.text for word in words], scores)
