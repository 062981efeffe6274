"""The paper's figures, of one result or two.

Each function takes its numbers from a table of the result and returns a figure that nothing has
shown: plotly's by default, matplotlib's with `backend="matplotlib"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from backward_lens_tl.arguments import check_choice, listed
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.appearance import running_text
from backward_lens_tl.views.figures import draw_matplotlib, draw_plotly
from backward_lens_tl.views.figures.charts import Colors, Grid, Heatmap, Lines
from backward_lens_tl.views.figures.plots import (
    norm_map,
    rank_charts,
    segment_lines,
    shown_norms,
    similarity_map,
    spectrum_lines,
    target_lines,
)

if TYPE_CHECKING:
    import pandas as pd

Backend = Literal["plotly", "matplotlib"]
Scale = Literal["log", "linear"]

_NORM = "norm of δ_i"


def norms(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """How strongly each position writes into each layer: the colours of the paper's figure 5.

    Args:
        result: What to show.
        matrix: Name of the matrix.
        batch: Which prompt.
        scale: `"log"` for three decades at most, as in the layers x tokens table, or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap of `||delta_i||_2`, the last layer on top; blank where a position adds nothing.
        Tokens have their position behind them where not all of the prompt's were analysed.

    Raises:
        InputError: If there is no such result, matrix, prompt, scale or backend.
    """
    _check(result, backend, scale)
    table = result.to_df(matrix=matrix, batch=batch)
    colors = Colors.of_norms(shown_norms(table), _NORM, scale == "log")
    title = f"{matrix}: how strongly each position writes{_towards(result, batch)}"
    return _drawn(backend, title, _norm_map(result, batch, table, colors))


def compare(
    one: BackwardLensResult,
    other: BackwardLensResult,
    matrix: str = "W_out",
    batch: tuple[int, int] = (0, 0),
    names: tuple[str, str] | None = None,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Two prompts, or two models, side by side, with one scale of colours.

    Args:
        one: The result on the left.
        other: The result on the right; it may be the same one.
        matrix: Name of the matrix.
        batch: Which prompt of each.
        names: What the two are called; by default their prompts, with the models where those
            differ.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two heatmaps, each like that of `norms`.

    Raises:
        InputError: If there is no such result, matrix, prompt, scale or backend, or there are not
            two prompts and two names.
    """
    _check(one, backend, scale)
    check_result(other)
    left, right = _two("batch", batch)
    tables = [one.to_df(matrix=matrix, batch=left), other.to_df(matrix=matrix, batch=right)]
    titles = _names(one, other, left, right) if names is None else _two("names", names)
    together = [norm for table in tables for norm in shown_norms(table)]
    colors = Colors.of_norms(together, _NORM, scale == "log")
    maps = (
        _norm_map(result, prompt, table, colors, running_text(str(title)))
        for result, prompt, table, title in zip(
            (one, other), (left, right), tables, titles, strict=True
        )
    )
    return _drawn(backend, f"{matrix}: how strongly each position writes", *maps)


def norms_by_segment(
    result: BackwardLensResult,
    subject: str | Sequence[str],
    matrix: str = "W_out",
    of: Literal["vjp", "input"] = "vjp",
    *,
    scale: Scale = "linear",
    backend: Backend = "plotly",
) -> Any:
    """Which part of a prompt writes into which layer (paper, figures 6, 16 and 17).

    Args:
        result: What to show; all of its prompts count.
        subject: What the prompts are about: one text for all, or one per prompt.
        matrix: Name of the matrix.
        of: `"vjp"` for `||delta_i||_2`, or `"input"` for `||x_i||_2`.
        scale: `"linear"`, or `"log"`, where zeros are left out.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per segment: the mean in each layer over all analysed tokens of the segment in all
        prompts. Zeros, as all but one in the last layer, are counted.

    Raises:
        InputError: If there is no such result, matrix, scale or backend, or a prompt lacks its
            subject.
    """
    _check(result, backend, scale)
    check_choice("of", of, ("vjp", "input"))
    result.readout(matrix)
    if subject is None:
        raise InputError("subject is None; pass a text, or one per prompt")
    column, symbol = ("norm", "δ_i") if of == "vjp" else ("input_norm", "x_i")
    table = result.to_df(subject, matrix=matrix)
    chart = segment_lines(table, column, symbol, is_log=scale == "log")
    title = f"{matrix}: mean norm of {symbol} by segment, {_prompts(result)}"
    return _drawn(backend, title, chart)


