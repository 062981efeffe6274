"""Text of all views: tokens with every character visible, numbers, and shared phrases."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.models.sites import READING_MATRICES, MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.readout.targets import Prediction

LEADS = "★"
"""Marks a cell whose top token is the target."""

ADDS_NOTHING = "·"
"""Replaces the token in a cell that adds nothing to its gradient."""

SPACE = "␣"

SIZES: Mapping[str, str] = {"norm": "‖δ_i‖", "write_norm": "‖x_i‖·‖δ_i‖"}
"""What colours show."""

_MARKS = {" ": " ", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_SHAPELESS = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"})
_JOINERS = "\u200c\u200d"
_DISPLAY_ORDER: tuple[MatrixName, ...] = (
    "W_out", "W_gate", "W_in", "W_O", "W_Q", "W_K", "W_V",
)  # fmt: skip
_READERS = {"W_Q": "queries", "W_K": "keys", "W_V": "values"}


class Piece(NamedTuple):
    """A piece of a token: text as it is, or a mark for an invisible character."""

    text: str
    is_mark: bool


def pieces(text: str) -> Iterator[Piece]:
    """Split a token so that every character of it is visible.

    Args:
        text: The token.

    Yields:
        Its text, and a mark for each control character, format character or space. The mark of a
        space is a space, which each view draws in its own way.
    """
    if not text:
        yield Piece("(empty)", True)
    elif unicodedata.category(text[0]).startswith("M"):
        yield Piece("◌", True)  # carries a combining character
    plain = ""
    for index, char in enumerate(text):
        # Joiners hold emoji and Arabic or Indic words together.
        inside = char in _JOINERS and 0 < index < len(text) - 1
        if inside or unicodedata.category(char) not in _SHAPELESS:
            plain += char
            continue
        if plain:
            yield Piece(plain, False)
        yield Piece(_MARKS.get(char) or char.encode("unicode_escape").decode("ascii"), True)
        plain = ""
    if plain:
        yield Piece(plain, False)


def running_text(text: str) -> str:
    """Text in one line, with plain spaces and marks for other invisible characters."""
    return "".join(piece.text for piece in pieces(text))


def visible(token: str) -> str:
    """A token in one line, with a mark for every space, too."""
    return "".join(SPACE if piece == (" ", True) else piece.text for piece in pieces(token))


def lens_name(projection: str) -> str:
    """The name of a projection in a sentence."""
    return projection.replace("_", " ").replace("jacobian", "Jacobian")


def number(value: float | int) -> str:
    """A norm, loss or score with four significant digits."""
    return f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """A number of things, such as `1 prompt` or `2 prompts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(probability: float) -> str:
    """A probability in percent; very small ones only as an upper bound."""
    return "below 0.01 %" if probability < 1e-4 else f"{100 * probability:.3g} %"


def _prompt_text(capture: GradientCapture, batch: int) -> str:
    """Text of a prompt without the answer that an objective appended.

    Args:
        capture: The capture.
        batch: Which prompt.

    Returns:
        The text.
    """
    length = int(capture.prompt_lengths[batch])
    if length == len(capture.str_tokens[batch]):
        return capture.prompt(batch)
    if not capture.prompts:
        return "".join(capture.str_tokens[batch][:length])
    return capture.prompts[batch][: max(end for _, end in capture.spans[batch][:length])]


def asked(capture: GradientCapture, batch: int, quoted: Callable[[str], str]) -> str:
    """A prompt as a reader knows it: its text, or the messages of a chat without their template.

    Args:
        capture: The capture.
        batch: Which prompt.
        quoted: Marks text in the view.

    Returns:
        The text, or each message after its role.
    """
    turns = capture.turns[batch] if capture.turns else ()
    if not turns:
        return quoted(_prompt_text(capture, batch))
    length = int(capture.prompt_lengths[batch])
    tokens = zip(turns[:length], capture.spans[batch], strict=False)
    messages = []
    for turn, group in groupby(tokens, key=itemgetter(0)):
        spans = [span for _, span in group]
        if turn != "template":
            text = capture.prompts[batch][spans[0][0] : spans[-1][1]]
            messages.append(f"{turn}: {quoted(text.strip())}")
    return " ".join(messages)


def prediction_text(
    prediction: Prediction, has_position_targets: bool, quoted: Callable[[str], str]
) -> str:
    """What the model answers before the update, and what the update is compared with.

    Args:
        prediction: The model's prediction.
        has_position_targets: Whether each position has a target of its own.
        quoted: Marks a token in the view.

    Returns:
        A few sentences.
    """
    said = f"The model answers {quoted(prediction.answer)} ({percent(prediction.answer_prob)})."
    if prediction.target is None:
        following = " Each position is compared with the next token of the text."
        return said + following if has_position_targets else said
    if prediction.target == prediction.answer:
        return f"{said} The target is the same token."
    probability, ahead = prediction.target_prob or 0.0, prediction.target_rank or 0
    target = f"{said} The target is {quoted(prediction.target)} ({percent(probability)})"
    if ahead == 0:
        return f"{target}, which starts with the same token."
    verb, than = "is" if ahead == 1 else "are", " than its first token"
    return (
        f"{target}; {counted(ahead, 'token')} {verb} more probable"
        f"{than if has_position_targets else ''}."
    )


def display_order(matrices: Iterable[MatrixName]) -> list[MatrixName]:
    """The order in which views show matrices: what the update adds comes first.

    Args:
        matrices: Some matrices, in any order.

    Returns:
        `W_out`, `W_gate`, `W_in`, then `W_O`, `W_Q`, `W_K`, `W_V`, as far as they are given.
    """
    return sorted(matrices, key=_DISPLAY_ORDER.index)


def matrix_title(matrix: MatrixName, direction: str, vjps_at: str) -> str:
    """What a matrix's table shows.

    Args:
        matrix: TransformerLens's name of the matrix.
        direction: `"update"` or `"gradient"`.
        vjps_at: `"matrix"` or `"residual"`.

    Returns:
        The description, without the matrix's name.
    """
    if matrix in READING_MATRICES:
        return f"imprint: x_i, what {_READERS.get(matrix, 'neurons')} turn towards or away from"
    where = ", where it joins the residual stream" if vjps_at == "residual" else ""
    if direction == "update":
        return f"shift: what the update adds{where}"
    return f"raw gradient, which gradient descent subtracts{where}"


def same_tokens_note(matrices: Collection[MatrixName]) -> str:
    """Why two tables have the same tokens; empty if none have."""
    if not {"W_gate", "W_in"} <= set(matrices):
        return ""
    return "W_gate and W_in read the same x_i, so they have the same tokens in different colours."


def faint_note(rows: Sequence[Sequence[Cell]], faint_norm: float, mark: str = "") -> str:
    """The note below a table in which some cells are faint.

    Args:
        rows: All of its cells.
        faint_norm: Norm below which a projected vector is faint.
        mark: How faint cells are marked.

    Returns:
        A sentence; empty if no cell is faint.
    """
    cells = [cell for row in rows for cell in row]
    faint = sum(cell.is_faint for cell in cells)
    if not faint:
        return ""
    return (
        f"{faint} of {len(cells)} cells{mark} are read from vectors shorter than "
        f"{number(faint_norm)}, where the final norm's eps and the model's bias outweigh the "
        "gradient: compare with the normalized projection."
    )


def leading_layers(cells: Sequence[Cell]) -> str:
    """In how many layers, and in which, the target is the top token.

    Args:
        cells: One cell per layer, in order.

    Returns:
        Text such as `3 of 8 layers (2, 6 to 7)`.
    """
    led = [index for index, cell in enumerate(cells) if cell.target_leads]
    # The difference of an index and its place among those led is the same in a run of layers.
    runs = [list(run) for _, run in groupby(enumerate(led), lambda pair: pair[1] - pair[0])]
    ends = [(cells[run[0][1]].layer, cells[run[-1][1]].layer) for run in runs]
    names = ", ".join(f"{one}" if one == other else f"{one} to {other}" for one, other in ends)
    return f"{len(led)} of {counted(len(cells), 'layer')}" + (f" ({names})" if led else "")


def zero_reason(cell: Cell) -> str:
    """Why a cell that adds nothing to its gradient has no tokens."""
    if not cell.norm:
        return "adds nothing: δ_i is zero, no gradient reaches this position"
    return "adds nothing: x_i is zero, the matrix has no input at this position"
