"""Widgets: contents in a real browser, and inputs that must not break them."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib import request

import nbformat
import pytest
import torch
from browser import Opened, opened
from circuitsvis import activations, attention, tokens, topk_tokens
from circuitsvis.tokens import colored_tokens_multi
from circuitsvis.utils.render import RenderedHTML
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from notebook_pages import OFFLINE
from playwright.sync_api import Browser, Locator, expect
from view_cases import NASTY, PARIS, make_result, parsed, with_faint_cells, without_target

import backward_lens_tl as blt
from backward_lens_tl.capture.hook_points import AttentionGradient
from backward_lens_tl.errors import BackwardLensError, InputError, WidgetError
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views import widgets
from backward_lens_tl.views.widgets import library
from backward_lens_tl.views.widgets.by_token import number_below, power_for_decimals
from backward_lens_tl.views.widgets.library import Carrier, Execution
from backward_lens_tl.views.widgets.token_table import round_number_above
from backward_lens_tl.views.widgets.widget import Widget, literal, make_widget

JOINER = "\u2060"
LIBRARY = "TopkTokens:()=>"  # once in CircuitsVis's JavaScript


def with_attention(result: BackwardLensResult, heads: int = 2) -> BackwardLensResult:
    """Random maps of both signs, causal; padding is one position longer than the prompt."""
    batch, pos = result.capture.mask.shape
    random = torch.Generator().manual_seed(1)
    maps = torch.randn(batch, heads, pos + 1, pos + 1, generator=random).tril() * 1e-4
    attention = {layer: AttentionGradient(maps, 4, is_patchable=True) for layer in result.layers}
    return replace(result, capture=replace(result.capture, attention=attention))


def with_reading(result: BackwardLensResult, **changes: Any) -> BackwardLensResult:
    return replace(result, readings=(replace(result.readings[0], **changes),))


def with_norms_times(result: BackwardLensResult, factor: float) -> BackwardLensResult:
    gradients = {
        key: replace(gradient, vjps=gradient.vjps * factor)
        for key, gradient in result.capture.gradients.items()
    }
    return replace(result, capture=replace(result.capture, gradients=gradients))


def plain(text: str) -> str:
    """A widget's text without its zero-width characters."""
    return re.sub("[\u2060\u2068\u2069]", "", text)


def seen(token: str) -> str:
    return plain(literal(token))


def texts(found: Locator) -> list[str]:
    return [plain(text).replace("\xa0", " ") for text in found.all_text_contents()]


@pytest.fixture(scope="module")
def result() -> BackwardLensResult:
    return with_attention(make_result(pos=len(NASTY)))


@pytest.fixture(scope="module")
def four(result: BackwardLensResult) -> list[Widget]:
    return [
        widgets.norms(result),
        widgets.top_tokens(result),
        widgets.quantities(result),
        widgets.reversed_attention(result, 3),
    ]


# --- texts and numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("token", NASTY)
def test_a_text_is_literal_when_set_as_html_or_as_text(token: str):
    text = literal(token)
    as_html = parsed(f"<p>{text}</p>").children
    assert [node.text for node in as_html] == [text]
    assert as_html[0].tags() == {"p"}
    assert not re.search(r"\s", text)  # CircuitsVis drops some of it


@pytest.mark.parametrize("factor", [1.0, 1e-7, 1e9])
def test_norms_are_scaled_by_one_power_of_ten_that_every_label_names(factor: float):
    result = with_norms_times(make_result(), factor)
    widget = widgets.norms(result)
    expected = result.norms("W_out")[:, 0].T
    shown = torch.tensor(widget.props["values"])
    powers = {re.search(r" ×1e(-?\d+)$", label) for label in widget.props["labels"]}
    power = 0 if powers == {None} else int(powers.pop()[1])
    assert [label.split(" ")[0] for label in widget.props["labels"]] == [
        f"L{layer}" for layer in result.layers
    ]
    # Six significant digits are kept, and six decimals shown.
    torch.testing.assert_close(shown * 10.0**power, expected, rtol=1e-5, atol=0)
    assert all(float(f"{value:.6f}") >= 1e-3 for value in shown[expected > 0].tolist())
    assert (power == 0) == (factor == 1)
    bounds = widget.props["positiveBounds"]
    assert bounds == [pytest.approx(float(shown.max()))] * len(result.layers)


@pytest.mark.parametrize(
    ("norms", "power"),
    [([], 0), ([0.0], 0), ([1.0, 0.001], 0), ([5e-4, 2e-6], -4), ([5e-4, 2e-9], -6),
     ([5e-4, 2e-20], -7), ([3e8, 1e5], 8), ([1.0, 1e-5], -2)],
)  # fmt: skip
def test_the_power_of_ten(norms: list[float], power: int):
    assert power_for_decimals(norms) == power


@pytest.mark.parametrize(
    ("largest", "factor"),
    [(0.0, 1), (0.3, 1), (1.0, 1), (12.0, 20), (2.0, 2), (60.0, 100), (0.013, 0.02)],
)
def test_the_round_number_above(largest: float, factor: float):
    assert round_number_above(largest) == factor


