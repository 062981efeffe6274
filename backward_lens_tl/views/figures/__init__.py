"""The paper's figures, of a result or of a table that an analysis made of thousands of prompts.

Each function takes its numbers from a table of the result or of `backward_lens_tl.analysis`
(`layer_maps` from tensors) and returns a figure that nothing has shown: plotly's by default,
matplotlib's with `backend="matplotlib"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, listed, plain, shown
from backward_lens_tl.analysis import by_segment
from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.data.segments import Subject
from backward_lens_tl.errors import EvaluationError, InputError
from backward_lens_tl.evaluation import Evaluation
from backward_lens_tl.result import BackwardLensResult, check_result
from backward_lens_tl.views.appearance import running_text
from backward_lens_tl.views.figures import draw_matplotlib, draw_plotly
from backward_lens_tl.views.figures.charts import Colors, Grid, Heatmap, Lines, floats
from backward_lens_tl.views.figures.curves import CURVE_METRICS, metric_charts, rate_charts
from backward_lens_tl.views.figures.plots import (
    layer_map,
    norm_map,
    overlap_map,
    rank_charts,
    score_points,
    segment_norms,
    segment_ranks,
    shown_norms,
    similarity_map,
    spectrum_lines,
    step_points,
    target_lines,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "compare",
    "edit_curves",
    "edit_scores",
    "gradient_ranks",
    "layer_maps",
    "least_rates",
    "neuron_overlap",
    "neuron_similarity",
    "norms",
    "norms_by_segment",
    "ranks_by_segment",
    "singular_values",
    "step_changes",
    "target_ranks",
]

Backend = Literal["plotly", "matplotlib"]
Scale = Literal["log", "linear"]
_Rows = tuple[tuple[float, ...], ...]

_NORM = "norm of δ_i"
_GRADIENT_COLUMNS = ("prompt", "matrix", "layer", "n_tokens", "rank")
_NEURON_COLUMNS = (
    "neuron",
    "neuron_norm",
    "norm_rank",
    "position",
    "token",
    "similarity",
    "overlap",
)
_KINDS = ("efficacy", "paraphrase", "neighborhood")
_RATE_COLUMNS = (
    "step",
    "layer",
    "n",
    "missing",
    "rate",
    "rate_low",
    "rate_high",
    "perplexity",
    "unedited",
)
_STEP_COLUMNS = (
    "prompt",
    "matrix",
    "layer",
    "learning_rate",
    "loss_change",
    "predicted_loss_change",
)


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

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.norms(result)
        >>> figure.layout.title.text
        'W_out: how strongly each position writes → “Paris”'
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

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
        >>> result = blt.backward_lens(model, prompts, " Rome")
        >>> figure = blt.figures.compare(result, result, batch=(0, 1))
        >>> [heatmap.type for heatmap in figure.data]
        ['heatmap', 'heatmap']
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


def layer_maps(
    maps: Mapping[str, Float[Tensor, "layer pos"]],
    labels: Sequence[str],
    units: str | Sequence[str],
    *,
    columns: str = "token",
    rows: str = "layer",
    title: str = "",
    backend: Backend = "plotly",
) -> Any:
    """Any numbers by layer and position, a map above the other, so that their columns line up.

    For what other tools measure at the places that the lens speaks of: the tensors of
    `transformer_lens.patching`, say, beside attributions and norms. Heads may take the place of
    positions or of layers.

    Args:
        maps: What each map is called, and its numbers; row 0 is layer 0.
        labels: Text of each column: tokens, as in `GradientCapture.str_tokens`, or names of heads.
        units: What the numbers are: one text for all maps, or one for each. Maps of one unit share
            a scale of colours, from 0, or the same to both sides of it if a number is negative.
        columns: What the columns are.
        rows: What the rows are.
        title: What the figure shows.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap per map, the first one on top, each with the last layer on top; blank where a
        number is NaN.

    Raises:
        InputError: If there is no such backend or no map, something is no map of these columns or
            has infinite numbers, or there are neither one nor as many units as maps.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> measured = torch.tensor([[0.5, -1.0], [0.0, 0.25]])
        >>> maps = {"measured": measured, "predicted": 2 * measured}
        >>> figure = blt.figures.layer_maps(maps, ["Rome", " is"], "change of the loss, in nats")
        >>> figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax  # of both maps
        (-2.0, 2.0)
    """
    _check_drawing(backend)
    texts = [str(label) for label in listed(labels)]
    by_name = _map_rows(maps, len(texts))
    given = listed(units)
    named = given * len(by_name) if len(given) == 1 else given
    if len(named) != len(by_name):
        raise InputError(
            f"units is {shown(units)}; pass one for all {len(by_name)} maps, or one each"
        )
    numbers: dict[str, list[float]] = {}
    for unit, values in zip(named, by_name.values(), strict=True):
        numbers.setdefault(unit, []).extend(chain.from_iterable(values))
    colors = {unit: Colors.of_values(values, str(unit)) for unit, values in numbers.items()}
    charts = (
        layer_map(values, texts, (columns, rows), colors[unit], running_text(name))
        for unit, (name, values) in zip(named, by_name.items(), strict=True)
    )
    return _drawn(backend, title, *charts, is_stacked=True)


def norms_by_segment(
    source: BackwardLensResult | pd.DataFrame,
    subject: Subject | Sequence[Subject] | None = None,
    matrix: str = "W_out",
    of: Literal["vjp", "input"] = "vjp",
    *,
    scale: Scale = "linear",
    backend: Backend = "plotly",
) -> Any:
    """Which part of a prompt writes into which layer (paper, figures 6, 16 and 17).

    Args:
        source: A result, of which all prompts count, or the table that
            `analysis.norms_by_segment` made of any number of prompts.
        subject: What a result's prompts are about: one text or span for all, or one per prompt.
        matrix: Name of the matrix.
        of: `"vjp"` for `||delta_i||_2`, or `"input"` for `||x_i||_2`.
        scale: `"linear"`, or `"log"`, where zeros are left out.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per segment: the mean in each layer over all analysed tokens of the segment in all
        prompts. Zeros, as all but one in the last layer, are counted.

    Raises:
        InputError: If there is no such source, matrix, scale or backend, or a prompt lacks its
            subject.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.norms_by_segment(result, subject="Lionel Messi")
        >>> [line.name for line in figure.data]
        ['before subject', 'first subject token', 'middle subject tokens', 'last subject token',
        'after subject', 'last token']
    """
    _check_drawing(backend, scale)
    check_choice("of", of, ("vjp", "input"))
    _check_source(source, "analysis.norms_by_segment")
    if isinstance(source, BackwardLensResult):
        table = by_segment.norms_by_segment(_positions(source, subject, matrix), of)
    else:
        table = _chosen(source, subject, matrix, of, "norms_by_segment", ("mean", "count"))
    symbol = "δ_i" if of == "vjp" else "x_i"
    chart = segment_norms(table, symbol, is_log=scale == "log")
    title = f"{matrix}: mean norm of {symbol} by segment, {_prompts(int(table['prompts'].max()))}"
    return _drawn(backend, title, chart)


def ranks_by_segment(
    source: BackwardLensResult | pd.DataFrame,
    subject: Subject | Sequence[Subject] | None = None,
    matrix: str = "W_out",
    of: Literal["target", "answer"] = "target",
    projection: str | None = None,
    *,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """Where a token stands in the vocabulary, by segment and layer (figures 7 and 18 to 21).

    Args:
        source: A result, of which all prompts count, or the table that
            `analysis.ranks_by_segment` made of any number of prompts. With
            `direction="gradient"`, as in the paper, VJPs have the target at the far end of the
            vocabulary, which `scale="linear"` shows better.
        subject: What a result's prompts are about: one text or span for all, or one per prompt.
        matrix: Name of the matrix.
        of: `"target"`, or `"answer"` for the model's own, which
            `backward_lens(..., measures=("answer_rank",))` ranks.
        projection: Name of the projection; the first one by default.
        scale: `"log"` or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A line per segment at 1 + the median rank, with a band from the lower quartile to the upper;
        a gap where all cells add nothing. The top of the vocabulary is at the top.

    Raises:
        InputError: If there is no such source, matrix, projection, scale or backend, a prompt lacks
            its subject, or there is no rank of the token.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.ranks_by_segment(result, subject="Lionel Messi")
        >>> figure.layout.title.text
        'W_out: rank of the target by segment, 1 prompt, logit_lens'
    """
    _check_drawing(backend, scale)
    check_choice("of", of, ("target", "answer"))
    _check_source(source, "analysis.ranks_by_segment")
    if isinstance(source, BackwardLensResult):
        asked = source if projection is None else source.under(projection)
        table = by_segment.ranks_by_segment(_positions(asked, subject, matrix), of)
    else:
        columns = ("projection", "median", "lower_quartile", "upper_quartile", "count")
        table = _chosen(source, subject, matrix, of, "ranks_by_segment", columns)
    table, name = _under(table, projection)
    token = "the target" if of == "target" else "the model's answer"
    chart = segment_ranks(table, token, is_log=scale == "log")
    prompts = _prompts(int(table["prompts"].max()))
    return _drawn(backend, f"{matrix}: rank of {token} by segment, {prompts}, {name}", chart)


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

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.target_ranks(result)
        >>> [line.name for line in figure.data]
        ['0: &lt;|endoftext|&gt;', '1: Li', '2: onel', '3: Messi', '4: plays', '5: for']
    """
    _check(result, backend, scale)
    table = result.to_df(matrix=matrix, batch=batch)
    result.target_rank(matrix)  # says what to do where there is no target
    title = f"{matrix}: rank of the target by layer{_towards(result, batch)}"
    return _drawn(backend, title, target_lines(table, is_log=scale == "log"))


