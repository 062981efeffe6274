"""The search for a size, on curves whose root is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from backward_lens_tl.editing.shift.search import SizeSearch

Curve = Callable[[float], float]

PASSES = 5


def searched(
    curve: Curve, guess: float, factor: float = 1.1, passes: int = PASSES
) -> tuple[SizeSearch, list[float]]:
    search = SizeSearch(float(curve(0)), guess, factor)
    sizes = []
    for left in reversed(range(passes)):
        if search.is_settled:
            break
        sizes.append(search.propose(is_last=left == 0))
        search.add(sizes[-1], float(curve(sizes[-1])))
    return search, sizes


CURVES: dict[str, tuple[Curve, float]] = {
    "line": (lambda c: c - 3, 3),
    "concave": (lambda c: 4 * math.log1p(c) - 4, math.e - 1),
    "saturating": (lambda c: 6 * math.tanh(c / 5) - 3, 5 * math.atanh(0.5)),
    "convex": (lambda c: (c / 3) ** 1.5 - 1, 3),
    "competitors": (lambda c: min(2 * c - 6, 0.3 * c - 0.3), 3),
    "slow start": (lambda c: c**2 / (c + 2) - 1.8, (1.8 + math.sqrt(1.8**2 + 4 * 3.6)) / 2),
}


@pytest.mark.parametrize("guess", [0.3, 0.6, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("factor", [1.0, 1.1, 2.0])
@pytest.mark.parametrize("name", CURVES)
def test_it_ends_at_the_multiple_of_the_least_size(name: str, factor: float, guess: float) -> None:
    """Within 3 % in at most five evaluations, from guesses of 0.3 to 2.5 times the root."""
    curve, root = CURVES[name]
    search, sizes = searched(curve, guess * root, factor)
    assert curve(sizes[-1]) > 0
    assert 0.97 < sizes[-1] / (max(factor, 1.01) * root) < 1.03
    assert len(sizes) <= PASSES
    assert search.points == [(0.0, curve(0)), *((each, curve(each)) for each in sizes)]


def test_a_line_takes_three_evaluations_and_a_good_guess_two() -> None:
    line = CURVES["line"][0]
    search, sizes = searched(line, 2.0)
    assert search.is_settled
    assert sizes == pytest.approx([2.0, 3.0, 3.3])
    search, sizes = searched(line, 3.01)
    assert search.is_settled
    assert sizes == pytest.approx([3.01, 3.3])


def test_a_guess_that_is_off_by_a_hundred_is_found_with_more_evaluations() -> None:
    line = CURVES["line"][0]
    for guess in (0.03, 300.0):
        search, sizes = searched(line, guess, passes=8)
        assert search.is_settled
        assert sizes[-1] == pytest.approx(3.3, rel=0.03)


@pytest.mark.parametrize(
    "curve", [lambda c: -1.0 - c, lambda c: -1 / (1 + c), lambda c: -1 - (c - 2) ** 2]
)
def test_without_a_root_it_is_never_settled(curve: Curve) -> None:
    search, sizes = searched(curve, 1.0, passes=8)
    assert not search.is_settled
    assert len(sizes) == 8
    assert all(size > 0 for size in sizes)
    assert len(set(sizes)) == 8


def test_a_narrow_peak_is_found_below_a_guess_that_is_too_large() -> None:
    """Where the edit outweighs the stream, the margin may fall again."""

    def curve(c: float) -> float:
        return 1 - (c - 2) ** 2

    for guess in range(4, 13):
        _, sizes = searched(curve, float(guess), passes=8)
        assert curve(sizes[-1]) > 0, guess


@pytest.mark.parametrize("guess", range(1, 41))
def test_a_window_between_too_little_and_too_much_is_found(guess: int) -> None:
    """Up by 1, down by 2: the target leads between 3 and 6 only."""
    search, sizes = searched(lambda c: min(c - 3, 12 - 2 * c), float(guess), passes=10)
    assert search.is_settled
    assert 3 < sizes[-1] < 6


def test_a_target_that_is_level_with_another_needs_little() -> None:
    search, sizes = searched(lambda c: 2 * c, 10.0)
    assert search.is_settled
    assert 0 < sizes[-1] < 1


def test_it_adapts_where_other_edits_move_the_curve() -> None:
    """What was sufficient no longer is: the curve is forgotten, and the target found again."""
    search = SizeSearch(-3.0, 2.0, 1.1)
    root = 3.0
    for at in range(10):
        if at == 2:
            root = 6.0
        size = search.propose()
        search.add(size, size - root)
    assert search.is_settled
    assert search.points[-1][0] == pytest.approx(6.6, rel=0.03)


def test_the_last_evaluation_is_of_the_wanted_multiple() -> None:
    points = [(2.0, -1.0), (4.0, 1.0)]
    for n, expected, usual in ((0, 4.0, 2.0), (1, 6.0, 3.0), (2, 6.0, 3.0)):
        for is_last, size in ((False, usual), (True, expected)):
            search = SizeSearch(-3.0, 2.0, 2.0)
            for point in points[:n]:
                search.add(*point)
            assert search.propose(is_last=is_last) == pytest.approx(size)
