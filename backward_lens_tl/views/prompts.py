"""How views name the prompt that they show, and where its answer begins."""

from __future__ import annotations

from collections.abc import Sequence

from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.text import asked, running_text

_LONGEST = 80
"""Characters of a prompt in a title; of longer ones, the end is shown."""


def which_prompt(result: BackwardLensResult, batch: int) -> str:
    """Such as `prompt 2 of 5`; empty if there is only one."""
    prompts = len(result.positions)
    return f"prompt {batch + 1} of {prompts}" if prompts > 1 else ""


def prompt_title(result: BackwardLensResult, batch: int) -> str:
    """A prompt, what should follow it, and which of several prompts it is.

    Args:
        result: The result.
        batch: Index of the prompt.

    Returns:
        Such as `prompt 2 of 5: “The capital of France is” → “Rome”`; of a chat, its messages.

    Raises:
        InputError: If there is no such prompt.
    """
    target, which = result.target(batch), which_prompt(result, batch)
    text = asked(result.capture, batch, running_text).strip()
    if len(text) > _LONGEST:
        text = f"…{text[1 - _LONGEST :]}"
    arrow = "" if target is None else f" → “{running_text(target).strip()}”"
    return f"{which}{': ' if which else ''}“{text}”{arrow}"


def answer_start(result: BackwardLensResult, batch: int, positions: Sequence[int]) -> int | None:
    """Which of some positions is the first after the prompt, where an appended answer begins.

    Args:
        result: The result.
        batch: Index of the prompt.
        positions: The positions that a view shows, in order.

    Returns:
        Its index; `None` unless all positions before it, and only those, are in the prompt.
    """
    length = int(result.capture.prompt_lengths[batch])
    is_answer = [position >= length for position in positions]
    start = is_answer.count(False)
    return start if any(is_answer) and start > 0 and not any(is_answer[:start]) else None


def answer_position(result: BackwardLensResult, batch: int) -> int | None:
    """The first analysed position of an appended answer; `None` if none begins there."""
    positions = [place for place in result.positions[batch].tolist() if place >= 0]
    start = answer_start(result, batch, positions)
    return None if start is None else positions[start]
