"""Figures: their numbers against the tensors, their texts in a browser, in both libraries."""

from __future__ import annotations

import ast
import html
import math
import struct
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from browser import opened
from figure_contents import bands, heatmaps, lines
from IPython.core.formatters import DisplayFormatter
from matplotlib import pyplot
from playwright.sync_api import Browser

import backward_lens_tl as blt
from backward_lens_tl.analysis import by_segment
from backward_lens_tl.analysis.neurons import neuron_overlap
from backward_lens_tl.analysis.steps import step_changes
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.data.segments import SEGMENTS, prompt_segments
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views import figures
from backward_lens_tl.views.colors import DIVERGING, ORDERED, SEQUENTIAL, Colors
from backward_lens_tl.views.figures import draw_matplotlib, draw_plotly
from backward_lens_tl.views.figures.charts import MOST_NAMES, Axis, Grid, Heatmap, Line, Lines

PROMPTS = ["Lionel Messi plays for", "The Eiffel Tower is in the city of", "Rome is in"]
SUBJECTS = ["Lionel Messi", "Eiffel Tower", "Rome"]
TARGETS = [" Paris", " Rome", " Paris"]
BACKENDS = ("plotly", "matplotlib")
HOSTILE = "<b> <a href='j:'>$a$</s> &lt; %{x} _z \\n\t\né 🙂"


@pytest.fixture(scope="module")
def result(facts_model: Any) -> BackwardLensResult:
    """Prompts of three lengths."""
    return blt.backward_lens(facts_model, PROMPTS, TARGETS)


@pytest.fixture(scope="module")
def hostile(facts_model: Any) -> BackwardLensResult:
    """A prompt with everything that a plotting library might interpret."""
    return blt.backward_lens(facts_model, HOSTILE, " Paris", matrices="W_out", layers=[4, 7])


def every_figure(result: BackwardLensResult, backend: Any) -> dict[str, Any]:
    prompts = len(result.positions)
    subject = SUBJECTS if prompts > 1 else "é"
    return {
        "norms": figures.norms(result, backend=backend),
        "norms_by_segment": figures.norms_by_segment(result, subject, backend=backend),
        "token_ranks_by_segment": figures.token_ranks_by_segment(result, subject, backend=backend),
        "target_ranks": figures.target_ranks(result, backend=backend),
        "gradient_ranks": figures.gradient_ranks(result, backend=backend),
        "singular_values": figures.singular_values(result, backend=backend),
        "neuron_similarity": figures.neuron_similarity(result, "W_out", 4, backend=backend),
        "neuron_overlap": figures.neuron_overlap(overlaps(result), "W_out", 4, backend=backend),
        "step_changes": figures.step_changes(STEPS, backend=backend),
        "compare": figures.compare(result, result, batch=(0, prompts - 1), backend=backend),
        "layer_lines": figures.layer_lines(
            pd.DataFrame(
                {"layer": [0, 1, 0, 1], "value": [1.0, 2.0, 3.0, 4.0], "of": list("aabb")}
            ).replace({"a": HOSTILE}),
            "value",
            "of",
            title=HOSTILE,
            unit=HOSTILE,
            scale="log",
            backend=backend,
        ),
        "layer_maps": figures.layer_maps(
            {HOSTILE: result.norms("W_out")[:, 0, : len(result.capture.str_tokens[0])]},
            result.capture.str_tokens[0],
            HOSTILE,
            columns=HOSTILE,
            rows=HOSTILE,
            title=HOSTILE,
            backend=backend,
        ),
    }


STEPS = pd.DataFrame(
    {
        "prompt": [0, 0, 1, 1],
        "matrix": ["W_in", "W_out", "W_in", "W_out"],
        "layer": [0, 0, 5, 5],
        "learning_rate": 0.01,
        "loss_change": [-0.5, -1e-4, 0.25, -3.0],
        "predicted_loss_change": [-0.75, -2e-4, -0.5, -6.0],
    }
)
"""One step raises the loss."""


def overlaps(result: BackwardLensResult, layer: int = 4) -> pd.DataFrame:
    """The largest neurons as in `neuron_overlap`, with arbitrary overlaps."""
    table = result.capture.neuron_df("W_out", layer)
    table = table[table["norm_order"] < 20]
    zero = table[table["position"] == 0].assign(position=None, token="zero vector", similarity=None)
    table = pd.concat([table.astype({"position": "Int64"}), zero.astype({"position": "Int64"})])
    table = table.sort_values("neuron", kind="stable", ignore_index=True)
    return table.assign(overlap=np.arange(len(table)) % 101 / 100).astype({"similarity": "float64"})


def titles(figure: Any) -> list[str]:
    """Title and subtitle of a figure of either library."""
    if hasattr(figure, "data"):
        title = figure.layout.title
        return [html.unescape(text) for text in (title.text, title.subtitle.text) if text]
    return figure.get_suptitle().split("\n")


def assert_equal(found: Any, expected: Any) -> None:
    """The factors are float32, with rounding of 1e-7; logarithms make it absolute."""
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------- numbers from tensors


def vjp_norms(result: BackwardLensResult, matrix: str, batch: int) -> np.ndarray:
    """`||delta_i||` by layer and position, from the factors one by one; NaN where it is zero."""
    return cell_norms(result, matrix, batch, lambda x, vjp: vjp)


def cell_norms(result: BackwardLensResult, matrix: str, batch: int, term: Any) -> np.ndarray:
    """The norm of `term(x_i, delta_i)` by layer and position; NaN where `delta_i` is zero."""
    n = len(result.capture.str_tokens[batch])
    norms = np.full((len(result.layers), n), np.nan)
    for row, layer in enumerate(result.layers):
        gradient = result.capture[matrix, layer]
        for position in range(n):
            x, vjp = gradient.inputs[batch, position], gradient.vjps[batch, position]
            if vjp.any():
                own = term(x, vjp).flatten().tolist()
                norms[row, position] = math.sqrt(sum(x * x for x in own))
    return norms


