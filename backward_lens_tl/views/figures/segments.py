"""Figures of norms and ranks by segment of the prompt and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from backward_lens_tl._checks import check_choice, shown
from backward_lens_tl.analysis import by_segment
from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.data.segments import Subject
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.run import Sweep
from backward_lens_tl.views.figures.charts import Axis, Line, Lines
from backward_lens_tl.views.figures.drawing import (
    Backend,
    Scale,
    check_matrix,
    draw,
    is_log,
)
from backward_lens_tl.views.norms import Quantity, symbol
from backward_lens_tl.views.text import counted, number, running_text

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.analysis.tables import Source

_STYLES: dict[str, dict[str, str]] = {
    segment: {"color": color, "dash": dash, "marker": marker}
    for segment, color, dash, marker in (
        ("before subject", "#56b4e9", "dot", "circle"),
        ("first subject token", "#009e73", "dash", "square"),
        ("middle subject tokens", "#cc79a7", "dashdot", "diamond"),
        ("last subject token", "#d55e00", "solid", "triangle"),
        ("after subject", "#7a5c00", "dash", "cross"),
        ("template", "#7f7f7f", "dot", "circle"),
        ("system", "#56b4e9", "dash", "square"),
        ("developer", "#7a5c00", "dash", "cross"),
        ("user", "#009e73", "solid", "diamond"),
        ("assistant", "#d55e00", "solid", "triangle"),
        ("tool", "#cc79a7", "dashdot", "square"),
        ("last token", "#0072b2", "solid", "x"),
    )
}
"""Style of each segment; lines are solid for those that, in the paper, write most."""


_QUANTITIES: dict[str, Quantity] = {
    "vjp": "norm",
    "input": "input_norm",
    "write": "write_norm",
}


def norms_by_segment(
    source: Source,
    subject: Subject | Sequence[Subject] | None = None,
    matrix: str = "W_out",
    of: Literal["vjp", "input", "write"] = "vjp",
    *,
    scale: Scale = "linear",
    backend: Backend = "plotly",
) -> Any:
    """Mean norms by segment of the prompt and layer (paper, figures 6, 16 and 17).

    Args:
        source: A result, all of whose prompts count, a sweep, or the table that
            `analysis.norms_by_segment` returned for any number of prompts.
        subject: The subject of a result's prompts: one text or span for all, or one per prompt.
            Without it, the segments of chats are their turns.
        matrix: Name of the matrix.
        of: `"vjp"` for `||delta_i||_2`, `"input"` for `||x_i||_2`, or `"write"` for
            `||x_i|| ||delta_i||`, the norm of the term that a token writes into the matrix.
        scale: `"linear"`, or `"log"`, which leaves out zeros.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per segment: the mean in each layer over all analysed tokens of the segment in all
        prompts. Zeros count, such as all but one token in the last layer.

    Raises:
        InputError: If `source` is something else, the matrix, scale or backend does not exist, or a
            prompt lacks its subject.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.norms_by_segment(result, subject="Lionel Messi")
        >>> [line.name for line in figure.data]
        ['before subject', 'first subject token', 'middle subject tokens', 'last subject token',
        'after subject', 'last token']
    """
    check_choice("of", of, tuple(_QUANTITIES))
    analysis = by_segment.norms_by_segment
    quantity = _QUANTITIES[of]
    table = _table(source, subject, matrix, of, analysis, ("mean", "count"))
    if is_log(scale):
        table = table.assign(mean=table["mean"].where(table["mean"] > 0))
    lines = _lines(
        table,
        "mean",
        lambda row: (
            f"mean {symbol(quantity)}: {number(row['mean'])}, {counted(row['count'], 'token')}"
        ),
    )
    prompts = counted(int(table["prompts"].max()), "prompt")
    y = Axis(f"mean {symbol(quantity)}", is_log=is_log(scale))
    chart = Lines(lines, Axis.counting("layer", table["layer"]), y)
    title = f"{matrix}: {symbol(quantity)} by segment"
    return draw(backend, title, chart, subtitle=f"mean over the tokens of {prompts}")


def token_ranks_by_segment(
    source: Source,
    subject: Subject | Sequence[Subject] | None = None,
    matrix: str = "W_out",
    of: Literal["target", "answer"] = "target",
    projection: str | None = None,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Rank of a token in the vocabulary by segment and layer (paper, figures 7 and 18 to 21).

    Args:
        source: A result, all of whose prompts count, a sweep, or the table that
            `analysis.token_ranks_by_segment` returned for any number of prompts. With
            `direction="gradient"`, as in the paper, VJPs rank the target near the end of the
            vocabulary, which is easier to see with `scale="linear"`.
        subject: The subject of a result's prompts: one text or span for all, or one per prompt.
            Without it, the segments of chats are their turns.
        matrix: Name of the matrix.
        of: `"target"`, or `"answer"` for the model's own answer, which
            `backward_lens(..., measures=("answer_rank",))` ranks.
        projection: Name of the projection; by default the first one.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per segment at 1 + the median rank, with a band between the quartiles; a gap where
        every token adds nothing. The top of the vocabulary is at the top.

    Raises:
        InputError: If `source` is something else, the matrix, projection, scale or backend does not
            exist, a prompt lacks its subject, or the token has no ranks.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.token_ranks_by_segment(result, subject="Lionel Messi")
        >>> figure.layout.title.text
        'W_out: rank of the target by segment'
    """
    check_choice("of", of, ("target", "answer"))
    if isinstance(source, BackwardLensResult) and projection is not None:
        source = source.under(projection)
    quartiles = ("median", "lower_quartile", "upper_quartile")
    columns = ("projection", *quartiles, "count")
    table = _table(source, subject, matrix, of, by_segment.token_ranks_by_segment, columns)
    there = table["projection"].unique().tolist()
    name = there[0] if projection is None else projection
    check_choice("projection", name, there)
    table = table[table["projection"] == name]
    places = dict(zip(("place", "low", "high"), quartiles, strict=True))
    lines = _lines(
        table.assign(**{place: 1 + table[column] for place, column in places.items()}),
        "place",
        lambda row: (
            f"median rank {row['median']:g}, quartiles {row['lower_quartile']:g} and "
            f"{row['upper_quartile']:g}, of {counted(row['count'], 'token')}"
        ),
        band=("low", "high"),
    )
    token = "the target" if of == "target" else "the model's answer"
    if of == "target" and isinstance(source, BackwardLensResult) and source.has_position_targets:
        token = "each position's target"
    y = Axis(f"1 + rank of {token} (1: top token)", is_log=is_log(scale), is_reversed=True)
    chart = Lines(lines, Axis.counting("layer", table["layer"]), y)
    prompts = counted(int(table["prompts"].max()), "prompt")
    subtitle = f"median over the tokens of {prompts}, {running_text(name)}"
    return draw(backend, f"{matrix}: rank of {token} by segment", chart, subtitle=subtitle)


