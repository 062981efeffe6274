"""A result in CircuitsVis's widgets: norms, top tokens, quantities by token, Reversed Attention.

Each function returns CircuitsVis's own object, which a notebook shows; `page` puts several into one
document. None of them needs a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch

from backward_lens_tl._checks import listed
from backward_lens_tl.errors import InputError
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.text import faint_note, number, running_text
from backward_lens_tl.views.widgets import embedding
from backward_lens_tl.views.widgets.embedding import Widget, embedded, literal
from backward_lens_tl.views.widgets.library import JavaScript
from backward_lens_tl.views.widgets.ranking import (
    INFINITE,
    rank_cells,
    rank_prompt,
    shown_at_either_end,
)
from backward_lens_tl.views.widgets.scales import number_below, power_for_decimals

__all__ = [
    "javascript",
    "norms",
    "page",
    "quantities",
    "reversed_attention",
    "top_tokens",
]

# Okabe and Ito's blue and vermilion, apart for every kind of colour blindness.
_POSITIVE, _NEGATIVE = "#0072b2", "#d55e00"

_NO_RANK = -1.0
_COLUMNS = 5
"""Columns that CircuitsVis's table begins with, whether there are as many or not."""

_LONGEST = 24
"""Characters of a token beside the attention map, where longer ones leave no room for it."""


def norms(result: BackwardLensResult, matrix: str = "W_out", batch: int = 0) -> Widget:
    """`||delta_i||_2` of every token, one button per layer.

    CircuitsVis shows six decimals. Where that is not enough, all numbers are divided by one power
    of ten, which every label names.

    Args:
        result: What to show.
        matrix: Name of the matrix.
        batch: Which prompt.

    Returns:
        The widget; one scale of colours for all layers.

    Raises:
        InputError: If there is no such result, or the matrix or the prompt is not in it.
        WidgetError: If the installed circuitsvis is not as known.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.norms(result)
        <ColoredTokensMulti of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    from circuitsvis.tokens import colored_tokens_multi

    check_result(result)
    rows = [result.cells(matrix, layer, batch) for layer in result.layers]
    values = [[cell.norm for cell in row] for row in rows]
    power = power_for_decimals(norm for row in values for norm in row)
    times = f" (×1e{power})" if power else ""
    scaled = torch.tensor(values, dtype=torch.float64).T / 10.0**power
    rendered = colored_tokens_multi(
        [literal(cell.token) for cell in rows[0]],
        scaled,
        [f"layer {layer}{times}" for layer in result.layers],
    )
    # Left alone, it keeps the first layer's scale when another layer is chosen.
    bound = float(scaled.max()) or 1.0
    caption = (
        f"<b>{matrix}</b>: norm of δ_i at each token{_of_prompt(result, batch)}, by layer. The "
        "fullest blue is the largest norm of all layers; point at a token for its numbers."
        f"{_only(result, batch, rows[0])}"
    )
    bounds = [bound] * len(result.layers)
    return embedded(
        rendered, caption, positiveBounds=bounds, negativeBounds=[-bound for bound in bounds]
    )


def top_tokens(
    result: BackwardLensResult, batch: int = 0, matrices: str | Sequence[str] | None = None
) -> Widget:
    """The most and least promoted tokens of every matrix, layer and position.

    CircuitsVis colours scores from 0 to 1. Those of a matrix are divided by a round number that
    brings them there, which the matrix's label names. An infinite score is shown as 10 or -10, and
    the caption says so.

    Args:
        result: What to show.
        batch: Which prompt.
        matrices: Names of the matrices; by default all.

    Returns:
        The widget; the samples are the matrices, and the columns the analysed positions.

    Raises:
        InputError: If there is no such result, a matrix or the prompt is not in it, or no matrix is
            named.
        WidgetError: If the installed circuitsvis is not as known.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.top_tokens(result, matrices="W_out")
        <TopkTokens of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    from circuitsvis.topk_tokens import topk_tokens

    check_result(result)
    names = list(result.matrices) if matrices is None else listed(matrices)
    if not names:
        raise InputError(f"matrices is {matrices!r}; pass some of {', '.join(result.matrices)}")
    cells = {name: [result.cells(name, layer, batch) for layer in result.layers] for name in names}
    every = [cell for rows in cells.values() for row in rows for cell in row]
    shown = next(iter(cells.values()))[0]
    k, width = shown_at_either_end(every), max(len(shown), _COLUMNS)
    samples, has_infinite = {}, False
    for name, rows in cells.items():
        ranking = rank_cells(rows, k, width)
        label = name if ranking.factor == 1 else f"{name} (score ×{ranking.factor:g})"
        samples[label] = ranking.words, ranking.scores
        has_infinite |= ranking.has_infinite
    if len(samples) == 1:
        # With one sample alone, it shows the first column only.
        prompt = rank_prompt([cell.token for cell in shown], len(result.layers), k, width)
        samples["the prompt's tokens"] = prompt.words, prompt.scores
    positions = [cell.position for cell in shown]
    complete = positions == list(range(len(positions)))
    rendered = topk_tokens(
        [words for words, _ in samples.values()],
        [scores.numpy() for _, scores in samples.values()],
        max_k=k,
        third_dimension_name="Position" if complete else "Column",
        sample_labels=list(samples),
        first_dimension_labels=[str(layer) for layer in result.layers],
    )
    legend = ", ".join(
        f"{column} {_quoted(cell.token)}" + ("" if complete else f" (position {cell.position})")
        for column, cell in enumerate(shown)
    )
    caption = (
        f"<b>{', '.join(cells)}</b>: the {k} most and least promoted tokens"
        f"{_of_prompt(result, batch)} ({_reading(result)}). Blue is a large score, and white "
        "one of 0 or less; point at a token for its score.<br>"
        f"{'Positions' if complete else 'Columns'}: {legend}"
    )
    if has_infinite:
        caption += f"<br>A score of ∞ or −∞ is shown as {INFINITE:g} or −{INFINITE:g}."
    faint = faint_note([every], result.faint_norm)
    if faint:
        caption += f"<br>{escape(faint)}"
    return embedded(rendered, caption)