@pytest.mark.parametrize(
    ("scores", "number"),
    [([], -1), ([2.0], -1), ([-1.0], -10), ([-32.0], -100), ([-math.inf, -32.0], -100)],
)
def test_the_number_below(scores: list[float], number: float):
    assert number_below(scores) == number


def columns(widget: Widget, sample: int, layer: int, side: str) -> list[list[tuple[str, float]]]:
    """Tokens and values of a table of top tokens, by column."""
    words = widget.props["tokens"][sample]
    rows = zip(
        widget.props[f"{side}Idxs"][sample][layer],
        widget.props[f"{side}Vals"][sample][layer],
        strict=True,
    )
    pairs = [
        [(plain(words[index]), value) for index, value in zip(*row, strict=True)] for row in rows
    ]
    return [list(column) for column in zip(*pairs, strict=True)]


def test_top_tokens_match_the_result_and_zero_cells_have_a_reason(result: BackwardLensResult):
    widget = widgets.top_tokens(result)
    assert [label.split()[0] for label in widget.props["sampleLabels"]] == ["W_out", "W_in"]
    zero = 0
    for sample, matrix in enumerate(("W_out", "W_in")):
        factor = float(widget.props["sampleLabels"][sample].split("×")[1].rstrip(")"))
        for row, layer in enumerate(result.layers):
            top, bottom = (columns(widget, sample, row, side) for side in ("topk", "bottomk"))
            for column, cell in enumerate(result.cells(matrix, layer)):
                if cell.is_zero:
                    zero += 1
                    assert top[column] == [("· adds nothing", 0), ("·", 0), ("·", 0)]
                    assert bottom[column] == [("·", 0)] * 3
                    continue
                assert_entries(top[column], cell.top, factor)
                assert_entries(bottom[column][::-1], cell.bottom, factor)
    assert zero == 2 * (len(NASTY) - 1)


def assert_entries(shown: list[tuple[str, float]], expected: Any, factor: float) -> None:
    assert [text for text, _ in shown] == [seen(entry.token) for entry in expected]
    scores = [value * factor for _, value in shown]
    assert scores == pytest.approx([entry.score for entry in expected], rel=1e-5)
    assert all(abs(value) <= 1 for _, value in shown)


def test_a_small_vocabulary_is_shown_at_both_ends():
    vocab = (PARIS, " a", " b", " c", " d")
    result = make_result(vocab=vocab, k=4)
    widget = widgets.top_tokens(result)
    for side in ("topk", "bottomk"):
        for column, cell in zip(columns(widget, 0, 0, side), result.cells("W_out", 0), strict=True):
            entries = cell.top if side == "topk" else cell.bottom[::-1]
            assert [text for text, _ in column] == [seen(entry.token) for entry in entries]


def with_scores(
    result: BackwardLensResult, top: list[float], bottom: list[float]
) -> BackwardLensResult:
    """The scores of `W_out` in layer 0 at position 0."""
    readout = result.readout("W_out")
    ends = {
        "top_scores": readout.top_scores.clone(),
        "bottom_scores": readout.bottom_scores.clone(),
    }
    for scores, changed in zip(ends.values(), (top, bottom), strict=True):
        scores[0, 0, 0] = torch.tensor(changed)
    return with_reading(
        result, readouts={**result.readings[0].readouts, "W_out": replace(readout, **ends)}
    )


def strict(widget: Widget) -> Any:
    """Data that the widget's script passes to CircuitsVis, read as JSON without extensions."""
    (text,) = re.findall(r'(?m)^\}\)\("[^"]+", (.*)\);$', widget.fragment)
    return json.loads(text, parse_constant=pytest.fail)


MASKED = -math.inf


@pytest.mark.parametrize(
    ("top", "bottom"),
    [
        # Some tokens are masked, as by a projection that puts -inf in their place.
        ([5, 3, 1], [MASKED] * 3),
        ([5, 3, 1], [MASKED, -4, -3]),
        ([math.inf, 3, 1], [-4, -3, -2]),
        # Masked tokens among the top tokens, too.
        ([5, 3, MASKED], [MASKED] * 3),
        ([MASKED] * 3, [MASKED] * 3),
        ([math.inf] * 3, [2, math.inf, math.inf]),
        ([5, 1, 1], [-4, 1, 1]),
    ],
)
def test_infinite_and_tied_scores(top: list[float], bottom: list[float]):
    result = with_scores(make_result(), top, bottom)
    widget = widgets.top_tokens(result)
    cell = result.cell("W_out", 0, 0)
    label = widget.props["sampleLabels"][0]
    factor = float(label.split("×")[1].rstrip(")"))
    assert factor <= 20  # of the finite scores
    for side, entries in (("topk", cell.top), ("bottomk", cell.bottom[::-1])):
        column = columns(widget, 0, 0, side)[0]
        assert [text for text, _ in column] == [seen(entry.token) for entry in entries]
        wanted = [
            entry.score / factor if math.isfinite(entry.score) else math.copysign(10, entry.score)
            for entry in entries
        ]
        assert [score for _, score in column] == pytest.approx(wanted, rel=1e-5)
    said = "A score of ∞ or −∞ is shown as 10 or −10."
    assert (said in caption(widget)) == any(map(math.isinf, top + bottom))
    assert columns(widget, 0, 1, "topk") == columns_alone(result, 1, factor)
    assert strict(widget) == widget.props


