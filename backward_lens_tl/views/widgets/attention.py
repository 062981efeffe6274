"""The widget of Reversed Attention."""

from __future__ import annotations

from backward_lens_tl._checks import truncated
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.colors import BLUE, VERMILION
from backward_lens_tl.views.prompts import answer_start
from backward_lens_tl.views.text import number
from backward_lens_tl.views.widgets.captions import prompt_line, quoted
from backward_lens_tl.views.widgets.widget import Widget, literal, make_widget

_LONGEST = 24
"""Characters of a token next to the map; longer ones leave no room for it."""


def reversed_attention(result: BackwardLensResult, layer: int, batch: int = 0) -> Widget:
    """Reversed Attention of every head of a layer, from destination to source tokens.

    Args:
        result: The result to show.
        layer: The layer, negative from the end of the model.
        batch: Index of the prompt.

    Returns:
        The widget, with one colour scale for all heads, symmetric around 0.

    Raises:
        InputError: If `result` is not a result, the layer or prompt does not exist, or none of the
            layer's attention matrices was analysed.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="attn")
        >>> blt.widgets.reversed_attention(result, layer=5)
        <AttentionHeads of CircuitsVis, shown in a notebook; str() is its HTML>
    """
    check_result(result)
    described = prompt_line(result, batch)
    index = result.capture.layer_number(layer)
    maps = result.capture.reversed_attention(index)[batch]
    tokens = result.capture.str_tokens[batch]
    maps = maps[:, : len(tokens), : len(tokens)].detach().cpu().double()
    largest = float(maps.abs().max())
    start = answer_start(result, batch, range(len(tokens)))
    answer = (
        "" if start is None else f" The answer begins at position {start}, {quoted(tokens[start])}."
    )
    caption = (
        f"<b>Reversed Attention of layer {index}</b>: where the backward pass attends."
        f"{described}{answer}<br>Blue: a larger attention score there raises the objective; "
        f"orange: it lowers it. Both are darkest at {number(largest)}, the largest of all heads."
    )
    return make_widget(
        "AttentionHeads",
        caption,
        attention=maps.tolist(),
        attentionHeadNames=[f"L{index}H{head}" for head in range(len(maps))],
        maxValue=largest or 1.0,
        minValue=-(largest or 1.0),
        negativeColor=VERMILION,
        positiveColor=BLUE,
        # Isolated from the index after a token that is read from right to left.
        tokens=[f"\u2068{truncated(literal(token), _LONGEST)}\u2069" for token in tokens],
        maskUpperTri=not bool(maps.triu(1).any()),
    )
