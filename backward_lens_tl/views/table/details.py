"""What the page's script needs: all tokens, scores, norms and ranks of a prompt, as small JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.views.appearance import number, zero_reason
from backward_lens_tl.views.table.grid import Grid
from backward_lens_tl.views.table.text import LEAD_MARKUP, compact_markup


def details(grid: Grid) -> str:
    """All cells of one prompt under every lens.

    Each token's markup is there once, and cells hold its index. A cell is the reason why it adds
    nothing, or `[norm of delta, norm of x, lens, ...]`, where a lens is `[target rank or null,
    whether it is faint, token, score, token, score, ...]`: the highest scores, then as many of the
    lowest.

    Args:
        grid: The cells.

    Returns:
        A `<script>` element that holds data.
    """
    counts = Counter(
        entry.token
        for matrices in grid.by_lens.values()
        for rows in matrices.values()
        for row in rows
        for cell in row
        for entry in (*cell.top, *cell.bottom)
    )
    # The most frequent tokens have the shortest indices.
    index = {token: place for place, (token, _) in enumerate(counts.most_common())}
    data = {
        "lenses": list(grid.by_lens),
        "lead": LEAD_MARKUP,
        "tokens": [compact_markup(token) for token in index],
        "panels": {
            matrix: [
                [_packed(lenses, index) for lenses in zip(*layers, strict=True)]
                for layers in zip(
                    *(matrices[matrix] for matrices in grid.by_lens.values()), strict=True
                )
            ]
            for matrix in grid.shown
        },
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Nothing in a token may end the element, or begin a comment in it.
    text = text.replace("</", "<\\/").replace("<!", "<\\u0021")
    return f'<script type="application/json">{text}</script>'


def _packed(lenses: tuple[Cell, ...], index: dict[str, int]) -> str | list[Any]:
    cell = lenses[0]
    if cell.is_zero:
        return zero_reason(cell)
    norms = [number(cell.norm), number(cell.input_norm)]
    return [*norms, *(_packed_lens(cell, index) for cell in lenses)]


def _packed_lens(cell: Cell, index: dict[str, int]) -> list[Any]:
    packed: list[Any] = [cell.target_rank, int(cell.is_faint)]
    for entry in (*cell.top, *cell.bottom):
        packed += [index[entry.token], _score(entry.score)]
    return packed


def _score(score: float) -> float | str:
    """As `number` writes it, but without quotes where JSON has such a number."""
    return float(number(score)) if math.isfinite(score) else number(score)
