"""What an experiment found, beside what the paper says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.result import BackwardLensResult

Verdict = Literal["holds", "holds with exceptions", "does not hold here", "not measured"]
Draw = Callable[..., Any]
"""Makes a figure, given `backend="plotly"` or `"matplotlib"`."""


@dataclass(frozen=True)
class Check:
    """One claim of the paper, made precise, and what was measured.

    Attributes:
        claim: The claim with its threshold.
        holds: Whether it holds.
        found: What was measured, with numbers.
        exceptions: What departs from a claim that holds on the whole; empty if nothing does.
    """

    claim: str
    holds: bool
    found: str
    exceptions: str = ""


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    Attributes:
        checks: The claims; the first is the one that the figure or table stands for. None if it
            could not be measured.
        tables: Small tables, by name.
        figures: What draws each figure, by name.
        results: Layers x tokens tables that are shown, by name.
        notes: What a reader has to know beside it.
    """

    checks: tuple[Check, ...]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Draw] = field(default_factory=dict)
    results: Mapping[str, BackwardLensResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Whether the paper's statement holds: not at all unless its first claim does."""
        if not self.checks:
            return "not measured"
        if not self.checks[0].holds:
            return "does not hold here"
        if all(check.holds and not check.exceptions for check in self.checks):
            return "holds"
        return "holds with exceptions"


def by_layer(table: pd.DataFrame, column: str, **where: str) -> dict[int, float]:
    """A column of a small table as numbers by layer.

    Args:
        table: An analysis with a row per layer and whatever `where` tells apart.
        column: The column.
        **where: What other columns hold in the rows that are meant.

    Returns:
        The numbers, in the order of the layers.
    """
    for name, value in where.items():
        table = table[table[name] == value]
    numbers = zip(table["layer"].tolist(), table[column].tolist(), strict=True)
    return dict(sorted(numbers))


def pick(table: pd.DataFrame, column: str, value: str) -> Mapping[Any, Any]:
    """The one row of a small table that holds something.

    Args:
        table: The table.
        column: Where to look.
        value: What the row holds there.

    Returns:
        The row.
    """
    rows = table[table[column] == value].to_dict("records")
    [row] = rows
    return row


def part(count: int, of: int) -> str:
    """A count as a part of a whole, in words.

    Args:
        count: The count.
        of: The whole.

    Returns:
        Such as `7 of 8 (88 %)`.
    """
    return f"{count} of {of} ({100 * count / of:.0f} %)" if of else "none of 0"
