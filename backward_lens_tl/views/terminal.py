"""The layers x tokens table in a terminal, or as plain text where there are no colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.appearance import (
    ADDS_NOTHING,
    DARK_SHADES,
    LEADS,
    NormScale,
    faint_note,
    matrix_title,
    pieces,
    scale_ends,
)

_LAYER_WIDTH = len("layer")
_NARROWEST, _WIDEST = 8, 16
_SPACE = "␣"

_FAINT = "~"
"""Marks a faint cell where there are no italics."""


@dataclass(frozen=True)
class TerminalTable:
    """A rich renderable: one table per matrix, as wide as the terminal allows.

    Where not every token of the prompt fits, the last ones are shown, since a gradient of the next
    token is largest there.

    Attributes:
        result: What to show.
        batch: Which prompt.
    """

    result: BackwardLensResult
    batch: int = 0

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Render for one console, as rich asks for it."""
        for matrix in self.result.matrices:
            yield self._panel(matrix, options.max_width, console.color_system is not None)

    def _panel(self, matrix: MatrixName, width: int, styled: bool) -> RenderableType:
        # The last layer is on top: the forward pass runs upwards, the gradient downwards.
        layers = reversed(self.result.layers)
        rows = [self.result.cells(matrix, layer, self.batch) for layer in layers]
        scale = NormScale.spanning(cell.norm for row in rows for cell in row if not cell.is_zero)
        words = [[_word(cell, scale, styled) for cell in row] for row in rows]
        heads = [_token(cell.token, "bold") for cell in rows[0]]
        columns = [
            max(text.cell_len for text in column) for column in zip(heads, *words, strict=True)
        ]
        first, cell_width = _fit(columns, width)

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("layer", justify="right", style="bold", width=_LAYER_WIDTH, no_wrap=True)
        for head in heads[first:]:
            table.add_column(head, width=cell_width, no_wrap=True, overflow="ellipsis")
        for row, texts in zip(rows, words, strict=True):
            table.add_row(str(row[0].layer), *(_filled(text, cell_width) for text in texts[first:]))
        meaning = matrix_title(matrix, self.result.direction, self.result.vjps_at)
        title = Text.assemble((matrix, "bold"), f" {meaning}")
        notes = [
            _left_out(first, len(columns)),
            faint_note(
                [cell for row in rows for cell in row],
                self.result.faint_norm,
                mark=" (in italics)" if styled else f" (with {_FAINT})",
            ),
        ]
        below = [Text(note, style="dim") for note in notes if note]
        return Group(title, table, _legend(scale, styled), *below, Text())


def _fit(columns: Sequence[int], width: int) -> tuple[int, int]:
    """The first column to show, and the width of every column.

    A column may be cut down to `_NARROWEST` before another column is left out.

    Args:
        columns: Width that each column would like to have.
        width: Width of the terminal.

    Returns:
        Index of the column, and the width.
    """
    room = width - _LAYER_WIDTH
    for first in range(len(columns)):
        each = min(room // (len(columns) - first) - 1, _WIDEST, max(columns[first:]))
        if each >= min(_NARROWEST, max(columns[first:])):
            return first, each
    return len(columns) - 1, max(room - 1, 1)


def _word(cell: Cell, scale: NormScale, styled: bool) -> Text:
    if cell.is_zero:
        return Text(ADDS_NOTHING, style="dim")
    shade = DARK_SHADES[scale.step(cell.norm)]
    style = f"{'italic ' if cell.is_faint else ''}{shade.text} on {shade.background}"
    mark = _FAINT if cell.is_faint and not styled else ""
    if cell.target_leads:
        return _token(cell.top[0].token, f"bold {style}", mark=LEADS + mark)
    return _token(cell.top[0].token, style, mark)


def _token(token: str, style: str, mark: str = "") -> Text:
    """A token as literal text: rich's markup means nothing in it."""
    visible = (_SPACE if piece == (" ", True) else piece.text for piece in pieces(token))
    return Text(mark + "".join(visible), style=style, no_wrap=True, overflow="ellipsis")


def _filled(text: Text, width: int) -> Text:
    """The text over the whole width of its cell, so that the colour fills it."""
    filled = text.copy()
    filled.truncate(width, overflow="ellipsis", pad=True)
    return filled


def _left_out(count: int, total: int) -> str:
    if not count:
        return ""
    left_out = "position 0" if count == 1 else f"positions 0 to {count - 1}"
    return f"no room for {left_out} of {total} tokens; a wider terminal or --html shows them"


def _legend(scale: NormScale, coloured: bool) -> Text:
    low, high = scale_ends(scale)
    swatches = (
        [("  ", f"on {shade.background}") for shade in DARK_SHADES] if coloured else [("to", "dim")]
    )
    return Text.assemble((f"{low} ", "dim"), *swatches, (f" {high}", "dim"))
