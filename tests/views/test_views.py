"""Views show the result's numbers and tokens, and no token can break them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from view_cases import (
    NASTY,
    PARIS,
    Node,
    all_cells,
    make_long_result,
    make_result,
    parsed,
    shown,
    with_answer,
    with_faint_cells,
    without_target,
)

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.readout.targets import Prediction
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views import table as html_table
from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES, NormScale
from backward_lens_tl.views.prompts import prompt_title
from backward_lens_tl.views.table import MAX_PROMPTS, heading, render_page, render_table
from backward_lens_tl.views.table.extent import PAGE, Budget, Extent
from backward_lens_tl.views.table.frequent import frequent_tokens
from backward_lens_tl.views.table.packing import packed
from backward_lens_tl.views.terminal import TerminalTable
from backward_lens_tl.views.text import (
    Piece,
    asked,
    display_order,
    leading_layers,
    pieces,
    prediction_text,
    running_text,
    zero_reason,
)

# --- a parser that accepts well-formed HTML only ------------------------------------------------


@pytest.fixture(scope="module")
def result() -> BackwardLensResult:
    return make_result(pos=len(NASTY))


@pytest.fixture(scope="module")
def page(result: BackwardLensResult) -> Node:
    return parsed(render_page(result))


def tables(page: Node, result: BackwardLensResult) -> list[tuple[Node, MatrixName]]:
    return list(zip(page.all("table"), display_order(result.matrices), strict=True))


# --- HTML ---------------------------------------------------------------------------------------


def test_there_is_one_cell_per_layer_and_position(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        for row, layer in zip(table.all("tr")[1:], reversed(result.layers), strict=True):
            assert row.all("th")[0].text == str(layer)
            for node, cell in zip(row.all("td"), result.cells(matrix, layer), strict=True):
                if cell.is_zero:
                    continue
                top, low = node.all("div", "top")[0].text, node.all("div", "low")[0].text
                lead = "★target leads: " if cell.target_leads else ""
                assert top == lead + shown(cell.top[0].token)
                assert low == shown(cell.bottom[0].token)


def test_a_token_is_never_markup(page: Node, result: BackwardLensResult):
    ours = parsed(render_page(make_result(vocab=(PARIS, " a", " b", " c"))))
    assert page.tags() <= ours.tags() | {"i"}  # <i> holds a mark
    marks = page.all("i") + [
        mark for text in data(page)["tokens"] for mark in parsed(text).all("i")
    ]
    assert {"⏎", "⇥", "(empty)", "\\x1e"} <= {node.text for node in marks}
    head = [node.text for node in page.all("thead")[0].all("bdi")]
    assert head == [shown(token) for token in NASTY]
    assert {"</script>", "<s>", "\"'&amp;", "</td><img src=x onerror=1>"} <= set(head)


def test_a_page_can_be_written_for_any_tokens(
    tmp_path: Path, page: Node, result: BackwardLensResult
):
    result.save_html(tmp_path / "page.html")
    assert parsed((tmp_path / "page.html").read_text(encoding="utf-8")) == page


def test_zero_cells_have_a_reason_instead_of_a_token(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        zero = [cell.is_zero for cell in all_cells(result, matrix)]
        assert sum(zero) == len(NASTY) - 1
        for node, is_zero in zip(table.all("td"), zero, strict=True):
            assert ("zero" in node.attributes["class"].split()) == is_zero
            assert bool(node.all("bdi")) != is_zero
            assert ("adds nothing: δ_i is zero, no gradient reaches" in node.text) == is_zero


def test_a_zero_input_has_its_own_reason():
    whole = make_result(layers=1, pos=2)
    inputs = torch.zeros(1, 2, 6)
    gradient = replace(whole.capture["W_in", 0], inputs=inputs, vjps=inputs + 1)
    gradients = {**whole.capture.gradients, ("W_in", 0): gradient}
    result = replace(whole, capture=replace(whole.capture, gradients=gradients))
    assert "adds nothing: x_i is zero, the matrix has no input" in render_page(result)


def test_marks_are_exactly_where_the_target_leads(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        leads = [cell.target_leads for cell in all_cells(result, matrix)]
        assert any(leads)
        for node, lead in zip(table.all("td"), leads, strict=True):
            assert ("lead" in node.attributes["class"].split()) == lead
            assert ("★" in node.text) == lead
            assert ("target leads" in node.text) == lead


def data(page: Node) -> dict[str, Any]:
    """Data read by the page's script."""
    (element,) = (
        node for node in page.all("script") if node.attributes.get("type") == "application/json"
    )
    return json.loads(element.text)


