"""The cells of one prompt, read once for all parts of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.result import BackwardLensResult

Rows = list[list[Cell]]
"""The cells of one matrix, by layer and position; the last layer is first.

The forward pass runs upwards in a table, and the gradient downwards.
"""


@dataclass(frozen=True)
class Grid:
    """The cells of one prompt.

    Attributes:
        by_lens: Rows of each matrix, by the name of the projection; the first one is shown.
    """

    by_lens: Mapping[str, Mapping[MatrixName, Rows]]

    @property
    def shown(self) -> Mapping[MatrixName, Rows]:
        """Rows of each matrix under the projection that is shown before any script runs."""
        return next(iter(self.by_lens.values()))


def read_grid(result: BackwardLensResult, batch: int) -> Grid:
    """Read the cells of one prompt under every lens.

    Args:
        result: The result.
        batch: Which prompt.

    Returns:
        The cells.
    """
    return Grid(
        {
            lens: {
                matrix: [read.cells(matrix, layer, batch) for layer in reversed(read.layers)]
                for matrix in read.matrices
            }
            for lens, read in ((lens, result.under(lens)) for lens in result.projections)
        }
    )