def gradient_ranks(
    source: BackwardLensResult | pd.DataFrame,
    matrices: str | Sequence[str] | None = None,
    *,
    backend: Backend = "plotly",
) -> Any:
    """The rank of each gradient against the length of its prompt (paper, figure 4).

    Lemma 4.1 bounds it by the line `rank = n`; the last layer has rank 1 if the loss is on the last
    token. `analysis.rank_exceptions` says why a point is elsewhere.

    Args:
        source: A result, of which all prompts count, or a table of gradients, as of
            `BackwardLensResult.gradient_df` or a sweep, of any number of prompts.
        matrices: One or more names; by default all that there are.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A chart per matrix, at most three in a row, with a point for each layer and prompt; layers
        that have the same ranks everywhere share their points. A matrix whose heads or experts have
        factors of their own has none.

    Raises:
        InputError: If there is no such source, matrix or backend.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.gradient_ranks(result, matrices="W_out")
        >>> [line.name for line in figure.data]
        ['rank = n', 'layers 0–6', 'layer 7']
    """
    import pandas as pd

    _check_drawing(backend)
    _check_source(source, "result.gradient_df")
    if isinstance(source, BackwardLensResult):
        names = _matrices(matrices, source.matrices)
        for name in names:
            source.readout(name)
        table = pd.concat([source.gradient_df(matrix=name) for name in dict.fromkeys(names)])
    else:
        checked_table(source, _GRADIENT_COLUMNS, "what result.gradient_df() returns")
        there = source["matrix"].unique().tolist()
        names = _matrices(matrices, there)
        for name in names:
            _check_there(name, there)
        table = source[source["matrix"].isin(names)]
    title = f"Rank of each layer's gradient, {_prompts(table['prompt'].nunique())}"
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

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.singular_values(result)
        >>> [len(line.y) for line in figure.data]
        [6, 6, 6, 6, 6, 6, 6, 1]
    """
    _check(result, backend)
    result.readout(matrix)
    result.target(batch)
    table = result.gradient_df(matrix=matrix, batch=batch)
    if table["rank"].isna().any():
        raise InputError(
            f"heads or experts of {matrix} have factors of their own, so it has no singular values "
            "as a whole; result.capture[matrix, layer] has .head(index) or .expert(index)"
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

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> figure = blt.figures.neuron_similarity(result, "W_out", layer=6)
        >>> figure.layout.title.text
        'W_out of layer 6: neurons of the gradient and the δ_i that span it'
    """
    _check(result, backend)
    chart = similarity_map(result.neuron_df(matrix, layer, batch))
    vectors = "x_i" if result.capture[matrix, result.layers[0]].reads_residual else "δ_i"
    own = result.layer_number(layer)
    title = f"{matrix} of layer {own}: neurons of the gradient and the {vectors} that span it"
    return _drawn(backend, title, chart)