TERMS = {
    "norm": ("‖δ_i‖", lambda x, vjp: vjp),
    "write_norm": ("‖x_i‖·‖δ_i‖", lambda x, vjp: torch.outer(x, vjp)),
    "input_norm": ("‖x_i‖", lambda x, vjp: x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantity", TERMS)
def test_each_norm_is_that_of_its_vector_or_term(
    facts_model: Any, quantity: Any, backend: Any
) -> None:
    result = blt.backward_lens(facts_model, PROMPTS[2], " Paris", layers=[2, 7])
    symbol, term = TERMS[quantity]
    options: Any = {"scale": "linear", "backend": backend, "quantity": quantity}
    figure = figures.norms(result, "W_in", **options)
    (found,) = heatmaps(figure)
    assert_equal(found, cell_norms(result, "W_in", 0, term))
    assert titles(figure)[0].startswith(f"W_in: {symbol}")
    both = figures.compare(result, result, **options)
    assert_equal(heatmaps(both)[1], cell_norms(result, "W_out", 0, term))
    assert titles(both)[0].startswith(f"W_out: {symbol}")
    if backend == "plotly":
        assert figure.layout.coloraxis.colorbar.title.text == symbol
        assert figure.data[0].hovertext[0][1].endswith(f"<br>{symbol}: {found[0, 1]:.4g}")
    else:
        assert figure.axes[1].get_ylabel() == symbol


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms(result: BackwardLensResult, backend: Any) -> None:
    batch, expected = 1, vjp_norms(result, "W_in", 1)
    assert (
        np.isnan(expected[-1]).sum() == len(expected[0]) - 1
    )  # only the last position contributes
    (linear,) = heatmaps(figures.norms(result, "W_in", batch, scale="linear", backend=backend))
    assert_equal(linear, expected)
    (log,) = heatmaps(figures.norms(result, "W_in", batch, backend=backend))
    assert_equal(log, np.log10(expected) if backend == "plotly" else expected)


def test_the_scale_of_norms(result: BackwardLensResult) -> None:
    norms = vjp_norms(result, "W_out", 0)
    largest, least = np.nanmax(norms), max(np.nanmin(norms), np.nanmax(norms) / 1000)
    axis = figures.norms(result).layout.coloraxis
    assert_equal([axis.cmin, axis.cmax], np.log10([least, largest]))
    assert axis.colorbar.ticktext == tuple(f"{10**value:g}" for value in axis.colorbar.tickvals)
    axis = figures.norms(result, scale="linear").layout.coloraxis
    assert_equal([axis.cmin, axis.cmax], [0, largest])
    mesh = figures.norms(result, backend="matplotlib").axes[0].collections[0]
    assert_equal([mesh.norm.vmin, mesh.norm.vmax], [least, largest])
    assert_equal(mesh.norm([least, math.sqrt(least * largest), largest]), [0, 0.5, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compare_has_one_scale(result: BackwardLensResult, backend: Any) -> None:
    figure = figures.compare(result, result, batch=(0, 1), scale="linear", backend=backend)
    norms = [vjp_norms(result, "W_out", batch) for batch in (0, 1)]
    for found, expected in zip(heatmaps(figure), norms, strict=True):
        assert_equal(found, expected)
    largest = max(np.nanmax(part) for part in norms)
    if backend == "plotly":
        assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
        assert_equal(figure.layout.coloraxis.cmax, largest)
        said = [note.text for note in figure.layout.annotations]
    else:
        assert_equal(
            [mesh.norm.vmax for axes in figure.axes[:2] for mesh in axes.collections], largest
        )
        assert len(figure.axes) == 3  # two charts and one bar
        said = [axes.get_title("left") for axes in figure.axes[:2]]
    assert "Messi" in said[0]
    assert "Eiffel" in said[1]


def test_compare_names_the_models_where_they_differ(result: BackwardLensResult) -> None:
    other = replace(result, capture=replace(result.capture, model_name="another"))
    said = [note.text for note in figures.compare(result, other).layout.annotations]
    assert [text.split(":")[0] for text in said] == [result.capture.model_name, "another"]
    named = figures.compare(result, other, names=("&lt;", "<i>two")).layout.annotations
    assert [note.text for note in named] == ["&amp;lt;", "&lt;i&gt;two"]


NUMBERS = torch.tensor([[0.5, -1.0, math.nan], [0.0, 0.25, 2.0]])
LABELS = ("Rome", " is", "  ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_maps(backend: Any) -> None:
    """Maps of one unit share a scale that is symmetric around 0; a scale of norms starts at 0."""
    maps = {"one": 2 * NUMBERS, "two": NUMBERS, "three": NUMBERS.abs()}
    figure = figures.layer_maps(maps, LABELS, ["nats", "nats", "norm"], backend=backend)
    for drawn, numbers in zip(heatmaps(figure), maps.values(), strict=True):
        assert_equal(drawn, numbers.numpy())  # row 0, layer 0, is the lowest
    if backend == "plotly":
        assert [trace.coloraxis for trace in figure.data] == [
            "coloraxis",
            "coloraxis",
            "coloraxis2",
        ]
        scales = [figure.layout[f"coloraxis{index}"] for index in ("", "2")]
        assert [(scale.cmin, scale.cmax) for scale in scales] == [(-4, 4), (0, 2)]
        stops = [tuple(color for _, color in scale.colorscale) for scale in scales]
        units = [scale.colorbar.title.text for scale in scales]
        labels = list(figure.layout.xaxis.ticktext)
        hover = figure.data[1].hovertext
        assert hover[0][1] == "is at 1, layer 0<br>-1"
        assert hover[1][2] == "␣ at 2, layer 1<br>2"
        tops = [figure.layout[f"yaxis{index}"].domain[1] for index in ("", "2", "3")]
        titles = [note.text for note in figure.layout.annotations]
    else:
        panels, bars = figure.axes[:3], figure.axes[3:]
        meshes = [axes.collections[0] for axes in panels]
        assert [mesh.norm.vmin for mesh in meshes] == [-4, -4, 0]
        assert [mesh.norm.vmax for mesh in meshes] == [4, 4, 2]
        ends = [(mesh.cmap(0.0), mesh.cmap(1.0)) for mesh in meshes[1:]]
        stops = [tuple(matplotlib.colors.to_hex(color) for color in pair) for pair in ends]
        units = [bar.get_ylabel() for bar in bars]
        labels = [label.get_text() for label in panels[0].get_xticklabels()]
        figure.canvas.draw()
        tops = [axes.get_position().y1 for axes in panels]
        titles = [axes.get_title("left") for axes in panels]
    assert [(pair[0], pair[-1]) for pair in stops] == [
        (DIVERGING[0], DIVERGING[-1]),
        (SEQUENTIAL[0], SEQUENTIAL[-1]),
    ]
    assert units == ["nats", "norm"]
    assert labels == ["Rome", "is", "␣"]
    assert titles == list(maps)
    assert tops[0] > tops[1] > tops[2]


def test_layer_maps_of_other_columns_and_lengths() -> None:
    figure = figures.layer_maps(
        {"heads": NUMBERS, "fewer layers": NUMBERS[:1].abs()},
        LABELS,
        "share",
        columns="head",
        rows="block",
    )
    assert figure.layout.xaxis.title.text == "head"
    assert figure.layout.yaxis.title.text == "block"
    assert figure.data[0].hovertext[1][0] == "Rome at 0, block 1<br>0"
    assert [drawn.shape for drawn in heatmaps(figure)] == [(2, 3), (1, 3)]
    only_zeros = figures.layer_maps({"zeros": torch.zeros(2, 3)}, LABELS, "share")
    assert (only_zeros.layout.coloraxis.cmin, only_zeros.layout.coloraxis.cmax) == (0, 1)
    nothing = figures.layer_maps({"nothing": torch.full((2, 3), math.nan)}, LABELS, "share")
    assert (nothing.layout.coloraxis.cmin, nothing.layout.coloraxis.cmax) == (0, 1)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("maps", "units", "message"),
    [
        ({}, "nats", "maps is an empty dict; pass a dict from titles"),
        (NUMBERS, "nats", "maps is a Tensor; pass a dict from titles"),
        ({"one": [[1.0, 2.0, 3.0]]}, "nats", "map 'one' is a list; pass a tensor"),
        (
            {"one": NUMBERS, "two": NUMBERS[0]},
            "nats",
            r"map 'two' is of shape \[3\]; pass a tensor",
        ),
        (
            {"one": NUMBERS[:, 1:]},
            "nats",
            r"map 'one' is of shape \[2, 2\]; .* each of the 3 labels",
        ),
        ({"one": NUMBERS[:0]}, "nats", r"map 'one' of shape \[0, 3\] is empty"),
        ({"one": 1 / torch.zeros(2, 3)}, "nats", "'one' of shape .* has infinite numbers"),
        (
            {"one": NUMBERS},
            ["nats", "norm"],
            "units is .*; pass one for all 1 maps, or one per map",
        ),
        ({"one": NUMBERS}, [], r"units is \[\]; pass one"),
    ],
)
def test_errors_of_layer_maps(maps: Any, units: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        figures.layer_maps(maps, LABELS, units)


@pytest.mark.parametrize(
    ("of", "backend"),
    [("vjp", "plotly"), ("vjp", "matplotlib"), ("input", "plotly"), ("write", "plotly")],
)
def test_norms_by_segment(result: BackwardLensResult, backend: Any, of: Any) -> None:
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(result.layers)))
    counts: dict[str, int] = defaultdict(int)
    for batch, (text, spans, subject) in enumerate(
        zip(PROMPTS, result.capture.spans, SUBJECTS, strict=True)
    ):
        for position, segment in enumerate(prompt_segments(text, spans, subject)):
            counts[segment] += 1
            for layer in result.layers:
                gradient = result.capture["W_out", layer]
                x, vjp = gradient.inputs[batch, position], gradient.vjps[batch, position]
                own = {"vjp": vjp, "input": x, "write": torch.outer(x.double(), vjp.double())}[of]
                sums[segment][layer] += own.norm().item()
    figure = figures.norms_by_segment(result, SUBJECTS, of=of, backend=backend)
    found = lines(figure)
    assert list(found) == [segment for segment in SEGMENTS if counts[segment]]
    for segment, (layers, means) in found.items():
        assert layers.tolist() == list(result.layers)
        assert_equal(means, sums[segment] / counts[segment])
    name = {"vjp": "‖δ_i‖", "input": "‖x_i‖", "write": "‖x_i‖·‖δ_i‖"}[of]
    assert titles(figure)[0].startswith(f"W_out: {name}")
    assert titles(figure)[0].endswith("by segment")
    assert titles(figure)[1] == "mean over the tokens of 3 prompts"
    if of == "vjp":
        assert found["before subject"][1][-1] == 0  # counted, although it is zero
        figure = figures.norms_by_segment(result, SUBJECTS, scale="log", backend=backend)
        assert np.isnan(lines(figure)["before subject"][1][-1])


def test_a_repeated_position_counts_once(facts_model: Any) -> None:
    once, twice = (
        figures.norms_by_segment(
            blt.backward_lens(facts_model, PROMPTS[1], " Rome", positions=positions),
            "Eiffel Tower",
        )
        for positions in ([1, 2, 3, 7, 8], [1, 2, 2, 2, 3, 7, 8, 8])
    )
    assert len(lines(once)) >= 3
    for name, points in lines(once).items():
        np.testing.assert_array_equal(lines(twice)[name], points)


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_ranks(result: BackwardLensResult, facts_model: Any, backend: Any) -> None:
    """Against the model's own final norm and unembedding of every vector."""
    batch = 2
    found = lines(figures.target_ranks(result, batch=batch, backend=backend))
    tokens = result.capture.str_tokens[batch]
    target = int(result.capture.targets[batch, 0])
    assert [name.split(":")[0] for name in found] == [str(i) for i in range(len(tokens))]
    for position, (layers, places) in enumerate(found.values()):
        assert layers.tolist() == list(result.layers)
        for layer, place in zip(result.layers, places, strict=True):
            update = -result.capture["W_out", layer].vjps[batch, position]
            scores = facts_model.unembed(facts_model.ln_final(update[None, None]))[0, 0]
            if not update.any():
                assert math.isnan(place)
                continue
            # Batched and single products round differently in float32.
            close = 1e-5 * scores.abs().max()
            fewest = int((scores > scores[target] + close).sum())
            most = int((scores >= scores[target] - close).sum()) - 1
            assert 1 + fewest <= place <= 1 + most
            assert most - fewest < 20  # out of about 4000: wrong ranks would exceed that
    assert next(reversed(found.values()))[1][-1] == 1  # the last token, in the last layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_ranks(result: BackwardLensResult, backend: Any) -> None:
    """The paper's figure 4: rank n in all layers but the last, which has rank 1."""
    figure = figures.gradient_ranks(result, backend=backend)
    lengths = {len(tokens) for tokens in result.capture.str_tokens}
    assert len(lengths) == 3
    last = result.layers[-1]
    for panel, matrix in enumerate(result.matrices):
        found = lines(figure, panel)
        assert list(found) == ["rank = n", f"layers 0–{last - 1}", f"layer {last}"]
        bound, every, top = (set(zip(*points, strict=True)) for points in found.values())
        assert bound == {(0, 0), (max(lengths), max(lengths))}
        assert every == {(n, n) for n in lengths}
        assert top == {(n, 1) for n in lengths}
        for batch in range(len(PROMPTS)):
            dense = result.capture[matrix, 3].dense(batch).double()
            # float32 rounds to 1e-7 of the largest of at most 12 values.
            assert int(torch.linalg.matrix_rank(dense, rtol=1e-6)) == len(
                result.capture.str_tokens[batch]
            )
    only = figures.gradient_ranks(result, "W_in", backend=backend)
    assert list(lines(only)) == list(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_values(result: BackwardLensResult, backend: Any) -> None:
    found = lines(figures.singular_values(result, "W_in", 2, backend=backend))
    assert list(found) == [f"layer {layer}" for layer in result.layers]
    n = len(result.capture.str_tokens[2])
    for layer in (0, 4, 7):
        index, values = found[f"layer {layer}"]
        dense = result.capture["W_in", layer].dense(2).double()
        expected = torch.linalg.svdvals(dense).numpy()[: 1 if layer == 7 else n]
        assert index.tolist() == list(range(1, len(expected) + 1))
        # The dense matrix is a float32 product.
        np.testing.assert_allclose(values, expected, atol=1e-6 * expected[0])


# ------------------------------------------------------------------------- numbers of analyses


@pytest.fixture(scope="module")
def answered(facts_model: Any) -> BackwardLensResult:
    """Raw gradients, as in the paper, and the ranks of the model's own answers."""
    return blt.backward_lens(
        facts_model, PROMPTS, TARGETS, measures=("answer_rank",), direction="gradient", k=1
    )


@pytest.mark.parametrize(("of", "backend"), [("target", "plotly"), ("answer", "matplotlib")])
def test_token_ranks_by_segment(answered: BackwardLensResult, backend: Any, of: Any) -> None:
    expected: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in answered.under("normalized").to_df(SUBJECTS, matrix="W_out").to_dict("records"):
        if not row["is_zero"]:
            expected[row["segment"]][row["layer"]].append(1 + row[f"{of}_rank"])
    figure = figures.token_ranks_by_segment(
        answered, SUBJECTS, of=of, projection="normalized", scale="linear", backend=backend
    )
    found = lines(figure)
    assert list(found) == [segment for segment in SEGMENTS if segment in expected]
    for band, (segment, (layers, places)) in zip(bands(figure), found.items(), strict=True):
        assert layers.tolist() == list(answered.layers)
        own = expected[segment]
        assert np.isnan(places[-1]) == (segment != "last token")
        quartiles = {layer: np.quantile(own[layer], [0.25, 0.5, 0.75]) for layer in own}
        for layer in own:
            assert places[layer] == quartiles[layer][1]
        corners = {(layer, values[end]) for layer, values in quartiles.items() for end in (0, 2)}
        assert set(map(tuple, band.tolist())) == corners
    if backend == "plotly":
        assert figure.layout.yaxis.autorange == "reversed"
    else:
        assert figure.axes[0].yaxis.get_inverted()
    token = "the target" if of == "target" else "the model's answer"
    assert titles(figure) == [
        f"W_out: rank of {token} by segment",
        "median over the tokens of 3 prompts, normalized",
    ]


def test_bands_have_gaps_and_no_entry_in_the_legend() -> None:
    nan = math.nan
    low, high = (1.0, 2.0, nan, 1.0), (3.0, 4.0, nan, 5.0)
    line = Line("a", (0.0, 1.0, 2.0, 3.0), (2.0, 3.0, nan, 2.0), "#0072b2", band=(low, high))
    grid = Grid((Lines((line,), Axis("x"), Axis("y")),), "t")
    band, drawn = draw_plotly.draw(grid).data
    assert band.x == (0, 1, 1, 0, None, 3, 3, None)
    assert band.y == (1, 2, 4, 3, None, 1, 5, None)
    assert (band.showlegend, band.hoverinfo, band.name) == (False, "skip", None)
    assert band.legendgroup == drawn.legendgroup == "a"
    assert band.fillcolor.startswith("rgba(0,114,178,0.")
    (axes,) = draw_matplotlib.draw(grid).axes
    (area,) = axes.collections
    assert len(area.get_paths()) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]


def test_a_sweep_and_its_tables_give_the_same_figures(facts_model: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Lionel Messi plays for", "target": " Paris", "subject": "Lionel Messi"}]
    sweep = blt.sweep(facts_model, rows, tmp_path, blt.SweepConfig(k=1), progress=False)
    positions = sweep.positions()
    norms, ranks = by_segment.norms_by_segment, by_segment.token_ranks_by_segment
    same(figures.norms_by_segment(sweep), figures.norms_by_segment(norms(positions)))
    same(figures.token_ranks_by_segment(sweep), figures.token_ranks_by_segment(ranks(positions)))
    same(figures.gradient_ranks(sweep), figures.gradient_ranks(sweep.gradients()))


def test_tables_of_analyses_give_the_same_figures(answered: BackwardLensResult) -> None:
    cells = pd.concat([answered.under(name).to_df(SUBJECTS) for name in answered.projections])
    norms = pd.concat([by_segment.norms_by_segment(cells, of) for of in ("vjp", "input")])
    ranks = pd.concat([by_segment.token_ranks_by_segment(cells, of) for of in ("target", "answer")])
    draw_norms, draw_ranks = figures.norms_by_segment, figures.token_ranks_by_segment
    for matrix, of in (("W_in", "vjp"), ("W_out", "input")):
        options: Any = {"matrix": matrix, "of": of}
        same(draw_norms(norms, **options), draw_norms(answered, SUBJECTS, **options))
    for of, projection in (("target", None), ("answer", "normalized")):
        options = {"of": of, "projection": projection}
        same(draw_ranks(ranks, **options), draw_ranks(answered, SUBJECTS, **options))
    gradients = answered.capture.gradient_df()
    for matrices in (None, ["W_out", "W_in"]):
        for source in (gradients, answered.capture):
            same(
                figures.gradient_ranks(source, matrices), figures.gradient_ranks(answered, matrices)
            )
    # The first projection in the table is used; the title counts the prompts with rows.
    some = by_segment.token_ranks_by_segment(cells, prompts=[0, 2])
    assert titles(draw_ranks(some))[1] == "median over the tokens of 2 prompts, logit_lens"
    one = by_segment.norms_by_segment(cells[cells["prompt"] == 1])
    assert titles(draw_norms(one))[1] == "mean over the tokens of 1 prompt"


def same(one: Any, other: Any) -> None:
    """One library suffices, since both draw the same charts."""
    assert one.to_json() == other.to_json()


@pytest.mark.parametrize("backend", BACKENDS)
def test_neuron_overlap(facts_model: Any, result: BackwardLensResult, backend: Any) -> None:
    """The table of the analysis: neurons by norm, tokens, and below them the zero vector."""
    table = neuron_overlap(facts_model, result.capture, "W_out", 4, k=20)
    table = table.sample(frac=1, random_state=0)
    figure = figures.neuron_overlap(table, "W_out", 4, backend=backend)
    tokens = result.capture.str_tokens[0]
    overlap, cosine = heatmaps(figure)
    assert overlap.shape == cosine.shape == (len(tokens) + 1, 512)
    for row in table.sample(300, random_state=1).to_dict("records"):
        is_zero = row["token"] == "zero vector" and pd.isna(row["position"])
        place = (len(tokens) if is_zero else row["position"], row["norm_order"])
        np.testing.assert_equal(
            [overlap[place], cosine[place]], [row["overlap"], row["similarity"]]
        )
    assert np.isnan(cosine[-1]).all()
    if backend == "plotly":
        layout = figure.layout
        labels, title = layout.yaxis.ticktext, layout.title.text
        assert [(axis.cmin, axis.cmax) for axis in (layout.coloraxis, layout.coloraxis2)] == [
            (0, 1),
            (-1, 1),
        ]
        assert [note.text for note in layout.annotations] == [
            "Overlap of the top tokens",
            "Cosine similarity",
        ]
        hover = figure.data[0].hovertext[-1][0]
        assert hover.startswith("neuron ")
        assert "<br>zero vector: " in hover
        assert " at 0: " in figure.data[0].hovertext[0][0]
    else:
        labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        title = figure.get_suptitle()
    shown = [html.unescape(label) for label in labels] if backend == "plotly" else labels
    assert sorted(shown) == sorted([*(token.strip() for token in tokens), "zero vector"])
    assert title == "W_out of layer 4: neurons of the gradient and what spans it"
    assert figures.neuron_overlap(table).layout.title.text.startswith("neurons of the gradient")


def test_stacked_charts_have_colour_bars_next_to_them(result: BackwardLensResult) -> None:
    layout = figures.neuron_overlap(overlaps(result)).layout
    upper, lower = layout.yaxis.domain, layout.yaxis2.domain
    assert lower[1] < upper[0]
    assert layout.xaxis.domain == layout.xaxis2.domain == (0, 1)
    for (low, high), axis in ((upper, layout.coloraxis), (lower, layout.coloraxis2)):
        bar = axis.colorbar
        assert (bar.x, bar.yanchor) == (1, "middle")
        assert (bar.y - bar.len / 2, bar.y + bar.len / 2) == pytest.approx((low, high))
    figure = figures.neuron_overlap(overlaps(result), backend="matplotlib")
    figure.canvas.draw()
    upper, lower, *bars = (axes.get_position() for axes in figure.axes)
    assert lower.y1 < upper.y0
    assert (lower.x0, lower.x1) == pytest.approx((upper.x0, upper.x1))
    for bar, chart in zip(bars, (upper, lower), strict=True):
        assert (bar.y0, bar.y1) == pytest.approx((chart.y0, chart.y1), abs=0.01)
        assert bar.x0 > chart.x1
    heat = Heatmap(((1.0,),), (("",),), Axis("x"), Axis("y"), Colors(0.0, 1.0, SEQUENTIAL, "one"))
    shared = draw_plotly.draw(Grid((heat, heat), "t", is_stacked=True)).layout
    assert shared.coloraxis.colorbar.len == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_changes(backend: Any) -> None:
    found = lines(figures.step_changes(STEPS, backend=backend))
    assert list(found) == ["predicted = measured", "W_out", "W_in"]
    bound, writing, reading = (list(zip(*points, strict=True)) for points in found.values())
    assert bound == [(-6, -6), (0.25, 0.25)]
    assert reading == [(-0.5, -0.75), (0.25, -0.5)]
    assert writing == [(-1e-4, -2e-4), (-3, -6)]
    found = lines(figures.step_changes(STEPS, scale="log", backend=backend))
    bound, writing, reading = (list(zip(*points, strict=True)) for points in found.values())
    assert bound == [(1e-4, 1e-4), (6, 6)]
    assert reading == [(0.5, 0.75)]  # the other one raised the loss
    assert writing == [(1e-4, 2e-4), (3, 6)]


def test_texts_of_step_changes(facts_model: Any) -> None:
    figure = figures.step_changes(STEPS)
    assert figure.layout.title.text == "One step on one matrix: change of the loss, 2 prompts"
    assert figure.layout.xaxis.title.text == "measured change of the loss, in nats"
    assert figure.layout.yaxis.title.text == "predicted change of the loss, in nats"
    assert figure.data[2].hovertext[1] == (
        "W_in of layer 5, prompt 2, learning rate 0.01<br>measured 0.25, predicted -0.5"
    )
    measured = step_changes(
        facts_model, PROMPTS[2], TARGETS[2], matrices="W_out", layers=[3, 5], learning_rate=1e-3
    )
    points = lines(figures.step_changes(measured))["W_out"]
    assert points[0].tolist() == measured["loss_change"].tolist()
    assert points[1].tolist() == measured["predicted_loss_change"].tolist()
    worse = STEPS.assign(loss_change=1.0)
    for backend in BACKENDS:
        assert not len(lines(figures.step_changes(worse, scale="log", backend=backend))["W_in"][0])


def test_labels_of_many_decades_do_not_overlap() -> None:
    table = pd.concat([STEPS, STEPS.assign(loss_change=-1e-5)])
    figure = figures.step_changes(table, scale="log", backend="matplotlib")
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    boxes = [
        label.get_window_extent()
        for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(boxes) >= 4
    assert all(left.x1 + 4 < right.x0 for left, right in pairwise(boxes))


def test_only_shown_gradients_are_decomposed(
    facts_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = blt.backward_lens(facts_model, PROMPTS, TARGETS, matrices="all")
    asked: list[tuple[str, int, int]] = []
    own = MatrixGradient.spectra

    def counted(self: MatrixGradient, batch: int = 0) -> tuple[torch.Tensor, ...]:
        asked.append((self.matrix, self.layer, batch))
        return own(self, batch)

    monkeypatch.setattr(MatrixGradient, "spectra", counted)
    figures.singular_values(result, "W_in", 2)
    assert sorted(asked) == [("W_in", layer, 2) for layer in result.layers]
    asked.clear()
    figures.gradient_ranks(result, ["W_V", "W_in"])
    wanted = [(m, layer, b) for m in ("W_V", "W_in") for layer in result.layers for b in range(3)]
    assert sorted(asked) == sorted(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
def test_neuron_similarity(result: BackwardLensResult, backend: Any, matrix: str) -> None:
    gradient = result.capture[matrix, 3]
    n = len(result.capture.str_tokens[1])
    dense = gradient.inputs[1, :n].double().T @ gradient.vjps[1, :n].double()
    neurons, vectors = (
        (dense.T, gradient.inputs[1, :n]) if matrix == "W_in" else (dense, gradient.vjps[1, :n])
    )
    order = neurons.norm(dim=1).argsort(descending=True)
    neurons = neurons[order] / neurons[order].norm(dim=1, keepdim=True)
    vectors = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    (found,) = heatmaps(figures.neuron_similarity(result, matrix, 3, 1, backend=backend))
    assert found.shape == (n, 512)
    np.testing.assert_allclose(found, (vectors @ neurons.T).numpy(), atol=1e-9)


def test_neurons_of_a_layer_from_the_end(result: BackwardLensResult) -> None:
    figure = figures.neuron_similarity(result, "W_out", -1)
    assert "layer 7" in figure.layout.title.text
    assert np.isnan(heatmaps(figure)[0][:-1]).all()  # only the last position has a direction


def test_a_subset_of_layers_and_positions(facts_model: Any, result: BackwardLensResult) -> None:
    """Layers and positions keep their own numbers, in any requested order."""
    part = blt.backward_lens(
        facts_model, PROMPTS[1], " Rome", layers=[2, 5], positions=[-1, 3, 3], matrices="W_out"
    )
    (found,) = heatmaps(figures.norms(part, scale="linear"))
    last = len(part.capture.str_tokens[0]) - 1
    assert_equal(found, vjp_norms(result, "W_out", 1)[[2, 5]][:, [3, last]])
    figure = figures.norms(part)
    assert figure.layout.yaxis.ticktext == ("2", "5")
    tokens = result.capture.str_tokens[1]
    named = tuple(f"{tokens[position].strip()} ({position})" for position in (3, last))
    drawn = figures.norms(part, backend="matplotlib").axes[0]
    both = figures.compare(part, part, batch=(0, 0)).layout
    for title, labels in (
        (figure.layout.xaxis.title.text, figure.layout.xaxis.ticktext),
        (both.xaxis2.title.text, both.xaxis2.ticktext),
        (drawn.get_xlabel(), tuple(label.get_text() for label in drawn.get_xticklabels())),
    ):
        assert (title, labels) == ("token (position)", named)
    whole = figures.norms(result, batch=1).layout.xaxis
    assert whole.title.text == "token"
    assert whole.ticktext[3] == tokens[3].strip()
    assert [trace.name.split(":")[0] for trace in figures.target_ranks(part).data] == [
        "3",
        str(last),
    ]


# ------------------------------------------------------------------------------------------- texts


def shown_tokens(result: BackwardLensResult) -> list[str]:
    special = {"\n": "⏎", "\t": "⇥"}
    texts = ["".join(special.get(c, c) for c in t) for t in result.capture.str_tokens[0]]
    return [text.strip() or "␣" for text in texts]


def test_repeated_tokens_have_separate_columns(facts_model: Any) -> None:
    twice = blt.backward_lens(facts_model, "Rome Rome Rome is in", " Paris", matrices="W_out")
    for backend in BACKENDS:
        (found,) = heatmaps(figures.norms(twice, backend=backend))
        assert found.shape[1] == len(twice.capture.str_tokens[0])
    axis = figures.norms(twice).layout.xaxis
    assert axis.tickvals == tuple(range(found.shape[1]))
    assert axis.ticktext.count("Rome") >= 2


@pytest.mark.slow
def test_tokens_in_a_browser(hostile: BackwardLensResult, browser: Browser, tmp_path: Path) -> None:
    """Plotly draws every token literally: nothing becomes a tag, a link, a template or TeX."""
    path = tmp_path / "figure.html"
    page = "<script>window.MathJax = undefined</script>"
    figure = figures.target_ranks(hostile)
    figure.update_layout(showlegend=True, height=2600)
    figure.update_traces(showlegend=True)
    path.write_text(page + figure.to_html(include_plotlyjs=True), encoding="utf-8")
    with opened(browser, path, height=2700) as shown:
        shown.page.wait_for_selector(".legendtext")
        texts = shown.page.locator(".legendtext").all_text_contents()
        named = [text.split(": ", 1)[1] for text in texts if ": " in text]
        assert named == shown_tokens(hostile)
        assert shown.page.locator("svg a").count() == 0
        shown.check()


def test_plotly_markup_and_tex_are_escaped(hostile: BackwardLensResult) -> None:
    for name, figure in every_figure(hostile, "plotly").items():
        assert isinstance(figure, go.Figure), name
        texts = [
            text
            for axis in (figure.layout.xaxis, figure.layout.yaxis)
            for text in (axis.ticktext or ())
        ]
        texts += [note.text for note in figure.layout.annotations] + [figure.layout.title.text]
        for trace in figure.data:
            hover = np.array([] if trace.hovertext is None else trace.hovertext, dtype=object)
            texts += [trace.name or "", *hover.flatten()]
            assert trace.hovertemplate is None
        assert not [text for text in texts if set("<>$") & set(text.replace("<br>", ""))], name


def test_matplotlib_mathtext_is_escaped(hostile: BackwardLensResult) -> None:
    figure = figures.target_ranks(hostile, backend="matplotlib")
    figure.canvas.draw()
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert [label.split(": ", 1)[1] for label in labels] == [
        text.replace("$", r"\$") for text in shown_tokens(hostile)
    ]


def test_matplotlib_draws_any_token(hostile: BackwardLensResult) -> None:
    """There is no warning about missing glyphs, and the caller's settings do not change."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, figure in every_figure(hostile, "matplotlib").items():
            assert isinstance(figure, matplotlib.figure.Figure), name
            figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before


def test_tex_is_not_used(hostile: BackwardLensResult) -> None:
    """It would raise an error for a token such as `_` or `%`."""
    with matplotlib.rc_context({"text.usetex": True}):
        figure = figures.norms(hostile, backend="matplotlib")
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(labels) > 10
    assert not any(label.get_usetex() for label in (*labels, figure.axes[0].xaxis.label))


def test_a_character_without_a_glyph_is_shown_as_its_code_point() -> None:
    label = "a\U0010fffdb\n"  # private use: only the last-resort font has it
    chart = Lines((Line(label, (0.0, 1.0), (1.0, 2.0), "#000000"),), Axis(label), Axis("y"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_matplotlib.draw(Grid((chart,), label))
        figure.canvas.draw()
    assert figure.axes[0].get_xlabel() == r"a\U0010fffdb" + "\n"


# --------------------------------------------------------------------------------- returned objects


def test_figures_can_be_written(result: BackwardLensResult, tmp_path: Path) -> None:
    figures.norms(result, backend="matplotlib").savefig(tmp_path / "norms.pdf")
    assert (tmp_path / "norms.pdf").read_bytes().startswith(b"%PDF")
    assert '"heatmap"' in figures.norms(result).to_json()


def test_only_public_names_are_listed() -> None:
    assert dir(figures) == sorted(figures.__all__)


def test_plotting_libraries_are_imported_lazily() -> None:
    """Not by the package's modules, which users import with or without matplotlib."""
    for module in (figures, draw_plotly, draw_matplotlib):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [getattr(node, "module", None) or node.names[0].name for node in at_once]
        assert not [name for name in names if name.split(".")[0] in ("plotly", "matplotlib")]


def test_a_notebook_shows_a_figure_without_pyplot(result: BackwardLensResult) -> None:
    figure = figures.norms(result, backend="matplotlib")
    assert isinstance(figure, matplotlib.figure.Figure)
    bundle, _ = DisplayFormatter().format(figure)
    width, height = struct.unpack(">II", bundle["image/png"][16:24])
    assert (width, height) == tuple(int(side * figure.dpi) for side in figure.get_size_inches())


def test_figures_are_not_registered_with_pyplot(result: BackwardLensResult) -> None:
    before = pyplot.get_fignums()
    figures.norms(result, backend="matplotlib").canvas.draw()
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_says_what_to_install(
    result: BackwardLensResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures.norms(result)
    with pytest.raises(InputError, match=r'pip install "backward-lens-tl\[matplotlib\]"'):
        figures.norms(result, backend="matplotlib")


def test_few_lines_have_a_legend_and_many_a_colour_bar(facts_model: Any) -> None:
    for words, many in ((3, False), (30, True)):
        result = blt.backward_lens(facts_model, "Rome" + " is" * words, " Paris", matrices="W_out")
        figure = figures.target_ranks(result)
        assert any(trace.showlegend for trace in figure.data) != many
        assert bool(figure.layout.coloraxis.colorbar.title.text) == many
        drawn = figures.target_ranks(result, backend="matplotlib")
        assert (drawn.axes[0].get_legend() is None) == many
        assert len(drawn.axes) == 1 + many
    assert words > MOST_NAMES
    some = blt.backward_lens(
        facts_model, "Rome" + " is" * 30, " Paris", matrices="W_out", positions=range(15, 32)
    )
    bar = figures.target_ranks(some).layout.coloraxis
    assert (bar.cmin, bar.cmax) == (15, 31)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("stranger", [None, torch.zeros(2)])
def test_other_types_than_a_result_are_refused(result: BackwardLensResult, stranger: Any) -> None:
    calls = (
        figures.norms,
        lambda given: figures.compare(given, result),
        lambda given: figures.compare(result, given),
        figures.target_ranks,
        figures.singular_values,
        lambda given: figures.neuron_similarity(given, "W_out", 0),
    )
    for call in calls:
        with pytest.raises(InputError, match=f"a {type(stranger).__name__}; pass what backward"):
            call(stranger)
    for function in (figures.norms_by_segment, figures.token_ranks_by_segment):
        with pytest.raises(
            InputError, match=f"a {type(stranger).__name__}; pass a result, a sweep"
        ):
            function(stranger, "Rome")
    with pytest.raises(InputError, match=f"a {type(stranger).__name__}; pass a table of gradients"):
        figures.gradient_ranks(stranger)


@pytest.mark.usefixtures("as_for_a_user")
def test_errors(result: BackwardLensResult, facts_model: Any) -> None:
    def refused(message: str, function: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(InputError, match=message):
            function(*args, **kwargs)

    refused(
        "backend is 'bokeh'; allowed: 'plotly', 'matplotlib'",
        figures.norms,
        result,
        backend="bokeh",
    )
    refused("scale is 'log2'; allowed: 'log', 'linear'", figures.norms, result, scale="log2")
    refused(
        "of is 'x'; allowed: 'vjp', 'input', 'write'", figures.norms_by_segment, result, "Rome",
        of="x",
    )  # fmt: skip
    for function in (figures.norms, lambda *args, **kw: figures.compare(result, *args, **kw)):
        refused(
            "quantity is 'x'; allowed: 'norm', 'write_norm', 'input_norm'", function, result,
            quantity="x",
        )  # fmt: skip
    for function in (figures.norms, figures.target_ranks, figures.singular_values):
        refused("'W_Q'", function, result, "W_Q")
        refused("prompt 3 does not exist; allowed: 0 to 2", function, result, batch=3)
    refused("'W_Q' was not captured; pass one of", figures.gradient_ranks, result, ["W_in", "W_Q"])
    refused(r"matrices is \[\]; pass some of W_in, W_out", figures.gradient_ranks, result, [])
    refused("'W_Q'.* was not captured", figures.neuron_similarity, result, "W_Q", 0)
    refused(
        "layer 8 does not exist; allowed: -8 to 7", figures.neuron_similarity, result, "W_in", 8
    )
    refused("prompt 7 does not exist", figures.compare, result, result, batch=(0, 7))
    refused("batch is 0; pass one for each", figures.compare, result, result, batch=0)
    refused(r"names is \['a'\]; pass one for each", figures.compare, result, result, names=["a"])
    refused("subject 'Oslo' is not in the prompt", figures.norms_by_segment, result, "Oslo")
    refused("there are 2 subjects and 3 prompts", figures.norms_by_segment, result, ["a", "b"])
    refused("subject is None", figures.norms_by_segment, result, None)
    refused("subject is None", figures.token_ranks_by_segment, result)
    refused(
        "of is 'x'; allowed: 'target'", figures.token_ranks_by_segment, result, SUBJECTS, of="x"
    )
    refused(
        "'tuned' was not requested",
        figures.token_ranks_by_segment,
        result,
        SUBJECTS,
        projection="tuned",
    )
    refused(
        "no answer_rank was measured: .*measures=", figures.token_ranks_by_segment, result,
        SUBJECTS, of="answer",
    )  # fmt: skip

    def loss(logits: Any, tokens: Any) -> Any:
        return -logits[:, -1].log_softmax(-1)[:, 7]

    aimless = blt.backward_lens(facts_model, "Rome is in", objective=loss)
    refused("has no target to rank; pass target=", figures.target_ranks, aimless)
    refused("no target_rank was measured", figures.token_ranks_by_segment, aimless, "Rome")


@pytest.mark.usefixtures("as_for_a_user")
def test_errors_of_tables(result: BackwardLensResult) -> None:
    def refused(message: str, function: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(InputError, match=message):
            function(*args, **kwargs)

    cells = result.to_df(SUBJECTS)
    norms, ranks = by_segment.norms_by_segment(cells), by_segment.token_ranks_by_segment(cells)
    for function, table in (
        (figures.norms_by_segment, norms),
        (figures.token_ranks_by_segment, ranks),
    ):
        name = f"a result, a sweep, or what analysis.{function.__name__} returned"
        refused(rf"no column .*'of'.*; pass {name}", function, cells)
        refused(f"the table has no rows; pass {name}", function, table.iloc[:0])
        refused("'W_Q' is not in this table; it has W_in, W_out", function, table, None, "W_Q")
        refused("subject is 'Rome', but the table has its segments", function, table, "Rome")
        refused("scale is 'log2'", function, table, scale="log2")
        refused("backend is 'bokeh'", function, table, backend="bokeh")
    refused("of is 'input'; allowed: 'vjp'\n", figures.norms_by_segment, norms, of="input")
    refused(
        "of is 'answer'; allowed: 'target'\n", figures.token_ranks_by_segment, ranks, of="answer"
    )
    refused(
        "projection is 'tuned'; allowed: 'logit_lens'\n", figures.token_ranks_by_segment, ranks,
        projection="tuned",
    )  # fmt: skip
    gradients = result.capture.gradient_df()
    refused("'W_Q' is not in this table", figures.gradient_ranks, gradients, ["W_in", "W_Q"])
    refused(r"matrices is \[\]; pass some of W_in, W_out", figures.gradient_ranks, gradients, [])
    refused("no column 'n_tokens'.* result.capture.gradient_df", figures.gradient_ranks, cells)
    refused("no column 'neuron', .*analysis.neuron_ov", figures.neuron_overlap, cells)
    refused("no column 'overlap'", figures.neuron_overlap, result.capture.neuron_df("W_in", 0))
    refused("no column 'learning_rate', .*analysis.step", figures.step_changes, cells)
    refused("the table is a BackwardLensResult", figures.step_changes, result)
    refused("scale is 'log2'", figures.step_changes, STEPS, scale="log2")
    refused("backend is 'bokeh'", figures.neuron_overlap, overlaps(result), backend="bokeh")


# ------------------------------------------------------------------------------------ descriptions


def luminance(color: str) -> float:
    """Relative luminance, as WCAG defines it."""
    channels = [value / 255 for value in bytes.fromhex(color[1:])]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_ordered_colours_get_darker_and_differ_for_48_layers() -> None:
    for stops in (SEQUENTIAL, ORDERED):
        lightness = [luminance(color) for color in stops]
        assert lightness == sorted(lightness, reverse=True)
    half = [luminance(color) for color in DIVERGING]
    assert half[:4] == sorted(half[:4])
    assert half[3:] == sorted(half[3:], reverse=True)
    scale = Colors.of_order(range(48), "layer")
    assert len({scale.at(layer) for layer in range(48)}) == 48
    assert (scale.at(0), scale.at(47), scale.at(99)) == (ORDERED[0], ORDERED[-1], ORDERED[-1])


@pytest.mark.parametrize(
    ("norms", "low", "high", "ticks"),
    [
        ([0.01, 0.5], 0.01, 0.5, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
        ([1e-9, 4.0], 0.004, 4.0, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
        ([3.0, 3.0], 0.3, 3.0, (0.5, 1.0, 2.0)),
    ],
)
def test_scales_of_norms(norms: list[float], low: float, high: float, ticks: tuple) -> None:
    scale = Colors.of_norms(norms, "norm", is_log=True)
    assert (scale.low, scale.high, scale.ticks) == (pytest.approx(low), high, ticks)


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3])]
)
def test_rows_have_at_most_three_charts(count: int, rows: list[int]) -> None:
    line = Line("a", (0.0, 1.0), (1.0, 2.0), "#000000")
    charts = tuple(Lines((line,), Axis("x"), Axis("y"), title=str(i)) for i in range(count))
    places = [(row, column) for row, size in enumerate(rows) for column in range(size)]
    drawn = draw_plotly.draw(Grid(charts, "several"))
    assert drawn.layout.width <= 1700
    numbers = [""] + [str(number) for number in range(2, count + 1)]
    left = [drawn.layout[f"xaxis{number}"].domain[0] for number in numbers]
    up = [drawn.layout[f"yaxis{number}"].domain for number in numbers]
    tops = [top for _, top in up]
    assert placed(left, [-top for top in tops]) == places
    assert [(note.x, note.y) for note in drawn.layout.annotations] == list(
        zip(left, tops, strict=True)
    )
    # Below each row there is room for its axis and the titles of the next one.
    for bottom, top in pairwise(sorted({edge for domain in up for edge in domain})[1:-1]):
        assert (top - bottom) * drawn.layout.height > 70
    figure = draw_matplotlib.draw(Grid(charts, "several"))
    figure.canvas.draw()
    boxes = [axes.get_position() for axes in figure.axes]
    assert placed([round(box.x0, 2) for box in boxes], [-round(box.y1, 2) for box in boxes]) == (
        places
    )
    legends = [axes.get_legend() is not None for axes in figure.axes]
    assert legends == [place == (0, rows[0] - 1) for place in places]


def placed(left: list[float], down: list[float]) -> list[tuple[int, int]]:
    """Row and column of each chart."""
    rows, columns = sorted(set(down)), sorted(set(left))
    return [(rows.index(y), columns.index(x)) for x, y in zip(left, down, strict=True)]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.004, 7.0), ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"]),
        ((2e-12, 3.0), ["1e-12", "1e-10", "1e-08", "1e-06", "0.0001", "0.01", "1"]),
    ],
)
def test_logarithmic_ticks_are_plotlys_round_numbers(
    values: tuple[float, float], ticks: list[str]
) -> None:
    line = Line("a", (0.0, 1.0), values, "#000000")
    figure = draw_matplotlib.draw(Grid((Lines((line,), Axis("x"), Axis("y", is_log=True)),), "t"))
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    seen = [t.get_text() for t in axis.get_ticklabels() if low <= t.get_position()[1] <= high]
    assert seen == ticks
    assert not len(axis.get_minorticklocs())


def test_only_zeros_can_be_drawn() -> None:
    scale = Colors.of_norms([], "norm", is_log=True)
    blank = Heatmap(((math.nan,),), (("none",),), Axis("x", ("a",)), Axis("y", ("0",)), scale)
    for drawing in (draw_plotly, draw_matplotlib):
        assert np.isnan(heatmaps(drawing.draw(Grid((blank,), "blank")))[0]).all()


def test_a_gradient_of_zero_can_be_drawn(facts_model: Any) -> None:
    def nothing(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (logits * 0).sum((1, 2))

    result = blt.backward_lens(facts_model, "é is", " Paris", objective=nothing, layers=[4])
    for backend in BACKENDS:
        drawn = every_figure(result, backend)
        assert np.isnan(heatmaps(drawn["norms"])[0]).all()
        assert {len(x) for x, _ in lines(drawn["singular_values"]).values()} == {0}
        if backend == "matplotlib":
            for figure in drawn.values():
                figure.canvas.draw()


def test_the_last_label_stays_if_not_all_fit() -> None:
    axis = Axis("token", tuple(map(str, range(100))))
    places = [place for place, _ in axis.ticks(390)]
    assert len(places) <= 30
    assert places[-1] == 99
    assert {right - left for left, right in pairwise(places)} == {4}
    assert axis.full_title(390) == "token, one of 4 labelled"
    assert axis.full_title(1300) == "token"
    assert [label for _, label in Axis("x", ("a", "b")).ticks(30)] == ["a", "b"]


@pytest.mark.parametrize("words", [3, 38, 150])
def test_every_token_is_labelled_unless_the_axis_says_how_many(
    facts_model: Any, words: int
) -> None:
    result = blt.backward_lens(facts_model, "Rome" + " is" * words, " Paris", matrices="W_out")
    tokens = [token.strip() for token in result.capture.str_tokens[0]]
    every = 3 if words == 150 else 1
    name = "token, one of 3 labelled" if words == 150 else "token"
    expected = tokens[::-1][::every][::-1]
    axis = figures.norms(result).layout.xaxis
    assert [html.unescape(label) for label in axis.ticktext] == expected
    assert axis.title.text == name
    figure = figures.norms(result, backend="matplotlib")
    figure.canvas.draw()
    drawn = figure.axes[0]
    labels = drawn.get_xticklabels()
    assert [label.get_text() for label in labels] == expected
    assert drawn.get_xlabel() == name
    # Labels at 45 degrees have overlapping boxes, so their distance is compared with the font.
    starts = [drawn.transData.transform((place, 0))[0] for place in drawn.get_xticks()]
    height = labels[0].get_fontsize() * figure.dpi / 72
    assert min(right - left for left, right in pairwise(starts)) > height
    rows = figures.neuron_similarity(result, "W_out", 4).layout.yaxis
    assert [html.unescape(label) for label in rows.ticktext] == (
        tokens[::-1][:: 4 if words == 150 else 1][::-1]
    )


def test_rotated_labels_stay_above_the_next_chart() -> None:
    labels = tuple("abcdefghijkl" for _ in range(40))
    figure = figures.layer_maps(
        {"one": torch.ones(3, 40), "two": torch.ones(3, 40)}, labels, "share"
    )
    layout = figure.layout
    assert layout.xaxis.tickangle == -90
    inner = layout.height - layout.margin.t - layout.margin.b
    gap = (layout.yaxis.domain[0] - layout.yaxis2.domain[1]) * inner
    # Labels, the axis's title and the title of the next chart.
    assert gap >= 12 * 6 + 20 + 20


# ----------------------------------------------------------------------------- prompts and answers


def test_titles_say_which_prompt(result: BackwardLensResult, facts_model: Any) -> None:
    expected = "prompt 3 of 3: “Rome is in” → “Paris”"
    for backend in BACKENDS:
        for figure in (
            figures.norms(result, batch=2, backend=backend),
            figures.target_ranks(result, batch=2, backend=backend),
            figures.singular_values(result, batch=2, backend=backend),
        ):
            assert titles(figure)[-1] == expected
        assert expected in titles(
            figures.neuron_similarity(result, "W_out", 4, batch=2, backend=backend)
        )
    pair = figures.compare(result, result, batch=(2, 0)).layout.annotations
    assert pair[0].text == expected
    assert pair[1].text.replace("<br>", " ") == (
        "prompt 1 of 3: “Lionel Messi plays for” → “Paris”"
    )
    one = blt.backward_lens(facts_model, "Rome is in", " Paris", matrices="W_out")
    assert titles(figures.norms(one))[1] == "“Rome is in” → “Paris”"
    text = blt.backward_lens(
        facts_model, "Rome is" + " in" * 40, matrices="W_out", objective=blt.next_token_loss()
    )
    (shown,) = titles(figures.norms(text))[1:]
    assert shown.startswith("“…")
    assert shown.endswith("in in”")
    assert len(shown) < 90


ANSWER = " the city of Rome"


@pytest.fixture(scope="module")
def answer(facts_model: Any) -> BackwardLensResult:
    """An answer of several tokens after the second of two prompts of different lengths."""
    return blt.backward_lens(
        facts_model, PROMPTS[1:], objective=blt.sequence_nll([ANSWER, " Paris"]), layers=[3, 7]
    )


def boundaries(figure: Any) -> list[tuple[list[float], list[float]]]:
    """Ends of the lines across the heatmaps, x and y."""
    if hasattr(figure, "data"):
        return [([line.x0, line.x1], [line.y0, line.y1]) for line in figure.layout.shapes]
    lines = [line for axes in figure.axes for line in axes.lines]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_line_separates_prompt_and_answer(
    answer: BackwardLensResult, facts_model: Any, backend: Any
) -> None:
    # The last token of an answer is not part of the input.
    asked = len(blt.backward_lens(facts_model, PROMPTS[1], " Rome").capture.str_tokens[0])
    tokens = answer.capture.str_tokens[0]
    assert len(tokens) > asked + 1
    assert "".join(tokens[asked:]) in ANSWER
    across, whole = ([asked - 0.5] * 2, [0, 1]), ([0, 1], [asked - 0.5] * 2)
    columns = figures.norms(answer, backend=backend)
    rows = figures.neuron_similarity(answer, "W_out", 3, backend=backend)
    assert boundaries(columns) == [across]
    assert boundaries(rows) == [whole]
    if backend == "plotly":
        assert columns.layout.xaxis.title.text == "token, answer right of the line"
        assert rows.layout.yaxis.title.text == "token, answer below the line"
        assert rows.layout.yaxis.autorange == "reversed"
    assert titles(columns)[1] == (
        "prompt 1 of 2: “The Eiffel Tower is in the city of” → “the city of Rome”"
    )
    # An answer of one token is not in the input.
    assert boundaries(figures.norms(answer, batch=1, backend=backend)) == []
    one = figures.norms(answer, batch=1)
    assert one.layout.xaxis.title.text == "token"
    assert len(boundaries(figures.compare(answer, answer, batch=(0, 1), backend=backend))) == 1


def test_the_line_is_between_the_positions_that_are_shown(facts_model: Any) -> None:
    objective = blt.sequence_nll(ANSWER)
    whole = blt.backward_lens(facts_model, PROMPTS[1], objective=objective, layers=3)
    asked = int(whole.capture.prompt_lengths[0])
    for positions, at in (
        ([asked - 1, asked], 0.5),
        ([2, 3, asked, asked + 1], 1.5),
        ([2, 3], None),
        ([asked, asked + 1], None),
    ):
        some = blt.backward_lens(
            facts_model, PROMPTS[1], objective=objective, layers=3, positions=positions
        )
        found = boundaries(figures.norms(some))
        assert [x for x, _ in found] == ([] if at is None else [[at, at]])


def test_ranks_are_those_of_each_positions_target(
    answer: BackwardLensResult, facts_model: Any
) -> None:
    figure = figures.target_ranks(answer)
    assert titles(figure)[0] == "W_out: rank of each position's target by layer"
    tokens, asked = answer.capture.str_tokens[0], int(answer.capture.prompt_lengths[0])
    said = [*tokens[asked:], " Rome"]  # what follows each token from the prompt's last on
    wanted = [said[0]] * (asked - 1) + said
    drawn = [line for line in figure.data if line.name]
    assert [html.unescape(line.name) for line in drawn] == [
        f"{position}: {token.strip()} → {target.strip()}"
        for position, (token, target) in enumerate(zip(tokens, wanted, strict=True))
    ]
    assert [line.line.width > 2 for line in drawn] == [
        position >= asked - 1 for position in range(len(tokens))
    ]
    vocabulary = facts_model.tokenizer
    for position, (line, target) in enumerate(zip(drawn, wanted, strict=True)):
        (token,) = vocabulary.encode(target, add_special_tokens=False)
        update = -answer.capture["W_out", 3].vjps[0, position]
        scores = facts_model.unembed(facts_model.ln_final(update[None, None]))[0, 0]
        close = 1e-5 * scores.abs().max()
        fewest = int((scores > scores[token] + close).sum())
        most = int((scores >= scores[token] - close).sum()) - 1
        assert fewest <= line.y[0] - 1 <= most
        rank = f"rank {line.y[0] - 1:.0f} of {target.strip()}"
        assert html.unescape(line.hovertext[0]).endswith(f"layer 3<br>{rank}")


def test_the_last_position_of_a_text_has_no_target(facts_model: Any) -> None:
    text = blt.backward_lens(facts_model, PROMPTS[2], objective=blt.next_token_loss(), layers=[3])
    for backend in BACKENDS:
        found = lines(figures.target_ranks(text, backend=backend))
        names = list(found)
        assert names[-2:] == ["3: is → in", "4: in"]
        assert [math.isnan(places[0]) for _, places in found.values()] == [False] * 4 + [True]


def test_what_the_update_adds_comes_first(facts_model: Any) -> None:
    result = blt.backward_lens(facts_model, PROMPTS[2], " Paris", matrices="all")
    order = ["W_out", "W_in", "W_O", "W_Q", "W_K", "W_V"]
    shown = [note.text for note in figures.gradient_ranks(result).layout.annotations]
    assert shown == order
    asked = figures.gradient_ranks(result, ["W_V", "W_out"]).layout.annotations
    assert [note.text for note in asked] == ["W_V", "W_out"]


def test_segments_of_chats_are_their_turns(facts_model: Any, monkeypatch: Any) -> None:
    template = "{{ messages[0]['content'] }} A:"
    monkeypatch.setattr(facts_model.tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "Messi plays for whom?"}]
    result = blt.backward_lens(facts_model, chat, " Paris", matrices="W_out")
    for figure in (figures.norms_by_segment(result), figures.token_ranks_by_segment(result)):
        names = [line.name for line in figure.data if line.name]
        assert set(names) == {"template", "user", "last token"}


def test_ranks_by_segment_name_the_targets_of_positions(facts_model: Any) -> None:
    prompt, subject = "Lionel Messi plays for", "Lionel Messi"
    for objective, whose in (
        (blt.target_nll(" Paris"), "the target"),
        (blt.next_token_loss(), "each position's target"),
    ):
        result = blt.backward_lens(facts_model, prompt, objective=objective)
        figure = figures.token_ranks_by_segment(result, subject)
        assert figure.layout.title.text == f"W_out: rank of {whose} by segment"
        assert figure.layout.yaxis.title.text == f"1 + rank of {whose} (1: top token)"
