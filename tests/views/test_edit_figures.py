"""Figures of edits: their numbers match the tables in both libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_contents import bands, lines

from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.rates import least_rates_by_layer
from backward_lens_tl.views import figures

BACKENDS = ("plotly", "matplotlib")
STEPS = ("sgd", "adam", "shift")

RATES = least_rates_by_layer(
    pd.DataFrame(
        {
            "request": request,
            "layer": layer,
            "step": step,
            "rate": 10.0 ** (request - at) * (layer + 1),
            "perplexity": 4.0 + at + layer / 8 + request,
        }
        for at, step in enumerate(STEPS)
        for layer in range(4)
        for request in range(3)
    ),
    3.5,
)

CURVES = pd.DataFrame(
    {
        "method": method,
        "edits_at_once": size,
        "layer": size // 7,
        "efficacy": 100.0 - at - size,
        "paraphrase": 50.0 - at - size / 2,
        "neighborhood": 10.0 + at,
        "kept": 80.0 + at + size / 5,
    }
    for at, method in enumerate(["a<b>", "$c$", "MEMIT"])
    for size in (1, 10, 50)
)


def titles(figure: Any) -> list[str]:
    """Titles of all axes, alternating x and y, chart by chart."""
    if hasattr(figure, "data"):
        layout = figure.layout.to_plotly_json()
        names = sorted((name for name in layout if name[1:5] == "axis"), key=lambda n: (n[5:], n))
        return [layout[name].get("title", {}).get("text", "") for name in names]
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_least_rates(backend: Any) -> None:
    figure = figures.least_rates(RATES, backend=backend)
    rates, costs = lines(figure, 0), lines(figure, 1)
    assert [name for name in rates if name in STEPS] == list(STEPS)
    for step in STEPS:
        own = RATES[RATES["step"] == step]
        for found, column in ((rates, "rate"), (costs, "perplexity")):
            np.testing.assert_allclose(found[step][0], own["layer"])
            np.testing.assert_allclose(found[step][1], own[column])
    np.testing.assert_allclose(costs["unedited"][0], [0, 3])
    np.testing.assert_allclose(costs["unedited"][1], [3.5, 3.5])
    assert "unedited" not in rates
    shaded = bands(figure)
    assert len(shaded) == 3
    for step, area in zip(STEPS, shaded, strict=True):
        own = RATES[RATES["step"] == step]
        corners = {(x, y) for x, y in np.round(area, 9).tolist()}
        for row in own.to_dict("records"):
            assert (row["layer"], round(row["rate_low"], 9)) in corners
            assert (row["layer"], round(row["rate_high"], 9)) in corners
    for text in ("layer", "least learning rate, median", "perplexity after the edit, mean"):
        assert text in titles(figure)
    if backend == "plotly":
        assert figure.layout.yaxis.type == "log"
        assert figure.layout.yaxis2.type != "log"
        assert figure.layout.title.text == "Least learning rate of an edit in one step, 3 prompts"
        assert figure.data[0].name in (None, *STEPS)
        [hover] = [trace.hovertext[1] for trace in figure.data if trace.name == "sgd" and
                   trace.hovertext is not None and trace.xaxis == "x"]  # fmt: skip
        assert hover == ("sgd, layer 1: 20 (11 to 110)<br>perplexity 5.125, not enough for 0 of 3")
    else:
        assert figure.axes[0].get_yscale() == "log"
        assert figure.axes[1].get_yscale() == "linear"


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_rates_are_gaps(backend: Any, tmp_path: Any) -> None:
    numbers = ["rate", "rate_low", "rate_high", "perplexity"]
    is_gap = (RATES["step"] == "shift") & (RATES["layer"] == 1)
    table = RATES.copy()
    table.loc[is_gap, numbers] = math.nan
    figure = figures.least_rates(table, backend=backend)
    x, y = lines(figure)["shift"]
    if len(x) == 4:
        assert np.isnan(y).tolist() == [False, True, False, False]
    else:
        assert x.tolist() == [0, 2, 3]
    table[numbers] = math.nan
    figure = figures.least_rates(table.assign(unedited=math.nan), backend=backend)
    if backend == "matplotlib":
        figure.savefig(tmp_path / "none.svg")
    else:
        figure.to_json()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("along", ["edits_at_once", "layer"])
def test_edit_curves(backend: Any, along: str) -> None:
    # Lines go from left to right for any order of rows.
    table = CURVES.iloc[::-1]
    figure = figures.edit_curves(table, along, backend=backend)
    for panel, metric in enumerate(("efficacy", "paraphrase", "neighborhood", "kept")):
        found = lines(figure, panel)
        assert len(found) == 3
        shown = list(found.values())
        for method, (x, y) in zip(["MEMIT", "$c$", "a<b>"], shown, strict=True):
            own = CURVES[CURVES["method"] == method].sort_values(along)
            np.testing.assert_allclose(x, own[along])
            np.testing.assert_allclose(y, own[metric])
        assert f"{metric}, %" in titles(figure)
    assert along.replace("_", " ") in titles(figure)
    is_log = along == "edits_at_once"
    if backend == "plotly":
        assert (figure.layout.xaxis.type == "log") == is_log
        assert figure.layout.title.text == f"Edits by {along.replace('_', ' ')}"
        named = figures.edit_curves(table, along, title="Mine", backend=backend)
        assert named.layout.title.text == "Mine"
        hovers = [trace.hovertext[0] for trace in figure.data if trace.hovertext is not None]
        assert any(
            "a&lt;b" in text and "efficacy 99.0 %, paraphrase 49.5 %, neighborhood 10.0 %" in text
            for text in hovers
        )
    else:
        assert (figure.axes[0].get_xscale() == "log") == is_log
        figure.canvas.draw()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_layer_or_size(backend: Any) -> None:
    one = RATES[RATES["layer"] == 2].assign(layer=0)
    assert lines(figures.least_rates(one, backend=backend))["sgd"][0].tolist() == [0]
    one = CURVES[CURVES["edits_at_once"] == 10].assign(paraphrase=math.nan)
    found = lines(figures.edit_curves(one, "edits_at_once", backend=backend))
    assert [x.tolist() for x, _ in found.values()] == [[10]] * 3


@pytest.mark.usefixtures("as_for_a_user")
def test_errors() -> None:
    def refused(message: str, function: Any, *args: Any, **given: Any) -> None:
        with pytest.raises(InputError, match=message):
            function(*args, **given)

    for column in RATES.columns.drop("spread"):
        refused(
            f"no column '{column}'; pass what evaluation.least_rates_by_layer returned",
            figures.least_rates,
            RATES.drop(columns=column),
        )
    refused("the table has no rows", figures.least_rates, RATES.iloc[:0])
    refused("the table is a list", figures.least_rates, [])
    refused("backend is 'bokeh'", figures.least_rates, RATES, backend="bokeh")
    for column in ("method", "efficacy", "paraphrase", "neighborhood", "kept"):
        table = CURVES.drop(columns=column)
        refused(
            f"no column '{column}'; pass concat",
            figures.edit_curves,
            table,
            "layer",
        )
    refused("no column 'size'", figures.edit_curves, CURVES, "size")
    refused("the table has no rows", figures.edit_curves, CURVES.iloc[:0], "layer")
    refused("backend is 'bokeh'", figures.edit_curves, CURVES, "layer", backend="bokeh")