def neuron_overlap(
    table: pd.DataFrame,
    matrix: str | None = None,
    layer: int | None = None,
    *,
    backend: Backend = "plotly",
) -> Any:
    """What a gradient's neurons share with the vectors that span it (paper, figures 8 to 10).

    Args:
        table: What `analysis.neuron_overlap` returned.
        matrix: Name of the matrix that it is of, for the title.
        layer: The layer that it is of, for the title.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two heatmaps, one above the other, with a column per neuron, the longest first, and a row
        per token of the prompt and for the zero vector: which part of their top tokens the two have
        in common, and their cosine, blank where one of them is zero.

    Raises:
        InputError: If it is no such table, or there is no such backend.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> table = blt.analysis.neuron_overlap(model, result, "W_out", layer=6, k=10)
        >>> figure = blt.figures.neuron_overlap(table, "W_out", layer=6)
        >>> [title.text for title in figure.layout.annotations]
        ['Overlap of the top tokens', 'Cosine similarity']
    """
    _check_drawing(backend)
    checked_table(table, _NEURON_COLUMNS, "what analysis.neuron_overlap returned")
    charts = (
        overlap_map(table, "Overlap of the top tokens"),
        similarity_map(table, "Cosine similarity"),
    )
    names = [] if matrix is None else [str(matrix)]
    names += [] if layer is None else [f"layer {layer}"]
    owner = f"{' of '.join(names)}: " if names else ""
    title = f"{owner}neurons of the gradient and what spans it"
    return _drawn(backend, title, *charts, is_stacked=True)


