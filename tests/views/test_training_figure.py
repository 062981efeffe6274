"""The figure of a training run: its numbers, labels and hover texts, in both libraries."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_contents import axis_labels, heatmaps
from training_frames import training_frame

from backward_lens_tl import figures
from backward_lens_tl.errors import InputError

BACKENDS = pytest.mark.parametrize("backend", ["plotly", "matplotlib"])
ALL = ["norm", "share", "reference_cosine", "change_norm", "change_cosine", "change_outside"]


def expected(table: pd.DataFrame, quantity: str, matrix: str = "W_out") -> np.ndarray:
    """Layers in rows, the first one at the bottom, and steps in columns."""
    own = table[table["matrix"] == matrix].assign(share=lambda rows: rows["energy"].str[0])
    return own.pivot(index="layer", columns="step", values=quantity).to_numpy(float)


def titles(figure: Any) -> list[str]:
    if hasattr(figure, "data"):
        return [html.unescape(note.text) for note in figure.layout.annotations]
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


@BACKENDS
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_everything_that_was_recorded(backend: Any, scale: Any) -> None:
    table = training_frame()
    figure = figures.training_run(table, scale=scale, backend=backend)
    found = heatmaps(figure)
    assert len(found) == len(titles(figure)) == len(ALL)
    for quantity, values in zip(ALL, found, strict=True):
        # Plotly has no logarithmic colours, so its values are logarithms.
        is_log = quantity.endswith("norm") and scale == "log" and backend == "plotly"
        numbers = expected(table, quantity)
        np.testing.assert_allclose(values, np.log10(numbers) if is_log else numbers)


@BACKENDS
def test_labels(backend: Any) -> None:
    table = training_frame()
    across, down = axis_labels(figures.training_run(table, "W_in", backend=backend))
    assert across == ["1", "11", "21"]
    last = table.query("step == 21 and matrix == 'W_in'")
    assert down == [
        f"{row.layer} {row.top_tokens[0][0].strip()} {row.top_tokens[0][1].strip()}"
        for row in last.itertuples()
    ]


def test_hover_texts_have_all_numbers_and_tokens() -> None:
    figure = figures.training_run(training_frame(tokens=["<b>", " Rome"]), "W_out", "norm")
    assert figure.data[0].hovertext[1][2].split("<br>") == [
        "step 21, W_out of layer 1",
        "gradient, norm: 0.873",
        "gradient, share: 51 %",
        "gradient, top tokens: Rome &lt;b&gt;",
        "gradient, bottom tokens: &lt;b&gt; Rome",
        "gradient, reference: −0.55",
        "change, norm: 0.00873",
        "change, cosine: +0.84",
        "change, outside: 5 %",
        "change, top tokens: Rome",
    ]


@BACKENDS
def test_what_was_not_recorded_is_left_out(backend: Any) -> None:
    table = training_frame(has_change=False, has_reference=False)
    assert len(heatmaps(figures.training_run(table, backend=backend))) == 2
    chosen = figures.training_run(table, quantities=["share", "norm"], backend=backend)
    np.testing.assert_allclose(heatmaps(chosen)[0], expected(table, "share"))
    with pytest.raises(InputError, match="'change_norm' was not recorded; this record has 'norm'"):
        figures.training_run(table, quantities="change_norm", backend=backend)


@BACKENDS
def test_gaps_are_blank(backend: Any) -> None:
    """A layer without a gradient in one step, and a loss that was not finite."""
    table = training_frame(matrices=["W_out"])
    table.loc[5, "norm"] = math.nan
    figure = figures.training_run(table.drop(index=2), backend=backend, quantities="norm")
    (found,) = heatmaps(figure)
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 1], [2, 0]]


@BACKENDS
def test_long_runs_are_thinned_and_say_so(backend: Any) -> None:
    table = training_frame(range(1, 1002), layers=2, matrices=["W_out"])
    figure = figures.training_run(table, quantities="share", backend=backend)
    (found,) = heatmaps(figure)
    assert found.shape == (2, 200)
    np.testing.assert_allclose(found[:, [0, -1]], expected(table, "share")[:, [0, -1]])
    title = figure.layout.title.text if backend == "plotly" else figure.get_suptitle()
    assert title == "W_out: 1001 watched steps, 200 of them shown"
    shown = [int(step) for step in axis_labels(figure)[0]]
    assert shown == sorted(set(shown))
    assert shown[-1] == 1001


def test_processes_are_not_mixed_and_repeated_steps_replace_the_first_ones() -> None:
    own, other = training_frame(), training_frame(process=1)
    other["norm"] *= 3
    both = pd.concat([own, other], ignore_index=True)
    (found,) = heatmaps(figures.training_run(both, quantities="norm", scale="linear"))
    np.testing.assert_allclose(found, expected(own, "norm"))
    (found,) = heatmaps(figures.training_run(both, "W_out", "norm", process=1, scale="linear"))
    np.testing.assert_allclose(found, expected(other, "norm"))
    repeated = pd.concat([own, other.assign(process=0).query("step > 1")], ignore_index=True)
    (found,) = heatmaps(figures.training_run(repeated, quantities="norm", scale="linear"))
    np.testing.assert_allclose(found[:, 0], expected(own, "norm")[:, 0])
    np.testing.assert_allclose(found[:, 1:], expected(other, "norm")[:, 1:])


@BACKENDS
def test_one_step_of_one_layer_is_enough(backend: Any) -> None:
    figure = figures.training_run(training_frame([1], layers=1), backend=backend)
    assert heatmaps(figure)[0].shape == (1, 1)


@pytest.mark.usefixtures("as_for_a_user")
def test_arguments_that_are_not_usable() -> None:
    table = training_frame()
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("no watched step yet; record one first", table.iloc[:0], {}),
        ("the table is a list; pass what TrainingRecord.to_dataframe returned", [], {}),
        ("no column 'energy'", table.drop(columns="energy"), {}),
        ("'W_Q' is not in this table; it has W_in, W_out", table, {"matrix": "W_Q"}),
        ("process 2 has no rows; this table has 0", table, {"process": 2}),
        ("quantities is 'rank'; allowed: 'norm'", table, {"quantities": "rank"}),
        ("quantities is empty", table, {"quantities": []}),
        ("scale is 'ln'", table, {"scale": "ln"}),
        ("backend is 'svg'", table, {"backend": "svg"}),
    ]
    for message, drawn, options in refused:
        with pytest.raises(InputError, match=message):
            figures.training_run(drawn, **options)
