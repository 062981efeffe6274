"""The tables of one prompt, one per matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import get_args

from backward_lens_tl.choices import Size
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import LIGHT_SHADES
from backward_lens_tl.views.prompts import answer_position
from backward_lens_tl.views.table.extent import Extent
from backward_lens_tl.views.table.frequent import frequent_tokens
from backward_lens_tl.views.table.markup import LEAD_MARKUP, isolated
from backward_lens_tl.views.table.packing import Rows, packed
from backward_lens_tl.views.table.shading import Shading
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    SIZES,
    display_order,
    faint_note,
    matrix_title,
    number,
    running_text,
    zero_reason,
)

_IN_TOOLTIP = 3
"""Tokens at either end in a cell's tooltip, which the script replaces by the details."""


def panels(result: BackwardLensResult, batch: int, extent: Extent) -> str:
    """The tables of one prompt and the data for their script.

    Args:
        result: The result.
        batch: Which prompt.
        extent: What to show of it.

    Returns:
        HTML. Tokens before the last `extent.written` are only in the data.
    """
    shown = extent.of_result(result, batch)
    by_lens: dict[str, dict[MatrixName, Rows]] = {
        lens: {
            matrix: [read.cells(matrix, layer, batch) for layer in reversed(read.layers)]
            for matrix in display_order(read.matrices)
        }
        for lens, read in ((lens, shown.under(lens)) for lens in shown.projections)
    }
    tables = "".join(
        _Panel(shown, batch, matrix, extent).html(
            {lens: rows[matrix] for lens, rows in by_lens.items()}
        )
        for matrix in display_order(shown.matrices)
    )
    return (
        f'<div data-prompt="{batch}"><div class="panels">{tables}</div>'
        f'<script type="application/json">{packed(by_lens)}</script></div>'
    )


class _Panel:
    """The table of one matrix."""

    def __init__(
        self, result: BackwardLensResult, batch: int, matrix: MatrixName, extent: Extent
    ) -> None:
        self.result = result
        self.matrix = matrix
        self.early = extent.tokens - extent.written
        self.answer = answer_position(result, batch)
        self.turns = result.capture.turns[batch] if result.capture.turns else ()

    def html(self, by_lens: Mapping[str, Rows]) -> str:
        rows = by_lens[self.result.projection]
        shading = Shading.of(rows)
        often = {end: frequent_tokens(rows, end) for end in ("top", "bottom")}
        title = escape(matrix_title(self.matrix, self.result.direction, self.result.vjps_at))
        head = "".join(self._head(cell, place) for place, cell in enumerate(rows[0]))
        gap = f'<td class="early" colspan="{self.early}"></td>' if self.early else ""
        body = "".join(
            f'<tr><th scope="row">{row[0].layer}</th>{gap}'
            f"{''.join(self._cell(cell, shading, often) for cell in row[self.early :])}</tr>"
            for row in rows
        )
        return (
            f'<figure data-matrix="{self.matrix}"><figcaption><strong>{self.matrix}</strong> '
            f'{title}</figcaption><div class="scroll" data-lm-suppress-shortcuts="true">'
            f'<table class="cells{" long" if self.early else ""}">'
            f"<caption>{self.matrix}, {title}: one vocabulary token for each layer, last layer "
            "first, and each token of the prompt</caption>"
            f"<thead><tr>{self._corner()}{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{_legends(shading)}"
            f"{_faint_notes(self.result, by_lens)}"
            '<div class="details" aria-live="polite"><p class="hint">A cell\'s tooltip shows its '
            "norms, target rank and more tokens.</p></div></figure>"
        )

    def _corner(self) -> str:
        if not self.result.has_position_targets:
            return '<th scope="col"><small>layer</small></th>'
        names = "<small>layer</small><small>should say</small>"
        return f'<th scope="col" class="row-names">{names}</th>'

    def _head(self, cell: Cell, place: int) -> str:
        names = ["early"] * (place < self.early) + self._edge(cell)
        if self.turns and self.turns[cell.position] == "template":
            names.append("template")
        says = ""
        if self.result.has_position_targets:
            target = "" if cell.target is None else isolated(cell.target)
            says = f'<small class="says">{target}</small>'
        return (
            f'<th scope="col"{_class(names)}>{isolated(cell.token)}<small>{cell.position}</small>'
            f"{says}</th>"
        )

    def _edge(self, cell: Cell) -> list[str]:
        """The class of the first token of an answer."""
        return ["answer"] if cell.position == self.answer else []

    def _cell(self, cell: Cell, shading: Shading, often: Mapping[str, frozenset[str]]) -> str:
        if cell.is_zero:
            reason = zero_reason(cell)
            return (
                f'<td{_class(["zero", *self._edge(cell)])} tabindex="0" title="{reason}">'
                f'<span aria-hidden="true">{ADDS_NOTHING}</span>'
                f'<span class="sr">{reason}</span></td>'
            )
        lead = LEAD_MARKUP if cell.target_leads else ""
        names = [shading.classes(cell), *self._edge(cell)]
        names += ["faint"] * cell.is_faint + ["lead"] * cell.target_leads
        top, low = cell.top[0].token, cell.bottom[0].token
        return (
            f'<td{_class(names)} tabindex="0" title="{escape(_tooltip(cell))}">'
            f"<div{_class(['top'] + ['often'] * (top in often['top']))}>{lead}{isolated(top)}</div>"
            f"<div{_class(['low'] + ['often'] * (low in often['bottom']))}>{isolated(low)}</div>"
            "</td>"
        )


def _class(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _tooltip(cell: Cell) -> str:
    rank = "" if cell.target_rank is None else f", target rank {cell.target_rank}"
    sizes = ", ".join(f"{SIZES[size]} {number(getattr(cell, size))}" for size in get_args(Size))
    return f"{sizes}{rank}; highest: {_first(cell.top)}; lowest: {_first(cell.bottom)}"


def _first(entries: Sequence[TokenScore]) -> str:
    return " ".join(repr(running_text(entry.token)) for entry in entries[:_IN_TOOLTIP])


def _legends(shading: Shading) -> str:
    return "".join(
        f'<div class="of-{size}">{_legend("log", size, *scale.ends)}'
        f"{_legend('lin', size, *scale.linear_ends)}</div>"
        for size, scale in shading.scales
    )


def _legend(kind: str, size: Size, low: str, high: str) -> str:
    swatches = "".join(f'<span class="n{step}"></span>' for step in range(len(LIGHT_SHADES)))
    return (
        f'<p class="legend {kind}">{SIZES[size]} {low} <span class="ramp" aria-hidden="true">'
        f"{swatches}</span> {high}</p>"
    )


def _faint_notes(result: BackwardLensResult, by_lens: Mapping[str, Rows]) -> str:
    """The notes on faint cells under each lens; that of the first lens is shown."""
    notes = []
    for lens, rows in by_lens.items():
        note = faint_note(rows, result.under(lens).faint_norm, " (in italics)")
        if note:
            hidden = "" if lens == result.projection else " hidden"
            notes.append(
                f'<p class="legend note" data-lens="{escape(lens)}"{hidden}>{escape(note)}</p>'
            )
    return "".join(notes)
