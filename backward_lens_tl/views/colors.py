"""Colours of all views: shades of a norm, scales from numbers to colours, and palettes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backward_lens_tl.choices import Size
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.views.text import number


class Shade(NamedTuple):
    """A background and the text colour that is legible on it."""

    background: str
    text: str


_INK, _WHITE = "#0a0e13", "#ffffff"

# One path through OKLCH each, from mint to navy. Lightness is monotone, so the order survives every
# kind of colour blindness and printing in grey. Larger norms contrast more with the page.
LIGHT_SHADES = (
    *(Shade(color, _INK) for color in ("#dafcf2", "#aaebe2", "#78d7d8", "#46c1d0")),
    *(Shade(color, _INK) for color in ("#0ea9c8", "#008fbb")),
    *(Shade(color, _WHITE) for color in ("#0e75a8", "#245c8e", "#2b4570", "#28314e")),
)
"""Shades from the smallest norm to the largest, on a light page."""

DARK_SHADES = (
    *(Shade(color, _WHITE) for color in ("#1a2343", "#1c3660", "#144c7c", "#006494", "#007da7")),
    *(Shade(color, _INK) for color in ("#0097b5", "#14b0c0", "#4ec7c8", "#7edcd1", "#acf0dd")),
)
"""Shades from the smallest norm to the largest, on a dark page."""

SEQUENTIAL = tuple(shade.background for shade in LIGHT_SHADES)
"""Colours from small to large, on a white page."""

DIVERGING = ("#9c3a10", "#d97f4f", "#f6c9a9", "#f5f5f5", "#b9d6e8", "#5c9ac9", "#1f5a9c")
"""Colours from negative (orange) to positive (blue, as in CircuitsVis); colour-blind safe."""

ORDERED = ("#a9cc2f", "#4fb765", "#1f9488", "#2d7090", "#3f4c8c", "#4c1d6b")
"""Colours of ordered lines, from light to dark; the first one is still legible on white."""

BLUE, VERMILION = "#0072b2", "#d55e00"
CATEGORICAL = (BLUE, VERMILION, "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000")
"""Colours of a few unordered lines: Okabe and Ito's palette, with a darker yellow."""

_LARGEST_RATIO = 1000.0


@dataclass(frozen=True)
class NormScale:
    """A map from norms to shades, logarithmic or linear.

    Norms within one matrix span orders of magnitude. On a linear scale all positions but the last
    may look alike; on a logarithmic scale a small norm may look large.

    Attributes:
        low: On the logarithmic scale, this norm and all smaller ones have the first shade.
        high: The largest norm.
    """

    low: float
    high: float

    @classmethod
    def spanning(cls, norms: Iterable[float]) -> NormScale:
        """The scale of some norms, over at most three decades; zeros and NaN are ignored."""
        counted = [norm for norm in norms if 0 < norm < math.inf] or [0.0]
        high = max(counted)
        return cls(max(min(counted), high / _LARGEST_RATIO), high)

    @classmethod
    def of_cells(cls, rows: Sequence[Sequence[Cell]], size: Size = "norm") -> NormScale:
        """The scale of a matrix's cells."""
        cells = (cell for row in rows for cell in row if not cell.is_zero)
        return cls.spanning(getattr(cell, size) for cell in cells)

    def step(self, norm: float) -> int:
        """Index of a norm's shade on the logarithmic scale."""
        last = len(LIGHT_SHADES) - 1
        if not norm < self.high:
            return last
        if norm <= self.low:
            return 0
        return round(last * math.log(norm / self.low) / math.log(self.high / self.low))

    def linear_step(self, norm: float) -> int:
        """Index of a norm's shade on the linear scale, which starts at 0."""
        last = len(LIGHT_SHADES) - 1
        return round(last * norm / self.high) if norm < self.high else last

    @property
    def ends(self) -> tuple[str, str]:
        """Labels of the two ends of the logarithmic scale."""
        return f"{number(self.low)} or less", f"{number(self.high)}, logarithmic"

    @property
    def linear_ends(self) -> tuple[str, str]:
        """Labels of the two ends of the linear scale."""
        return "0", f"{number(self.high)}, linear"


@dataclass(frozen=True)
class Colors:
    """A scale from numbers to colours, shown as a colour bar.

    Attributes:
        low: This number and all smaller ones have the first colour.
        high: This number and all larger ones have the last colour.
        stops: Equidistant colours, as `#rrggbb`.
        title: What the numbers are.
        is_log: Whether the scale is logarithmic.
        ticks: The numbers on the colour bar.
    """

    low: float
    high: float
    stops: tuple[str, ...]
    title: str
    is_log: bool = False
    ticks: tuple[float, ...] = ()

    @classmethod
    def of_norms(cls, norms: Iterable[float], title: str, is_log: bool) -> Colors:
        """The scale of some norms: from 0, or over at most three decades if it is logarithmic."""
        span = NormScale.spanning(norms)
        if not is_log or not span.high:
            return cls(0.0, span.high or 1.0, SEQUENTIAL, title)
        # A single norm needs a range, too.
        low = span.low if span.low < span.high else span.high / 10
        return cls(low, span.high, SEQUENTIAL, title, True, _decades(low, span.high))

    @classmethod
    def of_values(cls, values: Iterable[float], title: str) -> Colors:
        """The linear scale of some numbers: from 0, or symmetric if some are negative."""
        counted = [value for value in values if not math.isnan(value)]
        largest = max(map(abs, counted), default=0.0) or 1.0
        if min(counted, default=0.0) < 0:
            return cls(-largest, largest, DIVERGING, title)
        return cls(0.0, largest, SEQUENTIAL, title)

    @classmethod
    def of_order(cls, values: Sequence[int], title: str) -> Colors:
        """The scale of ordered lines, from the smallest to the largest value."""
        return cls(float(min(values)), float(max(values)), ORDERED, title)

    def at(self, value: int) -> str:
        """The colour of a number on a linear scale."""
        width = self.high - self.low
        return _blend(self.stops, (value - self.low) / width if width else 1.0)


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Round numbers of a logarithmic scale: 1, 2, 5 per decade, or 1, 3 over many decades."""
    leads = (1, 2, 5) if high / low < 200 else (1, 3)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_numbers = (float(f"{lead}e{power}") for power in exponents for lead in leads)
    return tuple(value for value in round_numbers if low <= value <= high)


def _blend(stops: Sequence[str], fraction: float) -> str:
    """The colour at a fraction of the way along some stops."""
    place = max(0.0, min(fraction, 1.0)) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    ends = (bytes.fromhex(stop[1:]) for stop in stops[left : left + 2])
    mixed = (round(a + (place - left) * (b - a)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
