"""Readouts: top tokens, bottom tokens and target ranks of vectors, one by one or as a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """Vectors, read over the vocabulary.

    Attributes:
        top_ids: Tokens with the largest scores, best first.
        top_scores: Their scores.
        bottom_ids: Tokens with the smallest scores, smallest first.
        bottom_scores: Their scores.
        target_rank: Number of tokens with a strictly larger score than the target; 0 is the top.
        answer_rank: The same for the model's own answer; -1 if it was not requested.
        entropy: Entropy of the softmax of the scores, in nats; NaN if it was not requested.
        is_faint: Whether the vector that was projected is so short that the `eps` of the final norm
            outweighs it.
    """

    top_ids: Int[Tensor, "*lead k"]
    top_scores: Float[Tensor, "*lead k"]
    bottom_ids: Int[Tensor, "*lead k"]
    bottom_scores: Float[Tensor, "*lead k"]
    target_rank: Int[Tensor, "*lead"]
    answer_rank: Int[Tensor, "*lead"]
    entropy: Float[Tensor, "*lead"]
    is_faint: Bool[Tensor, "*lead"]


@dataclass(frozen=True)
class Reading:
    """The readouts of all matrices under one projection.

    Attributes:
        projection: Name of the projection.
        readouts: The readout of each matrix, `[layer, batch, pos]`.
        faint_norm: Length below which a projected vector is faint; 0 if the projection has none.
        fit: What a Jacobian Lens was fitted on; empty for other projections.
    """

    projection: str
    readouts: Mapping[str, Readout]
    faint_norm: float = 0.0
    fit: str = ""


class ReadoutGrid:
    """Readouts of a batch, filled cell by cell.

    Cells that were not read hold -1 as ids and ranks, and NaN as scores; they are not faint.

    Args:
        layers: The layers, ascending.
        places: Positions to read in each prompt, -1 for none.
        device: Where readouts are kept.

    Attributes:
        places: As passed.
        by_matrix: The readout of each matrix, `[layer, batch, pos]`.
    """

    def __init__(
        self, layers: Sequence[int], places: Int[Tensor, "batch pos"], device: torch.device
    ) -> None:
        self.places = places
        self.by_matrix: dict[str, Readout] = {}
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._device = device

    def write(
        self,
        matrix: str,
        layer: int,
        cells: tuple[Int[Tensor, "n"], Int[Tensor, "n"]],
        read: Readout,
    ) -> None:
        """Store the readout of some cells of one matrix and layer.

        Args:
            matrix: The matrix.
            layer: The layer.
            cells: Prompt and column of each vector.
            read: Its readout.
        """
        if matrix not in self.by_matrix:
            self.by_matrix[matrix] = join_readouts([read], lambda values: self._empty(values[0]))
        rows, columns = (index.to(self._device) for index in cells)
        for field in fields(Readout):
            whole = getattr(self.by_matrix[matrix], field.name)
            whole[self._index[layer], rows, columns] = getattr(read, field.name).to(self._device)

    def _empty(self, values: Tensor) -> Tensor:
        shape = (len(self._index), *self.places.shape, *values.shape[1:])
        empty = False if values.dtype == torch.bool else -1
        if values.is_floating_point():
            return values.new_full(shape, float("nan"), device=self._device)
        return values.new_full(shape, empty, device=self._device)


def join_readouts(readouts: Sequence[Readout], join: Callable[[list[Tensor]], Tensor]) -> Readout:
    """Join several readouts field by field.

    Args:
        readouts: At least one.
        join: `torch.cat` for more vectors, `torch.stack` for a new first axis.

    Returns:
        The joined readout.
    """
    return Readout(
        **{
            field.name: join([getattr(readout, field.name) for readout in readouts])
            for field in fields(Readout)
        }
    )
