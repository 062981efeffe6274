"""The live table: what it shows of a step, and how terminals, logs and notebooks update it."""

from __future__ import annotations

import io
import math
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from rich.console import Console
from terminal_screen import Terminal
from tqdm import tqdm
from training_frames import training_frame
from transformers import TrainerControl, TrainerState
from view_cases import NASTY, parsed
from view_cases import shown as text_of

import backward_lens_tl as blt
from backward_lens_tl.errors import BackwardLensWarning, InputError
from backward_lens_tl.training import BackwardLensCallback, TrainingRecord, watch
from backward_lens_tl.views.text import visible
from backward_lens_tl.views.training.live import _Notebook
from backward_lens_tl.views.training.step_table import StepTable

TAGS = {
    *("root", "div", "style", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"),
    *("bdi", "i", "u"),  # a token and its marks
}
TEXTS = ["Lionel Messi plays for Paris", "The capital of France is Rome"]


def printed(table: StepTable, width: int = 200, height: int = 50) -> list[str]:
    """The table in a pipe of some size, without colours."""
    file = io.StringIO()
    Console(file=file, width=width, height=height).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def one_step(**options: Any) -> pd.DataFrame:
    return training_frame([21], **options)


# --- one step -----------------------------------------------------------------------------------


def test_the_largest_gradients_are_shown_in_the_order_of_a_backward_pass() -> None:
    lines = printed(StepTable.of(one_step(), 4))
    assert lines[0] == "Step 21: 10 positions; 4 of 8 matrices, with the largest norms"
    # Norms are 1, 2, 3, 4 in W_in and 2, 4, 6, 8 in W_out, over the root of 21.
    shown = [line.split()[:3] for line in lines[3:]]
    assert shown == [
        ["3", "W_out", "1.75"],
        ["2", "W_out", "1.31"],
        ["1", "W_out", "0.873"],
        ["3", "W_in", "0.873"],
    ]


def test_a_row_has_the_numbers_of_the_record() -> None:
    table = one_step(layers=1, matrices=["W_out"]).assign(
        reference_cosine=-0.256, change_norm=0.0123, change_cosine=0.5, change_outside=0.125
    )
    *_, heads, row = printed(StepTable.of(table, 12))
    assert re.split(r" {2,}", heads.strip()) == [
        *("layer", "matrix", "norm", "share", "top tokens", "bottom tokens", "reference"),
        *("norm", "cosine", "outside", "top tokens"),
    ]
    assert re.split(r" {2,}", row.strip()) == [
        *("0", "W_out", "0.436", "50 %", "␣Paris ␣Rome", "␣Rome ␣Paris", "−0.26"),
        *("0.0123", "+0.50", "12 %", "␣Paris"),
    ]


def test_what_was_not_recorded_has_no_column() -> None:
    table = StepTable.of(one_step(has_change=False, has_reference=False), 12)
    assert "change" not in repr(table) + table._repr_html_().split("</style>")[1]
    (heads,) = (line for line in printed(table) if "layer" in line)
    assert heads.split() == [
        "layer",
        "matrix",
        "norm",
        "share",
        *("top", "tokens", "bottom", "tokens"),
    ]
    no_tokens = one_step().assign(top_tokens=[[]] * 8, bottom_tokens=[[]] * 8, energy=[[]] * 8)
    (heads,) = (line for line in printed(StepTable.of(no_tokens, 12)) if "layer" in line)
    assert heads.split()[:4] == ["layer", "matrix", "norm", "reference"]


def test_a_single_missing_number_is_a_dash() -> None:
    table = one_step(layers=2, matrices=["W_out"])
    table.loc[0, "reference_cosine"] = math.nan
    lines = printed(StepTable.of(table, 12))
    assert ["–" in line for line in lines[3:]] == [False, True]


def test_a_gradient_that_is_not_finite_comes_first() -> None:
    table = one_step()
    table.loc[0, "norm"] = math.nan
    assert repr(StepTable.of(table, 12)).startswith(
        "step 21: W_in of layer 0 (largest of 8): norm nan"
    )
    assert printed(StepTable.of(table, 1))[3].split()[:3] == ["0", "W_in", "nan"]
    assert ">nan</td>" in StepTable.of(table, 1)._repr_html_()


@pytest.mark.parametrize("width", range(30, 130, 7))
def test_a_table_fits_into_its_terminal(width: int) -> None:
    lines = printed(StepTable.of(one_step(layers=30), 60), width, 20)
    assert max(map(len, lines)) <= width
    # A line below is for progress bars, and one for the prompt.
    assert len(lines) <= 18
    if width >= 60:  # every number in full
        assert not any("…" in line.split("%")[0] for line in lines[3:-1])


def test_a_narrow_terminal_leaves_out_columns_and_names_them() -> None:
    lines = printed(StepTable.of(one_step(), 12), width=80)
    assert lines[-1] == (
        "No room for bottom tokens (gradient), outside (change), top tokens (change)"
    )
    assert "outside" not in lines[2]
    assert "No room" not in "".join(printed(StepTable.of(one_step(), 12), width=140))


def test_tokens_are_text() -> None:
    """No token becomes markup, a control character or another line."""
    table = one_step(layers=len(NASTY), tokens=NASTY)
    text = repr(StepTable.of(table, 60)) + "".join(printed(StepTable.of(table, 60), height=100))
    assert not re.search(r"[\x00-\x1f\u202e\u2028]", text)
    for token in NASTY:
        one = one_step(layers=1, matrices=["W_out"], tokens=[token])
        shown = StepTable.of(one, 1)
        assert visible(token) in repr(shown)
        assert visible(token) in "".join(printed(shown, width=400))
        page = parsed(shown._repr_html_())
        assert page.tags() <= TAGS, token
        assert [each.text for each in page.all("bdi")] == [text_of(token)] * 5


def test_a_table_that_is_not_a_record_is_refused() -> None:
    with pytest.raises(InputError, match="no watched step yet; record one first"):
        StepTable.of(one_step().iloc[:0], 12)
    with pytest.raises(InputError, match="no column 'norm'; pass what TrainingRecord"):
        StepTable.of(one_step().drop(columns="norm"), 12)


# --- while a run is trained ---------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    return blt.load_facts_model()


def train(model: Any, record: TrainingRecord, n_steps: int = 3, printing: str = "", **options: Any):
    """Some steps of SGD, all of them watched and shown."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, "W_out", every=1) as watched, blt.live_table(record, **options) as table:
        for index in range(n_steps):
            tokens = model.to_tokens(TEXTS[index % len(TEXTS)])
            model(tokens, return_type="loss").backward()
            optimizer.step()
            optimizer.zero_grad()
            if printing:
                sys.stdout.write(f"{printing} {index + 1}\n")
            table.add(watched.step())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in {
        "TERM": "xterm-256color",
        # rich keeps the codes of the first colour system that a style is shown in.
        "COLORTERM": "truecolor",
        "COLUMNS": str(Terminal.width),
        "LINES": "20",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_terminal_is_updated_in_place_below_what_is_printed(
    model: Any, tmp_path: Path, terminal: Terminal
) -> None:
    with redirect_stdout(terminal):
        train(model, record := TrainingRecord(tmp_path), printing="loss of step")
        assert sys.stdout is terminal
    assert terminal.has_cursor
    lines = terminal.lines
    assert lines[:3] == ["loss of step 1", "loss of step 2", "loss of step 3"]
    assert lines[3].startswith("Step 3: ")
    assert [line.split()[0] for line in lines[6:14]] == list("76543210")
    # Nothing remains of earlier tables.
    assert sum("layer" in line or line.startswith("Step") for line in lines) == 2
    last = record.to_dataframe().query("step == 3 and layer == 7")
    assert f" {last.norm.item():.3g} " in lines[6]
    assert "\x1b[2K" in terminal.getvalue()


def test_a_terminal_is_left_as_it_was_after_an_exception(
    model: Any, tmp_path: Path, terminal: Terminal
) -> None:
    def fail(step: Any) -> None:
        table.add(step)
        assert not terminal.has_cursor
        raise ZeroDivisionError

    with watch(model, "W_out") as watched:
        model(model.to_tokens(TEXTS[0]), return_type="loss").backward()
        step = watched.step()
    with redirect_stdout(terminal):
        with pytest.raises(ZeroDivisionError), blt.live_table(TrainingRecord(tmp_path)) as table:
            fail(step)
        assert sys.stdout is terminal
    assert terminal.has_cursor
    assert terminal.lines[0].startswith("Step 1: ")


def test_a_progress_bar_stays_below_the_table(
    model: Any, tmp_path: Path, terminal: Terminal
) -> None:
    record = TrainingRecord(tmp_path)
    with (
        redirect_stdout(terminal),
        redirect_stderr(terminal),
        watch(model, "W_out", every=1) as watched,
        blt.live_table(record) as table,
    ):
        for _ in tqdm(range(3), mininterval=0, ncols=Terminal.width - 1):
            model(model.to_tokens(TEXTS[0]), return_type="loss").backward()
            table.add(watched.step())
    lines = terminal.lines
    assert lines[0].startswith("Step 3")
    assert sum("layer" in line or line.startswith("Step") for line in lines) == 2
    (bar,) = (index for index, line in enumerate(lines) if "it/s" in line)
    assert lines[bar].startswith("100%")
    assert not any(lines[bar + 1 :])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_log_has_a_line_per_step_without_codes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    written = io.BytesIO()
    log = io.TextIOWrapper(written, encoding=encoding)
    with redirect_stdout(log):
        train(model, record := TrainingRecord(tmp_path), printing="loss of step")
    lines = written.getvalue().decode(encoding).splitlines()
    assert lines[::2] == ["loss of step 1", "loss of step 2", "loss of step 3"]
    rows = record.to_dataframe()
    for step, line in enumerate(lines[1::2], start=1):
        largest = rows[rows["step"] == step].nlargest(1, "norm")
        assert line.startswith(
            f"step {step}: W_out of layer {largest.layer.item()} (largest of 8): "
            f"norm {largest.norm.item():.3g}, share {100 * largest.energy.item()[0]:.0f} %, "
        )
        assert "\x1b" not in line


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_without_codes_gets_lines(
    model: Any, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    with redirect_stdout(terminal):
        train(model, TrainingRecord(tmp_path))
    assert "\x1b" not in terminal.getvalue()
    lines = terminal.getvalue().splitlines()
    assert [line[:7] for line in lines] == ["step 1:", "step 2:", "step 3:"]


class Closed(Terminal):
    """A terminal that is closed after the first table."""

    def write(self, text: str) -> int:
        if "Step 2" in text or "step 2" in text:
            raise BrokenPipeError("Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_training_and_its_record_go_on_where_the_table_cannot_be_shown(
    model: Any,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    closed, record = Closed(), TrainingRecord(tmp_path)
    monkeypatch.setattr(closed, "isatty", lambda: is_terminal)
    warned = pytest.warns(BackwardLensWarning, match=r"live table stopped \(Broken pipe\)")
    with redirect_stdout(closed):
        with warned as found:
            train(model, record, n_steps=4)
        output = sys.stdout
    assert output is closed
    assert len(found) == 1
    assert record.to_dataframe()["step"].unique().tolist() == [1, 2, 3, 4]


def test_an_error_of_the_record_is_not_hidden(model: Any, tmp_path: Path) -> None:
    with blt.live_table(TrainingRecord(tmp_path)) as table, pytest.raises(InputError, match="step"):
        table.add(None)


def test_only_the_first_process_shows_its_steps(
    model: Any, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backward_lens_tl.training.record.process_index", lambda: 1)
    with redirect_stdout(terminal):
        train(model, record := TrainingRecord(tmp_path))
    assert record.to_dataframe()["process"].unique().tolist() == [1]
    assert terminal.getvalue() == ""


def test_the_callback_takes_the_table(model: Any, tmp_path: Path, terminal: Terminal) -> None:
    state, control = TrainerState(global_step=0), TrainerControl()
    with (
        redirect_stdout(terminal),
        watch(model, "W_out", every=1) as watched,
        blt.live_table(TrainingRecord(tmp_path), rows=2) as table,
    ):
        callback = BackwardLensCallback(watched, table.add)
        callback.on_train_begin(None, state, control)
        model(model.to_tokens(TEXTS[0]), return_type="loss").backward()
        callback.on_step_end(None, state, control)
    assert terminal.lines[0].endswith("2 of 8 matrices, with the largest norms")


@pytest.mark.usefixtures("as_for_a_user")
def test_arguments_that_are_not_usable(tmp_path: Path) -> None:
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("record is 'run'; pass TrainingRecord", "run", {}),
        ("rows is 0; pass an integer of at least 1", TrainingRecord(tmp_path), {"rows": 0}),
    ]
    for message, record, options in refused:
        with pytest.raises(InputError, match=message), blt.live_table(record, **options):
            pass


# --- notebooks ----------------------------------------------------------------------------------


def test_a_notebook_output_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython's publisher gets one output, and then updates of it."""
    publisher = CapturingDisplayPublisher()
    shell = SimpleNamespace(display_formatter=DisplayFormatter(), display_pub=publisher)
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: True)
    monkeypatch.setattr(InteractiveShell, "instance", lambda: shell)
    display = _Notebook()
    for step in (1, 11, 21):
        display.show(StepTable.of(training_frame([step]), 12))
    display.close()
    assert [output["update"] for output in publisher.outputs] == [False, True, True]
    assert len({output["transient"]["display_id"] for output in publisher.outputs}) == 1
    for step, output in zip((1, 11, 21), publisher.outputs, strict=True):
        assert f"<strong>Step {step}</strong>" in output["data"]["text/html"]
        assert output["data"]["text/plain"].startswith(f"step {step}: W_out of layer 3")


NOTEBOOK = """
import tempfile
import backward_lens_tl as blt
model = blt.load_facts_model()
record = blt.training.TrainingRecord(tempfile.mkdtemp())
watch = blt.training.watch(model, "W_out", every=1)
with watch as watched, blt.live_table(record, rows=3) as table:
    for _ in range(3):
        model(model.to_tokens("Lionel Messi plays for"), return_type="loss").backward()
        table.add(watched.step())
print("after")
"""


@pytest.mark.slow
def test_an_executed_notebook_has_the_last_table(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs  # loading the model shows its progress, too
    (table,) = (each for each in outputs if "Step" in each.get("data", {}).get("text/html", ""))
    assert outputs[-1].text == "after\n"
    assert "<strong>Step 3</strong>: 5 positions; 3 of 8 matrices" in table.data["text/html"]
    assert table.data["text/plain"].startswith("step 3: W_out of layer")
    assert "widget" not in "".join(table.data)