def quantities(result: BackwardLensResult, matrix: str = "W_out", batch: int = 0) -> Widget:
    """Four quantities of every token and layer, each on a scale of its own.

    They are the norms of `delta_i` and `x_i`, the rank of the target, if there is one, and the top
    score. Where a position adds nothing it has no rank and no score: it has a negative number that
    no other position has, in full red. A top score that is infinite is shown as a power of ten
    beyond all others, which the quantity's name tells.

    Args:
        result: What to show.
        matrix: Name of the matrix.
        batch: Which prompt.

    Returns:
        The widget.

    Raises:
        InputError: If there is no such result, or the matrix or the prompt is not in it.
        WidgetError: If the installed circuitsvis is not as known.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> blt.widgets.quantities(result)
        <TextNeuronActivations of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    from circuitsvis.activations import text_neuron_activations

    check_result(result)
    rows = [result.cells(matrix, layer, batch) for layer in result.layers]
    cells = [cell for row in rows for cell in row]
    by_name = {
        "norm of δ_i": [cell.norm for cell in cells],
        "norm of x_i": [cell.input_norm for cell in cells],
    }
    target = result.target(batch)
    if target is not None:
        by_name[f"rank of {literal(target)} (0 leads, {_NO_RANK:g}: no rank)"] = [
            _NO_RANK if cell.target_rank is None else float(cell.target_rank) for cell in cells
        ]
    name, scores = _top_scores(cells)
    by_name[name] = scores
    values = torch.tensor(list(by_name.values()), dtype=torch.float64)
    rendered = text_neuron_activations(
        [literal(cell.token) for cell in rows[0]],
        values.reshape(len(by_name), len(rows), len(rows[0])).permute(2, 1, 0),
        second_dimension_name="Quantity",
        first_dimension_labels=[str(layer) for layer in result.layers],
        second_dimension_labels=list(by_name),
    )
    caption = (
        f"<b>{matrix}</b>: one quantity of one layer at each token{_of_prompt(result, batch)} "
        f"({_reading(result)}). Blue is positive and red negative, full at the layer's largest; "
        f"point at a token for its number.{_only(result, batch, rows[0])}"
    )
    return embedded(rendered, caption)


def reversed_attention(result: BackwardLensResult, layer: int, batch: int = 0) -> Widget:
    """Reversed Attention of every head of a layer, from destination to source tokens.

    Args:
        result: What to show.
        layer: A layer of the model, or a negative index into the analysed layers.
        batch: Which prompt.

    Returns:
        The widget; one scale of colours for all heads, the same to both sides of 0.

    Raises:
        InputError: If there is no such result, layer or prompt, or no attention matrix of the layer
            was asked for.
        WidgetError: If the installed circuitsvis is not as known.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="attn")
        >>> blt.widgets.reversed_attention(result, layer=5)
        <AttentionHeads of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    from circuitsvis.attention import attention_heads

    check_result(result)
    described = _of_prompt(result, batch)
    maps = result.reversed_attention(layer)[batch]
    index = result.layer_number(layer)
    tokens = result.capture.str_tokens[batch]
    maps = maps[:, : len(tokens), : len(tokens)].detach().to("cpu", torch.float64)
    bound = float(maps.abs().max())
    rendered = attention_heads(
        maps,
        [_axis_label(token) for token in tokens],
        [f"L{index}H{head}" for head in range(len(maps))],
        max_value=bound or 1.0,
        min_value=-(bound or 1.0),
        negative_color=_NEGATIVE,
        positive_color=_POSITIVE,
        mask_upper_tri=not bool(maps.triu(1).any()),
    )
    caption = (
        f"<b>Reversed Attention of layer {index}</b>{described}: where the backward pass attends. "
        "Blue: a larger attention score there raises the objective; orange: it lowers it. Both are "
        f"full at {number(bound)}, the largest of all heads."
    )
    return embedded(rendered, caption)


