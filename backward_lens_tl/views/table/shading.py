"""The shades of a matrix's cells: two sizes, on two scales each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from backward_lens_tl.choices import Size
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.views.colors import NormScale

SHADE_CLASSES = "nmpq"
"""The classes of the shades: of the norm, logarithmic and linear, and of the term's norm."""


@dataclass(frozen=True)
class Shading:
    """Maps the cells of one matrix to shades.

    Attributes:
        scales: The scale of each size.
    """

    scales: tuple[tuple[Size, NormScale], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Cell]]) -> Shading:
        """The shading of a matrix's cells."""
        return cls(tuple((size, NormScale.of_cells(rows, size)) for size in get_args(Size)))

    def digits(self, cell: Cell) -> str:
        """The index of the cell's shade for each of `SHADE_CLASSES`."""
        return "".join(map(str, self._steps(cell)))

    def classes(self, cell: Cell) -> str:
        """The cell's classes."""
        return " ".join(map("".join, zip(SHADE_CLASSES, self.digits(cell), strict=True)))

    def _steps(self, cell: Cell) -> Iterator[int]:
        for size, scale in self.scales:
            value = getattr(cell, size)
            yield scale.step(value)
            yield scale.linear_step(value)
