"""Figures of edits: scores of methods, least learning rates, and metrics against a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.run import Evaluation
from backward_lens_tl.views.figures.charts import (
    GREY,
    Axis,
    Line,
    Lines,
    floats,
    lines_by,
    style_at,
)
from backward_lens_tl.views.figures.drawing import Backend, draw
from backward_lens_tl.views.text import counted, number

if TYPE_CHECKING:
    import pandas as pd

_METRICS = ("efficacy", "paraphrase", "neighborhood")
_CURVES = (*_METRICS, "kept")
_DISTANCE = 0.18
"""Distance between the points of one method."""

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


def edit_scores(evaluation: Evaluation, *, backend: Backend = "plotly") -> Any:
    """Success and specificity of editing methods, in both definitions.

    Args:
        evaluation: What `evaluate` returned.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two charts with three points per method and their 95 % bootstrap intervals. On the left, how
        often the desired answer is the most probable one (the paper); on the right, how often it is
        more probable than the other answer (ROME). The desired answer of a neighbor is its own.

    Raises:
        EvaluationError: If it is not an evaluation, or has no records yet.
        InputError: If the backend does not exist.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> evaluation = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> figure = blt.figures.edit_scores(evaluation)
        >>> [title.text for title in figure.layout.annotations]
        ['Desired answer ranks first (paper)', 'Desired answer is more probable (ROME)']
    """
    if not isinstance(evaluation, Evaluation):
        raise EvaluationError(
            f"the evaluation is a {type(evaluation).__name__}; pass what evaluate returned"
        )
    summary = evaluation.summary()
    if summary.empty:
        raise EvaluationError("the evaluation has no records yet; run it first")
    charts = (
        _score_points(summary, "", "Desired answer ranks first (paper)"),
        _score_points(summary, "_success", "Desired answer is more probable (ROME)"),
    )
    return draw(backend, f"Edits of {counted(int(summary['records'].max()), 'record')}", *charts)


def least_rates(table: pd.DataFrame, *, backend: Backend = "plotly") -> Any:
    """Least learning rate of a successful edit by layer, and the perplexity after it (figure 24).

    Args:
        table: What `evaluation.least_rates_by_layer` returned.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        Two charts with a line per step: the median rate with a band between the quartiles, on a
        logarithmic axis, and the mean perplexity.

    Raises:
        InputError: If it is not such a table, or the backend does not exist.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.evaluation.rates import least_rates, least_rates_by_layer
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> config = blt.EvaluationConfig(n_texts=0)  # no perplexity
        >>> rates = least_rates(model, request, steps=["sgd"], config=config, progress=False)
        >>> figure = blt.figures.least_rates(least_rates_by_layer(rates, unedited=float("nan")))
        >>> figure.layout.title.text
        'Least learning rate of an edit in one step, 1 prompt'
    """
    checked_table(table, _RATE_COLUMNS, "what evaluation.least_rates_by_layer returned")
    band = ("rate_low", "rate_high")
    rates = lines_by(table, "step", "layer", "rate", _rate_hover, band=band)
    costs = lines_by(table, "step", "layer", "perplexity", _rate_hover)
    ends = floats((table["layer"].min(), table["layer"].max()))
    height = floats([table["unedited"].iloc[0]] * 2)
    unedited = Line("unedited", ends, height, GREY, dash="dot", marker=None)
    layers = Axis.counting("layer", table["layer"])
    title = (
        f"Least learning rate of an edit in one step, {counted(int(table['n'].max()), 'prompt')}"
    )
    return draw(
        backend,
        title,
        Lines(rates, layers, Axis("least learning rate, median", is_log=True)),
        Lines((*costs, unedited), layers, Axis("perplexity after the edit, mean")),
    )


def edit_curves(
    table: pd.DataFrame, along: str, *, title: str = "", backend: Backend = "plotly"
) -> Any:
    """Efficacy, paraphrase, neighborhood and kept neighbors of several methods against a number.

    Args:
        table: One row per `method` and value of `along`, with `efficacy`, `paraphrase`,
            `neighborhood` and `kept` in percent, as in `Evaluation.summary`.
        along: The column of the number, such as `"layer"` or `"edits_at_once"`.
        title: Title of the figure.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A chart per metric with a line per method.

    Raises:
        InputError: If it is not such a table, or the backend does not exist.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> methods = {
        ...     f"shift in layer {layer}": blt.editing.ForwardPassShift.paper(layer, 0.5)
        ...     for layer in (6, 7)
        ... }
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> found = blt.evaluate(model, "facts", out, methods, config, progress=False)
        >>> table = found.summary()[1:].assign(method="shift", layer=[6, 7])  # without "none"
        >>> figure = blt.figures.edit_curves(table, along="layer")
        >>> figure.layout.title.text, [line.name for line in figure.data]
        ('Edits by layer', ['shift', 'shift', 'shift', 'shift'])
    """
    checked_table(table, ("method", along, *_CURVES), "concatenated summaries of evaluations")
    name = along.replace("_", " ")
    x = Axis(name, is_log=along == "edits_at_once")
    if along == "layer":
        x = Axis.counting(name, table[along])
    charts = (
        Lines(lines_by(table, "method", along, metric, _metrics_hover), x, Axis(f"{metric}, %"))
        for metric in _CURVES
    )
    counts = "" if "records" not in table else counted(int(table["records"].max()), "record")
    return draw(backend, title or f"Edits by {name}", *charts, subtitle=counts)


def _score_points(summary: pd.DataFrame, suffix: str, title: str) -> Lines:
    """A point per method and metric, side by side, with a line from end to end of its interval."""
    methods = tuple(map(str, summary["method"]))
    lines = []
    for index, name in enumerate(_METRICS):
        metric, style = f"{name}{suffix}", style_at(index)
        places = [at + _DISTANCE * (index - 1) for at in range(len(methods))]
        points = Line.of_rows(
            name,
            summary.assign(place=places),
            "place",
            metric,
            partial(_score_hover, name, metric),
            dash=None,
            **style,
        )
        ends = summary[[f"{metric}_low", f"{metric}_high"]].to_numpy(float).tolist()
        interval = Line(
            name,
            tuple(place for place in places for _ in range(3)),
            tuple(chain.from_iterable((*pair, math.nan) for pair in ends)),
            style["color"],
            marker=None,
        )
        lines += [points, interval]
    return Lines(tuple(lines), Axis("", methods), Axis("prompts, in %"), title=title)


def _score_hover(name: str, metric: str, row: Mapping[Any, Any]) -> str:
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    return f"{row['method']}: {name}\n{row[metric]:.1f} ({low:.1f} to {high:.1f})"


def _rate_hover(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['step']}, layer {row['layer']}: {number(row['rate'])} "
        f"({number(row['rate_low'])} to {number(row['rate_high'])})\n"
        f"perplexity {number(row['perplexity'])}, not enough for {row['missing']} of {row['n']}"
    )


def _metrics_hover(row: Mapping[Any, Any]) -> str:
    return f"{row['method']}\n" + ", ".join(f"{name} {row[name]:.1f} %" for name in _CURVES)