def array(kind: str, text: str) -> list[float]:
    """Little-endian numbers of `struct`'s kind."""
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))


def test_the_script_gets_all_tokens_scores_norms_and_ranks(page: Node, result: BackwardLensResult):
    held = data(page)
    assert tuple(held["lenses"]) == result.projections == ("logit_lens", "normalized")
    for matrix in result.matrices:
        panel = held["panels"][matrix]
        cells = all_cells(result, matrix)
        norms = [norm for cell in cells for norm in (cell.norm, cell.input_norm, cell.write_norm)]
        assert array("f", panel["norms"]) == norms
        reasons = [None if at == "-" else panel["reasons"][int(at)] for at in panel["zero"]]
        assert reasons == [zero_reason(cell) if cell.is_zero else None for cell in cells]
        for lens, name in zip(panel["lenses"], result.projections, strict=True):
            cells = all_cells(result.under(name), matrix)
            ranks = [-1 if cell.target_rank is None else cell.target_rank for cell in cells]
            assert array("i", lens["ranks"]) == ranks
            assert lens["faint"] == "".join(str(int(cell.is_faint)) for cell in cells)
            assert lens["n"] == 2 * result.k
            indices, scores = array("H", lens["tokens"]), array("e", lens["scores"])
            for at, cell in enumerate(cells):
                if cell.is_zero:
                    continue
                entries = slice(at * lens["n"], (at + 1) * lens["n"])
                words = [parsed(held["tokens"][int(index)]).text for index in indices[entries]]
                assert words == [shown(entry.token) for entry in cell.top + cell.bottom]
                # A half float has 11 bits.
                kept = [score * lens["scale"] for score in scores[entries]]
                own = [entry.score for entry in cell.top + cell.bottom]
                assert kept == pytest.approx(own, rel=2**-11)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_scores_of_any_size_keep_three_digits_and_infinities(size: float):
    plain = make_result(vocab=(PARIS, " a", " b", " c"))
    (first, *others) = plain.readings
    readouts = {}
    for matrix, read in first.readouts.items():
        scores = read.top_scores * size
        scores[0, 0, 0, 0] = math.inf
        readouts[matrix] = replace(read, top_scores=scores)
    result = replace(plain, readings=(replace(first, readouts=readouts), *others))
    lens = data(parsed(render_page(result)))["panels"]["W_out"]["lenses"][0]
    scores = array("e", lens["scores"])
    place = (len(result.layers) - 1) * result.positions.shape[1] * lens["n"]
    assert scores[place] == math.inf
    (_, *tops) = result.cell("W_out", 0, 0).top
    kept = [score * lens["scale"] for score in scores[place + 1 : place + result.k]]
    assert kept == pytest.approx([entry.score for entry in tops], rel=2**-11)


