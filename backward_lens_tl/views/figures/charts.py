"""Charts as plain descriptions (numbers, texts, colours) that any plotting library can draw.

Texts are as a reader should see them. Each backend escapes what its library would interpret.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

from backward_lens_tl.views.colors import CATEGORICAL, VERMILION, Colors

if TYPE_CHECKING:
    import pandas as pd

Values = tuple[tuple[float, ...], ...]
"""The numbers of a heatmap, a row per label of its vertical axis."""

GREY = "#6b7280"
"""Colour of reference lines."""

INK, FRAME, GRID = "#1f2937", "#9ca3af", "#e5e7eb"

ACCENT, BOUNDARY_WIDTH = VERMILION, 2.5
"""Colour and width, in points, of the line between prompt and answer."""

MARKERS = ("circle", "square", "diamond", "triangle", "cross", "x")

MOST_NAMES = 12
"""More lines than this have a colour bar instead of a legend."""

MOST_SEAMS = 64
"""More cells than this in a row or column have no line between them."""

BAND_OPACITY = 0.13
"""Opacity of the band around a line. Bands may overlap, and lines must stay legible."""

LABEL_ROOM = 13
"""Least distance between two labels of an axis, in CSS pixels; more labels are thinned out."""

SMALL_LABELS = 16
"""Labels that are closer than this, in CSS pixels, have a smaller font."""

_CHARACTER = 7
"""Width of a label's character, in CSS pixels."""

MOST_COLUMNS = 3
"""More charts than this are drawn in several rows."""


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: What it shows, with its unit.
        labels: Text at 0, 1, 2, ... on a categorical axis; empty on a numeric axis.
        step: Distance between ticks; by default the plotting library chooses.
        is_log: Whether it is logarithmic.
        is_reversed: Whether small numbers are at the top, or on the right.
        boundary: Index of the first label after a line across the chart, if there is a line.
    """

    title: str
    labels: tuple[str, ...] = ()
    step: int | None = None
    is_log: bool = False
    is_reversed: bool = False
    boundary: int | None = None

    @classmethod
    def counting(cls, title: str, numbers: Iterable[int]) -> Axis:
        """An axis of integers with about twelve ticks at most, none between two integers."""
        numbers = list(numbers)
        return cls(title, step=max(1, math.ceil((max(numbers) - min(numbers)) / 12)))

    def ticks(self, room: int) -> tuple[tuple[int, str], ...]:
        """Places and labels of the ticks that fit: every label, or every k-th and the last.

        Args:
            room: Length of the axis, in CSS pixels.

        Returns:
            The ticks, in order.
        """
        last = len(self.labels) - 1
        # Counted from the end: the last token and the last layer matter most.
        places = reversed(range(last, -1, -self._every(room)))
        return tuple((place, self.labels[place]) for place in places)

    def full_title(self, room: int) -> str:
        """The title, which says so if only some labels fit into this length."""
        every = self._every(room)
        return self.title if every == 1 else f"{self.title}, one of {every} labelled"

    def angle(self, room: int) -> int:
        """The rotation at which the labels that fit do not overlap: 0, 45 or 90 degrees.

        Args:
            room: Length of the axis, in CSS pixels.

        Returns:
            The angle.
        """
        shown = self.ticks(room)
        needed = _CHARACTER * (1 + max(len(label) for _, label in shown))  # with a space between
        each = room / len(shown)
        return 0 if needed <= each else 45 if each > 28 else 90

    def depth(self, room: int) -> int:
        """How far rotated labels reach below the axis, in CSS pixels; 0 for level ones."""
        if not self.labels:
            return 0
        longest = max(len(label) for _, label in self.ticks(room))
        return round(_CHARACTER * longest * math.sin(math.radians(self.angle(room))))

    def is_dense(self, room: int) -> bool:
        """Whether labels need a smaller font."""
        return room < SMALL_LABELS * len(self.ticks(room))

    def _every(self, room: int) -> int:
        """Distance between two labels that are shown."""
        return max(1, math.ceil(LABEL_ROOM * len(self.labels) / room))


@dataclass(frozen=True)
class Heatmap:
    """Coloured cells.

    Attributes:
        values: One row per label of `y`, the lowest first; NaN is left blank.
        hover: Hover text of each cell, for backends that support it.
        x: The columns.
        y: The rows.
        colors: From values to colours.
        title: Title of the chart.
    """

    values: Values
    hover: tuple[tuple[str, ...], ...]
    x: Axis
    y: Axis
    colors: Colors
    title: str = ""


@dataclass(frozen=True)
class Line:
    """Points of one colour, connected or not.

    Attributes:
        name: Its name in the legend; lines with the same name share an entry.
        x: Horizontal coordinates.
        y: Vertical coordinates; NaN leaves a gap.
        color: As `#rrggbb`.
        hover: Hover text of each point, for backends that support it.
        dash: `"solid"`, `"dash"`, `"dashdot"` or `"dot"`; `None` for points without a line.
        marker: One of `MARKERS`; `None` for a line without points.
        width: Line width, in points.
        band: Lower and upper edge of a shaded band around the line; NaN leaves a gap.
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

    @classmethod
    def of_rows(
        cls,
        name: str,
        rows: pd.DataFrame,
        x: str,
        y: str,
        hover: Callable[[Mapping[Any, Any]], str],
        *,
        band: tuple[str, str] | None = None,
        **style: Any,
    ) -> Line:
        """A line with a point per row of a table.

        Args:
            name: Its name.
            rows: The table.
            x: Column of the horizontal coordinates.
            y: Column of the vertical coordinates.
            hover: From a row to its hover text.
            band: Columns of the band's lower and upper edge.
            **style: Colour, dash, marker and width.

        Returns:
            The line.
        """
        texts = tuple(map(hover, rows.to_dict("records")))
        edges = None if band is None else (floats(rows[band[0]]), floats(rows[band[1]]))
        return cls(name, floats(rows[x]), floats(rows[y]), hover=texts, band=edges, **style)