def step_changes(
    table: pd.DataFrame, *, scale: Scale = "linear", backend: Backend = "plotly"
) -> Any:
    """What a step of gradient descent changes of the loss, predicted and measured.

    Args:
        table: What `analysis.step_changes` returned, of any number of prompts.
        scale: `"linear"`, or `"log"` for decreases, where a step that raises the loss, or should,
            is left out.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A point per prompt, matrix, layer and learning rate, in a colour per matrix, and the line on
        which the two changes are equal. For small steps the prediction is right to first order.

    Raises:
        InputError: If it is no such table, or there is no such scale or backend.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> table = blt.analysis.step_changes(model, "Lionel Messi plays for", " Paris", layers=6)
        >>> figure = blt.figures.step_changes(table)
        >>> [points.name for points in figure.data]
        ['predicted = measured', 'W_in', 'W_out']
    """
    _check_drawing(backend, scale)
    checked_table(table, _STEP_COLUMNS, "what analysis.step_changes returned")
    prompts = _prompts(table["prompt"].nunique())
    title = f"One step on one matrix: change of the loss, {prompts}"
    return _drawn(backend, title, step_points(table, is_log=scale == "log"))


def edit_scores(evaluation: Evaluation, *, backend: Backend = "plotly") -> Any:
    """What methods of editing reach, and what they spare, in both definitions.

    Args:
        evaluation: What `evaluate` returned.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two charts with three points per method, and their 95 % bootstrap intervals: on the left how
        often the wanted answer is the most probable one (the paper), on the right how often it is
        more probable than the other (ROME). The wanted answer of a neighbor is its own.

    Raises:
        EvaluationError: If it is no evaluation, or nothing of it is written yet.
        InputError: If there is no such backend.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> evaluation = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> figure = blt.figures.edit_scores(evaluation)
        >>> [title.text for title in figure.layout.annotations]
        ['The wanted answer leads (paper)', 'The wanted answer is the likelier one (ROME)']
    """
    _check_drawing(backend)
    if not isinstance(evaluation, Evaluation):
        raise EvaluationError(
            f"the evaluation is a {type(evaluation).__name__}; pass what evaluate returned"
        )
    summary = evaluation.summary()
    if summary.empty:
        raise EvaluationError("the evaluation has no records yet; run it first")
    charts = (
        score_points(
            summary,
            {f"{kind}{suffix}": kind for kind in _KINDS},
            "prompts, in %",
            title,
        )
        for suffix, title in (
            ("", "The wanted answer leads (paper)"),
            ("_success", "The wanted answer is the likelier one (ROME)"),
        )
    )
    records = int(summary["records"].max())
    title = f"Edits of {records} record{'' if records == 1 else 's'}"
    return _drawn(backend, title, *charts)


