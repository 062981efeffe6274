"""The layers x tokens table in HTML: a fragment for notebooks, and a page that needs nothing else.

There is no script: a cell's details lie in the cell, and the style sheet shows them in the panel's
reserved space while the cell is pointed at or focused. Where the style sheet is stripped, as on
code-hosting sites, they stay `hidden` and a plain table remains. Every text that comes from a model
or a user goes through `_token` or `_running`, which escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files

from backward_lens_tl.cells import Cell, TokenScore
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sites import MatrixName
from backward_lens_tl.views.appearance import (
    ADDS_NOTHING,
    DARK_SHADES,
    LEADS,
    LIGHT_SHADES,
    NormScale,
    faint_note,
    matrix_title,
    number,
    pieces,
    running_text,
    scale_ends,
)

MAX_PROMPTS = 4
"""Prompts of a batch that a notebook shows."""

_PROJECTIONS = {
    "logit_lens": "logit lens: the model's final norm and unembedding",
    "normalized": "normalized logit lens: each vector is scaled to length 1 first",
}
_DIRECTIONS = {
    "update": "update: W_out and W_O are read as -δ_i, what one step of gradient descent adds",
    "gradient": "gradient: W_out and W_O are read as δ_i, the raw gradient, which a step subtracts",
}


def render_table(result: BackwardLensResult) -> str:
    """The tables of a result's first prompts, as a fragment with its own style.

    Args:
        result: What to show.

    Returns:
        HTML for the body of any page.
    """
    prompts = len(result.positions)
    shown = "".join(_prompt_section(result, batch) for batch in range(min(prompts, MAX_PROMPTS)))
    more = ""
    if prompts > MAX_PROMPTS:
        more = (
            f"<p>{prompts - MAX_PROMPTS} more of {prompts} prompts are not shown; see one with "
            f"<code>result.save_html(path, batch={MAX_PROMPTS})</code>.</p>"
        )
    return f'<div class="blt"><style>{_style()}</style>{shown}{_key()}{more}</div>'


def render_page(result: BackwardLensResult, batch: int = 0) -> str:
    """The tables of one prompt as a complete document.

    Args:
        result: What to show.
        batch: Which prompt.

    Returns:
        An HTML document that fetches nothing and runs nothing.
    """
    title = escape(f"{running_text(_prompt(result, batch)).strip()} · Backward Lens")
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in result.matrices)
    panels = "".join(
        f'<section id="{name}" aria-label="{name}">{_panel(result, name, batch)}</section>'
        for name in result.matrices
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_style()}</style></head>"
        f'<body class="blt blt-page"><header><h1>{_heading(result, batch)}</h1>'
        f"{_facts(result, batch)}</header>"
        f'<nav aria-label="Tables">Tables: {links}</nav>'
        f'<main><div class="panels">{panels}</div>{_key()}</main></body></html>\n'
    )


# --- around the tables --------------------------------------------------------------------------


@cache
def _style() -> str:
    shades = "".join(
        f".blt .n{step}{{background:light-dark({light.background},{dark.background});"
        f"color:light-dark({light.text},{dark.text})}}\n"
        for step, (light, dark) in enumerate(zip(LIGHT_SHADES, DARK_SHADES, strict=True))
    )
    sheet = files("backward_lens_tl.views").joinpath("table.css").read_text(encoding="utf-8")
    return sheet + shades


def _prompt(result: BackwardLensResult, batch: int) -> str:
    return "".join(result.gradients.str_tokens[batch])


def _heading(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    arrow = "" if target is None else f' <span class="to">→</span> <q>{_running(target)}</q>'
    return f"<q>{_running(_prompt(result, batch))}</q>{arrow}"


def _facts(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    facts = {
        "Target": "none" if target is None else _token(target),
        "Loss": f"{number(float(result.gradients.loss[batch]))} "
        f"<small>{_running(result.gradients.objective)}</small>",
        "Model": _running(result.gradients.model_name),
        "Projection": _running(_PROJECTIONS.get(result.projection, result.projection)),
        "Direction": _running(_DIRECTIONS[result.direction]),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts.items())}</dl>"


def _prompt_section(result: BackwardLensResult, batch: int) -> str:
    panels = "".join(_panel(result, matrix, batch) for matrix in result.matrices)
    loss = number(float(result.gradients.loss[batch]))
    return (
        f'<section><p class="prompt"><strong>{_heading(result, batch)}</strong> '
        f'<small>loss {loss}</small></p><div class="panels">{panels}</div></section>'
    )


def _key() -> str:
    return (
        '<p class="key">A cell shows the token with the highest score; its colour is the norm '
        "of δ_i, how strongly the position writes. "
        f'<span class="lead">{LEADS}</span> the target leads. '
        f"{ADDS_NOTHING} adds nothing to this gradient. "
        "<bdi><u> </u></bdi> a space; <bdi><i>⏎</i></bdi> a line break.</p>"
    )


# --- one matrix ---------------------------------------------------------------------------------


def _panel(result: BackwardLensResult, matrix: MatrixName, batch: int) -> str:
    # The last layer is on top: the forward pass runs upwards, the gradient downwards.
    rows = [result.cells(matrix, layer, batch) for layer in reversed(result.layers)]
    scale = NormScale.spanning(cell.norm for row in rows for cell in row if not cell.is_zero)
    title = escape(matrix_title(matrix, result.direction, result.vjps_at))
    head = "".join(
        f'<th scope="col">{_token(cell.token)}<small>{cell.position}</small></th>'
        for cell in rows[0]
    )
    body = "".join(_row(row, scale) for row in rows)
    return (
        f"<figure><figcaption><strong>{matrix}</strong> {title}</figcaption>"
        f'<div class="scroll"><table><caption>{matrix}, {title}: the top token of each layer, '
        "the last layer first, and each prompt token</caption>"
        f'<thead><tr><th scope="col"><small>layer</small></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_legend(scale)}{_faint(rows, result.faint_norm)}"
        '<p class="hint">Point at a cell, or move to it with Tab, for its details.</p></figure>'
    )


def _legend(scale: NormScale) -> str:
    low, high = scale_ends(scale)
    swatches = "".join(f'<span class="n{step}"></span>' for step in range(len(LIGHT_SHADES)))
    return (
        f'<p class="legend">{low} <span class="ramp" aria-hidden="true">{swatches}</span> {high}'
        "</p>"
    )


def _faint(rows: Sequence[Sequence[Cell]], faint_norm: float) -> str:
    note = faint_note([cell for row in rows for cell in row], faint_norm)
    return f'<p class="legend note">{escape(note)}</p>' if note else ""


def _row(cells: Sequence[Cell], scale: NormScale) -> str:
    body = "".join(_cell(cell, scale) for cell in cells)
    return f'<tr><th scope="row">{cells[0].layer}</th>{body}</tr>'


def _cell(cell: Cell, scale: NormScale) -> str:
    if cell.is_zero:
        word, shade, lists = ADDS_NOTHING, "zero", "<p>adds nothing to this gradient</p>"
    else:
        word, shade = _token(cell.top[0].token), f"n{scale.step(cell.norm)}"
        lists = _list("Highest scores", cell.top) + _list("Lowest scores", cell.bottom)
    if cell.is_faint:
        shade += " faint"
    if cell.target_leads:
        shade += " lead"
        word = f'<b aria-hidden="true">{LEADS}</b>{word}<span class="sr"> target leads</span>'
    return (
        f'<td class="{shade}" tabindex="0"><div class="word">{word}</div>'
        f'<div class="details" hidden><p>{_summary(cell)}</p>{lists}</div></td>'
    )


def _summary(cell: Cell) -> str:
    parts = [f"layer {cell.layer}, {_token(cell.token)} at {cell.position}"]
    if not cell.is_zero:
        parts.append(f"norm {number(cell.norm)}{' (faint)' if cell.is_faint else ''}")
        if cell.target_rank is not None:
            parts.append(f"target rank {cell.target_rank}")
    return " · ".join(parts)


def _list(name: str, entries: Iterable[TokenScore]) -> str:
    # An <li> needs no end tag, and there are twenty of them in each cell.
    items = "".join(f"<li>{_token(entry.token)} {number(entry.score)}" for entry in entries)
    return f"<div>{name}<ol>{items}</ol></div>"


# --- text ---------------------------------------------------------------------------------------


def _token(text: str) -> str:
    """A token, isolated from the direction of its surroundings, with its spaces drawn."""
    return f"<bdi>{''.join(map(_piece, *zip(*pieces(text), strict=True)))}</bdi>"


def _piece(text: str, is_mark: bool) -> str:
    if not is_mark:
        return escape(text)
    return "<u> </u>" if text == " " else f"<i>{escape(text)}</i>"


def _running(text: str) -> str:
    return f"<bdi>{escape(running_text(text))}</bdi>"
