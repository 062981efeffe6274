"""How a norm, a token and a matrix appear, the same in every view."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backward_lens_tl.models.sites import READING_MATRICES, MatrixName
from backward_lens_tl.readout.cells import Cell

LEADS = "★"
"""Marks a cell whose top token is the target."""

ADDS_NOTHING = "·"
"""Stands in a cell that adds nothing to its gradient, in place of a word."""


class Shade(NamedTuple):
    """A background and the text colour that is legible on it."""

    background: str
    text: str


_INK, _WHITE = "#0a0e13", "#ffffff"

# One path through OKLCH each, from mint to navy: lightness is monotone, so the order survives
# every kind of colour blindness and a grey print. The larger norm stands out from the page.
LIGHT_SHADES = (
    Shade("#dafcf2", _INK),
    Shade("#aaebe2", _INK),
    Shade("#78d7d8", _INK),
    Shade("#46c1d0", _INK),
    Shade("#0ea9c8", _INK),
    Shade("#008fbb", _INK),
    Shade("#0e75a8", _WHITE),
    Shade("#245c8e", _WHITE),
    Shade("#2b4570", _WHITE),
    Shade("#28314e", _WHITE),
)
"""From the smallest norm to the largest, on a light page."""

DARK_SHADES = (
    Shade("#1a2343", _WHITE),
    Shade("#1c3660", _WHITE),
    Shade("#144c7c", _WHITE),
    Shade("#006494", _WHITE),
    Shade("#007da7", _WHITE),
    Shade("#0097b5", _INK),
    Shade("#14b0c0", _INK),
    Shade("#4ec7c8", _INK),
    Shade("#7edcd1", _INK),
    Shade("#acf0dd", _INK),
)
"""From the smallest norm to the largest, on a dark page."""

_LARGEST_RATIO = 1000.0


@dataclass(frozen=True)
class NormScale:
    """From norms to shades, logarithmic or linear.

    Norms within one matrix span orders of magnitude: on a linear scale all but the last position
    may look alike, and on a logarithmic one a small norm may look large.

    Attributes:
        low: On the logarithmic scale, this norm and all below have the first shade.
        high: The largest norm.
    """

    low: float
    high: float

    @classmethod
    def spanning(cls, norms: Iterable[float]) -> NormScale:
        """The scale of some norms, three decades at most.

        Args:
            norms: The norms; zeros and what is not finite do not count.

        Returns:
            The scale; from 0 to 0 if no norm counts.
        """
        counted = [norm for norm in norms if 0 < norm < math.inf] or [0.0]
        high = max(counted)
        return cls(max(min(counted), high / _LARGEST_RATIO), high)

    def step(self, norm: float) -> int:
        """Index of a norm's shade on the logarithmic scale, 0 for the smallest norms."""
        last = len(LIGHT_SHADES) - 1
        if not norm < self.high:
            return last
        if norm <= self.low:
            return 0
        return round(last * math.log(norm / self.low) / math.log(self.high / self.low))

    def linear_step(self, norm: float) -> int:
        """Index of a norm's shade on the linear scale, which begins at a norm of 0."""
        last = len(LIGHT_SHADES) - 1
        return round(last * norm / self.high) if norm < self.high else last


class Piece(NamedTuple):
    """A part of a token: text as it is, or the mark of a character that has no shape."""

    text: str
    is_mark: bool


_MARKS = {" ": " ", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_SHAPELESS = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"})
_JOINERS = "\u200c\u200d"


def pieces(text: str) -> Iterator[Piece]:
    """Split a token so that every character of it can be seen.

    Args:
        text: The token.

    Yields:
        Its text, and a mark for each control character, format character or space; the mark of a
        space is a space, which each view draws in its own way.
    """
    if not text:
        yield Piece("(empty)", True)
    elif unicodedata.category(text[0]).startswith("M"):
        yield Piece("◌", True)  # something for a combining character to stand on
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
    """Text in one line, in which spaces are spaces and other shapeless characters are marked."""
    return "".join(piece.text for piece in pieces(text))


_READERS = {"W_Q": "queries", "W_K": "keys", "W_V": "values"}


def matrix_title(matrix: MatrixName, direction: str, vjps_at: str) -> str:
    """What a matrix's table shows, in words.

    Args:
        matrix: TransformerLens's name of the matrix.
        direction: `"update"` or `"gradient"`.
        vjps_at: `"matrix"` or `"residual"`.

    Returns:
        The words, without the matrix's name.
    """
    if matrix in READING_MATRICES:
        return f"imprint: x_i, what {_READERS.get(matrix, 'neurons')} turn towards or away from"
    where = ", where it joins the residual stream" if vjps_at == "residual" else ""
    if direction == "update":
        return f"shift: what the update adds{where}"
    return f"raw gradient, which gradient descent subtracts{where}"


def faint_note(cells: Sequence[Cell], faint_norm: float, mark: str = " (in italics)") -> str:
    """What to say of a table in which some cells are faint.

    Args:
        cells: All of its cells.
        faint_norm: Length below which a projected vector is faint.
        mark: How they are set apart.

    Returns:
        One sentence, or nothing if no cell is faint.
    """
    faint = sum(cell.is_faint for cell in cells)
    if not faint:
        return ""
    return (
        f"{faint} of {len(cells)} cells{mark} are read from vectors shorter than "
        f"{number(faint_norm)}, where the final norm's eps and the model's bias outweigh the "
        "gradient: compare the normalized projection."
    )


def number(value: float) -> str:
    """A norm, loss or score with four significant digits."""
    return f"{value:.4g}"


def scale_ends(scale: NormScale) -> tuple[str, str]:
    """What stands at the two ends of a logarithmic scale's legend."""
    return f"norm ≤ {number(scale.low)}", f"{number(scale.high)}, logarithmic"


def linear_scale_ends(scale: NormScale) -> tuple[str, str]:
    """What stands at the two ends of a linear scale's legend."""
    return "norm 0", f"{number(scale.high)}, linear"


def zero_reason(cell: Cell) -> str:
    """Why a cell has no word.

    Args:
        cell: A cell that adds nothing to its gradient.

    Returns:
        A clause.
    """
    if not cell.norm:
        return "adds nothing: δ_i is zero, no error comes back to this position"
    return "adds nothing: x_i is zero, the matrix read nothing at this position"