def page(*widgets: Widget, title: str = "Backward Lens") -> str:
    """Several widgets as one document, with their JavaScript once.

    Args:
        *widgets: The widgets, from the top of the page.
        title: Title and heading of the page.

    Returns:
        An HTML document that fetches nothing.

    Raises:
        InputError: If there is no widget, or something is none.
        WidgetError: If the installed circuitsvis is not as known.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> widgets = [blt.widgets.norms(result), blt.widgets.quantities(result)]
        >>> html = blt.widgets.page(*widgets, title="Messi")
        >>> html.count("<section>"), "<h1>Messi</h1>" in html
        (2, True)
    """
    return embedding.page(widgets, running_text(title))


def javascript() -> JavaScript:
    """The JavaScript of all widgets, for a notebook whose first widget is gone.

    Returns:
        An object that a notebook shows; the widgets of that page come to life.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.widgets.javascript()
        JavaScript(CircuitsVis, shown in a notebook cell)
    """
    return JavaScript()


# --- numbers ------------------------------------------------------------------------------------


def _top_scores(cells: Sequence[Cell]) -> tuple[str, list[float]]:
    """The top score of each cell as a finite number, and what they are called."""
    scores = [cell.top[0].score if cell.top else None for cell in cells]
    there = [score for score in scores if score is not None]
    no_score = number_below(there)
    stand_ins = {math.inf: -number_below(-score for score in there), -math.inf: 10 * no_score}
    said = [f"{no_score:g}: no score"]
    said += [
        f"{stand_in:g}: {'∞' if infinite > 0 else '−∞'}"
        for infinite, stand_in in stand_ins.items()
        if infinite in there
    ]
    shown = [no_score if score is None else stand_ins.get(score, score) for score in scores]
    return f"top score ({', '.join(said)})", shown


# --- texts --------------------------------------------------------------------------------------


def _quoted(token: str) -> str:
    return f"<q><bdi>{escape(literal(token))}</bdi></q>"


def _of_prompt(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    prompt = f" of prompt {batch}" if len(result.positions) > 1 else ""
    return prompt if target is None else f"{prompt}, target {_quoted(target)}"


def _only(result: BackwardLensResult, batch: int, cells: Sequence[Cell]) -> str:
    """Which positions are shown, where these are not all of the prompt's."""
    length = len(result.capture.str_tokens[batch])
    if [cell.position for cell in cells] == list(range(length)):
        return ""
    shown = ", ".join(f"{cell.position} {_quoted(cell.token)}" for cell in cells)
    return f"<br>Of the prompt's {length} positions these were analysed: {shown}"


def _reading(result: BackwardLensResult) -> str:
    return escape(f"{running_text(result.projection)}, {result.direction}")


def _axis_label(token: str) -> str:
    """Short, and apart from the index behind it where the token is read from right to left."""
    text = literal(token)
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f"\u2068{short}\u2069"
