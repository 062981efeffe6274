"""The least size at which a target leads, from few evaluations of its margin.

The margin of a target over all other tokens grows nearly linearly with the size of an edit, until
the edit outweighs the residual stream. So the root is found with secants, and inside a bracket by
interpolation. Then the size that is wanted, a multiple of the root, is evaluated as well.
"""

from __future__ import annotations

import math

_CLOSE = 0.02
"""Relative distance of the root from an evaluated size at which the root counts as found."""

_LEAST_FACTOR = 1.01
_LITTLE = 0.05
_MOST_GROWTH = 4.0


class SizeSearch:
    """The search for one size.

    Call `propose`, evaluate the margin at that size, and `add` it, until `is_settled`.

    Args:
        margin: The margin without an edit, at most 0.
        guess: The size to try first.
        factor: The size that is wanted, as a multiple of the least sufficient one; at least 1.

    Attributes:
        points: All sizes tried so far and their margins, the unedited model first.
    """

    def __init__(self, margin: float, guess: float, factor: float) -> None:
        self.points: list[tuple[float, float]] = [(0.0, margin)]
        self._curve = [(0.0, margin)]
        # The root is known up to rounding and the error of the interpolation.
        self._guess, self._factor = guess, max(factor, _LEAST_FACTOR)
        self._final: float | None = None
        self._is_found = False

    def add(self, size: float, margin: float) -> None:
        """Take note of an evaluation.

        Args:
            size: The size.
            margin: The margin there.
        """
        self.points.append((size, margin))
        is_contradicted = any(
            (own <= size and margin <= 0 < value) or (own >= size and value <= 0 < margin)
            for own, value in self._curve[1:]
        )
        if is_contradicted or (self._is_found and margin <= 0):  # other edits have moved the curve
            self._curve = [self._curve[0]]
        self._curve = sorted({**dict(self._curve), size: margin}.items())
        if margin <= 0:
            self._final, self._is_found = None, False

    @property
    def is_settled(self) -> bool:
        """Whether the size tried last is the one that is wanted, and the target leads there."""
        size, margin = self.points[-1]
        return margin > 0 and size == self._final

    def propose(self, *, is_last: bool = False) -> float:
        """The size to evaluate next.

        Args:
            is_last: Whether there will be no further evaluation, so that it must be the final one.

        Returns:
            The size; again the last one if the search is settled.
        """
        if self._final is not None:
            return self._final
        if len(self._curve) == 1:
            return self._factor * self._guess if is_last else self._guess
        lower, upper = self._bracket
        root = self._elsewhere if upper is None else _root(self._curve, lower, upper)
        if upper is not None and root <= 0:  # the margin without an edit is 0
            root = _LITTLE * upper[0]
        self._is_found = any(abs(size - root) <= _CLOSE * root for size, _ in self._curve)
        if is_last or self._is_found:
            self._final = self._factor * root
            return self._final
        return root

    @property
    def _bracket(self) -> tuple[tuple[float, float], tuple[float, float] | None]:
        """The largest size that does not suffice, and the least one above that does."""
        above = next((point for point in self._curve if point[1] > 0), None)
        below = [point for point in self._curve if above is None or point[0] < above[0]]
        return below[-1], above

    @property
    def _elsewhere(self) -> float:
        """A size to try where none suffices: larger than all, or next to the largest margin."""
        sizes = [size for size, _ in self._curve]
        margins = [margin for _, margin in self._curve]
        peak = max(range(len(sizes)), key=margins.__getitem__)
        slope = (margins[-1] - margins[-2]) / (sizes[-1] - sizes[-2])
        # The margin without an edit may be older than what others have written since.
        is_outdated = peak == 0 and len(sizes) > 2 and slope > 0
        if peak == len(sizes) - 1 or is_outdated:
            return min(sizes[-1] - margins[-1] / slope, _MOST_GROWTH * sizes[-1])
        if peak == 0:
            return sizes[1] / _MOST_GROWTH
        below, at, above = sizes[peak - 1 : peak + 2]
        return (at + above) / 2 if above - at > at - below else (below + at) / 2


def _root(
    curve: list[tuple[float, float]], lower: tuple[float, float], upper: tuple[float, float]
) -> float:
    """Where the margin is 0 in a bracket: by a parabola through three points, or a line."""
    (a, at_a), (b, at_b) = lower, upper
    slope = (at_b - at_a) / (b - a)
    line = a - at_a / slope
    others = [point for point in curve if point not in (lower, upper)]
    if not others:
        return line
    c, at_c = min(others, key=lambda point: abs(point[0] - line))
    bend = ((at_c - at_b) / (c - b) - slope) / (c - a)
    # at_a + steep u + bend u^2 = 0 for u = size - a, solved without cancellation
    steep = slope - bend * (b - a)
    return a - 2 * at_a / (steep + math.sqrt(max(0.0, steep**2 - 4 * bend * at_a)))
