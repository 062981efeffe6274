"""What an experiment found, and how the paper's claims are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.result import BackwardLensResult

Verdict = Literal["holds", "holds with exceptions", "does not hold here", "not measured"]
Draw = Callable[..., Any]
"""Draws a figure, with `backend="plotly"` or `"matplotlib"`."""


@dataclass(frozen=True)
class Check:
    """A claim of the paper with a threshold, and what was measured.

    Attributes:
        claim: The claim.
        holds: Whether it holds.
        found: What was measured, with numbers.
        exceptions: Exceptions to a claim that holds in general; empty if there are none.
    """

    claim: str
    holds: bool
    found: str
    exceptions: str = ""


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    Attributes:
        checks: The claims; the first is the main one. Empty if they could not be measured.
        tables: Small tables, by name.
        figures: Functions that draw the figures, by name.
        results: Results whose layers x tokens tables are shown, by name.
        notes: Further notes for the reader.
    """

    checks: tuple[Check, ...]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Draw] = field(default_factory=dict)
    results: Mapping[str, BackwardLensResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Whether the paper's statement holds, which it does only if the first claim does."""
        if not self.checks:
            return "not measured"
        if not self.checks[0].holds:
            return "does not hold here"
        if all(check.holds and not check.exceptions for check in self.checks):
            return "holds"
        return "holds with exceptions"


def count_check(
    claim: str,
    flags: Iterable[bool | np.bool_],
    of: str,
    *,
    at_least: float | None = None,
    exceptions: str = "",
) -> Check:
    """Check how often a condition holds.

    Args:
        claim: The claim.
        flags: Whether it holds, case by case.
        of: What is counted, which follows the count in `Check.found`.
        at_least: The fraction of cases that the claim needs; `None` for more than half of them.
        exceptions: As in `Check`.

    Returns:
        The check. A claim about no cases does not hold.
    """
    cases = [bool(flag) for flag in flags]
    count, total = sum(cases), len(cases)
    holds = count > total / 2 if at_least is None else 0 < at_least * total <= count
    return Check(claim, holds, f"{count_of(count, total)} {of}", exceptions)


def count_of(count: int, total: int) -> str:
    """A count and its percentage.

    Args:
        count: The count.
        total: The number of all cases.

    Returns:
        Text such as `7 of 8 (88 %)`.
    """
    return f"{count} of {total} ({100 * count / total:.0f} %)" if total else "none of 0"


def spearman(first: Iterable[float], second: Iterable[float]) -> float:
    """Spearman's rank correlation.

    Args:
        first: Numbers.
        second: As many.

    Returns:
        The coefficient; NaN if all numbers of one are equal.
    """
    import pandas as pd

    ranks = [pd.Series([float(value) for value in each]).rank() for each in (first, second)]
    return float(ranks[0].corr(ranks[1]))


def listed_values(values: Iterable[tuple[Any, float]], form: str = ".1f", unit: str = "") -> str:
    """Named values as text.

    Args:
        values: Pairs of name and value.
        form: Format of the values.
        unit: What follows each value.

    Returns:
        Text such as `rome 99.0 %, shift 95.0 %`.
    """
    return ", ".join(f"{name} {value:{form}}{unit}" for name, value in values)


def by_layer(table: pd.DataFrame, values: str, columns: str, **where: str) -> pd.DataFrame:
    """A column of a table by layer and by another column.

    Args:
        table: A table with a `layer` column.
        values: The column with the values.
        columns: The column whose values become the columns.
        **where: Only rows that have these values in these columns.

    Returns:
        One row per layer, one column per value of `columns`.
    """
    for name, value in where.items():
        table = table[table[name] == value]
    return table.astype({columns: object}).pivot(index="layer", columns=columns, values=values)
