"""How much of a long prompt a page or a notebook cell holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl.readout.readout import Reading, Readout
from backward_lens_tl.result import BackwardLensResult

_CELL, _READING, _ENTRY = 21, 6, 11
"""Bytes of a cell in `packing`, of its reading by one lens, and of one token at both ends."""

_FEWEST = 3
"""Tokens at either end of a cell that are kept before tokens of the prompt are left out."""


@dataclass(frozen=True)
class Budget:
    """Limits on the size of an output.

    Attributes:
        cells: Cells that are all written as HTML. Of more cells, half this number is: they can be
            read without scripts, and are what a browser lays out when it opens the output.
        data: Bytes of data, from which the script writes the other cells when they are needed.
    """

    cells: int
    data: int

    def shared_by(self, prompts: int) -> Budget:
        """The budget of each of several prompts."""
        return Budget(self.cells // prompts, self.data // prompts)


PAGE = Budget(cells=3000, data=3_600_000)
"""For a file of at most 5 MB."""

NOTEBOOK = Budget(cells=1500, data=350_000)
"""For an output of at most 1 MB."""


@dataclass(frozen=True)
class Extent:
    """What an output holds of one prompt.

    Attributes:
        total: The tokens that were analysed.
        tokens: The last ones of them that the output shows.
        written: The last ones of them that are written as HTML.
        k: Number of tokens at either end of each cell.
    """

    total: int
    tokens: int
    written: int
    k: int

    @classmethod
    def of(cls, result: BackwardLensResult, batch: int, budget: Budget) -> Extent:
        """What fits into a budget; at least one token of the prompt.

        Args:
            result: The result.
            batch: Which prompt.
            budget: The limits.

        Returns:
            The extent.
        """
        total = int((result.positions[batch] >= 0).sum())
        rows = len(result.layers) * len(result.matrices)
        lenses, fewest = len(result.projections), min(_FEWEST, result.k)
        fixed = _CELL + lenses * _READING
        tokens = _within(budget.data // (rows * (fixed + lenses * _ENTRY * fewest)), total)
        k = (budget.data // (rows * max(tokens, 1)) - fixed) // (lenses * _ENTRY)
        written = tokens if rows * tokens <= budget.cells else budget.cells // 2 // rows
        return cls(total, tokens, _within(written, tokens), max(fewest, min(k, result.k)))

    def of_result(self, result: BackwardLensResult, batch: int) -> BackwardLensResult:
        """A result with only the shown tokens of one prompt, and only `k` tokens at either end.

        Args:
            result: The result.
            batch: Which prompt.

        Returns:
            The result. Its other prompts have no meaning.
        """
        analysed = (result.positions[batch] >= 0).nonzero()[:, 0]
        columns = analysed[len(analysed) - self.tokens :]
        readings = tuple(self._of_reading(reading, columns) for reading in result.readings)
        return replace(result, positions=result.positions[:, columns], readings=readings)

    def _of_reading(self, reading: Reading, columns: Int[Tensor, "shown"]) -> Reading:
        return replace(
            reading,
            readouts={
                matrix: Readout(
                    top_ids=read.top_ids[:, :, columns, : self.k],
                    top_scores=read.top_scores[:, :, columns, : self.k],
                    bottom_ids=read.bottom_ids[:, :, columns, : self.k],
                    bottom_scores=read.bottom_scores[:, :, columns, : self.k],
                    target_rank=read.target_rank[:, :, columns],
                    answer_rank=read.answer_rank[:, :, columns],
                    entropy=read.entropy[:, :, columns],
                    is_faint=read.is_faint[:, :, columns],
                )
                for matrix, read in reading.readouts.items()
            },
        )


def _within(count: int, limit: int) -> int:
    """A number of tokens: at least one, if there is one."""
    return min(max(count, 1), limit)
