"""The data of one prompt for the script, as compact JSON.

Arrays of numbers are little-endian, in base64.
"""

from __future__ import annotations

import json
import math
import struct
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.views.table.frequent import frequent_tokens
from backward_lens_tl.views.table.markup import LEAD_MARKUP, compact
from backward_lens_tl.views.table.shading import Shading
from backward_lens_tl.views.text import zero_reason

Rows = list[list[Cell]]
"""The cells of one matrix, by layer and position; the last layer comes first.

The forward pass goes up in a table, and the gradient down.
"""

_LARGEST_HALF = 60_000.0


def packed(by_lens: Mapping[str, Mapping[MatrixName, Rows]]) -> str:
    """All cells under every lens.

    The markup of each token is stored once, and cells hold its index. Arrays have the order of the
    table, row by row. The shades of a cell are four digits; a cell that adds nothing has the
    character in `zero` that is the index of its reason.

    Args:
        by_lens: Rows of each matrix, by the name of the lens.

    Returns:
        JSON that is safe inside a `<script>` element.
    """
    every = [rows for matrices in by_lens.values() for rows in matrices.values()]
    index: dict[str, int] = {}
    for entry in (entry for rows in every for cell in _cells(rows) for entry in _entries(cell)):
        index.setdefault(entry.token, len(index))
    first = next(iter(by_lens.values()))
    data = {
        "lenses": list(by_lens),
        "lead": LEAD_MARKUP,
        "tokens": list(map(compact, index)),
        "panels": {
            matrix: {
                **_of_matrix(first[matrix]),
                "lenses": [_of_lens(matrices[matrix], index) for matrices in by_lens.values()],
            }
            for matrix in first
        },
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # No token may end the element or start a comment.
    return text.replace("</", "<\\/").replace("<!", "<\\u0021")


def _cells(rows: Rows) -> Iterator[Cell]:
    return (cell for row in rows for cell in row)


def _entries(cell: Cell) -> tuple[TokenScore, ...]:
    return (*cell.top, *cell.bottom)


def _of_matrix(rows: Rows) -> dict[str, Any]:
    """What is the same under every lens."""
    shading = Shading.of(rows)
    reasons = sorted({zero_reason(cell) for cell in _cells(rows) if cell.is_zero})
    return {
        "shades": "".join(shading.digits(cell) for cell in _cells(rows)),
        "zero": "".join(
            str(reasons.index(zero_reason(cell))) if cell.is_zero else "-" for cell in _cells(rows)
        ),
        "reasons": reasons,
        "norms": _array("f", [norm for cell in _cells(rows) for norm in _norms(cell)]),
    }


def _norms(cell: Cell) -> tuple[float, float, float]:
    return cell.norm, cell.input_norm, cell.write_norm


def _of_lens(rows: Rows, index: Mapping[str, int]) -> dict[str, Any]:
    """What one lens reads: of each cell the highest scores, then as many of the lowest."""
    n = max((len(_entries(cell)) for cell in _cells(rows)), default=0)
    none = [TokenScore("", 0, 0.0)] * n
    entries = [entry for cell in _cells(rows) for entry in (_entries(cell) or none)]
    largest = max((abs(each.score) for each in entries if math.isfinite(each.score)), default=0)
    scale = largest / _LARGEST_HALF or 1.0
    return {
        "n": n,
        "tokens": _array(
            "H" if len(index) <= 0x10000 else "I",
            [index.get(entry.token, 0) for entry in entries],
        ),
        # Half floats have three digits; the factor keeps large and small scores in their range.
        "scores": _array("e", [entry.score / scale for entry in entries]),
        "scale": scale,
        "ranks": _array(
            "i", [-1 if cell.target_rank is None else cell.target_rank for cell in _cells(rows)]
        ),
        "faint": "".join(str(int(cell.is_faint)) for cell in _cells(rows)),
        "often": [
            # Sorted, so that the page of a result is always the same.
            sorted(index[token] for token in frequent_tokens(rows, end))
            for end in ("top", "bottom")
        ],
    }


def _array(kind: str, values: Sequence[int | float]) -> str:
    return b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode()
