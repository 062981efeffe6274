"""The tables of one prompt, one per matrix, and the data for their script.

All text from models and users is escaped here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import LIGHT_SHADES, NormScale
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    LEADS,
    display_order,
    faint_note,
    matrix_title,
    number,
    pieces,
    running_text,
    zero_reason,
)

Rows = list[list[Cell]]
"""The cells of one matrix, by layer and position; the last layer comes first.

The forward pass goes up in a table, and the gradient down.
"""

LEAD_MARKUP = f'<b aria-hidden="true">{LEADS}</b><span class="sr">target leads: </span>'
"""Marks a target that is the top token, also for screen readers."""

_IN_TOOLTIP = 3
"""Tokens at either end in a cell's tooltip, which the script replaces by the details."""


def panels(result: BackwardLensResult, batch: int) -> str:
    """The tables of one prompt and the data for their script."""
    by_lens = {
        lens: {
            matrix: [read.cells(matrix, layer, batch) for layer in reversed(read.layers)]
            for matrix in read.matrices
        }
        for lens, read in ((lens, result.under(lens)) for lens in result.projections)
    }
    tables = "".join(
        _panel(result, matrix, {lens: rows[matrix] for lens, rows in by_lens.items()})
        for matrix in display_order(result.matrices)
    )
    return (
        f'<div data-prompt="{batch}"><div class="panels">{tables}</div>'
        f'<script type="application/json">{_details(by_lens)}</script></div>'
    )


# --- text ---------------------------------------------------------------------------------------


def isolated(token: str) -> str:
    """A token with every character visible, isolated from the surrounding text direction."""
    return f"<bdi>{_compact(token).replace(' ', '<u> </u>')}</bdi>"


def isolated_run(text: str) -> str:
    """Running text in one line, isolated from the surrounding text direction."""
    return f"<bdi>{escape(running_text(text))}</bdi>"


def _compact(token: str) -> str:
    """A token with its control characters marked, and plain spaces, which `isolated` marks."""
    return "".join(
        f"<i>{escape(text)}</i>" if is_mark and text != " " else escape(text)
        for text, is_mark in pieces(token)
    )


# --- tables -------------------------------------------------------------------------------------


def _panel(result: BackwardLensResult, matrix: MatrixName, by_lens: Mapping[str, Rows]) -> str:
    rows = by_lens[result.projection]
    scale = NormScale.of_cells(rows)
    title = escape(matrix_title(matrix, result.direction, result.vjps_at))
    head = "".join(
        f'<th scope="col">{isolated(cell.token)}<small>{cell.position}</small></th>'
        for cell in rows[0]
    )
    body = "".join(
        f'<tr><th scope="row">{row[0].layer}</th>{"".join(_cell(cell, scale) for cell in row)}</tr>'
        for row in rows
    )
    return (
        f'<figure data-matrix="{matrix}"><figcaption><strong>{matrix}</strong> {title}</figcaption>'
        '<div class="scroll" data-lm-suppress-shortcuts="true"><table class="cells">'
        f"<caption>{matrix}, {title}: one vocabulary token for each layer, last layer first, "
        "and each token of the prompt</caption>"
        f'<thead><tr><th scope="col"><small>layer</small></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"{_legend('log', *scale.ends)}{_legend('lin', *scale.linear_ends)}"
        f"{_faint_notes(result, by_lens)}"
        '<div class="details" aria-live="polite"><p class="hint">A cell\'s tooltip shows its norm, '
        "target rank and more tokens.</p></div></figure>"
    )


def _cell(cell: Cell, scale: NormScale) -> str:
    if cell.is_zero:
        reason = zero_reason(cell)
        return (
            f'<td class="zero" tabindex="0" title="{reason}"><span aria-hidden="true">'
            f'{ADDS_NOTHING}</span><span class="sr">{reason}</span></td>'
        )
    lead = LEAD_MARKUP if cell.target_leads else ""
    marks = f"{' faint' if cell.is_faint else ''}{' lead' if lead else ''}"
    rank = "" if cell.target_rank is None else f", target rank {cell.target_rank}"
    tooltip = (
        f"norm {number(cell.norm)}{rank}; highest: {_first(cell.top)}; "
        f"lowest: {_first(cell.bottom)}"
    )
    return (
        f'<td class="n{scale.step(cell.norm)} m{scale.linear_step(cell.norm)}{marks}" tabindex="0" '
        f'title="{escape(tooltip)}"><div class="top">{lead}{isolated(cell.top[0].token)}</div>'
        f'<div class="low">{isolated(cell.bottom[0].token)}</div></td>'
    )


def _first(entries: Sequence[TokenScore]) -> str:
    return " ".join(repr(running_text(entry.token)) for entry in entries[:_IN_TOOLTIP])


def _legend(kind: str, low: str, high: str) -> str:
    swatches = "".join(f'<span class="n{step}"></span>' for step in range(len(LIGHT_SHADES)))
    return (
        f'<p class="legend {kind}">{low} <span class="ramp" aria-hidden="true">{swatches}'
        f"</span> {high}</p>"
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


# --- data for the script ------------------------------------------------------------------------


def _details(by_lens: Mapping[str, Mapping[MatrixName, Rows]]) -> str:
    """All cells under every lens, as compact JSON.

    Each token's markup is stored once, and cells hold its index. A cell is the reason why it adds
    nothing, or `[norm of delta, norm of x, lens, ...]`, where a lens is `[target rank or null,
    whether it is faint, token, score, token, score, ...]`: the highest scores, then as many of the
    lowest.

    Args:
        by_lens: Rows of each matrix, by the name of the lens.

    Returns:
        Text that is safe inside a `<script>` element.
    """
    counts = Counter(
        entry.token
        for matrices in by_lens.values()
        for rows in matrices.values()
        for row in rows
        for cell in row
        for entry in (*cell.top, *cell.bottom)
    )
    # The most frequent tokens have the shortest indices.
    index = {token: place for place, (token, _) in enumerate(counts.most_common())}
    data = {
        "lenses": list(by_lens),
        "lead": LEAD_MARKUP,
        "tokens": list(map(_compact, index)),
        "panels": {
            matrix: [
                [_packed(cells, index) for cells in zip(*layers, strict=True)]
                for layers in zip(*(rows[matrix] for rows in by_lens.values()), strict=True)
            ]
            for matrix in next(iter(by_lens.values()))
        },
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # No token may end the element or start a comment.
    return text.replace("</", "<\\/").replace("<!", "<\\u0021")


def _packed(lenses: Sequence[Cell], index: Mapping[str, int]) -> str | list[Any]:
    """One cell, read by each lens."""
    first = lenses[0]
    if first.is_zero:
        return zero_reason(first)
    packed: list[Any] = [number(first.norm), number(first.input_norm)]
    for cell in lenses:
        scores = [
            value
            for entry in (*cell.top, *cell.bottom)
            for value in (index[entry.token], _json_score(entry.score))
        ]
        packed.append([cell.target_rank, int(cell.is_faint), *scores])
    return packed


def _json_score(score: float) -> float | str:
    """A score with four digits; text if it is infinite, which JSON does not have."""
    return float(number(score)) if math.isfinite(score) else number(score)
