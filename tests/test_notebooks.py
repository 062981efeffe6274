"""Every notebook runs from top to bottom, and is what its paired script says."""

import json
import re
from pathlib import Path

import pytest
from browser import opened
from nbconvert import HTMLExporter
from playwright.sync_api import expect
from test_widgets import OFFLINE

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    namespace: dict[str, object] = {}
    for source in cells(path, "code"):
        exec(compile(source, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_its_script(path):
    script = path.with_suffix(".py").read_text(encoding="utf-8")
    for source in cells(path, "code"):
        assert source in script


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert any(cell.get("outputs") for cell in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exported_notebook_needs_no_network(path, browser, tmp_path):
    """With its outputs as they are kept: tables set up by their script, and widgets drawn."""
    page, _ = HTMLExporter(**OFFLINE).from_filename(str(path))
    exported = tmp_path / "notebook.html"
    exported.write_text(page, encoding="utf-8")
    assert exported.stat().st_size < 4e6
    code = "\n".join(cells(path, "code"))
    with opened(browser, exported) as shown:
        tables = shown.page.locator(".blt")
        assert tables.count() >= 1
        assert tables.evaluate_all("all => all.every(one => one.matches('.scripted'))")
        widgets = shown.page.locator(".blt-widget")
        assert widgets.count() == len(re.findall(r"^widgets\.", code, flags=re.MULTILINE))
        for widget in widgets.all():
            expect(widget.locator("[data-drawn=yes] > *").first).to_be_visible()
        shown.check()


def test_there_is_a_notebook_with_a_table_and_three_widgets():
    code = "\n".join(cells(NOTEBOOKS[0].with_name("looking.ipynb"), "code"))
    assert "\nresult\n" in f"{code}\n"
    assert len(set(re.findall(r"^widgets\.\w+", code, flags=re.MULTILINE))) >= 3
