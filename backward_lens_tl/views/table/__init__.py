"""The layers x tokens table in HTML: a fragment for notebooks, and a self-contained page.

The style sheet alone switches matrix, tokens and colours, so the table can be read without scripts,
as on code-hosting sites. Of long prompts, only the last tokens are written as HTML; the script
writes the other ones when they are scrolled into view.
"""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files

from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES
from backward_lens_tl.views.table import heading
from backward_lens_tl.views.table.extent import NOTEBOOK, PAGE, Budget, Extent
from backward_lens_tl.views.table.panels import panels
from backward_lens_tl.views.text import asked, running_text

MAX_PROMPTS = 4
"""Limit on prompts in a notebook output."""

_SHADED = {
    "": ".n",
    ":has([name=scale][value=linear]:checked)": "m",
    ":has([name=size][value=write_norm]:checked)": "p",
    ":has([name=size][value=write_norm]:checked):has([name=scale][value=linear]:checked)": "q",
}
"""The class of cells that has the shades, by the state of the controls."""


def render_table(result: BackwardLensResult) -> str:
    """The tables of a result's first prompts, as a fragment with its own style and script."""
    prompts, first = len(result.positions), _shown_prompts(result)
    budget = NOTEBOOK.shared_by(first)
    shown = "".join(_prompt_section(result, batch, budget) for batch in range(first))
    more = ""
    if prompts > first:
        which = "first" if first == 1 else f"first {first}"
        more = (
            f"<p>The {which} of {prompts} prompts; "
            f"<code>result.save_html(path, batch={first})</code> writes another one to a page.</p>"
        )
    return (
        f'<div class="blt"><style>{_style()}</style>{more}{heading.controls(result)}{shown}'
        f"{heading.key(result)}<script>{_asset('table.js')}</script></div>"
    )


def render_page(result: BackwardLensResult, batch: int = 0) -> str:
    """The tables of one prompt as an HTML document that loads nothing."""
    extent = Extent.of(result, batch, PAGE)
    title = escape(f"{asked(result.capture, batch, running_text).strip()} · Backward Lens")
    remedy = "analyse the others with <code>backward_lens(..., positions=...)</code>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{_style()}</style></head>"
        f'<body class="blt blt-page"><header><h1>{heading.heading(result, batch)}</h1>'
        f"{heading.introduction(result, batch)}{heading.facts(result)}</header>"
        f"<main>{heading.left_out(extent, result.k, remedy)}{heading.controls(result)}"
        f"{panels(result, batch, extent)}{heading.key(result)}</main>"
        f"<script>{_asset('table.js')}</script></body></html>\n"
    )


def _shown_prompts(result: BackwardLensResult) -> int:
    """How many prompts a notebook shows, at least one."""
    cells = len(result.matrices) * len(result.layers) * result.positions.shape[1]
    return max(1, min(len(result.positions), MAX_PROMPTS, NOTEBOOK.cells // cells))


def _prompt_section(result: BackwardLensResult, batch: int, budget: Budget) -> str:
    extent = Extent.of(result, batch, budget)
    remedy = f'<code>result.save_html("page.html", batch={batch})</code> writes more of them'
    return (
        f'<div class="prompt"><p><strong>{heading.heading(result, batch)}</strong></p>'
        f"{heading.introduction(result, batch)}{heading.left_out(extent, result.k, remedy)}</div>"
        f"{panels(result, batch, extent)}"
    )


# --- style and script ---------------------------------------------------------------------------


def stylesheet() -> str:
    """The style sheet, without the shades of cells."""
    return _asset("table.css")


@cache
def _style() -> str:
    pairs = list(enumerate(zip(LIGHT_SHADES, DARK_SHADES, strict=True)))
    # Browsers without light-dark() use the light shades.
    shades = "".join(
        f"{_selector(state, letter)}{step}{{background:{light.background};color:{light.text};"
        f"background:light-dark({light.background},{dark.background});"
        f"color:light-dark({light.text},{dark.text})}}\n"
        for state, letter in _SHADED.items()
        for step, (light, dark) in pairs
    )
    return _asset("table.css") + shades


def _selector(state: str, letter: str) -> str:
    return f".blt .controls{state} ~ * td.{letter}" if state else f".blt {letter}"


@cache
def _asset(name: str) -> str:
    return files("backward_lens_tl.views.table").joinpath(name).read_text(encoding="utf-8")
