"""The figure of the target's rank from layer to layer."""

from __future__ import annotations

from typing import Any

from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.colors import Colors
from backward_lens_tl.views.figures.charts import MOST_NAMES, Axis, Line, Lines, marker_at
from backward_lens_tl.views.figures.drawing import (
    Backend,
    Scale,
    draw,
    is_log,
    token_label,
    token_text,
    tokens_of,
)
from backward_lens_tl.views.prompts import prompt_title


def target_ranks(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Rank of the target in the vocabulary, layer by layer (paper, figures 7 and 18 to 21).

    Args:
        result: The result to plot. With `direction="gradient"`, as in the paper, VJPs rank the
            target near the end of the vocabulary, which is easier to see with `scale="linear"`.
        matrix: Name of the matrix.
        batch: Index of the prompt.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per token of the prompt, at 1 + rank so that a logarithmic axis can show the top
        token; a gap where a position adds nothing. The top of the vocabulary is at the top. With an
        objective over several positions, each token is followed by its own target.

    Raises:
        InputError: If `result` is not a result or has no target, or the matrix, prompt, scale or
            backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.target_ranks(result)
        >>> [line.name for line in figure.data]
        ['0: &lt;|endoftext|&gt;', '1: Li', '2: onel', '3: Messi', '4: plays', '5: for']
    """
    check_result(result)
    table = result.to_df(matrix=matrix, batch=batch).drop_duplicates(["layer", "position"])
    result.target_rank(matrix)  # its error says what to do without a target
    table = table.assign(place=1 + table["target_rank"].astype("float64"))
    tokens, names = tokens_of(table), _names(result, batch)
    last, many = len(tokens) - 1, len(tokens) > MOST_NAMES
    # The loss of an answer is read from the prompt's last token on.
    first_read = min(int(result.capture.prompt_lengths[batch]) - 1, max(tokens))
    colors = Colors.of_order(list(tokens), "position in the prompt")
    lines = tuple(
        Line.of_rows(
            names[position],
            table[table["position"] == position].sort_values("layer"),
            "layer",
            "place",
            lambda row: (
                f"{token_text(row['token'])} at {row['position']}, layer {row['layer']}\n"
                f"rank {row['place'] - 1:.0f} of {token_text(str(row['target']))}"
            ),
            color=colors.at(position),
            # Of many lines only those that the loss is read from stand out.
            marker=marker_at(last - index) if position >= first_read or not many else None,
            width=3.0 if position >= first_read else 0.8 if many else 1.4,
        )
        for index, (position, token) in enumerate(tokens.items())
    )
    ranks = Axis("1 + rank of the target (1: top token)", is_log=is_log(scale), is_reversed=True)
    layers = Axis.counting("layer", table["layer"])
    whose = "each position's" if result.has_position_targets else "the"
    chart = Lines(lines, layers, ranks, colors if many else None)
    title = f"{matrix}: rank of {whose} target by layer"
    return draw(backend, title, chart, subtitle=prompt_title(result, batch))


def _names(result: BackwardLensResult, batch: int) -> dict[int, str]:
    """The name of each position's line: its token and, if targets differ, its target."""
    tokens = result.capture.str_tokens[batch]
    positions = (place for place in result.positions[batch].tolist() if place >= 0)
    names = {}
    for position, target in zip(positions, result.position_targets(batch), strict=True):
        names[position] = f"{position}: {token_label(tokens[position])}"
        if result.has_position_targets and target is not None:
            names[position] += f" → {token_label(target)}"
    return names