def least_rates(table: pd.DataFrame, *, backend: Backend = "plotly") -> Any:
    """The least learning rate of a successful edit by layer, and the perplexity after it (fig 24).

    Args:
        table: What `evaluation.least_rates_by_layer` returned.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Medians of the rates with a band between the quartiles, and mean perplexities, a line per
        step.

    Raises:
        InputError: If it is no such table, or there is no such backend.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.evaluation import least_rates, least_rates_by_layer
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> config = blt.EvaluationConfig(n_texts=0)  # no perplexity
        >>> rates = least_rates(model, request, steps=["sgd"], config=config, progress=False)
        >>> figure = blt.figures.least_rates(least_rates_by_layer(rates, unedited=float("nan")))
        >>> figure.layout.title.text
        'Least learning rate of an edit in one step, 1 prompt'
    """
    _check_drawing(backend)
    checked_table(table, _RATE_COLUMNS, "what evaluation.least_rates_by_layer returned")
    title = f"Least learning rate of an edit in one step, {_prompts(int(table['n'].max()))}"
    return _drawn(backend, title, *rate_charts(table))


def edit_curves(
    table: pd.DataFrame, along: str, *, title: str = "", backend: Backend = "plotly"
) -> Any:
    """Efficacy, paraphrase and neighborhood of several methods along a number.

    Args:
        table: One row per `method` and value of `along`, with `efficacy`, `paraphrase` and
            `neighborhood` in percent, as `Evaluation.summary` has them.
        along: The column of the number, such as `"layer"` or `"edits_at_once"`.
        title: The figure's.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A chart per metric, a line per method.

    Raises:
        InputError: If it is no such table, or there is no such backend.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> methods = {
        ...     f"shift in layer {layer}": blt.editing.ForwardPassShift(layer=layer, size=0.5)
        ...     for layer in (6, 7)
        ... }
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> found = blt.evaluate(model, "facts", out, methods, config, progress=False)
        >>> table = found.summary()[1:].assign(method="shift", layer=[6, 7])  # without "none"
        >>> figure = blt.figures.edit_curves(table, along="layer")
        >>> figure.layout.title.text, [line.name for line in figure.data]
        ('Edits by layer', ['shift', 'shift', 'shift'])
    """
    _check_drawing(backend)
    columns = ("method", along, *CURVE_METRICS)
    checked_table(table, columns, "summaries of evaluations, one below the other")
    name = along.replace("_", " ")
    return _drawn(backend, title or f"Edits by {name}", *metric_charts(table, along, name))


# --- parts ---------------------------------------------------------------------------------------


def _check(result: object, backend: object, scale: object = "log") -> None:
    check_result(result)
    _check_drawing(backend, scale)


def _check_drawing(backend: object, scale: object = "log") -> None:
    check_choice("backend", backend, ("plotly", "matplotlib"))
    check_choice("scale", scale, ("log", "linear"))


def _check_source(source: object, origin: str) -> None:
    import pandas as pd

    if not isinstance(source, BackwardLensResult | pd.DataFrame):
        raise InputError(
            f"the source is a {type(source).__name__}; pass what backward_lens returned, or a "
            f"table of {origin}"
        )


def _positions(
    result: BackwardLensResult, subject: Subject | Sequence[Subject] | None, matrix: str
) -> pd.DataFrame:
    """The cells of one matrix, with their segments."""
    result.readout(matrix)
    if subject is None:
        raise InputError("subject is None; pass a text, or one per prompt")
    return result.to_df(subject, matrix=matrix)


