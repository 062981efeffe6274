"""The layers x tokens table in a real browser: its contents and its controls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Opened, opened
from playwright.sync_api import Browser, Locator, Page
from type_checks import type_checks_off
from view_cases import (
    NASTY,
    all_cells,
    make_long_result,
    make_result,
    parsed,
    shown,
    with_faint_cells,
)

from backward_lens_tl.lens import backward_lens
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.readout.jacobian_projection import jacobian_lens
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES, NormScale
from backward_lens_tl.views.text import display_order

pytestmark = pytest.mark.slow  # test_views.py has the quick checks of the same table

SEEN = """root => {
    // Text that takes up room: neither hidden nor for screen readers only.
    const visible = element => {
        const box = element.getBoundingClientRect();
        return element.checkVisibility() && box.width > 1 && box.height > 1;
    };
    const words = element => {
        const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
        let text = "";
        while (walker.nextNode())
            if (visible(walker.currentNode.parentElement)) text += walker.currentNode.data;
        return text;
    };
    const all = (element, selector) => [...element.querySelectorAll(selector)];
    const cell = td => {
        const style = getComputedStyle(td), token = all(td, "bdi").find(visible);
        return {
            words: words(td),
            background: style.backgroundColor,
            outlined: style.outlineStyle !== "none",
            bold: style.fontWeight > 400,
            italic: token ? getComputedStyle(token).fontStyle === "italic" : false,
        };
    };
    const shownOnes = (element, selector) => all(element, selector).filter(visible).map(words);
    const figure = figure => ({
        matrix: figure.dataset.matrix,
        columns: all(figure, "thead th").map(words),
        rows: all(figure, "tbody th").map(words),
        cells: all(figure, "td").map(cell),
        legends: shownOnes(figure, ".legend:not(.note)"),
        notes: shownOnes(figure, ".note"),
    });
    return {
        tables: all(root, "figure").filter(visible).map(figure),
        projection: shownOnes(root, "dd [data-lens]"),
    };
}"""

DETAILS = """figure => {
    const box = figure.querySelector(".details");
    const entry = li => [li.firstElementChild.textContent, li.lastChild.textContent.trim()];
    return {
        about: box.firstElementChild.textContent,
        rest: [...box.children].slice(1).map(part => part.firstChild.textContent),
        entries: [...box.querySelectorAll("ol")].map(ol => [...ol.children].map(entry)),
    };
}"""

HINT = {"about": "Hover over a cell for its details, or move between cells with the arrow keys."}
HINT |= {"rest": [], "entries": []}
PAGE_COLOURS = {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 22, 29)"}


@dataclass(frozen=True)
class State:
    """Settings of a table's controls."""

    matrix: str = ""
    lens: str = "logit_lens"
    end: str = "top"
    often: str = "ink"
    size: str = "norm"
    scale: str = "log"
    theme: str = "light"


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def expected_cell(cell: Cell, scale: NormScale, state: State) -> dict[str, Any]:
    if cell.is_zero:
        look = {"background": PAGE_COLOURS[state.theme], "outlined": False}
        return {"words": "·", **look, "bold": False, "italic": False}
    marked = cell.target_leads and state.end == "top"
    entry = (cell.top if state.end == "top" else cell.bottom)[0]
    shades = LIGHT_SHADES if state.theme == "light" else DARK_SHADES
    step = scale.step if state.scale == "log" else scale.linear_step
    return {
        "words": ("★" if marked else "") + shown(entry.token),
        "background": rgb(shades[step(getattr(cell, state.size))].background),
        "outlined": marked,
        "bold": marked,
        "italic": cell.is_faint,
    }


def expected_table(result: BackwardLensResult, matrix: str, state: State) -> dict[str, Any]:
    cells = all_cells(result.under(state.lens), matrix)
    norms = [getattr(cell, state.size) for cell in cells if not cell.is_zero]
    scale = NormScale.spanning(norms)
    size = {"norm": "‖δ_i‖", "write_norm": "‖x_i‖·‖δ_i‖"}[state.size]
    low = f"{size} {scale.low:.4g} or less" if state.scale == "log" else f"{size} 0"
    name = "logarithmic" if state.scale == "log" else "linear"
    faint = sum(cell.is_faint for cell in cells)
    threshold = result.under(state.lens).faint_norm
    note = f"{faint} of {len(cells)} cells (in italics) are read from vectors shorter than "
    return {
        "matrix": matrix,
        "columns": ["layer"]
        + [f"{shown(cell.token)}{cell.position}" for cell in result.cells(matrix, 0)],
        "rows": [str(layer) for layer in reversed(result.layers)],
        "cells": [expected_cell(cell, scale, state) for cell in cells],
        "legends": [f"{low}  {max(norms):.4g}, {name}"],
        "notes": [f"{note}{threshold:.4g}"] if faint else [],
    }


def see(root: Locator) -> dict[str, Any]:
    """Contents of the screen; for a note, only the numbers."""
    found = root.evaluate(SEEN)
    for table in found["tables"]:
        table["notes"] = [note.partition(", where")[0] for note in table["notes"]]
    return found


def assert_shows(root: Locator, result: BackwardLensResult, state: State = State()) -> None:
    found = see(root)
    matrices = [state.matrix] if state.matrix else display_order(result.matrices)
    assert [table["matrix"] for table in found["tables"]] == matrices
    for table, matrix in zip(found["tables"], matrices, strict=True):
        expected = expected_table(result, matrix, state)
        for part, value in expected.items():
            assert table[part] == value, (matrix, part, state)
    for text in found["projection"]:
        assert (
            text.casefold().replace("_", " ").startswith(state.lens.casefold().replace("_", " "))
        ), state


