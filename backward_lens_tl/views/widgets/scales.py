"""Round numbers that bring others into the range in which CircuitsVis shows or colours them."""

from __future__ import annotations

import math
from collections.abc import Iterable

_FAINTEST = 1e-45
"""Below every positive float32."""


def power_for_decimals(values: Iterable[float]) -> int:
    """The power of ten to divide norms by, for six decimals to show the digits that count.

    Args:
        values: The norms; zeros do not count.

    Returns:
        The exponent; 0 if they are shown well as they are.
    """
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    smallest, largest = math.floor(min(logs)), math.floor(max(logs))
    if smallest >= -3 and largest <= 3:
        return 0
    # Four digits of the smallest, but no more than four before the point: a float32 has seven.
    return max(min(largest, smallest + 3), largest - 3)


def round_number_above(largest: float) -> float:
    """The round number to divide scores by, for the largest to have nearly the fullest colour.

    Args:
        largest: The largest absolute score.

    Returns:
        1, 2 or 5 times a power of ten; 1 if a scale from 0 to 1 shows the scores as they are.
    """
    if 0.2 < largest <= 1 or largest < _FAINTEST:
        return 1.0
    power = math.floor(math.log10(largest))
    candidates = (float(f"{step}e{power}") for step in (1, 2, 5, 10))
    return next(candidate for candidate in candidates if candidate >= largest)


def number_below(scores: Iterable[float]) -> float:
    """A number that no score is, to stand where there is none.

    Args:
        scores: The scores; infinite ones do not count.

    Returns:
        A negative power of ten below all of them.
    """
    least = min(filter(math.isfinite, scores), default=0.0)
    return -1.0 if least > -1 else -(10.0 ** (math.floor(math.log10(-least)) + 1))
