"""Notebooks run, match their scripts, and contain their outputs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pandas as pd
import pytest
import tomllib
import torch
from browser import opened
from IPython.core.formatters import DisplayFormatter
from jacobian_cases import slow_jacobians
from models import HAS_BRIDGE, readable
from nbconvert import HTMLExporter
from notebook_pages import OFFLINE
from packaging.requirements import Requirement
from playwright.sync_api import expect
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import backward_lens_tl as blt
from backward_lens_tl.models.smollm2 import find_smollm2

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"].replace("https://github.com/", "github/")
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
MODEL = 'model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub'
FIT = 'fit = "facts"  # for another model, the file of its Jacobian Lens, or its name on the hub'

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[Any]:
    found = nbformat.read(path, as_version=4).cells
    return [cell for cell in found if kind in (None, cell.cell_type)]


def code(path: Path) -> str:
    return "\n".join(cell.source for cell in cells(path, "code"))


def run(
    path: Path, model_line: str = MODEL, fit_line: str = FIT
) -> list[tuple[str, dict[str, str]]]:
    """The printed text of each code cell, and the display of its last value by content type."""
    if '"smollm2"' in code(path).replace(MODEL, "") and find_smollm2() is None:
        pytest.skip("SmolLM2 is not installed: make real-model")
    if ".original_model" in code(path) and not HAS_BRIDGE:
        pytest.skip("a HookedTransformer does not keep its transformers model")
    namespace: dict[str, object] = {}
    formatter = DisplayFormatter()
    shown = []
    for cell in cells(path, "code"):
        source = cell.source.replace(MODEL, model_line).replace(FIT, fit_line)
        tree = ast.parse(source, str(path))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        value = None
        with redirect_stdout(io.StringIO()) as written:
            exec(compile(tree, str(path), "exec"), namespace)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)
        # The setting of pandas in notebooks; elsewhere it omits columns.
        with pd.option_context("display.max_columns", 20):
            content = {} if value is None else formatter.format(value)[0]
        shown.append((written.getvalue(), content))
    return shown


def stored(cell: Any) -> tuple[str, dict[str, str]]:
    """The stored outputs of a cell, in the same form."""
    written = [output.text for output in cell.outputs if output.output_type == "stream"]
    contents = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    assert len(contents) <= 1
    return "".join(written), dict(*contents)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
CHECKSUM = re.compile(r"(?<![\w.])[0-9a-f]{12,64}(?![\w.])")
ROUNDING = 1e-3
"""Differences between processors and libraries, relative and absolute."""


def without_seconds(table: str) -> str:
    """A table without the values of its column `seconds`."""
    lines, end = [], 0
    for line in table.splitlines():
        heading = re.search(r" seconds\b", line)
        if end and line.strip():
            line = re.sub(r"\S+$", "", line[:end]) + line[end:]
        else:
            end = heading.end() if heading else 0
        lines.append(line)
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """Words and numbers of an output, without times, and with numbered checksums."""
    seen: dict[str, str] = {}
    text = CHECKSUM.sub(
        lambda found: seen.setdefault(found[0], f"checksum {len(seen)}"), without_seconds(text)
    )
    return re.findall(rf"{NUMBER.pattern}|[^\s\d-]+|-", text)


def differences(text: str, other: str) -> list[tuple[str, str]]:
    """Words and numbers that differ between two outputs, up to rounding and spaces."""
    own, others = words(text), words(other)
    if len(own) != len(others):
        return [(" ".join(own), " ".join(others))]
    return [pair for pair in zip(own, others, strict=True) if not is_same(*pair)]


def is_same(word: str, other: str) -> bool:
    if word == other or {word, other} == {"None", "NaN"}:  # as pandas 2 and 3 write it
        return True
    if not (NUMBER.fullmatch(word) and NUMBER.fullmatch(other)):
        return False
    if {".", "e"}.isdisjoint(word + other):
        return False  # ranks and counts are the same everywhere
    decimals = max(len(each.partition("e")[0].partition(".")[2]) for each in (word, other))
    allowed = max(ROUNDING, 0.0 if "e" in word + other else 1.01 * 10.0**-decimals)
    return float(word) == pytest.approx(float(other), rel=ROUNDING, abs=allowed)


def test_all_notebooks_and_scripts_exist():
    assert {path.stem for path in NOTEBOOKS} == {
        "activation_patching", "attention_backwards", "data_set", "early_layers", "editing",
        "fine_tuning", "five_minutes", "looking", "similar_gradients", "the_paper",
    }  # fmt: skip
    assert {path.stem for path in (ROOT / "notebooks").glob("*.py")} == {
        path.stem for path in NOTEBOOKS
    }


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
@each_notebook
def test_notebook_runs_and_reproduces_its_outputs(path):
    """Compares text and content types; images are rendered by the front end."""
    for cell, (written, content) in zip(cells(path, "code"), run(path), strict=True):
        written_before, content_before = stored(cell)
        assert differences(written, written_before) == [], cell.source
        plain, plain_before = (each.get("text/plain", "") for each in (content, content_before))
        assert differences(plain, plain_before) == [], cell.source
        assert set(content) | {"image/png"} == set(content_before) | {"image/png"}


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("clean  Paris  11.02", "clean Paris    11.03"),
        ("(5.96e-08, 0.47100)", "(8.9e-08, 0.47103)"),
        ("error 9e-08 0e+00", "error 0e+00 6e-06"),
        ("size NaN", "size None"),
        ("-0.00 [0.18, 0.5]", "0.00 [0.18, 0.51]"),
        (
            "a 084fa4646f96 b 624bfa53152c 084fa4646f96",
            "a 00aa84646f96 b 5a770d91e3da 00aa84646f96",
        ),
        ("norm  seconds  \nsgd  \nA 1.0    0.12 \n", "norm  seconds  \nsgd  \nA 1.0   10.30 \n"),
    ],
)
def test_equal_outputs(text, other):
    assert differences(text, other) == []


@pytest.mark.parametrize(
    ("text", "other", "found"),
    [
        ("clean  Paris  11.02", "clean Paris 12.34", [("11.02", "12.34")]),
        ("clean  Paris  11.02", "clean Rome 11.02", [("Paris", "Rome")]),
        ("rank 3071", "rank 3070", [("3071", "3070")]),
        ("0.4710049", "0.4760049", [("0.4710049", "0.4760049")]),
        ("-0.30", "0.30", [("-0.30", "0.30")]),
        ("1", "1.5", [("1", "1.5")]),
        ("1 of 2 holds", "1 of 2", [("1 of 2 holds", "1 of 2")]),
        ("084fa4646f96 084fa4646f96", "084fa4646f96 624bfa53152c", [("0", "1")]),
        ("norm  seconds\nA 1.0    0.12", "norm  seconds\nA 1.7    0.12", [("1.0", "1.7")]),
        ("took seconds\n\nA 1.0", "took seconds\n\nA 1.7", [("1.0", "1.7")]),
    ],
)
def test_different_outputs(text, other, found):
    assert differences(text, other) == found


SIZES = {"vocab_size": 50257, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
OTHERS = {
    # TransformerLens 2 reads n_ctx, which is in GPT-2's config.
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_ctx=1024)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2)
    ),
}
"""Random models of other sizes; the second one has rotary embeddings, grouped queries and gates."""


@pytest.fixture(scope="module", params=OTHERS)
def other_model(request, shared, tmp_path_factory) -> Path:
    """A folder with a random model and GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    OTHERS[request.param]().save_pretrained(folder)
    tokenizer = readable(shared / "models" / "gpt2_tokenizer", tmp_path_factory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_fit(other_model) -> Path:
    """The file of that model's Jacobian Lens, fitted on one text."""
    model = blt.load_model(str(other_model))
    lens = slow_jacobians(model, model.to_tokens("The Colosseum is in the city of Rome"), skip=0)
    path = other_model / "lens.pt"
    torch.save({"J": lens.jacobians, "n_prompts": 1, "d_model": lens.d_model}, path)
    return path


@pytest.mark.slow
@each_notebook
def test_notebook_runs_on_another_model_by_changing_one_line(path, other_model, other_fit):
    """The numbers are meaningless there. One of the notebooks also needs the model's fit."""
    run(path, f"model = blt.load_model({str(other_model)!r})", f"fit = {str(other_fit)!r}")


@pytest.mark.slow
def test_the_formulas_inside_heads_hold_on_another_model(other_model):
    """Against autograd, in the notebook; with grouped queries and rotary embeddings, too."""
    path = NOTEBOOKS[0].with_name("attention_backwards.ipynb")
    shown = run(path, f"model = blt.load_model({str(other_model)!r})")
    tables = (content.get("text/plain", "") for _, content in shown)
    [errors] = [table for table in tables if "relative error" in table]
    found = dict(re.findall(r"^(\w+) +(\de[+-]\d+)$", errors, flags=re.MULTILINE))
    assert set(found) == {"RA", "delta_v", "delta_q", "delta_k"}
    assert max(map(float, found.values())) < 1e-4


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_backwards", "five_minutes", "looking"])
def test_notebook_runs_on_the_real_model_by_changing_one_line(name):
    """The others take minutes, or need a fit; they run on the small Llama above."""
    if find_smollm2() is None:
        pytest.skip("SmolLM2 is not installed: make real-model")
    run(NOTEBOOKS[0].with_name(f"{name}.ipynb"), 'model = blt.load_model("smollm2")')


@each_notebook
def test_the_install_cell_installs_all_imports(path):
    requirements = map(Requirement, importlib.metadata.requires("backward-lens-tl") or [])
    installed = {
        requirement.name.replace("-", "_")
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("matplotlib", "lora"))
    } | {"backward_lens_tl", "numpy"}
    imported = set()
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= installed