def _table(
    source: Source,
    subject: Subject | Sequence[Subject] | None,
    matrix: str,
    of: str,
    analysis: Callable[..., pd.DataFrame],
    columns: Sequence[str],
) -> pd.DataFrame:
    """The rows of an analysis for one matrix and one kind of vector or token."""
    origin = f"analysis.{analysis.__name__}"
    if isinstance(source, BackwardLensResult):
        source.readout(matrix)
        by_turn = subject is None and any(source.capture.turns)
        if subject is None and not by_turn:
            raise InputError("subject is None; pass a text, or one per prompt")
        return analysis(source.to_df(subject, matrix=matrix, turns=by_turn), of)
    found = analysis(source, of) if isinstance(source, Sweep) else source
    needed = ("matrix", "of", "layer", "segment", "prompts", *columns)
    table = checked_table(found, needed, f"a result, a sweep, or what {origin} returned")
    if subject is not None:
        raise InputError(
            f"subject is {shown(subject)}, but the table has its segments; leave subject out"
        )
    check_matrix(matrix, table)
    own = table[table["matrix"] == matrix]
    check_choice("of", of, own["of"].unique().tolist())
    return own[own["of"] == of]


def _lines(
    table: pd.DataFrame,
    y: str,
    hover: Callable[[Mapping[Any, Any]], str],
    band: tuple[str, str] | None = None,
) -> tuple[Line, ...]:
    """A line per segment, in the order of a prompt."""

    def text(row: Mapping[Any, Any]) -> str:
        return f"{row['segment']}, layer {row['layer']}\n{hover(row)}"

    there = set(table["segment"])
    return tuple(
        Line.of_rows(
            segment,
            table[table["segment"] == segment].sort_values("layer"),
            "layer",
            y,
            text,
            band=band,
            **style,
        )
        for segment, style in _STYLES.items()
        if segment in there
    )
