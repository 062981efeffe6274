"""The layers x tokens table in a terminal, or as plain text without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from backward_lens_tl.choices import Size
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, NormScale
from backward_lens_tl.views.prompts import answer_position
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    LEADS,
    SIZES,
    display_order,
    faint_note,
    matrix_title,
    same_tokens_note,
    visible,
)

_LAYER_WIDTH = len("layer")
_NARROWEST, _WIDEST = 8, 16

_SAYS, _EDGE = "say →", "│"
"""The row of tokens that positions should say; the line between a prompt and its answer."""

_FAINT = "~"
"""Marks a faint cell where italics are not available."""


@dataclass(frozen=True)
class TerminalTable:
    """A rich renderable: one table per matrix, as wide as the terminal allows.

    If not every token of the prompt fits, the last ones are shown, where gradients are largest.

    Attributes:
        result: The result to show.
        batch: Index of the prompt.
        shade_by: What colours show: `"norm"` for `||delta_i||`, `"write_norm"` for
            `||x_i|| ||delta_i||`, the norm of the term that the position writes.
    """

    result: BackwardLensResult
    batch: int = 0
    shade_by: Size = "norm"

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
        scale = NormScale.of_cells(rows, self.shade_by)
        texts = [[self._text(cell, scale, styled) for cell in row] for row in rows]
        heads = [self._from_edge(cell, _token(cell.token, "bold")) for cell in rows[0]]
        says = [self._says(cell) for cell in rows[0]] if self.result.has_position_targets else []
        columns = [
            max(text.cell_len for text in column)
            for column in zip(heads, *texts, *([says] if says else []), strict=True)
        ]
        first, cell_width = _fit(columns, width)

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("layer", justify="right", style="bold", width=_LAYER_WIDTH, no_wrap=True)
        for head in heads[first:]:
            table.add_column(head, width=cell_width, no_wrap=True, overflow="ellipsis")
        if says:
            table.add_row(_SAYS, *says[first:], style="italic")
        for row, own in zip(rows, texts, strict=True):
            table.add_row(str(row[0].layer), *(_filled(text, cell_width) for text in own[first:]))
        meaning = matrix_title(matrix, self.result.direction, self.result.vjps_at)
        title = Text.assemble((matrix, "bold"), f" {meaning}")
        notes = [
            same_tokens_note(self.result.matrices) if matrix == "W_in" else "",
            _left_out(first, len(columns)),
            faint_note(
                rows,
                self.result.faint_norm,
                " (in italics)" if styled else f" (with {_FAINT})",
            ),
        ]
        below = [Text(note, style="dim") for note in notes if note]
        legend = _legend(SIZES[self.shade_by], scale, styled)
        return Group(title, table, legend, *below, Text())

    def _text(self, cell: Cell, scale: NormScale, styled: bool) -> Text:
        if cell.is_zero:
            return self._from_edge(cell, Text(ADDS_NOTHING, style="dim"))
        shade = DARK_SHADES[scale.step(getattr(cell, self.shade_by))]
        style = f"{'italic ' if cell.is_faint else ''}{shade.text} on {shade.background}"
        marks = LEADS * cell.target_leads + _FAINT * (cell.is_faint and not styled)
        bold = "bold " if cell.target_leads else ""
        return self._from_edge(cell, _token(cell.top[0].token, bold + style, marks))

    @cached_property
    def _answer(self) -> int | None:
        return answer_position(self.result, self.batch)

    def _says(self, cell: Cell) -> Text:
        """The token that the cell's position should say."""
        token = Text() if cell.target is None else _token(cell.target, "")
        return self._from_edge(cell, token)

    def _from_edge(self, cell: Cell, text: Text) -> Text:
        """The text, after a line if the answer begins at this position."""
        begins = cell.position == self._answer
        return Text.assemble((_EDGE, "default on default"), text) if begins else text


def _fit(columns: Sequence[int], width: int) -> tuple[int, int]:
    """Index of the first column to show, and the width of every column."""
    # Columns shrink to `_NARROWEST` before one is left out.
    room = width - _LAYER_WIDTH
    for first in range(len(columns)):
        each = min(room // (len(columns) - first) - 1, _WIDEST, max(columns[first:]))
        if each >= min(_NARROWEST, max(columns[first:])):
            return first, each
    return len(columns) - 1, max(room - 1, 1)


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


def _legend(name: str, scale: NormScale, coloured: bool) -> Text:
    low, high = scale.ends
    swatches = (
        [("  ", f"on {shade.background}") for shade in DARK_SHADES] if coloured else [("to", "dim")]
    )
    return Text.assemble((f"{name} {low} ", "dim"), *swatches, (f" {high}", "dim"))
