"""Figures of similarities and of a batch's main directions, in both libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from figure_contents import axis_labels, heatmaps

import backward_lens_tl as blt
from backward_lens_tl import figures
from backward_lens_tl.capture.similarity import Similarity
from backward_lens_tl.errors import InputError

BACKENDS = pytest.mark.parametrize("backend", ["plotly", "matplotlib"])
PROMPTS = ["Lionel Messi plays for", "The Eiffel Tower is in the city of", "Rome is in"]


@pytest.fixture(scope="module")
def result(facts_model: Any) -> blt.BackwardLensResult:
    return blt.backward_lens(facts_model, PROMPTS, [" Paris", " Rome", " Paris"])


@pytest.fixture(scope="module")
def table(facts_model: Any, result: Any) -> pd.DataFrame:
    return blt.analysis.principal_directions(facts_model, result, k=2)


@BACKENDS
def test_cosines(result: Any, backend: Any) -> None:
    similarity = result.capture.similarity()
    figure = figures.similarity(similarity, PROMPTS, backend=backend)
    (found,) = heatmaps(figure)
    np.testing.assert_allclose(found, similarity.cosine.numpy())
    across, down = axis_labels(figure)
    assert across == down == ["Lionel Messi pl…", "The Eiffel Towe…", "Rome is in"]


@BACKENDS
def test_chosen_prompts_in_an_order(result: Any, backend: Any) -> None:
    similarity = result.capture.similarity()
    figure = figures.similarity(similarity, rows=[2, 0], columns=[1], backend=backend)
    (found,) = heatmaps(figure)
    np.testing.assert_allclose(found, similarity.cosine[[2, 0]][:, [1]].numpy())
    assert axis_labels(figure) == (["1"], ["2", "0"])


@BACKENDS
def test_a_map_for_each_layer(result: Any, backend: Any) -> None:
    similarity = result.capture.similarity(by="layer")
    figure = figures.similarity(similarity, backend=backend)
    np.testing.assert_allclose(heatmaps(figure), similarity.cosine.numpy())
    names = (
        [note.text for note in figure.layout.annotations]
        if backend == "plotly"
        else [axes.get_title(loc="left") for axes in figure.axes[:8]]
    )
    assert names == [f"layer {layer}" for layer in range(8)]
    by_matrix = figures.similarity(result.capture.similarity(by="matrix"))
    assert [note.text for note in by_matrix.layout.annotations] == ["W_in", "W_out"]


def test_other_prompts(facts_model: Any, result: Any) -> None:
    query = blt.backward_lens(facts_model, "Obama grew up in", " Paris").capture
    similarity = result.capture.similarity(query)
    figure = figures.similarity(similarity, PROMPTS, query.prompts)
    assert axis_labels(figure)[0] == ["Obama grew up in"]
    assert axis_labels(figures.similarity(similarity, PROMPTS))[0] == ["0"]
    assert figure.data[0].hovertext[2][0].startswith("Rome is in<br>Obama grew up in<br>cosine ")


def test_a_gradient_of_zero_is_blank() -> None:
    inner = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    norms = torch.tensor([1.0, 0.0], dtype=torch.float64)
    (found,) = heatmaps(figures.similarity(Similarity(inner, norms, norms)))
    assert np.isnan(found).tolist() == [[False, True], [True, True]]


@BACKENDS
def test_directions(table: pd.DataFrame, backend: Any) -> None:
    figure = figures.principal_directions(table, PROMPTS, backend=backend)
    (found,) = heatmaps(figure)
    np.testing.assert_allclose(found, np.array(table["prompt_shares"].tolist()))
    assert found.min() < 0
    across, down = axis_labels(figure)
    assert across[2] == "Rome is in"
    last = table.iloc[-2]
    tokens = " ".join(token.strip() for token in last["top_tokens"][:3])
    assert down[-2] == f"layer 7: {100 * last['energy']:.0f} % {tokens}"
    if backend == "plotly":
        hover = figure.data[0].hovertext[0][1].split("<br>")
        assert (
            hover[0]
            == f"The Eiffel Tower is in the city of: {100 * found[0, 1]:.3g} % of the direction"
        )
        assert hover[-1].endswith(f" at {table['position'][0]} of prompt {table['prompt'][0]}")
        assert figure.layout.title.text == "W_out: main directions of the gradient"


@BACKENDS
def test_directions_of_two_matrices(
    facts_model: Any, result: Any, table: pd.DataFrame, backend: Any
) -> None:
    """Each has a map of its own, with its name."""
    reading = blt.analysis.principal_directions(facts_model, result, k=1, matrix="W_in")
    both = pd.concat([table, reading], ignore_index=True)
    figure = figures.principal_directions(both, backend=backend)
    first, second = heatmaps(figure)
    np.testing.assert_allclose(first, np.array(table["prompt_shares"].tolist()))
    np.testing.assert_allclose(second, np.array(reading["prompt_shares"].tolist()))
    if backend == "plotly":
        assert [note.text for note in figure.layout.annotations] == ["W_out", "W_in"]
        assert figure.layout.title.text == "Main directions of the gradient"
    else:
        assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["W_out", "W_in"]


def test_the_expert_of_a_direction_is_named(table: pd.DataFrame) -> None:
    figure = figures.principal_directions(table.assign(part="expert 3"))
    across, down = axis_labels(figure)
    assert across == ["0", "1", "2"]
    assert down[0].startswith("layer 0, expert 3: ")


@pytest.mark.usefixtures("as_for_a_user")
def test_arguments_that_are_not_usable(result: Any, table: pd.DataFrame) -> None:
    similarity = result.capture.similarity()
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("similarity is 'W_out'; pass Similarity", "W_out", {}),
        ("labels has 2 texts, but there are 3 prompts", similarity, {"labels": ["a", "b"]}),
        ("other_labels has 1 texts", similarity, {"other_labels": ["a"]}),
        ("prompt 3 does not exist; allowed: 0 to 2", similarity, {"rows": [3]}),
        ("columns is empty", similarity, {"columns": []}),
        ("allowed: 'plotly', 'matplotlib'", similarity, {"backend": "svg"}),
    ]
    for message, drawn, options in refused:
        with pytest.raises(InputError, match=message):
            figures.similarity(drawn, **options)
    many = Similarity(torch.ones(201, 200), torch.ones(201), torch.ones(200))
    with pytest.raises(
        InputError, match="40,200 cells; at most 40,000 are drawn, so select prompts"
    ):
        figures.similarity(many)
    figures.similarity(many, rows=range(200))
    with pytest.raises(InputError, match="labels has 1 texts, but there are 3 prompts"):
        figures.principal_directions(table, ["a"])
    with pytest.raises(InputError, match="no column 'direction'"):
        figures.principal_directions(table.drop(columns="direction"))