def test_tooltips_show_norm_rank_and_tokens_without_scripts(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        for node, cell in zip(table.all("td"), all_cells(result, matrix), strict=True):
            assert node.attributes["tabindex"] == "0"
            if cell.is_zero:
                continue
            tooltip = node.attributes["title"]
            norms = f"‖δ_i‖ {cell.norm:.4g}, ‖x_i‖·‖δ_i‖ {cell.write_norm:.4g}"
            assert tooltip.startswith(f"{norms}, target rank {cell.target_rank};")
            assert repr(running_text(cell.top[2].token)) in tooltip
            assert repr(running_text(cell.bottom[2].token)) in tooltip


def test_controls_offer_the_results_matrices_and_lenses(page: Node):
    def offered(node: Node) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for button in node.all("input"):
            found.setdefault(button.attributes["name"], []).append(button.attributes["value"])
        return found

    ends = {
        "end": ["top", "bottom"],
        "often": ["ink", "faded"],
        "size": ["norm", "write_norm"],
        "scale": ["log", "linear"],
    }
    lenses, matrices = ["logit_lens", "normalized"], ["", "W_out", "W_in"]
    assert offered(page) == {"matrix": matrices, "lens": lenses, **ends}
    assert page.all("form")[0].attributes["method"] == "dialog"  # which is never submitted
    one = make_result()
    one = replace(one, readings=one.readings[:1])
    assert offered(parsed(render_table(one))) == {"matrix": matrices, **ends}


def test_tables_have_captions_and_scoped_headers(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        assert table.all("caption")[0].text.startswith(matrix)
        columns = table.all("thead")[0].all("th")
        assert len(columns) == 1 + len(NASTY)
        assert {node.attributes["scope"] for node in columns} == {"col"}
        assert {node.attributes["scope"] for node in table.all("tbody")[0].all("th")} == {"row"}


def test_a_page_names_its_contents(page: Node):
    assert page.all("title")[0].text.endswith("Backward Lens")
    assert page.all("p", "answer-now")[0].text == (
        "The model answers </script> (50 %). The target is  Paris (25 %); 1 token is more probable."
    )
    assert "The loss target_nll(' Paris') is 1.25." in page.text
    facts = [node.text for node in page.all("dd")]
    assert facts[0] == "a <model>"
    assert "logit lens" in facts[1]
    assert facts[2].startswith("update")


@pytest.mark.parametrize("render", [render_page, render_table])
def test_nothing_is_fetched(render):
    html = render(make_result(vocab=(PARIS, " a", " b", " c")))
    for forbidden in ("http", "src=", "url(", "@import", "<link", "fetch(", "import "):
        assert forbidden not in html


WORDS = tuple(f" w{index * 7919:x}" for index in range(30_000))
"""A vocabulary so large that hardly any token occurs twice."""


def test_a_prompt_in_a_deep_model_stays_below_2_mb():
    html = render_page(make_result(layers=48, pos=20, k=10, vocab=(*WORDS, PARIS)))
    assert len(html.encode()) < 2e6


def test_a_notebook_cell_of_a_long_prompt_stays_below_1_mb():
    """test_page.py tests the page of the same result."""
    html = make_long_result(layers=30, pos=400)._repr_html_()
    assert 7e5 < len(html.encode()) < 1e6
    fragment = parsed(html)
    heads = fragment.all("thead")[0].all("th")
    assert f"The tables show the last {len(heads) - 1} of 400 tokens" in fragment.text
    assert 'result.save_html("page.html", batch=0)' in fragment.text
    last = [node.all("small")[0].text for node in heads[1:]]
    assert last == [str(at) for at in range(400 - len(last), 400)]
    assert round(len(last), -1) == 40  # as docs/looking.md says


def test_a_prompt_of_thousands_of_tokens_is_cut_and_says_so():
    result = make_long_result(layers=2, pos=2)
    columns = torch.zeros(1, 30_000, dtype=torch.long)
    extent = Extent.of(replace(result, positions=columns), 0, PAGE)
    assert (extent.total, extent.k) == (30_000, 3)
    assert extent.written < extent.tokens < 30_000
    left_out = heading.left_out(extent, result.k, "analyse the others")
    said = f"the last {extent.tokens} of 30000 tokens; analyse the others."
    assert said in parsed(left_out).text


@pytest.mark.parametrize("render", [render_page, render_table])
def test_the_last_tokens_of_a_long_prompt_are_those_of_the_result(
    render: Any, monkeypatch: pytest.MonkeyPatch
):
    """Cells, data and headers belong together where a long prompt is cut."""
    result = make_result(pos=12, k=4)
    small = Budget(cells=40, data=4 * 2 * (21 + 2 * (6 + 3 * 11)) * 6)
    monkeypatch.setattr(html_table, "PAGE", small)
    monkeypatch.setattr(html_table, "NOTEBOOK", small)
    found = parsed(render(result))
    held = data(found)
    for element, matrix in tables(found, result):
        heads = [node.all("small")[0].text for node in element.all("thead")[0].all("th")[1:]]
        assert heads == [str(at) for at in range(6, 12)]
        panel = held["panels"][matrix]
        norms = array("f", panel["norms"])[::3]
        cells = [cell for cell in all_cells(result, matrix) if cell.position >= 6]
        assert norms == [cell.norm for cell in cells]
        assert panel["lenses"][0]["n"] == 2 * 3
        written = [cell for cell in cells if cell.position >= 10]
        nodes = [node for node in element.all("td") if "early" not in node.attributes["class"]]
        for node, cell in zip(nodes, written, strict=True):
            assert ("zero" in node.attributes["class"].split()) == cell.is_zero
            if not cell.is_zero:
                assert node.all("div", "low")[0].text == shown(cell.bottom[0].token)


# --- answers and targets ------------------------------------------------------------------------


def test_a_header_says_what_each_position_should_say_and_where_the_answer_begins():
    plain = make_result(vocab=(PARIS, " a", " b", " c"))
    result = with_answer(plain, 2)
    page = parsed(render_page(result))
    for element in page.all("table"):
        heads = element.all("thead")[0].all("th")
        assert heads[0].text == "layershould say"
        assert [node.all("small", "says")[0].text for node in heads[1:]] == [
            text or "" for text in result.position_targets()
        ]
        for row in element.all("tr"):
            nodes = [node for node in row.children if isinstance(node, Node)]
            edges = ["answer" in (node.attributes.get("class") or "").split() for node in nodes]
            assert edges == [False, False, False, False, True, False]
    assert "where the answer begins" in page.text
    plain_page = parsed(render_page(plain))
    assert not plain_page.all("small", "says")
    assert "where the answer begins" not in plain_page.text
    assert not plain_page.all("td", "answer")


def test_the_heading_separates_the_prompt_and_the_answer():
    plain = with_answer(make_result(vocab=(PARIS, " a", " b", " c")), 2)
    capture = replace(
        plain.capture,
        str_tokens=(("<s>", "The", " Tower", " in", " Rome"),),
        prompts=("The Tower in Rome",),
        spans=(((0, 0), (0, 3), (3, 9), (9, 12), (12, 17)),),
        target_texts=(" in Rome",),
    )
    for given in (capture, replace(capture, prompts=(), spans=())):
        page = parsed(render_page(replace(plain, capture=given)))
        prompt = "The Tower" if given.prompts else "<s>The Tower"
        assert page.all("h1")[0].text == f"{prompt} →  in Rome"
        assert "more probable than its first token" in page.text


def test_a_chat_is_shown_as_its_messages():
    plain = make_result(pos=6, vocab=(PARIS, " a", " b", " c"))
    capture = replace(
        plain.capture,
        str_tokens=(("<s>", "Hi", " <b>", "</s>", "<s>", "Oh"),),
        prompts=("<s>Hi <b></s><s>Oh",),
        spans=(((0, 3), (3, 5), (5, 9), (9, 13), (13, 16), (16, 18)),),
        turns=(("template", "user", "user", "template", "template", "assistant"),),
    )
    result = replace(plain, capture=capture)
    assert asked(capture, 0, repr) == "user: 'Hi <b>' assistant: 'Oh'"
    assert prompt_title(result, 0) == "“user: Hi <b> assistant: Oh” → “Paris”"
    page = parsed(render_page(result))
    assert page.all("h1")[0].text == "user: Hi <b> assistant: Oh →  Paris"
    for element in page.all("table"):
        heads = element.all("thead")[0].all("th")[1:]
        is_template = ["template" in (node.attributes.get("class") or "") for node in heads]
        assert is_template == [True, False, False, True, True, False]
    assert not parsed(render_page(plain)).all("th", "template")
    # An appended answer belongs to no message.
    answered = replace(capture, prompt_lengths=torch.tensor([5]))
    assert asked(answered, 0, repr) == "user: 'Hi <b>'"


def test_tables_of_several_prompts_say_which_one_they_show():
    result = make_result(batch=3)
    assert parsed(render_page(result, 1)).all("h1")[0].text.startswith("prompt 2 of 3: ")
    page = parsed(render_table(result))
    assert [element.text[:14] for element in page.all("strong") if " of 3" in element.text] == [
        f"prompt {number} of 3:" for number in (1, 2, 3)
    ]
    assert " of " not in parsed(render_page(make_result())).all("h1")[0].text


@pytest.mark.parametrize(("matrices", "notes"), [(("W_in", "W_gate"), 1), (("W_in", "W_out"), 0)])
def test_gated_models_have_a_note_on_tables_with_the_same_tokens(matrices: Any, notes: int):
    result = make_result(matrices=matrices)
    note = "W_gate and W_in read the same x_i"
    assert printed(result, 200).count(note) == notes
    assert render_page(result).count(note) == notes


@pytest.mark.parametrize(
    ("prediction", "has_position_targets", "said"),
    [
        (Prediction("b", 0.7, "a", 0.001, 43), False,
         "The model answers 'b' (70 %). The target is 'a' (0.1 %); 43 tokens are more probable."),
        (Prediction("b", 0.99951, "a", 1e-7, 1), False,
         "The model answers 'b' (100 %). The target is 'a' (below 0.01 %); 1 token is more "
         "probable."),
        (Prediction("a", 0.7, "a", 0.7, 0), False,
         "The model answers 'a' (70 %). The target is the same token."),
        (Prediction("a", 0.7, "a b", 0.1234, 0), True,
         "The model answers 'a' (70 %). The target is 'a b' (12.3 %), which starts with the same "
         "token."),
        (Prediction("a", 0.7, "b c", 0.02, 3), True,
         "The model answers 'a' (70 %). The target is 'b c' (2 %); 3 tokens are more probable than "
         "its first token."),
        (Prediction("a", 0.7, None, None, None), True,
         "The model answers 'a' (70 %). Each position is compared with the next token of the "
         "text."),
        (Prediction("a", 0.7, None, None, None), False, "The model answers 'a' (70 %)."),
    ],
)  # fmt: skip
def test_the_models_own_answer_is_stated(
    prediction: Prediction, has_position_targets: bool, said: str
):
    assert prediction_text(prediction, has_position_targets, repr) == said


# --- frequent tokens ----------------------------------------------------------------------------


def test_frequent_tokens_lead_many_cells_at_several_positions():
    """With rows that state the answer: of 100 cells, who leads how many and where."""
    result = make_result(layers=1, pos=1, vocab=(PARIS, " a", " b", " c"))
    cell = result.cell("W_out", 0, 0)

    def led_by(token: str, position: int) -> Cell:
        return replace(
            cell, position=position, target=PARIS, top=(replace(cell.top[0], token=token),)
        )

    leaders = [
        *[led_by("junk", at) for at in (0, 1, 2)],
        *[led_by("topic", 3)] * 20,
        *[led_by("two places", at) for at in (4, 5) for _ in range(5)],
        *[led_by(PARIS, at) for at in range(10)],
        led_by("rare", 6),
        *[led_by(f"other {at}", at) for at in range(56)],
    ]
    assert len(leaders) == 100
    rows = [leaders, [replace(led_by("junk", at), is_zero=True) for at in range(9)]]
    assert frequent_tokens(rows, "top") == {"junk"}
    more = [*leaders, *[led_by(f"more {at}", at) for at in range(51)]]
    assert frequent_tokens([more], "top") == frozenset()  # 3 of 151 cells
    assert frequent_tokens([leaders], "bottom") == {cell.bottom[0].token} - {PARIS}


def test_frequent_tokens_are_marked_where_they_lead():
    result = make_result(pos=len(NASTY), layers=12, vocab=(PARIS, " a", " b", " c"))
    page = parsed(render_page(result))
    for element, matrix in tables(page, result):
        cells = all_cells(result, matrix)
        rows = [result.cells(matrix, layer) for layer in result.layers]
        for end, name in (("top", "top"), ("bottom", "low")):
            often = frequent_tokens(rows, end)
            assert {" a", " b", " c"} <= often
            for node, cell in zip(element.all("td"), cells, strict=True):
                if not cell.is_zero:
                    (div,) = node.all("div", name)
                    is_marked = "often" in div.attributes["class"].split()
                    assert is_marked == (getattr(cell, end)[0].token in often)


def test_a_page_does_not_depend_on_the_order_of_a_set():
    result = make_result(pos=len(NASTY), layers=12, vocab=(PARIS, " a", " b", " c"))
    rows = [result.cells("W_out", layer) for layer in result.layers]
    panel = json.loads(packed({"logit_lens": {"W_out": rows}}))["panels"]["W_out"]
    for often in panel["lenses"][0]["often"]:
        assert len(often) > 2
        assert often == sorted(often)


def test_the_gradient_direction_is_stated():
    text = parsed(render_page(make_result(direction="gradient"))).text
    assert "W_out raw gradient, which gradient descent subtracts" in text
    assert "what the update adds" not in text


def test_without_a_target_nothing_is_marked_or_ranked():
    page = parsed(render_page(without_target(make_result())))
    assert not page.all("td", "lead")
    assert not any("target rank" in node.text for node in page.all("td"))
    assert page.all("p", "answer-now")[0].text == "The model answers </script> (50 %)."


def test_a_notebook_shows_the_first_prompts_and_how_to_see_the_others():
    fragment = parsed(make_result(batch=MAX_PROMPTS)._repr_html_())
    assert len(fragment.all("table")) == 2 * MAX_PROMPTS
    assert "prompts;" not in fragment.text

    fragment = parsed(make_result(layers=48, pos=7, batch=3)._repr_html_())
    assert len(fragment.all("table")) == 2 * 2
    assert "The first 2 of 3 prompts;" in fragment.text

    fragment = parsed(make_result(batch=MAX_PROMPTS + 3)._repr_html_())
    assert len(fragment.all("table")) == 2 * MAX_PROMPTS
    assert "The first 4 of 7 prompts;" in fragment.text
    assert f"save_html(path, batch={MAX_PROMPTS})" in fragment.text

    fragment = parsed(make_result(layers=48, pos=20, batch=2)._repr_html_())
    assert len(fragment.all("table")) == 2
    assert "The first of 2 prompts;" in fragment.text


def test_the_style_applies_only_to_its_fragment(result: BackwardLensResult):
    sheet = re.sub(r"/\*.*?\*/", "", parsed(render_table(result)).all("style")[0].text, flags=re.S)
    rules = re.sub(r"@media[^{]*\{", "", sheet)
    for selectors in re.findall(r"([^{}]+)\{", rules):
        outside = re.sub(r"\([^()]*\)", "", selectors)  # :is(a, b) is one selector
        assert all(".blt" in selector for selector in outside.split(","))


# --- colours ------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def css_pairs(sheet: str, pattern: str) -> list[tuple[str, ...]]:
    colours = r"light-dark\((#\w{6}), ?(#\w{6})\)"
    found = re.findall(pattern.replace("COLOURS", colours), sheet)
    assert found
    return found


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_legible_on_every_colour_and_colour_is_monotone(page: Node, theme: int):
    sheet = page.all("style")[0].text
    shades = css_pairs(sheet, r"\.n\d+\{[^}]*;background:COLOURS;color:COLOURS\}")
    assert len(shades) == len(LIGHT_SHADES) == len(DARK_SHADES)
    assert all(contrast(shade[theme], shade[2 + theme]) >= 4.5 for shade in shades)
    away_from_page = [luminance(shade[theme]) * (1 if theme else -1) for shade in shades]
    assert all(one < other for one, other in pairwise(away_from_page))

    (background,) = css_pairs(sheet, r"--page: COLOURS")
    for name in ("ink", "quiet", "accent"):
        (text,) = css_pairs(sheet, rf"--{name}: COLOURS")
        assert contrast(background[theme], text[theme]) >= 4.5


@pytest.mark.parametrize(
    ("size", "letter", "name"),
    [("norm", "n", "‖δ_i‖"), ("write_norm", "p", "‖x_i‖·‖δ_i‖")],
)
def test_colours_follow_the_norm(
    page: Node, result: BackwardLensResult, size: str, letter: str, name: str
):
    for table, matrix in tables(page, result):
        pairs = sorted(
            (getattr(cell, size), int(re.search(rf"\b{letter}(\d+)", node.attributes["class"])[1]))
            for node, cell in zip(table.all("td"), all_cells(result, matrix), strict=True)
            if not cell.is_zero
        )
        steps = [step for _, step in pairs]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, len(LIGHT_SHADES) - 1)
        low, high = f"{name} {pairs[0][0]:.4g} or less", f"{pairs[-1][0]:.4g}, logarithmic"
        legends = " ".join(node.text for node in page.all("p", "legend"))
        assert low in legends
        assert high in legends


def test_the_scale_is_logarithmic_over_three_decades_at_most():
    scale = NormScale.spanning([0.0, 1e-9, 0.1, 1.0, 10.0, float("inf"), float("nan")])
    assert (scale.low, scale.high) == (0.01, 10.0)
    last = len(LIGHT_SHADES) - 1
    assert [scale.step(norm) for norm in (1e-9, 0.01, 0.1, 1.0, 10.0)] == [
        0, 0, round(last / 3), round(last * 2 / 3), last,
    ]  # fmt: skip


@pytest.mark.parametrize("norms", [[], [0.0], [2.0], [float("nan")]])
def test_a_scale_of_one_norm_or_none_still_has_shades(norms: list[float]):
    scale = NormScale.spanning(norms)
    assert all(0 <= scale.step(norm) < len(LIGHT_SHADES) for norm in [*norms, 0.0, 1.0])


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" Paris", [(" ", True), ("Paris", False)]),
        ("a\nb", [("a", False), ("⏎", True), ("b", False)]),
        ("\t", [("⇥", True)]),
        ("", [("(empty)", True)]),
        ("\x1e", [("\\x1e", True)]),
        ("\u202eevil", [("\\u202e", True), ("evil", False)]),
        ("\ud800", [("\\ud800", True)]),
        ("\u00a0", [("\\xa0", True)]),
        ("\u0301", [("◌", True), ("\u0301", False)]),
        ("👩\u200d👧", [("👩\u200d👧", False)]),
        ("\u200d", [("\\u200d", True)]),
    ],
)
def test_every_character_of_a_token_can_be_seen(token: str, expected: list[tuple[str, bool]]):
    assert list(pieces(token)) == [Piece(*piece) for piece in expected]