def columns_alone(result: BackwardLensResult, layer: int, factor: float) -> list[Any]:
    """The top tokens of a layer whose scores are finite and distinct."""
    return [
        [(seen(entry.token), float(f"{entry.score / factor:.6g}")) for entry in cell.top]
        for cell in result.cells("W_out", layer)
    ]


def test_an_infinite_top_score_is_a_number_that_the_quantity_names():
    result = make_result()
    finite = result.readout("W_out").top_scores[..., 0]
    assert 10 <= finite.max() < 100
    for scores, name in (
        ([math.inf, 3, 1], "top score (-1: no score, 100: ∞)"),
        ([MASKED] * 3, "top score (-1: no score, -10: −∞)"),
        ([5, 3, 1], "top score (-1: no score)"),
    ):
        widget = widgets.quantities(with_scores(result, scores, [MASKED] * 3))
        assert widget.props["secondDimensionLabels"][-1] == name
        shown = torch.tensor(widget.props["activations"])[..., -1]
        numbers = {math.inf: 100.0, MASKED: -10.0}
        assert shown[0, 0] == numbers.get(scores[0], scores[0])
        torch.testing.assert_close(shown[1:, 0], finite[0, 0, 1:], rtol=1e-5, atol=0)
        assert strict(widget) == widget.props


def test_infinite_numbers_are_not_written_as_json():
    with pytest.raises(ValueError, match="JSON"):
        library.script_json({"score": math.inf})


def test_columns_name_their_positions_if_some_are_missing():
    result = make_result(pos=5)
    at_two = {
        name: type(readout)(*(value[:, :, [2, 4]] for value in vars(readout).values()))
        for name, readout in result.readings[0].readouts.items()
    }
    chosen = replace(with_reading(result, readouts=at_two), positions=torch.tensor([[2, 4]]))
    widget = widgets.top_tokens(chosen, matrices="W_out")
    assert widget.props["thirdDimensionName"] == "Column"
    assert "Columns: 0 “<b>” (position 2), 1 “⏎” (position 4)" in caption(widget)
    top = columns(widget, 0, 0, "topk")
    assert [text for text, _ in top[1]] == [
        seen(token) for token in result.top_tokens("W_out", 0, 4)
    ]
    assert {column[0][0] for column in top[2:]} == {"· no position"}
    # CircuitsVis shows one column only if there is one sample.
    assert widget.props["sampleLabels"][1] == "the prompt's tokens"
    assert [column[0][0] for column in columns(widget, 1, 0, "topk")][:2] == ["<b>", "⏎"]


def test_captions_name_the_positions_if_some_are_missing():
    result = make_result(pos=5)
    for show in (widgets.norms, widgets.quantities):
        assert "positions" not in caption(show(result))
        some = replace(
            with_reading(
                result,
                readouts={
                    name: type(readout)(*(v[:, :, [4, 1]] for v in vars(readout).values()))
                    for name, readout in result.readings[0].readouts.items()
                },
            ),
            positions=torch.tensor([[4, 1]]),
        )
        said = "Of the prompt's 5 positions these were analysed: 4 “⏎”, 1 “<s>”"
        assert caption(show(some)).endswith(said)


def caption(widget: Widget) -> str:
    html = widget.caption.replace("<q>", "“").replace("</q>", "”").replace("<br>", " ")
    return plain(parsed(f"<p>{html}</p>").text)


def test_faint_cells_are_counted():
    faint = with_faint_cells(make_result(), 0.1)
    assert "are read from vectors shorter than 0.1" in caption(widgets.top_tokens(faint))
    assert "italics" not in caption(widgets.top_tokens(faint))


def quantity_of(cell: Cell, name: str) -> float:
    norms = {"‖δ_i‖": cell.norm, "‖x_i‖": cell.input_norm}
    norms["‖x_i‖·‖δ_i‖"] = cell.norm * cell.input_norm
    if name in norms:
        return norms[name]
    if cell.is_zero:
        return float(re.search(r"(-\d+): no ", name)[1])
    return cell.target_rank if name.startswith("rank") else cell.top[0].score


