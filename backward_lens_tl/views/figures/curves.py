"""Figures of edits that have several sizes: rates by layer, and metrics along anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backward_lens_tl.views.appearance import number
from backward_lens_tl.views.figures.charts import (
    CATEGORICAL,
    MARKERS,
    Axis,
    Line,
    Lines,
    counting,
    floats,
    in_turn,
)

if TYPE_CHECKING:
    import pandas as pd

CURVE_METRICS = ("efficacy", "paraphrase", "neighborhood")
"""What curves of edits show, each in percent."""


def rate_charts(table: pd.DataFrame) -> tuple[Lines, Lines]:
    """The least rate by layer, and what it costs.

    Args:
        table: What `least_rates_by_layer` returns.

    Returns:
        Two charts with a line per step: the median rate with its quartiles, on a logarithmic axis,
        and the mean perplexity.
    """
    rates, costs = [], []
    for index, step in enumerate(table["step"].unique()):
        own = table[table["step"] == step].sort_values("layer")
        x, style = floats(own["layer"]), _style(index)
        band = floats(own["rate_low"]), floats(own["rate_high"])
        hover = tuple(map(_rate_in_words, own.to_dict("records")))
        rates.append(Line(str(step), x, floats(own["rate"]), hover=hover, band=band, **style))
        costs.append(Line(str(step), x, floats(own["perplexity"]), hover=hover, **style))
    unedited = table["unedited"].iloc[0]
    ends = floats((table["layer"].min(), table["layer"].max()))
    costs.append(Line("unedited", ends, (unedited,) * 2, "#6b7280", dash="dot", marker=None))
    layers = counting("layer", table["layer"].tolist())
    return (
        Lines(tuple(rates), layers, Axis("least learning rate, median", is_log=True)),
        Lines(tuple(costs), layers, Axis("perplexity after the edit, mean")),
    )


def metric_charts(table: pd.DataFrame, along: str, title: str) -> tuple[Lines, ...]:
    """Efficacy, paraphrase and neighborhood along something.

    Args:
        table: One row per `method` and value of `along`.
        along: A column of numbers.
        title: What it is.

    Returns:
        A chart per metric with a line per method.
    """
    x_axis = Axis(title, is_log=along == "edits_at_once")
    if along == "layer":
        x_axis = counting(title, table[along].tolist())
    charts = []
    for metric in CURVE_METRICS:
        lines = []
        for index, method in enumerate(table["method"].unique()):
            own = table[table["method"] == method].sort_values(along)
            lines.append(
                Line(
                    str(method),
                    floats(own[along]),
                    floats(own[metric]),
                    hover=tuple(map(_metrics_in_words, own.to_dict("records"))),
                    **_style(index),
                )
            )
        charts.append(Lines(tuple(lines), x_axis, Axis(f"{metric}, %")))
    return tuple(charts)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": in_turn(CATEGORICAL, index),
        "marker": in_turn(MARKERS, index),
    }


def _rate_in_words(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['step']}, layer {row['layer']}: {number(row['rate'])} "
        f"({number(row['rate_low'])} to {number(row['rate_high'])})\n"
        f"perplexity {number(row['perplexity'])}, not enough for {row['missing']} of {row['n']}"
    )


def _metrics_in_words(row: Mapping[Any, Any]) -> str:
    return f"{row['method']}\n" + ", ".join(f"{name} {row[name]:.1f} %" for name in CURVE_METRICS)