@pytest.mark.parametrize(
    ("given", "shown_first"),
    [
        (("W_in", "W_out"), ["W_out", "W_in"]),
        (("W_in", "W_gate", "W_out"), ["W_out", "W_gate", "W_in"]),
        (
            ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"),
            ["W_out", "W_in", "W_O", "W_Q", "W_K", "W_V"],
        ),
        (("W_K",), ["W_K"]),
    ],
)
def test_views_show_what_the_update_adds_first(
    given: tuple[MatrixName, ...], shown_first: list[MatrixName]
):
    assert display_order(given) == shown_first


def test_running_text_is_one_line_with_plain_spaces():
    assert running_text("a b\nc") == "a b⏎c"


# --- terminal -----------------------------------------------------------------------------------


def printed(result: BackwardLensResult, width: int, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="truecolor"
    ) if terminal else Console(file=io.StringIO(), width=width)  # fmt: skip
    console.print(TerminalTable(result))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 60, 100, 200])
def test_the_terminal_table_fits_and_keeps_every_layer(width: int):
    result = make_result(pos=12)
    lines = printed(result, width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    layers = [line.split()[0] for line in lines if re.match(r" {4}\d ", line)]
    assert layers == [str(layer) for layer in reversed(result.layers)] * 2


@pytest.mark.parametrize(("width", "left_out"), [(60, 6), (100, 1), (200, 0)])
def test_the_last_tokens_are_kept_if_not_all_fit(width: int, left_out: int):
    vocab = (PARIS, *(f"{name * 7}" for name in "abcdefghijk"))
    result = make_result(pos=12, vocab=vocab)
    text = printed(result, width)
    head = next(line for line in text.splitlines() if line.startswith("layer")).split()
    assert head[1:] == [token.replace(" ", "␣") for token in vocab[left_out:]]
    row = next(line for line in text.splitlines() if line.startswith("    2 ")).split()
    words = [cell.top[0].token for cell in result.cells("W_out", 2)]
    assert [word.strip("★") for word in row[1:]] == [
        word.replace(" ", "␣") for word in words[left_out:]
    ]
    said = " ".join(text.split())
    assert (f"0 to {left_out - 1} of 12 tokens" in said) == (left_out > 1)
    assert ("position 0 of 12 tokens" in said) == (left_out == 1)


def test_a_pipe_gets_text_without_escape_codes(result: BackwardLensResult):
    text = printed(result, 200)
    assert "\x1b" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800]", text)
    assert re.search(r"‖δ_i‖ \S+ or less to \S+, logarithmic", text)


