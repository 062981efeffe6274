"""Phrases in the captions of widgets, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.prompts import answer_start, prompt_title
from backward_lens_tl.views.text import running_text
from backward_lens_tl.views.widgets.widget import literal


def quoted(token: str) -> str:
    """A token in quotation marks."""
    return f"<q><bdi>{escape(literal(token))}</bdi></q>"


def prompt_line(result: BackwardLensResult, batch: int) -> str:
    """A line that says which prompt is shown, and what should follow it."""
    return f"<br><bdi>{escape(prompt_title(result, batch))}</bdi>"


def reading(result: BackwardLensResult) -> str:
    """The projection and the direction."""
    return escape(f"{running_text(result.projection)}, {result.direction}")


def analysed_positions(result: BackwardLensResult, batch: int, cells: Sequence[Cell]) -> str:
    """Which positions are shown, unless these are all of the prompt's."""
    length = len(result.capture.str_tokens[batch])
    if [cell.position for cell in cells] == list(range(length)):
        return ""
    shown = ", ".join(f"{cell.position} {quoted(cell.token)}" for cell in cells)
    return f"<br>Of the prompt's {length} positions these were analysed: {shown}"


def answer_line(start: int | None) -> str:
    """What the line before an answer means, if there is one."""
    return "" if start is None else "<br>The answer begins at the orange line."


def start_of_answer(result: BackwardLensResult, batch: int, cells: Sequence[Cell]) -> int | None:
    """Index of the cell at which an appended answer begins."""
    return answer_start(result, batch, [cell.position for cell in cells])