def target_ranks(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Where the target stands in the vocabulary, layer by layer (paper, figures 7 and 18 to 21).

    Args:
        result: What to show. With `direction="gradient"`, as in the paper, VJPs have the target at
            the far end of the vocabulary, which `scale="linear"` shows better.
        matrix: Name of the matrix.
        batch: Which prompt.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per token of the prompt, at 1 + rank, so that a logarithmic axis has a place for the
        top token; a gap where a position adds nothing. The top of the vocabulary is at the top.

    Raises:
        InputError: If there is no target, or no such result, matrix, prompt, scale or backend.
    """
    _check(result, backend, scale)
    table = result.to_df(matrix=matrix, batch=batch)
    result.target_rank(matrix)  # says what to do where there is no target
    title = f"{matrix}: rank of the target by layer{_towards(result, batch)}"
    return _drawn(backend, title, target_lines(table, is_log=scale == "log"))


def gradient_ranks(
    result: BackwardLensResult,
    matrices: str | Sequence[str] | None = None,
    *,
    backend: Backend = "plotly",
) -> Any:
    """The rank of each gradient against the length of its prompt (paper, figure 4).

    Lemma 4.1 bounds it by the line `rank = n`; the last layer has rank 1 if the loss is on the last
    token.

    Args:
        result: What to show; all of its prompts count.
        matrices: One or more names; by default all in the result.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A chart per matrix, at most three in a row, with a point for each layer and prompt; layers
        that have the same ranks everywhere share their points. A matrix whose heads or experts have
        factors of their own has none.

    Raises:
        InputError: If there is no such result, matrix or backend.
    """
    import pandas as pd

    _check(result, backend)
    names = list(result.matrices) if matrices is None else listed(matrices)
    if not names:
        raise InputError("no matrix was asked for; leave `matrices` out for all of them")
    for name in names:
        result.readout(name)
    table = pd.concat([result.gradient_df(matrix=name) for name in dict.fromkeys(names)])
    title = f"Rank of each layer's gradient, {_prompts(result)}"
    return _drawn(backend, title, *rank_charts(table, names))


def singular_values(
    result: BackwardLensResult,
    matrix: str = "W_out",
    batch: int = 0,
    *,
    backend: Backend = "plotly",
) -> Any:
    """The singular values of each layer's gradient, of which there are as many as its rank.

    Args:
        result: What to show.
        matrix: Name of the matrix.
        batch: Which prompt.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per layer, largest value first, on a logarithmic axis.

    Raises:
        InputError: If there is no such result, matrix, prompt or backend, or heads or experts have
            factors of their own.
    """
    _check(result, backend)
    result.readout(matrix)
    result.target(batch)
    table = result.gradient_df(matrix=matrix, batch=batch)
    if table["rank"].isna().any():
        raise InputError(
            f"heads or experts of {matrix} have factors of their own, so it has no singular values "
            "as a whole; result.gradients[matrix, layer] has .head(index) or .expert(index)"
        )
    title = f"{matrix}: singular values of the gradient{_towards(result, batch)}"
    return _drawn(backend, title, spectrum_lines(table))


def neuron_similarity(
    result: BackwardLensResult,
    matrix: str,
    layer: int,
    batch: int = 0,
    *,
    backend: Backend = "plotly",
) -> Any:
    """How much each neuron of a gradient is one of the vectors that span it (figures 8 to 10).

    Args:
        result: What to show.
        matrix: Name of the matrix.
        layer: A layer of the model, or a negative index into the analysed layers.
        batch: Which prompt.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap of cosines: a column per neuron, the longest first, and a row per token of the
        prompt. Blank where the neuron or the vector is zero.

    Raises:
        InputError: If there is no such result, matrix, layer, prompt or backend, or heads or
            experts have factors of their own.
    """
    _check(result, backend)
    chart = similarity_map(result.neuron_df(matrix, layer, batch))
    vectors = "x_i" if result.gradients[matrix, result.layers[0]].reads_residual else "δ_i"
    own = result.layer_number(layer)
    title = f"{matrix} of layer {own}: neurons of the gradient and the {vectors} that span it"
    return _drawn(backend, title, chart)


# --- parts ---------------------------------------------------------------------------------------


def _check(result: object, backend: object, scale: object = "log") -> None:
    check_result(result)
    check_choice("backend", backend, ("plotly", "matplotlib"))
    check_choice("scale", scale, ("log", "linear"))


def _norm_map(
    result: BackwardLensResult, batch: int, table: pd.DataFrame, colors: Colors, title: str = ""
) -> Heatmap:
    return norm_map(table, colors, len(result.gradients.str_tokens[batch]), title)


def _two(name: str, values: object) -> list[Any]:
    pair = listed(values)
    if len(pair) != 2:
        raise InputError(f"{name} is {values!r}; pass one for each of the two results")
    return pair


def _names(
    one: BackwardLensResult, other: BackwardLensResult, left: int, right: int
) -> tuple[str, str]:
    """What tells two prompts apart."""
    models = one.gradients.model_name, other.gradients.model_name
    prompts = (
        f"“{''.join(result.gradients.str_tokens[batch])}”{_towards(result, batch)}"
        for result, batch in ((one, left), (other, right))
    )
    first, second = prompts
    if models[0] == models[1]:
        return first, second
    return f"{models[0]}: {first}", f"{models[1]}: {second}"


def _towards(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    return "" if target is None else f" → “{running_text(target).strip()}”"


def _prompts(result: BackwardLensResult) -> str:
    count = len(result.gradients.str_tokens)
    return "1 prompt" if count == 1 else f"{count} prompts"


def _drawn(backend: str, title: str, *charts: Heatmap | Lines) -> Any:
    # Only the one that draws imports its library.
    drawing = draw_plotly if backend == "plotly" else draw_matplotlib
    return drawing.draw(Grid(charts, title))
