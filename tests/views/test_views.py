"""Views show the result's numbers and tokens, and no token can break them."""

from __future__ import annotations

import io
import json
import re
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
    make_result,
    parsed,
    shown,
    without_target,
)

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES, NormScale
from backward_lens_tl.views.table import MAX_PROMPTS, render_page, render_table
from backward_lens_tl.views.terminal import TerminalTable
from backward_lens_tl.views.text import Piece, display_order, pieces, running_text

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


def test_the_script_gets_all_tokens_scores_norms_and_ranks(page: Node, result: BackwardLensResult):
    held = data(page)
    assert tuple(held["lenses"]) == result.projections == ("logit_lens", "normalized")
    for matrix in result.matrices:
        found = [cell for row in held["panels"][matrix] for cell in row]
        for place, lens in enumerate(result.projections):
            cells = all_cells(result.under(lens), matrix)
            for packed, cell in zip(found, cells, strict=True):
                if cell.is_zero:
                    assert packed.startswith("adds nothing")
                    continue
                assert packed[:2] == [f"{cell.norm:.4g}", f"{cell.input_norm:.4g}"]
                rank, faint, *entries = packed[2 + place]
                assert (rank, faint) == (cell.target_rank, int(cell.is_faint))
                words = [parsed(held["tokens"][index]).text for index in entries[::2]]
                assert words == [shown(entry.token) for entry in cell.top + cell.bottom]
                scores = [float(f"{entry.score:.4g}") for entry in cell.top + cell.bottom]
                assert entries[1::2] == scores


def test_tooltips_show_norm_rank_and_tokens_without_scripts(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        for node, cell in zip(table.all("td"), all_cells(result, matrix), strict=True):
            assert node.attributes["tabindex"] == "0"
            if cell.is_zero:
                continue
            tooltip = node.attributes["title"]
            assert tooltip.startswith(f"norm {cell.norm:.4g}, target rank {cell.target_rank};")
            assert repr(running_text(cell.top[2].token)) in tooltip
            assert repr(running_text(cell.bottom[2].token)) in tooltip


def test_controls_offer_the_results_matrices_and_lenses(page: Node):
    def offered(node: Node) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for button in node.all("input"):
            found.setdefault(button.attributes["name"], []).append(button.attributes["value"])
        return found

    ends = {"end": ["top", "bottom"], "scale": ["log", "linear"]}
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
    facts = [node.text for node in page.all("dd")]
    assert facts[:3] == [" Paris", "1.25 target_nll(' Paris')", "a <model>"]
    assert "logit lens" in facts[3]
    assert facts[4].startswith("update")


@pytest.mark.parametrize("render", [render_page, render_table])
def test_nothing_is_fetched(render):
    html = render(make_result(vocab=(PARIS, " a", " b", " c")))
    for forbidden in ("http", "src=", "url(", "@import", "<link", "fetch(", "import "):
        assert forbidden not in html


def test_a_long_prompt_in_a_deep_model_stays_below_2_mb():
    """Under both lenses, with a vocabulary so large that hardly any token occurs twice."""
    words = tuple(f" w{index * 7919:x}" for index in range(30_000))
    html = render_page(make_result(layers=48, pos=20, k=10, vocab=(*words, PARIS)))
    assert len(html.encode()) < 2e6


def test_the_gradient_direction_is_stated():
    text = parsed(render_page(make_result(direction="gradient"))).text
    assert "W_out raw gradient, which gradient descent subtracts" in text
    assert "what the update adds" not in text


def test_without_a_target_nothing_is_marked_or_ranked():
    page = parsed(render_page(without_target(make_result())))
    assert not page.all("td", "lead")
    assert not any("target rank" in node.text for node in page.all("td"))
    assert page.all("dd")[0].text == "none"


def test_a_notebook_shows_the_first_prompts_and_how_to_see_the_others():
    fragment = parsed(make_result(batch=MAX_PROMPTS)._repr_html_())
    assert len(fragment.all("table")) == 2 * MAX_PROMPTS
    assert "not shown" not in fragment.text

    fragment = parsed(make_result(layers=48, pos=20, batch=3)._repr_html_())
    assert len(fragment.all("table")) == 2 * 2
    assert "1 more of 3 prompts" in fragment.text

    fragment = parsed(make_result(batch=MAX_PROMPTS + 3)._repr_html_())
    assert len(fragment.all("table")) == 2 * MAX_PROMPTS
    assert "3 more of 7 prompts" in fragment.text
    assert f"save_html(path, batch={MAX_PROMPTS})" in fragment.text


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


def test_colours_follow_the_norm(page: Node, result: BackwardLensResult):
    for table, matrix in tables(page, result):
        pairs = sorted(
            (cell.norm, int(re.search(r"n(\d+)", node.attributes["class"])[1]))
            for node, cell in zip(table.all("td"), all_cells(result, matrix), strict=True)
            if not cell.is_zero
        )
        steps = [step for _, step in pairs]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, len(LIGHT_SHADES) - 1)
        low, high = f"≤ {pairs[0][0]:.4g}", f"{pairs[-1][0]:.4g}"
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
    assert re.search(r"norm ≤ \S+ to \S+, logarithmic", text)


def test_a_terminal_gets_a_star_in_bold_exactly_where_the_target_leads():
    result = make_result()
    text = printed(result, 200, terminal=True)
    leads = [cell for name in result.matrices for cell in all_cells(result, name)]
    starred = re.findall(r"\x1b\[([\d;]+)m★␣Paris", text)
    assert len(starred) == text.count("★") == sum(cell.target_leads for cell in leads) > 0
    assert all(codes.startswith("1;") for codes in starred)


def test_markup_in_tokens_is_text_in_a_terminal():
    vocab = ("[/bold]", "[red]", "[link=x]", PARIS)
    text = printed(make_result(pos=4, vocab=vocab), 200)
    head = next(line for line in text.splitlines() if line.startswith("layer")).split()
    assert head[1:] == ["[/bold]", "[red]", "[link=x]", "␣Paris"]


def test_zero_cells_are_dots_in_a_terminal():
    last_layer = [line for line in printed(make_result(), 200).splitlines() if line[4:6] == "3 "]
    assert [line.split()[1:5] for line in last_layer] == [["·"] * 4] * 2


def test_faint_cells_are_marked_and_explained():
    whole = make_result()
    faint = replace(whole.readings[0], faint_norm=0.1)
    result = replace(whole, readings=(faint, *whole.readings[1:]))
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