def _chosen(
    table: pd.DataFrame,
    subject: object,
    matrix: str,
    of: str,
    analysis: str,
    columns: Sequence[str],
) -> pd.DataFrame:
    """The rows of an analysis that are about one matrix and one kind of vector or token."""
    if subject is not None:
        raise InputError(
            f"subject is {shown(subject)}, but the table has its segments; leave subject out"
        )
    needed = ("matrix", "of", "layer", "segment", "prompts", *columns)
    checked_table(table, needed, f"what analysis.{analysis} returned")
    _check_there(matrix, table["matrix"].unique().tolist())
    own = table[table["matrix"] == matrix]
    check_choice("of", of, own["of"].unique().tolist())
    return own[own["of"] == of]


def _under(table: pd.DataFrame, projection: str | None) -> tuple[pd.DataFrame, str]:
    """The rows of one projection, the first by default, and its name."""
    there = table["projection"].unique().tolist()
    name = there[0] if projection is None else projection
    check_choice("projection", name, there)
    return table[table["projection"] == name], name


def _matrices(asked: object, there: Sequence[str]) -> list[str]:
    names = list(there) if asked is None else listed(asked)
    if not names:
        raise InputError("no matrix was asked for; leave `matrices` out for all of them")
    return names


def _check_there(matrix: object, there: Sequence[str]) -> None:
    if matrix not in there:
        raise InputError(
            f"{shown(matrix)} is not in this table; it has {', '.join(there)}: name one of these "
            "as the matrix"
        )


def _norm_map(
    result: BackwardLensResult, batch: int, table: pd.DataFrame, colors: Colors, title: str = ""
) -> Heatmap:
    return norm_map(table, colors, len(result.capture.str_tokens[batch]), title)


def _map_rows(maps: object, width: int) -> dict[str, _Rows]:
    """The rows of each map, by what it is called."""
    if not isinstance(maps, Mapping) or not maps:
        found = "an empty" if isinstance(maps, Mapping) else "a"
        raise InputError(
            f"maps is {found} {type(maps).__name__}; pass a dict of tensors [layer, pos] by what "
            "they are called"
        )
    return {str(name): _checked_rows(str(name), values, width) for name, values in maps.items()}


def _checked_rows(name: str, values: object, width: int) -> _Rows:
    found = f"a {type(values).__name__}"
    if isinstance(values, Tensor):
        found = f"of shape {list(values.shape)}"
    if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != width:
        raise InputError(
            f"map {name!r} is {found}; pass a tensor [layer, pos] with a column for each of the "
            f"{width} labels"
        )
    if not values.numel() or bool(values.isinf().any()):
        raise InputError(
            f"map {name!r} {found} is empty or has infinite numbers; NaN is left blank"
        )
    return tuple(map(floats, plain(values)))


def _two(name: str, values: object) -> list[Any]:
    pair = listed(values)
    if len(pair) != 2:
        raise InputError(f"{name} is {values!r}; pass one for each of the two results")
    return pair


def _names(
    one: BackwardLensResult, other: BackwardLensResult, left: int, right: int
) -> tuple[str, str]:
    """What tells two prompts apart."""
    models = one.capture.model_name, other.capture.model_name
    prompts = (
        f"“{''.join(result.capture.str_tokens[batch])}”{_towards(result, batch)}"
        for result, batch in ((one, left), (other, right))
    )
    first, second = prompts
    if models[0] == models[1]:
        return first, second
    return f"{models[0]}: {first}", f"{models[1]}: {second}"


def _towards(result: BackwardLensResult, batch: int) -> str:
    target = result.target(batch)
    return "" if target is None else f" → “{running_text(target).strip()}”"


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _drawn(backend: str, title: str, *charts: Heatmap | Lines, is_stacked: bool = False) -> Any:
    # Only the one that draws imports its library.
    drawing = draw_plotly if backend == "plotly" else draw_matplotlib
    return drawing.draw(Grid(charts, title, is_stacked))
