"""Figures as descriptions: numbers, texts and colours, for any library to draw.

Texts are as a reader should see them; each drawing module escapes what its library would interpret.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

from backward_lens_tl.views.appearance import LIGHT_SHADES, NormScale

SEQUENTIAL = tuple(shade.background for shade in LIGHT_SHADES)
"""From small to large, on a white page."""

DIVERGING = ("#9c3a10", "#d97f4f", "#f6c9a9", "#f5f5f5", "#b9d6e8", "#5c9ac9", "#1f5a9c")
"""From below 0 to above: orange and blue, which no kind of colour blindness confuses. Blue is
positive, as in CircuitsVis."""

ORDERED = ("#a9cc2f", "#4fb765", "#1f9488", "#2d7090", "#3f4c8c", "#4c1d6b")
"""From the first line to the last: ever darker, and the first is still legible on white."""

CATEGORICAL = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000")
"""For few lines without an order: Okabe and Ito's, with their yellow darkened."""

DASHES = ("solid", "dash", "dashdot", "dot")
MARKERS = ("circle", "square", "diamond", "triangle", "cross", "x")

MOST_NAMES = 12
"""More lines than this have a colour bar in place of a legend."""

BAND_OPACITY = 0.13
"""Of a band around a line: several may lie on each other, and lines stay legible."""

MOST_COLUMNS = 3
"""More charts than this do not stand in one row."""


@dataclass(frozen=True)
class Colors:
    """A scale from numbers to colours, and its bar.

    Attributes:
        low: This number and all below have the first colour.
        high: This number and all above have the last colour.
        stops: Colours at equal distances, as `#rrggbb`.
        title: What the numbers are.
        is_log: Whether distances are those of the logarithm.
        ticks: The numbers that the bar names.
    """

    low: float
    high: float
    stops: tuple[str, ...]
    title: str
    is_log: bool = False
    ticks: tuple[float, ...] = ()

    @classmethod
    def of_norms(cls, norms: Iterable[float], title: str, is_log: bool) -> Colors:
        """The scale of some norms: from 0, or the three decades of the layers x tokens table.

        Args:
            norms: The norms.
            title: What they are.
            is_log: Whether the scale is logarithmic.

        Returns:
            The scale.
        """
        span = NormScale.spanning(norms)
        if not is_log or not span.high:
            return cls(0.0, span.high or 1.0, SEQUENTIAL, title)
        # A single norm has a scale, too.
        low = span.low if span.low < span.high else span.high / 10
        return cls(low, span.high, SEQUENTIAL, title, True, _decades(low, span.high))

    @classmethod
    def of_values(cls, values: Iterable[float], title: str) -> Colors:
        """The linear scale of some numbers: from 0, or equal to both sides of it if one is below.

        Args:
            values: The numbers; NaN does not count.
            title: What they are.

        Returns:
            The scale.
        """
        counted = [value for value in values if not math.isnan(value)]
        largest = max(map(abs, counted), default=0.0) or 1.0
        if min(counted, default=0.0) < 0:
            return cls(-largest, largest, DIVERGING, title)
        return cls(0.0, largest, SEQUENTIAL, title)

    def at(self, value: int) -> str:
        """The colour of one of a linear scale's numbers."""
        width = self.high - self.low
        return _blend(self.stops, (value - self.low) / width if width else 1.0)


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: What it shows, with its unit.
        labels: Text of 0, 1, 2, ... on an axis of things in a row; none on an axis of numbers.
        step: Distance of its ticks; by default as the drawing library likes it.
        is_log: Whether it is logarithmic.
        is_reversed: Whether small numbers are at the top, or on the right.
    """

    title: str
    labels: tuple[str, ...] = ()
    step: int | None = None
    is_log: bool = False
    is_reversed: bool = False

    def ticks(self, at_most: int) -> tuple[tuple[int, str], ...]:
        """Which labels are shown where there is no room for all: every k-th, and the last.

        Args:
            at_most: For how many there is room.

        Returns:
            Places and their labels.
        """
        last = len(self.labels) - 1
        step = max(1, math.ceil(len(self.labels) / at_most))
        # Counted from the last one: the last token and the last layer matter most.
        return tuple((place, self.labels[place]) for place in reversed(range(last, -1, -step)))

    def angle(self, room: int, shown: int) -> int:
        """By how many degrees labels are turned so that they do not run into each other.

        Args:
            room: For all labels, in CSS pixels.
            shown: How many labels are shown.

        Returns:
            0, 45 or 90.
        """
        needed, each = 7 * max(map(len, self.labels)), room / shown
        return 0 if needed <= each else 45 if each > 28 else 90


def counting(title: str, numbers: Sequence[int]) -> Axis:
    """An axis of whole numbers.

    Args:
        title: What it shows.
        numbers: The numbers.

    Returns:
        An axis of at most some twelve ticks, none of them between two numbers.
    """
    return Axis(title, step=max(1, math.ceil((max(numbers) - min(numbers)) / 12)))


@dataclass(frozen=True)
class Heatmap:
    """Coloured cells.

    Attributes:
        values: One row per label of `y`, the lowest first; NaN is left blank.
        hover: What is said of each cell that is pointed at, where that is possible.
        x: The columns.
        y: The rows.
        colors: From values to colours.
        title: What the chart shows.
    """

    values: tuple[tuple[float, ...], ...]
    hover: tuple[tuple[str, ...], ...]
    x: Axis
    y: Axis
    colors: Colors
    title: str = ""


@dataclass(frozen=True)
class Line:
    """Points of one colour, joined or not.

    Attributes:
        name: Its name in the legend; lines of one name in a grid of charts share an entry.
        x: Where the points are.
        y: Their heights; NaN leaves a gap.
        color: As `#rrggbb`.
        hover: What is said of each point that is pointed at, where that is possible.
        dash: One of `DASHES`; none leaves points without a line.
        marker: One of `MARKERS`; none leaves a line without points.
        width: Of the line, in points.
        band: Lower and upper edge of a shaded band around the line, where there is one; NaN leaves
            a gap.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: str
    hover: tuple[str, ...] = ()
    dash: str | None = "solid"
    marker: str | None = "circle"
    width: float = 1.6
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Lines:
    """Lines over two axes.

    Attributes:
        lines: The lines, later ones on top.
        x: The horizontal axis.
        y: The vertical axis.
        colors: The scale that lines have their colours from, where they are too many for a legend.
        title: What the chart shows.
    """

    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    colors: Colors | None = None
    title: str = ""


