"""The layers x tokens table in a terminal, or as plain text without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, NormScale
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    LEADS,
    display_order,
    faint_note,
    matrix_title,
    visible,
)

_LAYER_WIDTH = len("layer")
_NARROWEST, _WIDEST = 8, 16

_FAINT = "~"
"""Marks a faint cell where italics are not available."""


@dataclass(frozen=True)
class TerminalTable:
    """A rich renderable: one table per matrix, as wide as the terminal allows.

    If not every token of the prompt fits, the last ones are shown, where gradients are largest.

    Attributes:
        result: The result to show.
        batch: Index of the prompt.
    """

    result: BackwardLensResult
    batch: int = 0

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Render for a console; rich calls this."""
        for matrix in display_order(self.result.matrices):
            yield self._panel(matrix, options.max_width, console.color_system is not None)

    def _panel(self, matrix: MatrixName, width: int, styled: bool) -> RenderableType:
        # The last layer is on top: the forward pass goes up, the gradient down.
        layers = reversed(self.result.layers)
        rows = [self.result.cells(matrix, layer, self.batch) for layer in layers]
        scale = NormScale.of_cells(rows)
        texts = [[_text(cell, scale, styled) for cell in row] for row in rows]
        heads = [_token(cell.token, "bold") for cell in rows[0]]
        columns = [
            max(text.cell_len for text in column) for column in zip(heads, *texts, strict=True)
        ]
        first, cell_width = _fit(columns, width)

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("layer", justify="right", style="bold", width=_LAYER_WIDTH, no_wrap=True)
        for head in heads[first:]:
            table.add_column(head, width=cell_width, no_wrap=True, overflow="ellipsis")
        for row, own in zip(rows, texts, strict=True):
            table.add_row(str(row[0].layer), *(_filled(text, cell_width) for text in own[first:]))
        meaning = matrix_title(matrix, self.result.direction, self.result.vjps_at)
        title = Text.assemble((matrix, "bold"), f" {meaning}")
        notes = [
            _left_out(first, len(columns)),
            faint_note(
                rows,
                self.result.faint_norm,
                " (in italics)" if styled else f" (with {_FAINT})",
            ),
        ]
        below = [Text(note, style="dim") for note in notes if note]
        return Group(title, table, _legend(scale, styled), *below, Text())


def _fit(columns: Sequence[int], width: int) -> tuple[int, int]:
    """Index of the first column to show, and the width of every column."""
    # Columns shrink to `_NARROWEST` before one is left out.
    room = width - _LAYER_WIDTH
    for first in range(len(columns)):
        each = min(room // (len(columns) - first) - 1, _WIDEST, max(columns[first:]))
        if each >= min(_NARROWEST, max(columns[first:])):
            return first, each
    return len(columns) - 1, max(room - 1, 1)


def _text(cell: Cell, scale: NormScale, styled: bool) -> Text:
    if cell.is_zero:
        return Text(ADDS_NOTHING, style="dim")
    shade = DARK_SHADES[scale.step(cell.norm)]
    style = f"{'italic ' if cell.is_faint else ''}{shade.text} on {shade.background}"
    mark = _FAINT if cell.is_faint and not styled else ""
    if cell.target_leads:
        return _token(cell.top[0].token, f"bold {style}", mark=LEADS + mark)
    return _token(cell.top[0].token, style, mark)


def _token(token: str, style: str, mark: str = "") -> Text:
    """A token as literal text, in which rich finds no markup."""
    return Text(mark + visible(token), style=style, no_wrap=True, overflow="ellipsis")


def _filled(text: Text, width: int) -> Text:
    """The text padded to the width of its cell, so that the colour fills it."""
    filled = text.copy()
    filled.truncate(width, overflow="ellipsis", pad=True)
    return filled


def _left_out(count: int, total: int) -> str:
    if not count:
        return ""
    left_out = "position 0" if count == 1 else f"positions 0 to {count - 1}"
    return f"{left_out} of {total} tokens not shown; use a wider terminal or --html"


def _legend(scale: NormScale, coloured: bool) -> Text:
    low, high = scale.ends
    swatches = (
        [("  ", f"on {shade.background}") for shade in DARK_SHADES] if coloured else [("to", "dim")]
    )
    return Text.assemble((f"{low} ", "dim"), *swatches, (f" {high}", "dim"))
