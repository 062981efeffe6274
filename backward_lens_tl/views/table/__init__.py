"""The layers x tokens table in HTML: a fragment for notebooks, and a self-contained page.

The style sheet alone switches matrix, tokens and colours, so the table can be read without scripts,
as on code-hosting sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files

from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES
from backward_lens_tl.views.table.panels import isolated, isolated_run, panels
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    LEADS,
    display_order,
    number,
    running_text,
)

MAX_PROMPTS = 4
MAX_CELLS = 4000
"""Limits on prompts, and on cells of several prompts, in a notebook output of about 3 MB."""

_PROJECTIONS = {
    "logit_lens": "logit lens: the model's final norm and unembedding",
    "normalized": "normalized logit lens: each vector is scaled to length 1 first",
    "cosine": "cosine with each token's column of the unembedding, whatever its length",
}
_DIRECTIONS = {
    "update": "update: W_out and W_O are read as -δ_i, what one step of gradient descent adds",
    "gradient": "gradient: W_out and W_O are read as δ_i, the raw gradient, which a step subtracts",
}


def render_table(result: BackwardLensResult) -> str:
    """The tables of a result's first prompts, as a fragment with its own style and script."""
    prompts, first = len(result.positions), _shown_prompts(result)
    shown = "".join(_prompt_section(result, batch) for batch in range(first))
    more = ""
    if prompts > first:
        more = (
            f"<p>{prompts - first} more of {prompts} prompts are not shown; write one with "
            f"<code>result.save_html(path, batch={first})</code>.</p>"
        )
    return (
        f'<div class="blt"><style>{_style()}</style>{_controls(result)}{shown}{_key()}{more}'
        f"<script>{_asset('table.js')}</script></div>"
    )


def render_page(result: BackwardLensResult, batch: int = 0) -> str:
    """The tables of one prompt as an HTML document that loads nothing."""
    title = escape(f"{running_text(result.capture.prompt(batch)).strip()} · Backward Lens")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{_style()}</style></head>"
        f'<body class="blt blt-page"><header><h1>{_heading(result, batch)}</h1>'
        f"{_facts(result, batch)}</header>"
        f"<main>{_controls(result)}{panels(result, batch)}{_key()}</main>"
        f"<script>{_asset('table.js')}</script></body></html>\n"
    )


# --- style --------------------------------------------------------------------------------------


@cache
def _style() -> str:
    pairs = list(enumerate(zip(LIGHT_SHADES, DARK_SHADES, strict=True)))
    # Browsers without light-dark() use the light shades.
    shades = "".join(
        f"{selector}{step}{{background:{light.background};color:{light.text};"
        f"background:light-dark({light.background},{dark.background});"
        f"color:light-dark({light.text},{dark.text})}}\n"
        for selector in (
            ".blt .n",
            ".blt .controls:has([name=scale][value=linear]:checked) ~ * td.m",
        )
        for step, (light, dark) in pairs
    )
    return _asset("table.css") + shades


@cache
def _asset(name: str) -> str:
    return files("backward_lens_tl.views.table").joinpath(name).read_text(encoding="utf-8")


# --- controls -----------------------------------------------------------------------------------


def _controls(result: BackwardLensResult) -> str:
    # A dialog's form is never submitted, and keeps this table's choices separate from those of
    # other tables on the page.
    matrices: dict[str, str] = {
        "": "all",
        **{name: name for name in display_order(result.matrices)},
    }
    lenses = {name: name.replace("_", " ") for name in result.projections}
    choices = [
        _choice("Matrix", "matrix", matrices) if len(result.matrices) > 1 else "",
        _choice("Lens", "lens", lenses) if len(lenses) > 1 else "",
        _choice("Tokens", "end", {"top": "top", "bottom": "bottom"}),
        _choice("Colour", "scale", {"log": "log", "linear": "linear"}),
    ]
    return f'<form class="controls" method="dialog" autocomplete="off">{"".join(choices)}</form>'


def _choice(title: str, name: str, labels: Mapping[str, str]) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{escape(value)}"'
        f"{' checked' if index == 0 else ''}>{escape(label)}</label>"
        for index, (value, label) in enumerate(labels.items())
    )
    return f'<fieldset class="choose-{name}"><legend>{title}</legend>{buttons}</fieldset>'


# --- around the tables --------------------------------------------------------------------------


def _heading(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    arrow = "" if target is None else f' <span class="to">→</span> <q>{isolated_run(target)}</q>'
    return f"<q>{isolated_run(result.capture.prompt(batch))}</q>{arrow}"


def _facts(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    facts = {
        "Target": "none" if target is None else isolated(target),
        "Loss": f"{number(float(result.capture.loss[batch]))} "
        f"<small>{isolated_run(result.capture.objective)}</small>",
        "Model": isolated_run(result.capture.model_name),
        "Projection": "".join(_lens_fact(result, name) for name in result.projections),
        "Direction": isolated_run(_DIRECTIONS[result.direction]),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts.items())}</dl>"


def _lens_fact(result: BackwardLensResult, name: str) -> str:
    hidden = "" if name == result.projection else " hidden"
    meaning = isolated_run(_PROJECTIONS.get(name, name))
    return f'<span data-lens="{escape(name)}"{hidden}>{meaning}</span>'


def _shown_prompts(result: BackwardLensResult) -> int:
    """How many prompts a notebook shows, at least one."""
    cells = len(result.matrices) * len(result.layers) * result.positions.shape[1]
    return max(1, min(len(result.positions), MAX_PROMPTS, MAX_CELLS // cells))


def _prompt_section(result: BackwardLensResult, batch: int) -> str:
    loss = number(float(result.capture.loss[batch]))
    return (
        f'<p class="prompt"><strong>{_heading(result, batch)}</strong> <small>loss {loss}</small>'
        f"</p>{panels(result, batch)}"
    )


def _key() -> str:
    return (
        '<p class="key">A cell shows the token with the highest or lowest score; its colour is the '
        "norm of δ_i, how strongly the position writes. "
        f'<span class="lead">{LEADS}</span> the target leads. '
        f"{ADDS_NOTHING} adds nothing to this gradient. "
        "<bdi><u> </u></bdi> a space; <bdi><i>⏎</i></bdi> a line break.</p>"
    )