@each_notebook
def test_it_starts_with_the_install_cell_and_loads_the_model_once(path):
    install, loaded = (cell.source for cell in cells(path, "code")[:2])
    assert install == cells(NOTEBOOKS[0], "code")[0].source
    assert MODEL in loaded.splitlines()
    assert code(path).count(MODEL) == 1


def test_the_install_cell_keeps_installed_versions(monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    exec(cells(NOTEBOOKS[0], "code")[0].source, {})
    [[python, *pip]] = asked
    assert python == sys.executable
    assert pip[:4] == ["-m", "pip", "install", "-q"]
    assert pip[4] == "backward-lens-tl[matplotlib,lora]"
    assert sorted(pip[5:]) == sorted(
        f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "torch", "transformers")
    )


def test_nothing_is_installed_if_the_package_exists(monkeypatch):
    monkeypatch.delattr(subprocess, "run")
    exec(cells(NOTEBOOKS[0], "code")[0].source, {})


# ---------------------------------------------------------------------------------------- contents


@each_notebook
def test_notebook_matches_its_script(path):
    script = jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in cells(path)
    ]


@each_notebook
def test_it_starts_with_a_title_and_a_badge(path):
    title, badge = cells(path)[0].source.splitlines()[0:3:2]
    assert title.startswith("# ")
    colab = f"https://colab.research.google.com/{ADDRESS}/blob/main/notebooks/{path.name}"
    assert badge == f"[![Open in Colab]({BADGE})]({colab})"


