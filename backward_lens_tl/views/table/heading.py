"""What is above and below the tables: the question, the answer, the controls and the key."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from backward_lens_tl.choices import JACOBIAN_LENS
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.prompts import which_prompt
from backward_lens_tl.views.table.extent import Extent
from backward_lens_tl.views.table.frequent import RULE
from backward_lens_tl.views.table.markup import isolated_run, quoted
from backward_lens_tl.views.text import (
    ADDS_NOTHING,
    LEADS,
    SIZES,
    asked,
    display_order,
    leading_layers,
    lens_name,
    number,
    prediction_text,
    same_tokens_note,
)

_CARRIED = "Jacobian lens: average Jacobians carry each vector to the last layer"
_PROJECTIONS = {
    "logit_lens": "logit lens: the model's final norm and unembedding",
    "normalized": "normalized logit lens: each vector is scaled to length 1 first",
    "cosine": "cosine with each token's column of the unembedding, whatever its length",
    JACOBIAN_LENS: f"{_CARRIED}, then the logit lens",
    f"{JACOBIAN_LENS}_normalized": f"{_CARRIED}, then the normalized logit lens",
    f"{JACOBIAN_LENS}_cosine": f"{_CARRIED}, then the cosine with each token's column",
}
_DIRECTIONS = {
    "update": "update: W_out and W_O are read as -δ_i, what one step of gradient descent adds",
    "gradient": "gradient: W_out and W_O are read as δ_i, the raw gradient, which a step subtracts",
}


# --- above --------------------------------------------------------------------------------------


def heading(result: BackwardLensResult, batch: int) -> str:
    """Which prompt it is, its text, and the target or the whole answer."""
    target, which = result.target(batch), which_prompt(result, batch)
    arrow = "" if target is None else f' <span class="to">→</span> {_quoted_run(target)}'
    return f"{which}{': ' if which else ''}{asked(result.capture, batch, _quoted_run)}{arrow}"


def _quoted_run(text: str) -> str:
    return f"<q>{isolated_run(text)}</q>"


def introduction(result: BackwardLensResult, batch: int) -> str:
    """What the model answers now, and what the tables show."""
    said = prediction_text(result.prediction(batch), result.has_position_targets, quoted)
    step = "what one step of gradient descent on this loss writes into the model's weights"
    if result.direction == "gradient":
        step = "the gradient of this loss, which a step of gradient descent subtracts"
    return (
        f'<p class="answer-now">{said}</p>'
        f"<p>The loss {isolated_run(result.capture.objective)} is {loss(result, batch)}. The "
        f"tables show {step}: one row per layer, one column per token of the prompt. The token in "
        "a cell is what is written there; its colour is how strongly the loss acts there, or, with "
        f"‖x_i‖·‖δ_i‖, how much is written. {_leads(result, batch)}</p>"
    )


def _leads(result: BackwardLensResult, batch: int) -> str:
    """In which layers the update of `W_out` shows the target at the last token."""
    if "W_out" not in result.matrices or result.direction == "gradient":
        return ""
    last = int(result.positions[batch].max())
    cells = [result.cell("W_out", layer, last, batch) for layer in result.layers]
    target = cells[0].target
    if target is None:
        return ""
    return (
        f"At {quoted(cells[0].token)} in column {last}, {quoted(target)} leads W_out in "
        f"{leading_layers(cells)}."
    )


def loss(result: BackwardLensResult, batch: int) -> str:
    """The loss of a prompt."""
    return number(float(result.capture.loss[batch]))


def facts(result: BackwardLensResult) -> str:
    """The model and the settings."""
    named = {
        "Model": isolated_run(result.capture.model_name),
        "Projection": "".join(_lens_fact(result, name) for name in result.projections),
        "Direction": isolated_run(_DIRECTIONS[result.direction]),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in named.items())}</dl>"


def _lens_fact(result: BackwardLensResult, name: str) -> str:
    hidden = "" if name == result.projection else " hidden"
    fit = result.under(name).fit
    meaning = isolated_run(_PROJECTIONS.get(name, name) + (f" ({fit})" if fit else ""))
    return f'<span data-lens="{escape(name)}"{hidden}>{meaning}</span>'


def left_out(extent: Extent, k: int, remedy: str) -> str:
    """What the tables of a long prompt lack, and how to see it.

    Args:
        extent: What they hold.
        k: Number of tokens at either end of a cell in the result.
        remedy: How to see the other tokens of the prompt.

    Returns:
        A paragraph; empty if nothing is missing.
    """
    notes = []
    if extent.tokens < extent.total:
        notes.append(
            f"The tables show the last {extent.tokens} of {extent.total} tokens; {remedy}."
        )
    if extent.written < extent.tokens:
        notes.append(
            '<span class="unscripted">Without scripts they show only the last '
            f"{extent.written}.</span>"
        )
    if extent.k < k:
        notes.append(
            f"Details hold {extent.k} of the {k} tokens at either end of a cell; "
            "<code>result.cell(...)</code> has all of them."
        )
    return f'<p class="key">{" ".join(notes)}</p>' if notes else ""


# --- controls -----------------------------------------------------------------------------------


def controls(result: BackwardLensResult) -> str:
    """The choices of what the tables show."""
    # A dialog's form is never submitted, and keeps this table's choices separate from those of
    # other tables on the page.
    matrices: dict[str, str] = {
        "": "all",
        **{name: name for name in display_order(result.matrices)},
    }
    lenses = {name: lens_name(name) for name in result.projections}
    choices = [
        _choice("Matrix", "matrix", matrices) if len(result.matrices) > 1 else "",
        _choice("Lens", "lens", lenses) if len(lenses) > 1 else "",
        _choice("Tokens", "end", {"top": "top", "bottom": "bottom"}),
        _choice("Frequent tokens", "often", {"ink": "as others", "faded": "faded"}),
        _choice("Colour", "size", SIZES),
        _choice("Scale", "scale", {"log": "log", "linear": "linear"}),
    ]
    return f'<form class="controls" method="dialog" autocomplete="off">{"".join(choices)}</form>'


def _choice(title: str, name: str, labels: Mapping[str, str]) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{escape(value)}"'
        f"{' checked' if index == 0 else ''}>{escape(label)}</label>"
        for index, (value, label) in enumerate(labels.items())
    )
    return f'<fieldset class="choose-{name}"><legend>{title}</legend>{buttons}</fieldset>'


# --- below --------------------------------------------------------------------------------------


def key(result: BackwardLensResult) -> str:
    """The meaning of tokens, colours and marks."""
    has_answer = any(
        int(length) < len(tokens)
        for length, tokens in zip(
            result.capture.prompt_lengths, result.capture.str_tokens, strict=True
        )
    )
    own = " of its position, the token below “should say”," if result.has_position_targets else ""
    entries = [
        "A cell shows the token with the highest or lowest score.",
        f"Colour: {SIZES['norm']} is the norm of the gradient at the matrix's output, how strongly "
        f"the loss acts on this position; {SIZES['write_norm']} is the norm of the term "
        "x_i<sup>T</sup>δ_i that the position adds to the gradient of the matrix.",
        f'<span class="lead">{LEADS}</span> the target{own} leads.',
        same_tokens_note(result.matrices),
        "The line between two columns is where the answer begins." if has_answer else "",
        f"{ADDS_NOTHING} adds nothing to this gradient.",
        f"Frequent tokens {RULE}; they tell little about a cell.",
        "<bdi><u> </u></bdi> a space; <bdi><i>⏎</i></bdi> a line break.",
    ]
    return f'<p class="key">{" ".join(filter(None, entries))}</p>'
