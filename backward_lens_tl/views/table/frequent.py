"""Tokens that lead many cells of a matrix, whatever the prompt's token is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from backward_lens_tl.readout.cells import Cell

LEAST_SHARE, LEAST_POSITIONS = 0.02, 3

RULE = (
    f"lead at least {LEAST_SHARE:.0%} of a matrix's cells, at {LEAST_POSITIONS} or more tokens of "
    "the prompt"
)
"""Which tokens are frequent; targets are not."""


def frequent_tokens(rows: Sequence[Sequence[Cell]], end: str) -> frozenset[str]:
    """The tokens that lead many cells, and so tell little about any of them.

    A token that leads many layers at only one or two positions is not frequent: it is likely to
    tell something about these positions.

    Args:
        rows: All cells of a matrix.
        end: `"top"` or `"bottom"`.

    Returns:
        The frequent tokens, without the targets.
    """
    positions = defaultdict[str, list[int]](list)
    cells = [cell for row in rows for cell in row if not cell.is_zero]
    for cell in cells:
        positions[getattr(cell, end)[0].token].append(cell.position)
    return frozenset(
        token
        for token, led in positions.items()
        if len(led) >= LEAST_SHARE * len(cells) and len(set(led)) >= LEAST_POSITIONS
    ).difference(cell.target for cell in cells if cell.target is not None)
