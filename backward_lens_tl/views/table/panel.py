"""One matrix as a table of layers and tokens: what is in the page before any script runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.appearance import (
    ADDS_NOTHING,
    LIGHT_SHADES,
    NormScale,
    faint_note,
    linear_scale_ends,
    matrix_title,
    number,
    running_text,
    scale_ends,
    zero_reason,
)
from backward_lens_tl.views.table.grid import Grid
from backward_lens_tl.views.table.text import LEAD_MARKUP, isolated

_IN_TITLE = 3
"""Tokens at either end in the tooltip that a cell has until the script shows all."""


def panel(result: BackwardLensResult, matrix: MatrixName, grid: Grid) -> str:
    """The table of one matrix and prompt, the last layer on top.

    Args:
        result: What to show.
        matrix: Which matrix.
        grid: The cells of one of its prompts.

    Returns:
        A `<figure>`.
    """
    rows = grid.shown[matrix]
    scale = NormScale.spanning(cell.norm for row in rows for cell in row if not cell.is_zero)
    title = escape(matrix_title(matrix, result.direction, result.vjps_at))
    head = "".join(
        f'<th scope="col">{isolated(cell.token)}<small>{cell.position}</small></th>'
        for cell in rows[0]
    )
    return (
        f'<figure data-matrix="{matrix}"><figcaption><strong>{matrix}</strong> {title}</figcaption>'
        '<div class="scroll" data-lm-suppress-shortcuts="true"><table class="cells">'
        f"<caption>{matrix}, {title}: one token for each layer, the last layer first, and each "
        "token of the prompt</caption>"
        f'<thead><tr><th scope="col"><small>layer</small></th>{head}</tr></thead>'
        f"<tbody>{''.join(_row(row, scale) for row in rows)}</tbody></table></div>"
        f"{_legend('log', scale_ends(scale))}{_legend('lin', linear_scale_ends(scale))}"
        f"{_faint_notes(result, matrix, grid)}"
        '<div class="details" aria-live="polite"><p class="hint">A cell\'s tooltip has its norm, '
        "target rank and more tokens.</p></div></figure>"
    )


def _row(cells: Sequence[Cell], scale: NormScale) -> str:
    body = "".join(_cell(cell, scale) for cell in cells)
    return f'<tr><th scope="row">{cells[0].layer}</th>{body}</tr>'


def _cell(cell: Cell, scale: NormScale) -> str:
    if cell.is_zero:
        reason = zero_reason(cell)
        return (
            f'<td class="zero" tabindex="0" title="{reason}"><span aria-hidden="true">'
            f'{ADDS_NOTHING}</span><span class="sr">{reason}</span></td>'
        )
    lead = LEAD_MARKUP if cell.target_leads else ""
    marks = f"{' faint' if cell.is_faint else ''}{' lead' if lead else ''}"
    return (
        f'<td class="n{scale.step(cell.norm)} m{scale.linear_step(cell.norm)}{marks}" tabindex="0" '
        f'title="{_tooltip(cell)}"><div class="top">{lead}{isolated(cell.top[0].token)}</div>'
        f'<div class="low">{isolated(cell.bottom[0].token)}</div></td>'
    )


def _tooltip(cell: Cell) -> str:
    rank = "" if cell.target_rank is None else f", target rank {cell.target_rank}"
    top, bottom = (_first(entries) for entries in (cell.top, cell.bottom))
    return escape(f"norm {number(cell.norm)}{rank}; highest: {top}; lowest: {bottom}")


def _first(entries: Iterable[TokenScore]) -> str:
    return " ".join(repr(running_text(entry.token)) for entry in list(entries)[:_IN_TITLE])


def _legend(kind: str, ends: tuple[str, str]) -> str:
    swatches = "".join(f'<span class="n{step}"></span>' for step in range(len(LIGHT_SHADES)))
    return (
        f'<p class="legend {kind}">{ends[0]} <span class="ramp" aria-hidden="true">{swatches}'
        f"</span> {ends[1]}</p>"
    )


def _faint_notes(result: BackwardLensResult, matrix: MatrixName, grid: Grid) -> str:
    """What to say of faint cells under each lens; that of the first is shown."""
    notes = []
    for reading in result.readings:
        rows = grid.by_lens[reading.projection][matrix]
        note = faint_note([cell for row in rows for cell in row], reading.faint_norm)
        if note:
            hidden = "" if reading.projection == result.projection else " hidden"
            name = escape(reading.projection)
            notes.append(f'<p class="legend note" data-lens="{name}"{hidden}>{escape(note)}</p>')
    return "".join(notes)