@dataclass(frozen=True)
class Lines:
    """Lines over two axes.

    Attributes:
        lines: The lines, later ones on top.
        x: The horizontal axis.
        y: The vertical axis.
        colors: The colour scale of lines that are too many for a legend.
        title: Title of the chart.
    """

    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    colors: Colors | None = None
    title: str = ""


@dataclass(frozen=True)
class Grid:
    """Charts side by side. Those with equal colours share a colour bar; all share one legend.

    More than `MOST_COLUMNS` charts are spread evenly over several rows.

    Attributes:
        charts: From left to right, and from top to bottom.
        title: Title of the figure.
        subtitle: A second line, such as the prompt; may be empty.
        is_stacked: Whether they are stacked in one column instead, each with its own colour bar.
    """

    charts: tuple[Heatmap | Lines, ...]
    title: str
    subtitle: str = ""
    is_stacked: bool = False

    @property
    def colors(self) -> tuple[Colors, ...]:
        """The different colour scales."""
        return tuple(dict.fromkeys(chart.colors for chart in self.charts if chart.colors))

    @property
    def bar_columns(self) -> int:
        """How many colour bars are side by side."""
        return min(1, len(self.colors)) if self.is_stacked else len(self.colors)

    @property
    def has_legend(self) -> bool:
        """Whether lines are named."""
        return any(isinstance(chart, Lines) and chart.colors is None for chart in self.charts)

    @property
    def columns(self) -> int:
        """How many charts are in a row."""
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
        """Width and height of each chart without its surroundings, in CSS pixels."""
        return tuple(_size(chart, is_small=self.columns > 2) for chart in self.charts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each column: that of its widest chart."""
        return tuple(
            max(width for width, _ in self.sizes[column :: self.columns])
            for column in range(self.columns)
        )

    @property
    def heights(self) -> tuple[int, ...]:
        """Height of each row: that of its tallest chart."""
        return tuple(
            max(height for _, height in self.sizes[first : first + self.columns])
            for first in range(0, len(self.charts), self.columns)
        )


def floats(values: Iterable[SupportsFloat]) -> tuple[float, ...]:
    """Numbers of any type as floats."""
    return tuple(map(float, values))


def marker_at(index: int) -> str:
    """The marker of the line with this index; they repeat if there are too few."""
    return MARKERS[index % len(MARKERS)]


def style_at(index: int) -> dict[str, Any]:
    """Colour and marker of the line with this index."""
    return {"color": CATEGORICAL[index % len(CATEGORICAL)], "marker": marker_at(index)}


def lines_by(
    table: pd.DataFrame,
    by: str,
    x: str,
    y: str,
    hover: Callable[[Mapping[Any, Any]], str],
    **options: Any,
) -> tuple[Line, ...]:
    """A line through `x` and `y` for each value of the column `by`, in order of appearance."""
    return tuple(
        Line.of_rows(
            str(name),
            table[table[by] == name].sort_values(x),
            x,
            y,
            hover,
            **options,
            **style_at(at),
        )
        for at, name in enumerate(table[by].unique())
    )


def wrapped(text: str, room: int) -> str:
    """A text in at most two lines of this many characters."""
    return "\n".join(textwrap.wrap(text, room, max_lines=2, placeholder="…"))


def _size(chart: Heatmap | Lines, *, is_small: bool) -> tuple[int, int]:
    if isinstance(chart, Lines):
        return (380, 300) if is_small else (520, 360)
    columns, rows = len(chart.x.labels or chart.values[0]), len(chart.values)
    # Cells are as wide as a token if there are few, and share a page if there are many.
    return _within(48 * columns, 240, 820), _within(26 * rows, 140, 650)


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