def expected_details(cell: Cell) -> dict[str, Any]:
    at = f"layer {cell.layer}, {shown(cell.token)} at {cell.position}"
    if cell.is_zero:
        reason = "adds nothing: δ_i is zero, no gradient reaches this position"
        return {"about": at, "rest": [reason], "entries": []}
    facts = [at, f"‖δ_i‖ {cell.norm:.4g}", f"‖x_i‖ {cell.input_norm:.4g}"]
    facts += [f"‖x_i‖·‖δ_i‖ {cell.write_norm:.4g}"]
    facts += ["faint"] * cell.is_faint + [f"target rank {cell.target_rank}"]
    return {
        "about": " · ".join(facts),
        "rest": ["Highest scores", "Lowest scores"],
        "entries": [words_and_scores(cell.top), words_and_scores(cell.bottom)],
    }


def words_and_scores(entries: tuple[TokenScore, ...]) -> list[list[Any]]:
    # Three digits of a half float, which is rounded before.
    return [[shown(entry.token), pytest.approx(entry.score, rel=6e-3)] for entry in entries]


def details(figure: Locator) -> dict[str, Any]:
    found = figure.evaluate(DETAILS)
    found["entries"] = [
        [[word, float(score)] for word, score in entries] for entries in found["entries"]
    ]
    return found


def figure_of(page: Page, matrix: str) -> Locator:
    return page.locator(f"figure[data-matrix={matrix}]")


def td_of(result: BackwardLensResult, figure: Locator, cell: Cell) -> Locator:
    """Position of the cell on the screen, found by counting."""
    row = list(reversed(result.layers)).index(cell.layer)
    columns = [each.position for each in result.cells(cell.matrix, cell.layer)]
    return figure.locator("tbody tr").nth(row).locator("td").nth(columns.index(cell.position))


def choose(root: Locator, name: str, value: str) -> None:
    root.locator(f"label:has([name={name}][value='{value}'])").click()


def is_wide_as_window(page: Page) -> bool:
    return page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


# --- results ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messi(facts_model: Any) -> BackwardLensResult:
    """A result of the shipped facts model, under both lenses."""
    return backward_lens(facts_model, "Lionel Messi plays for", " Paris")


@pytest.fixture(scope="module", params=["messi", "nasty"])
def result(request: pytest.FixtureRequest) -> BackwardLensResult:
    if request.param == "messi":
        return request.getfixturevalue("messi")
    whole = make_result(layers=3, pos=len(NASTY))
    # Only under the first lens, short vectors are faint; under the second, the target leads in
    # another layer, too.
    return with_faint_cells(whole, 0.1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[BackwardLensResult, Path]:
    """A long prompt in a deep model, and its page."""
    path = tmp_path_factory.mktemp("deep") / "page.html"
    words = tuple(f" w{index * 7919:x}" for index in range(300))
    with type_checks_off():
        result = make_result(layers=48, pos=31, k=10, vocab=(*words, *NASTY))
        result.save_html(path)
    return result, path


@contextmanager
def page_of(
    browser: Browser, folder: Path, result: BackwardLensResult, **options: Any
) -> Iterator[Opened]:
    result.save_html(folder / "page.html")
    with opened(browser, folder / "page.html", **options) as window:
        yield window
        window.check()


@contextmanager
def notebook_of(browser: Browser, folder: Path, body: str, **options: Any) -> Iterator[Opened]:
    """Outputs in one document, as in a notebook."""
    (folder / "notebook.html").write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A notebook</title>'
        f"</head><body><main><h1>A notebook</h1>{body}</main></body></html>",
        encoding="utf-8",
    )
    with opened(browser, folder / "notebook.html", **options) as window:
        yield window
        window.check()


# --- contents -------------------------------------------------------------------------------------


def test_tokens_marks_and_colours_match_the_result(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    cells = [cell for matrix in result.matrices for cell in all_cells(result, matrix)]
    assert any(cell.is_zero for cell in cells)
    assert any(cell.is_faint for cell in cells)
    assert any(cell.target_leads for cell in cells)
    with page_of(browser, tmp_path, result) as window:
        page = window.page
        assert_shows(page.locator("body"), result)
        page.emulate_media(color_scheme="dark")
        assert_shows(page.locator("body"), result, State(theme="dark"))
        body = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert body == PAGE_COLOURS["dark"]
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 800})
            assert is_wide_as_window(page), width


