"""Phrases in the captions of widgets, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.text import running_text
from backward_lens_tl.views.widgets.widget import literal


def quoted(token: str) -> str:
    """A token in quotation marks."""
    return f"<q><bdi>{escape(literal(token))}</bdi></q>"


def of_prompt(result: BackwardLensResult, batch: int) -> str:
    """The index of a prompt, if there are several, and its target, if it has one."""
    target = result.target(batch)
    prompt = f" of prompt {batch}" if len(result.positions) > 1 else ""
    return prompt if target is None else f"{prompt}, target {quoted(target)}"


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