def test_a_terminal_gets_a_star_in_bold_exactly_where_the_target_leads():
    result = make_result()
    text = printed(result, 200, terminal=True)
    leads = [cell for name in result.matrices for cell in all_cells(result, name)]
    starred = re.findall(r"\x1b\[([\d;]+)m★␣Paris", text)
    assert len(starred) == text.count("★") == sum(cell.target_leads for cell in leads) > 0
    assert all(codes.startswith("1;") for codes in starred)


def test_a_terminal_shows_what_positions_should_say_and_where_the_answer_begins():
    result = with_answer(make_result(vocab=(PARIS, " a", " b", " c")), 2)
    text = printed(result, 200)
    lines = text.splitlines()
    says = [line.split()[2:] for line in lines if line.startswith("say →")]
    assert says == [["␣Paris", "␣Paris", "␣Paris", "│␣Paris", "␣a"]] * 2
    rows = [line for line in lines if re.match(r"layer|say →| {4}\d ", line)]
    # One line of characters, from the header to the first layer.
    assert len({line.index("│") for line in rows}) == 1
    assert "│" not in printed(make_result(), 200)
    assert "say →" not in printed(make_result(), 200)


@pytest.mark.parametrize("shade_by", ["norm", "write_norm"])
def test_terminal_colours_follow_the_chosen_norm(shade_by: str):
    result = make_result(pos=4, layers=2)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    console.print(TerminalTable(result, shade_by=shade_by))
    text = console.file.getvalue()
    cells = [
        cell for name in ("W_out", "W_in") for cell in all_cells(result, name) if not cell.is_zero
    ]
    for name in ("W_out", "W_in"):
        own = [getattr(cell, shade_by) for cell in cells if cell.matrix == name]
        scale = NormScale.spanning(own)
        shades = [DARK_SHADES[scale.step(value)].background for value in own]
        panel = text[text.index(f"{name}\x1b") :]
        panel = panel[: panel.index("or less")]
        found = re.findall(r"48;2;(\d+);(\d+);(\d+)m", panel)
        assert ["#" + "".join(f"{int(part):02x}" for part in rgb) for rgb in found] == shades