def test_each_control_changes_only_its_own_setting(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    looks = [
        expected_table(result, "W_out", State(lens=lens))["cells"] for lens in result.projections
    ]
    for part in ("words", "italic", "outlined")[: 3 if result.k == 3 else 2]:
        assert [cell[part] for cell in looks[0]] != [cell[part] for cell in looks[1]], part
    with page_of(browser, tmp_path, result) as window:
        body = window.page.locator("body")
        assert len(see(body)["projection"]) == 1
        previous = State()
        others = product(
            ["logit_lens", "normalized"], ["top", "bottom"], ["ink"], ["norm", "write_norm"],
            ["log", "linear"],
        )  # fmt: skip
        matrices = cycle(["", "W_out", "W_in"])
        states = [State(matrix, *other) for matrix, other in zip(matrices, others, strict=False)]
        for state in (*states, State()):
            for name in ("matrix", "lens", "end", "size", "scale"):
                if getattr(state, name) != getattr(previous, name):
                    choose(body, name, getattr(state, name))
            assert_shows(body, result, state)
            previous = state


def test_a_jacobian_lens_is_a_choice(browser: Browser, tmp_path: Path, facts_model: Any):
    carried = backward_lens(
        facts_model,
        "Lionel Messi plays for",
        " Paris",
        projection=("logit_lens", "normalized", jacobian_lens("facts")),
    )
    with page_of(browser, tmp_path, carried) as window:
        body = window.page.locator("body")
        for lens in ("jacobian_lens", "normalized", "jacobian_lens", "logit_lens"):
            choose(body, "lens", lens)
            assert_shows(body, carried, State(lens=lens))
            [fact] = see(body)["projection"]
            assert ("SHA-256" in fact) == (lens == "jacobian_lens")


def test_a_single_lens_stays_visible(browser: Browser, tmp_path: Path, messi: BackwardLensResult):
    alone = with_faint_cells(replace(messi, readings=messi.readings[:1]), 0.1)
    assert expected_table(alone, "W_out", State())["notes"]
    with page_of(browser, tmp_path, alone) as window:
        body = window.page.locator("body")
        choose(body, "end", "bottom")
        assert_shows(body, alone, State(end="bottom"))
        assert len(see(body)["projection"]) == 1


@pytest.mark.parametrize("name", ["linear", "bottom", "W_in"])
def test_a_lens_may_have_the_name_of_another_controls_choice(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult, name: str
):
    renamed = replace(messi.readings[1], projection=name)
    result = replace(messi, readings=(messi.readings[0], renamed))
    with page_of(browser, tmp_path, result) as window:
        body = window.page.locator("body")
        choose(body, "lens", name)
        assert_shows(body, result, State(lens=name))
        choose(body, "scale", "linear")
        choose(body, "end", "bottom")
        choose(body, "matrix", "W_out")
        assert_shows(body, result, State("W_out", name, "bottom", scale="linear"))


@pytest.mark.parametrize("is_restored", [False, True])
def test_after_going_back_the_page_matches_its_controls(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult, is_restored: bool
):
    path = tmp_path / "page.html"
    messi.save_html(path)
    if is_restored:  # by a browser that restores choices nevertheless
        path.write_text(path.read_text("utf-8").replace(' autocomplete="off"', ""), "utf-8")
    with opened(browser, path) as window:
        page, body = window.page, window.page.locator("body")
        choose(body, "lens", "normalized")
        choose(body, "end", "bottom")
        page.goto("about:blank")
        page.go_back()
        left = State(lens="normalized", end="bottom")
        assert_shows(body, messi, left if is_restored else State())
        # Some browsers restore the controls after the scripts have run, without an event.
        radio = page.locator("[name=lens][value=logit_lens]")
        radio.evaluate("radio => { radio.checked = true; }")
        page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow'))")
        assert_shows(body, messi, replace(left if is_restored else State(), lens="logit_lens"))
        window.requests.clear()  # about:blank
        window.check()


def test_older_browsers_show_the_tokens(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    path = tmp_path / "page.html"
    messi.save_html(path)
    sheet = path.read_text("utf-8").replace(":has(", ":unknown(").replace("light-dark(", "unknown(")
    path.write_text(sheet, "utf-8")
    with opened(browser, path) as window:
        found = see(window.page.locator("body"))
        for table, matrix in zip(found["tables"], display_order(messi.matrices), strict=True):
            expected = expected_table(messi, matrix, State())
            expected["cells"] = [cell["words"] for cell in expected["cells"]]
            assert {**table, "cells": [cell["words"] for cell in table["cells"]]} == expected
        header = figure_of(window.page, "W_in").locator("thead th").first
        colour = header.evaluate("th => getComputedStyle(th).backgroundColor")
        assert colour == PAGE_COLOURS["light"]  # it covers what is scrolled below it


def test_print_has_the_whole_table_without_controls(
    browser: Browser, tmp_path: Path, deep: tuple[BackwardLensResult, Path]
):
    with opened(browser, deep[1], width=400) as window:
        page, heading = window.page, window.page.locator("h1")
        clamped = heading.bounding_box()["height"]
        figure = figure_of(page, "W_out")
        assert "visible" not in clipping(figure)
        for locator in (page.locator("form"), page.locator(".hint").first):
            assert locator.is_visible()
        td_of(deep[0], figure, deep[0].cell("W_out", 46, -1)).click()
        page.mouse.move(1, 1)
        page.emulate_media(media="print", color_scheme="dark")
        assert clipping(figure) == ["visible", "visible"]
        box = figure.locator(".scroll").bounding_box()
        assert box["height"] >= figure.locator("table").bounding_box()["height"]
        for locator in (page.locator("form"), page.locator(".hint")):
            assert not locator.is_visible()
        assert not figure_of(page, "W_in").locator(".details").is_visible()
        assert figure.locator(".details").is_visible()  # a cell was chosen
        assert heading.bounding_box()["height"] > clamped
        paper = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert paper == PAGE_COLOURS["light"]
        window.check()


def test_the_table_can_be_read_and_switched_without_scripts(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    with page_of(browser, tmp_path, messi, scripts=False) as window:
        page, body = window.page, window.page.locator("body")
        assert_shows(body, messi)
        assert page.locator("legend:visible").all_inner_texts() == [
            "Matrix", "Tokens", "Frequent tokens", "Colour", "Scale",
        ]  # fmt: skip
        assert "tooltip" in figure_of(page, "W_in").locator(".details").inner_text()
        for cell in (all_cells(messi, "W_out")[-1], all_cells(messi, "W_out")[0]):
            td = td_of(messi, figure_of(page, "W_out"), cell)
            tooltip = td.get_attribute("title")
            if cell.is_zero:
                assert tooltip.startswith("adds nothing: δ_i is zero")
            else:
                assert tooltip.startswith(f"‖δ_i‖ {cell.norm:.4g}, ‖x_i‖·‖δ_i‖ ")
            td.focus()  # by keyboard, too
            assert td.evaluate("td => td === document.activeElement")
        page.locator("[name=end]").first.focus()
        for state in (
            State(end="bottom"),
            State(end="bottom", scale="linear"),
            State("W_out", end="bottom", scale="linear"),
            State("W_out", scale="linear"),
            State("W_out", size="write_norm", scale="linear"),
            State("W_out", size="write_norm"),
        ):
            for name in ("matrix", "end", "size", "scale"):
                choose(body, name, getattr(state, name))
            assert_shows(body, messi, state)


# --- details and keys ---------------------------------------------------------------------------


def test_details_follow_the_mouse_and_return_to_the_focused_cell(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    cells = {
        matrix: [
            next(cell for cell in all_cells(result, matrix) if cell.is_zero),
            next(cell for cell in all_cells(result, matrix) if not cell.is_zero),
            result.cell(matrix, 0, 2),
            result.cell(matrix, 1, -1),
        ]
        for matrix in result.matrices
    }
    with page_of(browser, tmp_path, result) as window:
        page = window.page
        for matrix in result.matrices:
            figure = figure_of(page, matrix)
            assert details(figure) == HINT
            assert figure.locator(".details").bounding_box()["height"] < 50
            heights = set()
            for cell in cells[matrix]:
                td_of(result, figure, cell).hover()
                assert details(figure) == expected_details(cell)
                heights.add(figure.bounding_box()["height"])
            page.mouse.move(1, 1)
            assert details(figure) == HINT
            heights.add(figure.bounding_box()["height"])
            assert len(heights) == 1  # nothing moves after the first cell
            clicked, other = cells[matrix][2], cells[matrix][1]
            td_of(result, figure, clicked).click()
            td_of(result, figure, other).hover()
            assert details(figure) == expected_details(other)
            figure.locator("tbody th").first.hover()
            assert details(figure) == expected_details(clicked)
            td_of(result, figure, other).hover()
            page.mouse.move(1, 1)
            assert details(figure) == expected_details(clicked)
        # Tables have separate details, but the lens applies to all of them.
        choose(page.locator("body"), "lens", "normalized")
        for matrix in result.matrices:
            clicked = result.under("normalized").cell(matrix, 0, 2)
            assert details(figure_of(page, matrix)) == expected_details(clicked)


def test_arrow_keys_move_between_cells(browser: Browser, tmp_path: Path, messi: BackwardLensResult):
    columns, rows = len(messi.cells("W_in", 0)), len(messi.layers)
    path = [
        ("ArrowUp", 0, 0), ("ArrowLeft", 0, 0), ("Home", 0, 0), ("ArrowRight", 0, 1),
        ("ArrowDown", 1, 1), ("End", 1, columns - 1), ("ArrowRight", 1, columns - 1),
        ("ArrowUp", 0, columns - 1), ("ArrowLeft", 0, columns - 2), ("Home", 0, 0),
        *(("ArrowDown", row, 0) for row in range(1, rows)), ("ArrowDown", rows - 1, 0),
        ("PageDown", rows - 1, 0), ("Control+ArrowUp", rows - 1, 0), ("x", rows - 1, 0),
    ]  # fmt: skip
    with page_of(browser, tmp_path, messi) as window:
        page = window.page
        page.locator("[name=scale]").first.focus()
        for matrix in display_order(messi.matrices):
            figure, cells = figure_of(page, matrix), all_cells(messi, matrix)
            assert figure.locator("[tabindex='0']").count() == 1
            page.keyboard.press("Tab")  # one Tab leads to the next table
            for key, row, column in [("Shift", 0, columns - 1), ("Home", 0, 0), *path]:
                page.keyboard.press(key)
                at = row * columns + column
                td = figure.locator("td").nth(at)
                assert td.evaluate("td => td === document.activeElement"), (key, row, column)
                assert td.evaluate("td => getComputedStyle(td).outlineStyle") == "solid"
                assert details(figure) == expected_details(cells[at])
            assert figure.locator("[tabindex='0']").count() == 1
        page.keyboard.press("Shift+Tab")  # back to the previous cell
        last = all_cells(messi, "W_out")[(rows - 1) * columns]
        assert details(figure_of(page, "W_out")) == expected_details(last)
        td = td_of(messi, figure_of(page, "W_out"), last)
        assert td.evaluate("td => td === document.activeElement")


def test_controls_work_by_keyboard_and_are_never_submitted(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    with page_of(browser, tmp_path, messi) as window:
        page, body = window.page, window.page.locator("body")
        address = page.url
        state = State()
        for name, value in {
            "matrix": "W_out", "lens": "normalized", "end": "bottom", "often": "faded",
            "size": "write_norm", "scale": "linear",
        }.items():  # fmt: skip
            page.keyboard.press("Tab")
            label = page.locator("label:focus-within")
            assert label.evaluate("label => getComputedStyle(label).outlineStyle") == "solid"
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            state = replace(state, **{name: value})
            assert_shows(body, messi, state)
        page.keyboard.press("ArrowRight")  # wraps from the last choice to the first
        assert_shows(body, messi, replace(state, scale="log"))
        page.keyboard.press("ArrowLeft")
        assert_shows(body, messi, state)
        # Chromium does not submit a form without a button on Enter; other browsers do.
        page.locator("form").evaluate("form => form.requestSubmit()")
        assert_shows(body, messi, state)
        assert page.url == address


# --- in a notebook ------------------------------------------------------------------------------


def test_two_tables_on_one_page_are_independent(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    fragment = messi._repr_html_()
    with notebook_of(browser, tmp_path, fragment * 2) as window:
        first, second = window.page.locator(".blt").all()
        chosen = State("W_out", "normalized", "bottom", size="write_norm", scale="linear")
        for name in ("matrix", "lens", "end", "size", "scale"):
            choose(second, name, getattr(chosen, name))
        assert_shows(first, messi)
        assert_shows(second, messi, chosen)
        choose(first, "end", "bottom")
        assert_shows(first, messi, State(end="bottom"))
        assert_shows(second, messi, chosen)

        cell = messi.cell("W_out", 0, 1)
        figures = [root.locator("figure[data-matrix=W_out]") for root in (first, second)]
        td_of(messi, figures[0], cell).click()
        assert details(figures[0]) == expected_details(cell)
        assert details(figures[1]) == HINT
        cell = messi.under("normalized").cell("W_out", 1, 2)
        td_of(messi, figures[1], cell).click()
        assert details(figures[1]) == expected_details(cell)
        assert details(figures[0]) == expected_details(messi.cell("W_out", 0, 1))


@pytest.mark.parametrize(("theme", "system"), [("dark", "light"), ("light", "dark")])
def test_a_notebooks_theme_overrides_the_systems(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult, theme: str, system: str
):
    is_light = "true" if theme == "light" else "false"
    with notebook_of(browser, tmp_path, messi._repr_html_(), scheme=system) as window:
        body = window.page.locator("body")
        assert_shows(body, messi, State(theme=system))
        body.evaluate("(body, value) => body.dataset.jpThemeLight = value", is_light)
        assert_shows(body, messi, State(theme=theme))


# JupyterLab's rules for tables, paragraphs and lists in outputs.
JUPYTER = """
.jp-RenderedHTMLCommon u { text-decoration: underline }
.jp-RenderedHTMLCommon ol:not(.list-inline) { padding-left: 2em }
.jp-RenderedHTMLCommon ol { list-style: decimal; margin-bottom: 1em }
.jp-RenderedHTMLCommon table { border-collapse: collapse; border-spacing: 0; border: none;
    color: green; font-size: 20px; table-layout: fixed; margin: 0 auto 1em }
.jp-RenderedHTMLCommon thead { border-bottom: 1px solid; vertical-align: bottom }
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th, .jp-RenderedHTMLCommon tr {
    vertical-align: middle; padding: .5em; line-height: normal; white-space: normal;
    max-width: none; border: none }
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon td,
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon th,
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon tr { text-align: right }
.jp-RenderedHTMLCommon th { font-weight: bold }
.jp-RenderedHTMLCommon tbody tr:nth-child(odd) { background: red }
.jp-RenderedHTMLCommon tbody tr:nth-child(even) { background: red }
.jp-RenderedHTMLCommon tbody tr:hover { background: red }
.jp-RenderedHTMLCommon p { text-align: left; margin: 0; margin-bottom: 1em }
"""
LOOKS = """root => {
    const names = ["textAlign", "verticalAlign", "padding", "lineHeight", "whiteSpace", "color",
        "maxWidth", "borderRightWidth", "fontSize", "fontWeight", "textDecorationLine",
        "backgroundColor", "listStyleType", "margin", "borderCollapse", "tableLayout"];
    const looks = {};
    for (const element of root.querySelectorAll(".scroll :not(thead, tr), .details *")) {
        const style = getComputedStyle(element), box = element.getBoundingClientRect();
        const place = `${element.tagName} ${element.className}`;
        looks[place] ??= [];
        const look = names.map(name => style[name].replace(/^start$/, "left"));
        looks[place].push([Math.round(box.width), ...look]);
    }
    return looks;
}"""


def test_a_notebooks_own_rules_for_tables_change_nothing(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    body = f'<div class="jp-RenderedHTMLCommon">{result._repr_html_()}</div>'
    looks = []
    for rules in ("", JUPYTER):
        with notebook_of(browser, tmp_path, f"{body}<style>{rules}</style>") as window:
            root = window.page.locator(".blt")
            cell = result.cell("W_in", 0, -1)
            td_of(result, root.locator("figure[data-matrix=W_in]"), cell).hover()
            looks.append(root.evaluate(LOOKS))
    for place, look in looks[0].items():
        assert looks[1][place] == look, place
    cells = [look for place in looks[0] if place.startswith("TD") for look in looks[0][place]]
    assert {align for _, align, *_ in cells} == {"left"}


# --- long prompts and many layers ---------------------------------------------------------------

# What is at many points of an element's visible part: only itself and what is in it?
ON_TOP = """element => {
    const box = element.getBoundingClientRect();
    const scroll = element.closest(".scroll"), window = scroll.getBoundingClientRect();
    const inside = (x, y) => x > window.left && x < window.left + scroll.clientWidth &&
        y > window.top && y < window.top + scroll.clientHeight;
    const points = [];
    for (let i = 0.5; i < 8; i++)
        for (let j = 0.5; j < 4; j++)
            points.push([box.left + box.width * i / 8, box.top + box.height * j / 4]);
    const hit = points.filter(point => inside(...point)).map(
        point => element.contains(document.elementFromPoint(...point)));
    return {visible: hit.length / points.length, all: hit.every(Boolean)};
}"""
HEADERS = """(figure, test) => {
    const onTop = eval(test), scroll = figure.querySelector(".scroll");
    const top = scroll.getBoundingClientRect().top, left = scroll.getBoundingClientRect().left;
    const column = [...figure.querySelectorAll("thead th")];
    const row = [...figure.querySelectorAll("tbody th")];
    const below = column[0].getBoundingClientRect().bottom;
    const bottom = scroll.getBoundingClientRect().top + scroll.clientHeight;
    const marks = [...figure.querySelectorAll("td u")].filter(u => u.checkVisibility())
        .map(u => u.getBoundingClientRect()).map(box => [box.left + 1, box.top + 1])
        .filter(([x, y]) => x > left && x < column[0].getBoundingClientRect().right &&
            y > below && y < bottom);
    return {
        covered: marks.map(point => document.elementFromPoint(...point).tagName),
        scrolled: [scroll.scrollLeft, scroll.scrollTop],
        tops: [...new Set(column.map(th => th.getBoundingClientRect().top - top))],
        lefts: [...new Set(row.map(th => th.getBoundingClientRect().left - left))],
        corner: onTop(column[0]),
        rows: row.filter(th => th.getBoundingClientRect().top >= below)
            .map(onTop).filter(found => found.visible === 1),
    };
}"""


def clipping(figure: Locator) -> list[str]:
    return figure.locator(".scroll").evaluate(
        "scroll => [getComputedStyle(scroll).overflowX, getComputedStyle(scroll).overflowY]"
    )


def test_a_long_prompt_opens_at_its_last_token(
    browser: Browser, tmp_path: Path, deep: tuple[BackwardLensResult, Path]
):
    result = deep[0]
    with opened(browser, deep[1], width=600) as window:
        page = window.page
        assert page.evaluate("scrollY") == 0
        for matrix in result.matrices:
            figure = figure_of(page, matrix)
            td = td_of(result, figure, result.cell(matrix, 47, -1))
            figure.evaluate("figure => figure.scrollIntoView()")  # only downwards
            assert td.evaluate(ON_TOP) == {"visible": 1, "all": True}
            first = td_of(result, figure, result.cell(matrix, 47, 0))
            assert first.evaluate(ON_TOP)["visible"] < 1
        window.check()


def test_a_long_prompt_is_three_lines_above_the_table(
    browser: Browser, deep: tuple[BackwardLensResult, Path]
):
    for width in (1280, 400):
        with opened(browser, deep[1], width=width) as window:
            h1 = window.page.locator("h1")
            line = h1.evaluate("h1 => parseFloat(getComputedStyle(h1).lineHeight)")
            assert h1.bounding_box()["height"] <= 3 * line + 1, width
            assert h1.text_content().endswith("→  Paris")  # for searching and copying
            window.check()


def test_a_page_of_many_matrices_is_not_stretched_by_empty_boxes(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    with notebook_of(browser, tmp_path, messi._repr_html_() * 3) as window:
        for box in window.page.locator(".details").all():
            assert box.bounding_box()["height"] < 50


def test_a_long_prompt_in_a_deep_model_scrolls_below_its_headers(
    browser: Browser, deep: tuple[BackwardLensResult, Path]
):
    with opened(browser, deep[1]) as window:
        page = window.page
        assert page.locator("td").count() == 2 * 48 * 31
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 800})
            assert is_wide_as_window(page), width
            figure = figure_of(page, "W_in")
            scroll = figure.locator(".scroll")
            left = figure.locator("td").nth(8).evaluate("td => td.offsetLeft") - 15
            scroll.evaluate("(element, left) => element.scrollTo(left, 305)", left)
            scroll.scroll_into_view_if_needed()
            found = figure.evaluate(HEADERS, ON_TOP)
            assert found["scrolled"] == [left, 305]
            assert (found["tops"], found["lefts"]) == ([0], [0])
            assert found["corner"] == {"visible": 1, "all": True}
            assert len(found["rows"]) > 5
            assert all(row["all"] for row in found["rows"])
            assert found["covered"]
            assert set(found["covered"]) == {"TH"}
            # At the headers' edge with every step.
            figure.locator("td").nth(15 * 31 + 5).click()
            for key, times in {"ArrowUp": 6, "End": 1, "ArrowLeft": 6}.items():
                for _ in range(times):
                    page.keyboard.press(key)
                    focused = page.evaluate(f"({ON_TOP})(document.activeElement)")
                    assert focused == {"visible": 1, "all": True}, (width, key)
        window.check()


def test_a_large_page_is_ready_quickly(browser: Browser, deep: tuple[BackwardLensResult, Path]):
    """It takes about 0.9 s, and switching the lens 0.4 s, on a busy core."""
    result, path = deep
    with opened(browser, path) as window:
        page = window.page
        (ready,) = page.evaluate(
            "performance.getEntriesByType('navigation').map(page => page.domContentLoadedEventEnd)"
        )
        switched = page.locator("[value=normalized]").evaluate(
            "radio => { const before = performance.now(); radio.click();"
            " document.body.offsetHeight; return performance.now() - before; }"
        )
        assert ready < 6000
        assert switched < 3000
        cell = result.under("normalized").cell("W_out", 30, 7)
        td_of(result, figure_of(page, "W_out"), cell).hover()
        assert details(figure_of(page, "W_out")) == expected_details(cell)


LONG = 400
SCROLL = """async (scroll, steps) => {
    for (let step = 1; step <= steps; step++) {
        scroll.scrollLeft = (scroll.scrollWidth - scroll.clientWidth) * (1 - step / steps);
        await new Promise(requestAnimationFrame);
    }
}"""


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[BackwardLensResult, Path]:
    """A prompt of 400 tokens in a gated model of 30 layers, and its page."""
    path = tmp_path_factory.mktemp("long") / "page.html"
    with type_checks_off():
        result = make_long_result(layers=30, pos=LONG)
        result.save_html(path)
    return result, path


def column_of(page: Page, matrix: str, row: int, column: int) -> Locator:
    """A cell of a long table, found by its place on the screen."""
    figure = figure_of(page, matrix)
    place = """(figure, [row, column]) => {
        const cells = [...figure.querySelector("tbody").rows[row].cells].slice(1);
        let at = 0;
        for (const td of cells) { if (at === column) { td.dataset.found = "1"; break; }
            at += td.colSpan; }
    }"""
    figure.evaluate("figure => figure.querySelector('[data-found]')?.removeAttribute('data-found')")
    figure.evaluate(place, [row, column])
    return figure.locator("td[data-found]")


def test_a_long_prompt_stays_below_5_mb_with_all_tokens(long: tuple[BackwardLensResult, Path]):
    html = long[1].read_text("utf-8")
    assert 4e6 < len(html.encode()) < 5e6
    page, written = parsed(html), 1500 // 90
    for table in page.all("table"):
        assert len(table.all("thead")[0].all("th")) == 1 + LONG
        assert len(table.all("thead")[0].all("th", "early")) == LONG - written
        for row in table.all("tbody")[0].all("tr"):
            gap, *cells = row.all("td")
            assert gap.attributes == {"class": "early", "colspan": str(LONG - written)}
            assert len(cells) == written
    assert f"Without scripts they show only the last {written}." in page.text
    assert "Details hold 3 of the 10 tokens" in page.text
    assert "of 400 tokens" not in page.text


def test_a_long_prompt_opens_and_scrolls_quickly(
    browser: Browser, long: tuple[BackwardLensResult, Path]
):
    """1 s, and 0.1 s for each of 24 steps from the last token to the first one.

    That is the time on the CPU, which other processes do not change much.
    """
    with opened(browser, Path(__file__)) as window:
        page, steps = window.page, 24
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def spent() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

        page.goto(long[1].as_uri())
        page.evaluate("new Promise(requestAnimationFrame)")
        ready = spent()
        assert ready < 2
        figure = figure_of(page, "W_out")
        assert figure.locator("td.early").count() > 0
        figure.locator(".scroll").evaluate(SCROLL, steps)
        assert (spent() - ready) / steps < 0.3
        assert figure.locator("td.early").count() == 0


PLACES = """figure => [...figure.querySelector("tbody").rows].map(row => {
    let column = 0;
    return [...row.cells].slice(1).map(td => {
        const at = column;
        column += td.colSpan;
        const top = td.querySelector(".top bdi")?.textContent ?? "";
        return [at, td.className === "early" ? null : top];
    });
})"""


def assert_in_place(figure: Locator, result: BackwardLensResult) -> None:
    """In every row of `W_out`, each cell that is written is below its token."""
    rows = figure.evaluate(PLACES)
    for layer, row in zip(reversed(result.layers), rows, strict=True):
        cells = result.cells("W_out", layer)
        assert row[-1][0] == len(cells) - 1
        for column, text in row:
            if text is not None:
                cell = cells[column]
                assert text == ("" if cell.is_zero else shown(cell.top[0].token))


def test_early_tokens_of_a_long_prompt_are_written_when_they_are_needed(
    browser: Browser, long: tuple[BackwardLensResult, Path]
):
    result = long[0]
    with opened(browser, long[1]) as window:
        page = window.page
        figure = figure_of(page, "W_out")
        before = figure.locator("td:not(.early)").count()
        assert before < 30 * LONG / 2
        assert_in_place(figure, result)
        figure.locator(".scroll").evaluate("scroll => scroll.scrollLeft = 0")
        page.wait_for_function("document.querySelector('tbody tr').cells[1].colSpan === 1")
        assert figure.locator("td.early").count() > 0  # between the first and the last tokens
        assert_in_place(figure, result)
        for lens in ("logit_lens", "normalized"):
            choose(page.locator("body"), "lens", lens)
            for layer, column in [(3, 0), (28, 7), (29, 2)]:
                cell = result.under(lens).cell("W_out", layer, column)
                td = column_of(page, "W_out", 29 - layer, column)
                td.hover()
                found = details(figure)
                if cell.is_zero:
                    assert found["rest"] == expected_details(cell)["rest"]
                    continue
                kept = replace(cell, top=cell.top[:3], bottom=cell.bottom[:3])
                assert found == expected_details(kept)
                assert td.locator(".top bdi").text_content() == shown(cell.top[0].token)
                assert td.locator(".low bdi").text_content() == shown(cell.bottom[0].token)
        # A header is above its column, and keys reach cells that were not written.
        heads = figure.locator("thead th")
        for column in (0, 7, LONG - 1):
            td = column_of(page, "W_out", 0, column)
            assert td.bounding_box()["x"] == heads.nth(column + 1).bounding_box()["x"]
        column_of(page, "W_out", 5, LONG - 1).focus()
        page.keyboard.press("Home")
        page.keyboard.press("End")
        for _ in range(80):
            page.keyboard.press("ArrowLeft")
        at = page.evaluate("document.activeElement.getBoundingClientRect().x")
        assert at == heads.nth(LONG - 80).bounding_box()["x"]
        for headers, side in (("thead th", "top"), ("tbody th", "left")):
            places = """(figure, [headers, side]) => {
                const box = figure.querySelector(".scroll").getBoundingClientRect();
                const all = [...figure.querySelectorAll(headers)];
                return all.map(th => th.getBoundingClientRect()[side] - box[side]);
            }"""
            assert set(figure.evaluate(places, [headers, side])) == {0}
        window.check()


def test_a_long_prompt_without_scripts_shows_its_last_tokens(
    browser: Browser, long: tuple[BackwardLensResult, Path]
):
    with opened(browser, long[1], scripts=False) as window:
        heads = window.page.locator("figure[data-matrix=W_out] thead th:visible")
        assert heads.count() == 1 + 1500 // 90
        assert window.page.locator(".unscripted").is_visible()
        first = window.page.locator("figure[data-matrix=W_out] tbody tr td:visible").first
        assert first.bounding_box()["x"] == heads.nth(1).bounding_box()["x"]


def test_frequent_tokens_fade(browser: Browser, tmp_path: Path):
    result = make_result(layers=12, vocab=(" Paris", *" abcdefghijklmno"))
    with page_of(browser, tmp_path, result) as window:
        page = window.page
        colours = """root => [...root.querySelectorAll("td:not(.zero) .top")].map(
            div => [div.classList.contains("often"), getComputedStyle(div).color])"""
        before = page.locator("body").evaluate(colours)
        assert {is_often for is_often, _ in before} == {False, True}
        choose(page.locator("body"), "often", "faded")
        after = page.locator("body").evaluate(colours)
        for (is_often, colour), (_, faded) in zip(before, after, strict=True):
            assert (colour != faded) == is_often


# --- accessibility ------------------------------------------------------------------------------


def serious(page: Page) -> list[tuple[str, list[str]]]:
    """Violations that axe-core rates as serious or critical."""
    return [
        (found["id"], [node["html"] for node in found["nodes"]])
        for found in Axe().run(page).response["violations"]
        if found["impact"] in ("serious", "critical")
    ]


def test_axe_finds_no_serious_violation(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    with page_of(browser, tmp_path, messi) as window:
        page, body = window.page, window.page.locator("body")
        td_of(messi, figure_of(page, "W_out"), messi.cell("W_out", 0, 1)).click()
        assert serious(page) == []
        page.emulate_media(color_scheme="dark")
        assert serious(page) == []
        choose(body, "end", "bottom")
        choose(body, "scale", "linear")
        page.set_viewport_size({"width": 400, "height": 800})
        assert serious(page) == []
        # Control: it does find violations.
        body.evaluate(
            """body => {
                body.insertAdjacentHTML("beforeend", "<img src='data:,'><input>");
                body.querySelector("figcaption").style.color = "#333";
            }"""
        )
        planted = {"image-alt", "label", "color-contrast"}
        assert {name for name, _ in serious(page)} == planted
        page.locator("img").evaluate("image => image.remove()")
        window.requests.clear()  # that of the image


def test_axe_finds_no_serious_violation_in_a_notebook(
    browser: Browser, tmp_path: Path, messi: BackwardLensResult
):
    with notebook_of(browser, tmp_path, messi._repr_html_() * 2) as window:
        assert serious(window.page) == []


def test_a_screen_reader_gets_tables_with_headers(
    browser: Browser, tmp_path: Path, result: BackwardLensResult
):
    """Checked in the browser's accessibility tree."""
    with page_of(browser, tmp_path, result) as window:
        session = window.page.context.new_cdp_session(window.page)
        named: dict[str, list[str]] = {}
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"]:
                name = node.get("name", {}).get("value", "")
                named.setdefault(node["role"]["value"], []).append(name)
    columns, rows = len(result.cells("W_in", 0)), len(result.layers)
    assert [name.partition(",")[0] for name in named["table"]] == display_order(result.matrices)
    assert len(named["columnheader"]) == 2 * (1 + columns)
    assert named["rowheader"] == [str(layer) for layer in reversed(result.layers)] * 2
    cells = [
        cell for matrix in display_order(result.matrices) for cell in all_cells(result, matrix)
    ]
    assert len(named["cell"]) == len(cells) == 2 * rows * columns
    for name, cell in zip(named["cell"], cells, strict=True):
        assert ("target leads: " in name) == cell.target_leads
        assert name.startswith("adds nothing: δ_i is zero") == cell.is_zero
    titles = {"Matrix", "Lens", "Tokens", "Frequent tokens", "Colour", "Scale"}
    assert titles <= set(named["group"])
    assert named["radio"] == [
        "all", "W_out", "W_in", "logit lens", "normalized", "top", "bottom", "as others", "faded",
        "‖δ_i‖", "‖x_i‖·‖δ_i‖", "log", "linear",
    ]  # fmt: skip