def test_quantities_match_the_result_and_missing_ones_are_distinct(result: BackwardLensResult):
    props = widgets.quantities(result).props
    names = props["secondDimensionLabels"]
    assert [name.split(" (")[0] for name in names] == [
        "‖δ_i‖", "‖x_i‖·‖δ_i‖", "‖x_i‖", "rank of ␣Paris", "top score",
    ]  # fmt: skip
    for row, layer in enumerate(result.layers):
        for column, cell in enumerate(result.cells("W_out", layer)):
            expected = [quantity_of(cell, name) for name in names]
            assert props["activations"][column][row] == pytest.approx(expected, rel=1e-5)
    values = torch.tensor(props["activations"])
    assert values.isfinite().all()
    missing = result.is_zero("W_out")[:, 0].T
    assert torch.equal(values[..., 3], result.target_rank("W_out")[:, 0].T.masked_fill(missing, -1))
    scores = result.readout("W_out").top_scores[:, 0, :, 0].T
    absent = number_below(scores[~missing].tolist())
    torch.testing.assert_close(
        values[..., 4], scores.masked_fill(missing, absent), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("quantity", ["norm", "write_norm", "input_norm"])
def test_the_norms_are_those_of_the_caption(result: BackwardLensResult, quantity: Any):
    widget = widgets.norms(result, "W_in", quantity=quantity)
    power = float(re.search(r"×(1e-?\d+)$", f"{widget.props['labels'][0]} ×1e0")[1])
    for row, layer in enumerate(result.layers):
        gradient = result.capture["W_in", layer]
        for position in range(len(NASTY)):
            x, vjp = gradient.inputs[0, position].double(), gradient.vjps[0, position].double()
            term = {"norm": vjp, "write_norm": torch.outer(x, vjp), "input_norm": x}[quantity]
            shown = widget.props["values"][position][row] * power
            assert shown == pytest.approx(term.norm().item(), rel=1e-5)
    name = {"norm": "‖δ_i‖", "write_norm": "‖x_i‖·‖δ_i‖, ", "input_norm": "‖x_i‖"}
    assert caption(widget).startswith(f"W_in, by token and layer: {name[quantity]}")


def test_without_a_target_there_is_no_rank():
    labels = widgets.quantities(without_target(make_result())).props["secondDimensionLabels"]
    assert not any("rank" in label for label in labels)


def test_captions_say_which_prompt():
    several = with_attention(make_result(batch=3))
    for show in (
        widgets.norms,
        widgets.top_tokens,
        widgets.quantities,
        lambda result, batch: widgets.reversed_attention(result, 0, batch=batch),
    ):
        said = caption(show(several, batch=1))
        assert " prompt 2 of 3: “" in said
        assert "” → “Paris”" in said
        alone = caption(show(with_attention(make_result()), batch=0))
        assert " of 1" not in alone
        assert "” → “Paris”" in alone


@pytest.fixture(scope="module")
def answer(facts_model: Any) -> BackwardLensResult:
    """An answer of several tokens, of which the last one is not in the input."""
    objective = blt.sequence_nll(" the city of Rome")
    return blt.backward_lens(facts_model, "Rome is in", objective=objective, matrices="all")


def test_widgets_show_where_the_answer_begins(answer: BackwardLensResult):
    asked, tokens = 5, answer.capture.str_tokens[0]
    assert tokens[asked - 2 :] == (" is", " in", " the", " city", " of")[: len(tokens) - asked + 2]
    for show in (widgets.norms, widgets.quantities):
        html, said = show(answer).fragment, caption(show(answer))
        rule = (
            rf"#circuits-vis-\w+ .colored-tokens > span:nth-of-type\({asked + 1}\) {{ border-left"
        )
        assert len(re.findall(rule, html)) == 1
        assert "“Rome is in” → “the city of Rome” The answer begins at the orange line." in said
        plainly = show(make_result())
        assert "nth-of-type" not in plainly.fragment
        assert "The answer begins" not in caption(plainly)
    said = caption(widgets.reversed_attention(answer, 3))
    assert f"The answer begins at position {asked}, “{seen(tokens[asked])}”." in said
    assert "The answer begins" not in caption(
        widgets.reversed_attention(with_attention(make_result()), 3)
    )


def test_each_position_has_its_own_target(answer: BackwardLensResult):
    said = caption(widgets.top_tokens(answer))
    assert f"4 “␣in” → “␣the”, answer: 5 “␣the” → “{seen(answer.capture.str_tokens[0][6])}”" in said
    assert "→ “␣Rome”; → the token that a position should say" in said
    names = widgets.quantities(answer).props["secondDimensionLabels"]
    assert "rank of the token that the position should say (0 leads, -1: no rank)" in names
    ranks = torch.tensor(widgets.quantities(answer).props["activations"])[:, :, 3]
    expected = answer.target_rank("W_out")[:, 0].T.masked_fill(answer.is_zero("W_out")[:, 0].T, -1)
    assert torch.equal(ranks, expected)
    assert "→ the token" not in caption(widgets.top_tokens(make_result()))


def test_reversed_attention_has_no_padding_and_a_symmetric_scale(result: BackwardLensResult):
    props = widgets.reversed_attention(result, -1).props
    shown = torch.tensor(props["attention"])
    assert shown.shape == (2, len(NASTY), len(NASTY))
    expected = result.capture.reversed_attention(3)[0, :, : len(NASTY), : len(NASTY)]
    torch.testing.assert_close(shown, expected, rtol=1e-5, atol=0)
    assert (
        props["maxValue"]
        == -props["minValue"]
        == pytest.approx(float(expected.abs().max()), rel=1e-5)
    )
    assert props["attentionHeadNames"] == ["L3H0", "L3H1"]
    assert props["maskUpperTri"]
    assert len(max(map(plain, props["tokens"]), key=len)) <= 24


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("stranger", [None, torch.zeros(2)])
def test_other_types_than_a_result_are_refused(stranger: Any):
    for show in (
        widgets.norms,
        widgets.top_tokens,
        widgets.quantities,
        lambda result: widgets.reversed_attention(result, 0),
    ):
        with pytest.raises(InputError, match=f"a {type(stranger).__name__}; pass what backward"):
            show(stranger)


@pytest.mark.usefixtures("as_for_a_user")
def test_requests_outside_the_result_are_refused(result: BackwardLensResult):
    for ask in (widgets.norms, widgets.quantities):
        with pytest.raises(InputError, match="'W_K' is not in this result; it has W_in, W_out"):
            ask(result, "W_K")
        with pytest.raises(InputError, match="prompt 1 does not exist; allowed: 0 to 0"):
            ask(result, batch=1)
    with pytest.raises(InputError, match="'W_K' is not in this result"):
        widgets.top_tokens(result, matrices=["W_in", "W_K"])
    with pytest.raises(InputError, match=r"matrices is \[\]; pass some of W_in, W_out"):
        widgets.top_tokens(result, matrices=[])
    with pytest.raises(InputError, match="prompt 7 does not exist"):
        widgets.reversed_attention(result, 0, batch=7)
    with pytest.raises(InputError, match="layer 9 does not exist"):
        widgets.reversed_attention(result, 9)
    with pytest.raises(InputError, match="quantity is 'x'; allowed: 'norm', 'write_norm', 'inp"):
        widgets.norms(result, quantity="x")
    with pytest.raises(
        InputError, match=r"no Reversed Attention for layer 0; capture its attention"
    ):
        widgets.reversed_attention(make_result(), 0)


# --- HTML ---------------------------------------------------------------------------------------


def test_a_widget_is_a_rendered_html_and_needs_no_network(
    four: list[Widget], monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []
    monkeypatch.setattr(request, "urlopen", lambda *args, **kwargs: asked.append(args))
    for widget in four:
        assert isinstance(widget, RenderedHTML)
        assert isinstance(widget, Widget)
        for html in (str(widget), widget.__html__(), widget._repr_html_(), widget.local_src):
            assert html.count(LIBRARY) == 1
            assert "https://unpkg.com" not in html
            parsed(re.sub(r"<script>.*?</script>|<br>", "", html, flags=re.DOTALL))
    assert not asked
    colored_tokens_multi(["a"], torch.ones(1, 1))._repr_html_()
    assert asked


def test_properties_have_the_names_that_circuitsviss_functions_pass(
    four: list[Widget], monkeypatch: pytest.MonkeyPatch
):
    passed: dict[str, set[str]] = {}

    def render(element: str, **props: Any) -> None:
        passed[element] = set(props)

    for module in (activations, attention, tokens, topk_tokens):
        monkeypatch.setattr(module, "render", render)
    ones = torch.ones(1, 1, 1)
    activations.text_neuron_activations(["a"], ones)
    attention.attention_heads(ones, ["a"])
    tokens.colored_tokens_multi(["a"], ones[0])
    topk_tokens.topk_tokens([["a"]], [ones.numpy()])
    for shown in four:
        # Python has no arguments for the bounds.
        own = set(shown.props) - {"positiveBounds", "negativeBounds"}
        assert own <= passed[shown.element]


def test_only_public_names_are_listed():
    assert dir(widgets) == sorted(widgets.__all__)


def test_html_for_the_cdn_is_small_and_well_formed(four: list[Widget]):
    for widget in four:
        html = widget.show_code()
        assert "https://unpkg.com/circuitsvis@" in html
        assert len(html) < 200_000
        assert html.count("<div") == html.count("</div>") == 2
        assert html.count("</script") == 1
        parsed(html.replace("<br>", ""))


def test_a_widget_can_be_shown_twice(four: list[Widget]):
    places = re.findall(r'<div id="([^"]+)"', widgets.page(four[0], four[0]))
    assert len(set(places)) == 2


@pytest.mark.usefixtures("as_for_a_user")
def test_a_page_needs_widgets(four: list[Widget]):
    with pytest.raises(InputError, match=r"nothing; pass results, and what widgets\.norms"):
        widgets.page()
    with pytest.raises(InputError, match="str, which is neither a widget nor a result"):
        widgets.page(four[0], "x")


def test_a_page_has_results_next_to_widgets(four: list[Widget]):
    results = [make_result(), make_result(batch=2)]
    html = widgets.page(results[0], four[0], results[1], title="Both")
    assert html.count(LIBRARY) == 1
    assert html.count("<section>") == 3
    parts = html.split("<section>")[1:]
    assert ["blt-widget" in part for part in parts] == [False, True, False]
    # A table per matrix of each prompt.
    assert [part.count("<table") for part in parts] == [2, 0, 4]
    assert LIBRARY not in widgets.page(*results)
    parsed(re.sub(r"(?s)<script.*?</script>|<style>.*?</style>|<br>|<!DOCTYPE html>", "", html))


def test_another_circuitsvis_is_refused_by_name():
    with pytest.raises(
        WidgetError, match=r"circuitsvis 1\.\S+ has no component Another; .*==1\.43\.3"
    ) as raised:
        make_widget("Another", "")
    assert isinstance(raised.value, BackwardLensError)


@pytest.mark.parametrize("bundle", [None, "let Another"])
def test_other_javascript_is_refused(
    bundle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if bundle:
        (tmp_path / "dist" / "cdn").mkdir(parents=True)
        (tmp_path / "dist" / "cdn" / "iife.js").write_text(bundle)
    monkeypatch.setattr(library, "files", lambda name: tmp_path)
    with pytest.raises(WidgetError, match="ships"):
        library.library_script.__wrapped__()


# --- which output has the JavaScript --------------------------------------------------------------


def test_the_first_output_has_the_javascript_and_so_does_a_rerun_of_its_cell():
    carrier = Carrier()
    runs = [("1", "a"), ("1", "a"), ("2", "b"), ("3", "a"), ("3", "a"), ("4", "b"), ("5", "a")]
    carried = [carrier.must_carry(Execution(*run)) for run in runs]
    assert carried == [True, False, False, True, False, False, True]


def test_without_cell_ids_the_first_run_has_the_javascript():
    carrier = Carrier()
    carried = [carrier.must_carry(Execution(run, None)) for run in ("1", "1", "2", "1")]
    assert carried == [True, False, False, False]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """As in a notebook; `request` and `cell` are sent by the front end."""
    kernel = SimpleNamespace(parent={})
    kernel.get_parent = lambda: kernel.parent
    module = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setattr(library, "_carrier", Carrier())
    return kernel


def run(kernel: SimpleNamespace, request: str, cell: str, *shown: Any) -> list[int]:
    kernel.parent = {"header": {"msg_id": request}, "metadata": {"cellId": cell}}
    return [widget._repr_mimebundle_()["text/html"].count(LIBRARY) for widget in shown]


def test_a_notebook_gets_the_javascript_once(kernel: SimpleNamespace, four: list[Widget]):
    assert str(four[0]).count(LIBRARY) == 1  # and does not count as shown
    assert run(kernel, "1", "a", *four) == [1, 0, 0, 0]
    assert run(kernel, "2", "b", *four[:2]) == [0, 0]
    assert run(kernel, "3", "a", *four[:2]) == [1, 0]
    assert run(kernel, "4", "c", widgets.javascript(), four[0]) == [1, 0]
    assert run(kernel, "5", "a", four[0]) == [0]
    assert run(kernel, "6", "c", four[0]) == [1]


def test_in_colab_every_output_has_the_javascript(
    kernel: SimpleNamespace, four: list[Widget], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    assert run(kernel, "1", "a", *four) == [1, 1, 1, 1]


# --- in a browser -------------------------------------------------------------------------------


def drawn(page: Opened, count: int) -> list[Locator]:
    places = page.page.locator("[data-drawn]")
    expect(places).to_have_count(count)
    return places.all()


def tooltip(place: Locator, target: Locator) -> Locator:
    target.hover()
    shown = place.locator("[data-popper-placement]")
    expect(shown).to_be_visible()
    return shown


def assert_tokens(place: Locator, tokens: list[str]) -> None:
    found = place.locator(".colored-tokens > span > span")
    expect(found).to_have_count(len(tokens))
    assert texts(found) == [seen(token) for token in tokens]


@pytest.mark.slow
def test_all_widgets_on_one_page_with_the_javascript_once(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    tiny = with_norms_times(result, 1e-6)
    norms = widgets.norms(tiny)
    four = [norms, widgets.top_tokens(result), widgets.quantities(result)]
    html = widgets.page(*four, widgets.reversed_attention(result, 3), title="<Lens>")
    assert html.count(LIBRARY) == 1
    assert html.count("</script") == 5  # the library and one call each
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    with opened(browser, tmp_path / "page.html", scheme="dark") as page:
        assert page.page.title() == "<Lens>"
        first, second, third, last = drawn(page, 4)
        check_norms(first, tiny)
        check_top_tokens(second, result)
        check_quantities(third, result)
        check_attention(page, last)
        page.check()


def check_norms(place: Locator, result: BackwardLensResult) -> None:
    assert_tokens(place, list(NASTY))
    shown = tooltip(place, place.locator(".colored-tokens > span > span").nth(1))
    assert plain(shown.locator("div").first.text_content()) == "<s>"
    cells = [result.cell("W_out", layer, 1) for layer in result.layers]
    for row, cell in zip(shown.locator("tr").all(), cells, strict=True):
        label, number = row.locator("td").all_text_contents()
        power = float(re.fullmatch(rf"L{cell.layer} ×(1e-\d)", label)[1])
        # Six decimals of a number with at least three leading zeros.
        assert float(number) * power == pytest.approx(cell.norm, rel=1e-2)
        assert (number == "0.000000") == cell.is_zero
    bound = float(place.locator("input").first.input_value())
    assert bound * power == pytest.approx(float(result.norms("W_out").max()), rel=1e-4)


def check_top_tokens(place: Locator, result: BackwardLensResult) -> None:
    def cells(column: int) -> list[str]:
        return texts(place.locator(f"tbody tr td:nth-last-child({5 - column}) > span"))

    for column in range(5):
        expected = result.cell("W_out", 0, column)
        entries = (*expected.top, *reversed(expected.bottom))
        assert cells(column) == [seen(entry.token) for entry in entries]
    # The colour depends on the score, which the tooltip shows.
    target = place.locator("tbody tr").first.locator("td > span").first
    factor = float(
        re.search(r"×(\d+)", place.locator("#sample-selector option").first.text_content())[1]
    )
    words = tooltip(place, target)
    score = float(words.evaluate("node => node.lastChild.textContent"))
    best = result.cell("W_out", 0, 0).top[0]
    assert score * factor == pytest.approx(best.score, rel=1e-5)
    assert plain(words.locator("strong").text_content()) == seen(best.token)
    place.locator("#layer-selector").select_option("3")
    assert cells(0) == ["· adds nothing", *["·"] * 5]


def check_quantities(place: Locator, result: BackwardLensResult) -> None:
    assert_tokens(place, list(NASTY))
    found = place.locator(".colored-tokens > span > span")
    place.locator("#layer-selector").select_option("3")
    place.locator("#neuron-selector").select_option(label="rank of ␣Paris (0 leads, -1: no rank)")
    colours = found.evaluate_all("nodes => nodes.map(node => node.style.backgroundColor)")
    assert colours[:-1] == ["rgb(255, 0, 0)"] * (len(NASTY) - 1)
    assert colours[-1] != colours[0]
    place.locator("#neuron-selector").select_option("0")
    place.locator("#layer-selector").select_option("0")
    words = tooltip(place, found.nth(0))
    norm = float(words.evaluate("node => node.lastChild.textContent"))
    assert norm == pytest.approx(result.cell("W_out", 0, 0).norm, rel=1e-5)
    assert plain(words.locator("strong").text_content()) == "</script>"


def check_attention(page: Opened, place: Locator) -> None:
    canvas = place.locator("canvas").last
    canvas.scroll_into_view_if_needed()
    pixels = canvas.evaluate(
        """canvas => {
          const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let blue = 0, orange = 0, grey = 0;
          for (let i = 0; i < all.length; i += 4) {
            const [r, g, b] = all.slice(i, i + 3);
            if (b > r + 30) blue += 1;
            if (r > b + 30) orange += 1;
            if (r == 200 && g == 200 && b == 200) grey += 1;
          }
          return [blue, orange, grey].map(count => count * 4 / all.length);
        }"""
    )
    assert all(share > 0.02 for share in pixels), pixels
    assert place.locator("h4").all_text_contents() == ["L3H0", "L3H1"]


@pytest.mark.slow
def test_results_and_widgets_on_one_page_do_not_disturb_each_other(
    browser: Browser, tmp_path: Path, result: BackwardLensResult, four: list[Widget]
):
    other = make_result(batch=2)
    (tmp_path / "both.html").write_text(
        widgets.page(result, *four, other, title="Both"), encoding="utf-8"
    )
    (tmp_path / "tables.html").write_text(widgets.page(result, other), encoding="utf-8")
    with opened(browser, tmp_path / "tables.html", scheme="dark") as page:
        alone = page.page.evaluate(LOOKS)
    with opened(browser, tmp_path / "both.html", scheme="dark") as page:
        drawn(page, 4)
        # The widgets' style does not reach the tables.
        assert page.page.evaluate(LOOKS) == alone
        # Tables are light next to widgets, which have no dark colours.
        for part in page.page.locator(".blt, .blt-widget").all():
            look = "node => getComputedStyle(node).backgroundColor"
            assert part.evaluate(look) == "rgb(255, 255, 255)"
        boxes = [part.bounding_box() for part in page.page.locator("section").all()]
        assert len(boxes) == 6
        for upper, lower in pairwise(boxes):
            assert upper["y"] + upper["height"] <= lower["y"]
        for section, box in zip(page.page.locator("section").all(), boxes, strict=True):
            inner = section.locator("> div").bounding_box()
            assert inner["y"] + inner["height"] <= box["y"] + box["height"] + 1
        # The choices of one table do not change the other.
        tables = page.page.locator(".blt")
        tables.nth(0).locator("input[name=end][value=bottom]").check(force=True)
        assert tables.nth(0).locator("td .low").first.is_visible()
        assert not tables.nth(1).locator("td .low").first.is_visible()
        page.check()


LOOKS = """() => {
  const names = ["color", "backgroundColor", "font", "padding", "margin", "border"];
  const found = document.querySelectorAll(".blt, .blt :is(p, table, th, td, label, legend)");
  return [...found].map(node => names.map(name => getComputedStyle(node)[name]));
}"""
"""Computed styles of all tables, and of what is around them."""


@pytest.mark.slow
def test_a_tooltip_of_many_layers_fits_below_the_widget(browser: Browser, tmp_path: Path):
    result = make_result(layers=30)
    (tmp_path / "norms.html").write_text(widgets.page(widgets.norms(result)), encoding="utf-8")
    with opened(browser, tmp_path / "norms.html", width=900) as page:
        (place,) = drawn(page, 1)
        widget = page.page.locator(".blt-widget").bounding_box()
        tokens = place.locator(".colored-tokens > span > span")
        last = tokens.last.bounding_box()
        below = widget["y"] + widget["height"] - last["y"] - last["height"]
        shown = tooltip(place, tokens.nth(1))
        assert shown.locator("tr").count() == 30
        box = shown.bounding_box()
        assert box["y"] + box["height"] <= widget["y"] + widget["height"]
        assert box["x"] + box["width"] <= widget["x"] + widget["width"]
        assert below < 250
        expect(place.locator('label[for="Negative Bound"]')).to_be_hidden()
        expect(place.locator('label[for="Positive Bound"]')).to_be_visible()


@pytest.mark.slow
def test_the_line_before_an_answer(browser: Browser, tmp_path: Path, answer: BackwardLensResult):
    shown = [widgets.norms(answer), widgets.quantities(answer)]
    (tmp_path / "answer.html").write_text(widgets.page(*shown), encoding="utf-8")
    with opened(browser, tmp_path / "answer.html") as page:
        for place in drawn(page, 2):
            tokens = place.locator(".colored-tokens > span")
            tooltip(place, tokens.nth(1).locator("span"))  # an element between the tokens
            widths = tokens.evaluate_all(
                "nodes => nodes.map(node => getComputedStyle(node).borderLeftWidth)"
            )
            assert widths == ["0px"] * 5 + ["3px"] + ["0px"] * (len(widths) - 6)


@pytest.mark.slow
def test_plain_circuitsvis_has_these_problems(browser: Browser, tmp_path: Path):
    """Negative control: the problems that our widgets avoid do occur."""
    tokens, norms = ["<s>", "a", "\n"], torch.tensor([[3e-8], [1e-8], [2e-8]])
    plainly = colored_tokens_multi(tokens, norms)
    html = f"<!DOCTYPE html><body>{plainly.local_src}<p id='after'>after</p></body>"
    (tmp_path / "plain.html").write_text(html, encoding="utf-8")
    with opened(browser, tmp_path / "plain.html") as page:
        found = page.page.locator(".colored-tokens > span > span")
        expect(found).to_have_count(3)
        assert texts(found) == ["", "a", " "]
        expect(page.page.locator("#after")).to_have_count(0)  # inside the open element
        found.nth(1).hover()
        expect(page.page.locator("[data-popper-placement] td").last).to_have_text("0.000000")
    broken = colored_tokens_multi(["</script>", "a"], norms[:2]).local_src
    (tmp_path / "broken.html").write_text(f"<!DOCTYPE html>{broken}", encoding="utf-8")
    with opened(browser, tmp_path / "broken.html") as page:
        page.page.wait_for_load_state()
        assert page.page.locator(".colored-tokens").count() == 0
        assert page.complaints


@pytest.mark.slow
def test_a_widget_without_the_javascript_shows_a_hint_and_is_drawn_once_it_is_loaded(
    browser: Browser, tmp_path: Path, four: list[Widget]
):
    hasty = four[0].fragment.replace("< 50)", "< 2)")
    assert hasty != four[0].fragment
    (tmp_path / "bare.html").write_text(f"<!DOCTYPE html>{hasty}", encoding="utf-8")
    found = re.fullmatch(r"(?s)<script>(.*)</script>", library.library_script())[1]
    with opened(browser, tmp_path / "bare.html") as page:
        expect(page.page.locator(".blt-widget")).to_contain_text("widgets.javascript()")
        page.page.evaluate("code => (0, eval)(code)", found)
        assert_tokens(drawn(page, 1)[0], list(NASTY))
        page.check()
    with opened(browser, tmp_path / "bare.html", scripts=False) as page:
        expect(page.page.locator(".blt-widget")).to_contain_text("which does not run here")


NOTEBOOK = (
    "from backward_lens_tl.result import BackwardLensResult\n"
    "from backward_lens_tl.views import widgets\n"
    "from IPython.display import display\n"
    "result = BackwardLensResult.load({path!r})",
    "display(widgets.norms(result), widgets.quantities(result))",
    "widgets.top_tokens(result)",
    "widgets.reversed_attention(result, 3)",
)


@pytest.mark.slow
def test_an_executed_notebook_shows_them_offline_with_the_javascript_once(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    result.save(tmp_path / "result.safetensors")
    sources = [source.format(path=str(tmp_path / "result.safetensors")) for source in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    assert json.dumps(notebook).count(LIBRARY) == 1
    body, _ = HTMLExporter(theme="dark", **OFFLINE).from_notebook_node(notebook)
    (tmp_path / "notebook.html").write_text(body, encoding="utf-8")
    with opened(browser, tmp_path / "notebook.html", scheme="dark") as page:
        norms, quantities, top, _ = drawn(page, 4)
        assert_tokens(norms, list(NASTY))
        assert_tokens(quantities, list(NASTY))
        for part in (top.locator("thead th").first, top.locator("label").first):
            assert part.evaluate("node => getComputedStyle(node).color") == "rgb(17, 17, 17)"
        rows = top.locator("tbody tr").evaluate_all(
            "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
        )
        assert set(rows) == {"rgba(0, 0, 0, 0)"}
        assert (
            page.page.locator(".blt-widget").first.evaluate(
                "node => getComputedStyle(node).backgroundColor"
            )
            == "rgb(255, 255, 255)"
        )
        page.page.screenshot(path=str(tmp_path / "dark.png"), full_page=True)
        page.check()