def test_markup_in_tokens_is_text_in_a_terminal():
    vocab = ("[/bold]", "[red]", "[link=x]", PARIS)
    text = printed(make_result(pos=4, vocab=vocab), 200)
    head = next(line for line in text.splitlines() if line.startswith("layer")).split()
    assert head[1:] == ["[/bold]", "[red]", "[link=x]", "␣Paris"]


def test_zero_cells_are_dots_in_a_terminal():
    last_layer = [line for line in printed(make_result(), 200).splitlines() if line[4:6] == "3 "]
    assert [line.split()[1:5] for line in last_layer] == [["·"] * 4] * 2


def test_faint_cells_are_marked_and_explained():
    result = with_faint_cells(make_result(), 0.1)
    faint = {
        matrix: sum(cell.is_faint for cell in all_cells(result, matrix))
        for matrix in result.matrices
    }
    assert faint["W_in"] == 0 < faint["W_out"] < 20
    note = f"{faint['W_out']} of 20 cells"
    html, coloured = render_page(result), printed(result, 200, terminal=True)
    assert len(re.findall(r'<td class="[^"]*\bfaint\b', html)) == faint["W_out"]
    for text in (html, coloured):
        assert text.count("in italics") == 1
        assert f"{note} (in italics)" in text
    piped = printed(result, 200)
    assert f"{note} (with ~)" in piped
    assert piped.count("~") == 1 + faint["W_out"]
    assert "~" not in coloured
    without = make_result()
    assert "faint" not in render_page(without).partition("</style>")[2].partition("<script")[0]
    assert "with ~" not in printed(without, 200)


@pytest.mark.parametrize(
    ("layers", "leads", "expected"),
    [
        ([0, 1, 2], [], "0 of 3 layers"),
        ([0, 1, 2], [1], "1 of 3 layers (1)"),
        ([0, 1, 2, 3, 4], [0, 2, 3, 4], "4 of 5 layers (0, 2 to 4)"),
        ([3, 8, 9], [3, 9], "2 of 3 layers (3, 9)"),
        ([7], [7], "1 of 1 layer (7)"),
    ],
)
def test_in_which_layers_the_target_leads(layers, leads, expected):
    [some, *_] = make_result().cells("W_out", 0)
    cells = [replace(some, layer=layer, target_rank=int(layer not in leads)) for layer in layers]
    assert leading_layers(cells) == expected