@each_notebook
def test_cells_are_short_and_introduced(path):
    found = cells(path)
    assert max(len(cell.source.splitlines()) for cell in found if cell.cell_type == "code") <= 25
    kinds = [cell.cell_type for cell in found]
    after_set_up = kinds.index("code") + 2
    pairs = zip(kinds[after_set_up:], kinds[after_set_up + 1 :], strict=False)
    assert ("code", "code") not in pairs
    assert kinds[-1] == "markdown" or found[-1].outputs


@each_notebook
def test_outputs_are_stored(path):
    found = cells(path, "code")
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell.outputs]
    assert len(outputs) > 4
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
@each_notebook
def test_exported_notebook_works_offline(path, browser, tmp_path):
    """With its stored outputs: interactive tables and rendered widgets."""
    page, _ = HTMLExporter(**OFFLINE).from_filename(str(path))
    assert BADGE in page
    exported = tmp_path / "notebook.html"
    exported.write_text(page.replace(BADGE, "data:,"), encoding="utf-8")
    assert exported.stat().st_size < 4e6
    with opened(browser, exported) as shown:
        tables = shown.page.locator(".blt")
        assert tables.evaluate_all("all => all.every(one => one.matches('.scripted'))")
        widgets = shown.page.locator(".blt-widget")
        assert widgets.count() == len(re.findall(r"^widgets\.", code(path), flags=re.MULTILINE))
        for widget in widgets.all():
            expect(widget.locator("[data-drawn=yes] > *").first).to_be_visible()
        shown.check()


def test_a_notebook_shows_a_table_and_three_widgets():
    looking = code(NOTEBOOKS[0].with_name("looking.ipynb"))
    assert "\nresult\n" in f"{looking}\n"
    assert len(set(re.findall(r"^widgets\.\w+", looking, flags=re.MULTILINE))) >= 3


def test_the_fit_is_one_line_after_the_model():
    early = code(NOTEBOOKS[0].with_name("early_layers.ipynb"))
    assert f"{MODEL}\n{FIT}\n" in early
    assert early.count("fit = ") == 1


def test_the_first_notebook_shows_a_table():
    assert "\nresult\n" in code(NOTEBOOKS[0].with_name("five_minutes.ipynb"))