@dataclass(frozen=True)
class Grid:
    """Charts side by side; those with the same colours share one bar, and all share one legend.

    More than `MOST_COLUMNS` stand in several rows, which differ by as few charts as they can.

    Attributes:
        charts: From left to right, and from the upper row to the lower.
        title: What they show together.
        is_stacked: Whether they stand one above the other instead, each with its own bar.
    """

    charts: tuple[Heatmap | Lines, ...]
    title: str
    is_stacked: bool = False

    @property
    def colors(self) -> tuple[Colors, ...]:
        """The different colour scales."""
        return tuple(dict.fromkeys(chart.colors for chart in self.charts if chart.colors))

    @property
    def bar_columns(self) -> int:
        """How many bars of colours stand side by side."""
        return min(1, len(self.colors)) if self.is_stacked else len(self.colors)

    @property
    def has_legend(self) -> bool:
        """Whether lines are named."""
        return any(isinstance(chart, Lines) and chart.colors is None for chart in self.charts)

    @property
    def columns(self) -> int:
        """How many charts stand in a row."""
        if self.is_stacked:
            return 1
        rows = math.ceil(len(self.charts) / MOST_COLUMNS)
        return math.ceil(len(self.charts) / rows)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Row, from the top, and column of each chart."""
        return tuple(divmod(index, self.columns) for index in range(len(self.charts)))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each chart without what is around it, in CSS pixels."""
        return tuple(_size(chart, is_small=self.columns > 2) for chart in self.charts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each column, which is that of its widest chart."""
        return tuple(
            max(width for width, _ in self.sizes[column :: self.columns])
            for column in range(self.columns)
        )

    @property
    def heights(self) -> tuple[int, ...]:
        """Height of each row, which is that of its highest chart."""
        return tuple(
            max(height for _, height in self.sizes[first : first + self.columns])
            for first in range(0, len(self.charts), self.columns)
        )


def floats(values: Iterable[SupportsFloat]) -> tuple[float, ...]:
    """Numbers of any kind as a line takes them."""
    return tuple(map(float, values))


def in_turn(choices: Sequence[str], index: int) -> str:
    """One of some colours or markers, which begin anew where there are too few."""
    return choices[index % len(choices)]


def ordered_colors(values: Sequence[int], title: str) -> Colors:
    """The scale of lines that have an order.

    Args:
        values: What they are ordered by.
        title: What that is.

    Returns:
        A linear scale from the smallest to the largest.
    """
    return Colors(float(min(values)), float(max(values)), ORDERED, title)


def wrapped(text: str, room: int) -> str:
    """A text in at most two lines of so many characters."""
    return "\n".join(textwrap.wrap(text, room, max_lines=2, placeholder="…"))


def shortened(text: str, room: int) -> str:
    """A text of at most so many characters, its end cut off."""
    return text if len(text) <= room else text[: max(room - 1, 1)] + "…"


def _size(chart: Heatmap | Lines, *, is_small: bool) -> tuple[int, int]:
    if isinstance(chart, Lines):
        return (380, 300) if is_small else (520, 360)
    columns, rows = len(chart.x.labels or chart.values[0]), len(chart.values)
    # Cells are as wide as a token where there are few, and share a page where there are many.
    return _within(48 * columns, 240, 820), _within(26 * rows, 140, 620)


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Round numbers of a logarithmic scale: 1, 2 and 5 of each decade, or 1 and 3 of many."""
    leads = (1, 2, 5) if high / low < 200 else (1, 3)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Divided by a power where it is small, since 5 / 1000 is 0.005 and 5 * 0.001 is not.
    round_numbers = [
        lead * 10.0**power if power >= 0 else lead / 10.0**-power
        for power in exponents
        for lead in leads
    ]
    return tuple(value for value in round_numbers if low <= value <= high)


def _blend(stops: Sequence[str], fraction: float) -> str:
    """The colour at a fraction of the way along some stops."""
    place = max(0.0, min(fraction, 1.0)) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    pairs = zip(_channels(stops[left]), _channels(stops[left + 1]), strict=True)
    mixed = (round(one + (place - left) * (other - one)) for one, other in pairs)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))
