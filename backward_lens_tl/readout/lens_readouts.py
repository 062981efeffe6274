"""The readouts of a result: tensors, cells and tokens of every matrix, layer and position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl._checks import is_index, shown
from backward_lens_tl.capture.selection import position_index
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, CellReader, cells_of
from backward_lens_tl.readout.readout import Readout
from backward_lens_tl.readout.targets import LensTargets

_ResultT = TypeVar("_ResultT", bound="LensReadouts")


@dataclass(frozen=True, repr=False)
class LensReadouts(LensTargets):
    """Readouts of every matrix, layer, prompt and position; the base of `BackwardLensResult`.

    `BackwardLensResult` explains the fields.
    """

    direction: str
    vjps_at: str = "matrix"

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the matrices, in the order in which a layer uses them."""
        return self.capture.matrices

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return self.capture.layers

    @property
    def projection(self) -> str:
        """Name of the projection that methods use."""
        return self.readings[0].projection

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections."""
        return tuple(reading.projection for reading in self.readings)

    @property
    def k(self) -> int:
        """Number of tokens kept at either end."""
        return int(self.readout(self.matrices[0]).top_ids.shape[-1])

    @property
    def faint_norm(self) -> float:
        """Norm below which a projected vector is faint; 0 if the projection has none."""
        return self.readings[0].faint_norm

    @property
    def fit(self) -> str:
        """What the Jacobian Lens was fitted on; empty if the projection is another."""
        return self.readings[0].fit

    def under(self: _ResultT, projection: str) -> _ResultT:
        """The same result under another projection.

        Args:
            projection: Its name, such as `"normalized"`.

        Returns:
            A result that shares all tensors with this one.

        Raises:
            InputError: If the result does not have this projection.

        Examples:
            >>> result.cell("W_out", layer=6, pos=0).is_faint
            True
            >>> result.top_tokens("W_out", layer=6, pos=0, k=1)  # mostly the final norm's bias
            [' English']
            >>> result.under("normalized").top_tokens("W_out", layer=6, pos=0, k=1)
            [' child']
        """
        if projection not in self.projections:
            raise InputError(
                f"{projection!r} was not requested, only {', '.join(self.projections)}; pass "
                "several to backward_lens(..., projection=...)"
            )
        first = self.readings[self.projections.index(projection)]
        others = (reading for reading in self.readings if reading is not first)
        return replace(self, readings=(first, *others))

    # --- tensors -------------------------------------------------------------------------------

    def readout(self, matrix: str) -> Readout:
        """The projected spanning set of a matrix.

        Args:
            matrix: Its name.

        Returns:
            Token ids and scores, `[layer, batch, pos, k]`, and target ranks, `[layer, batch, pos]`.

        Raises:
            InputError: If the matrix was not requested.

        Examples:
            >>> result.readout("W_out").top_ids.shape  # [layer, batch, pos, k]
            torch.Size([8, 1, 6, 10])
        """
        readouts = self.readings[0].readouts
        if isinstance(matrix, str) and matrix in readouts:
            return readouts[matrix]
        raise InputError(
            f"{matrix!r} is not in this result; it has {', '.join(self.matrices)}; pass one of "
            "these, or request it with backward_lens(..., matrices=...)"
        )

    def target_rank(self, matrix: str) -> Int[Tensor, "layer batch pos"]:
        """Rank of the target among all tokens, 0 for the largest score.

        Each position has its own target, as in `capture.targets`. Where `is_zero` is true, the rank
        is that of the final norm's bias and has no meaning.

        Args:
            matrix: Its name.

        Returns:
            The ranks; -1 at padding, and at the last position with `next_token_loss`.

        Raises:
            InputError: If the objective has no targets and none was given.

        Examples:
            >>> result.target_rank("W_out")[:, 0, -1].tolist()  # at the last token, layer by layer
            [0, 0, 0, 0, 0, 0, 0, 0]
        """
        if self.capture.targets is None:
            raise InputError(
                f"{self.capture.objective} has no target to rank; pass target=... in addition to "
                "the objective"
            )
        return self.readout(matrix).target_rank

    def norms(self, matrix: str) -> Float[Tensor, "layer batch pos"]:
        """`||delta_i||_2`, how strongly each position writes into a matrix; 0 at padding.

        Args:
            matrix: Its name.

        Returns:
            The norms.

        Raises:
            InputError: If the matrix was not requested.

        Examples:
            >>> norms = result.norms("W_out")
            >>> norms.shape  # [layer, batch, pos]
            torch.Size([8, 1, 6])
            >>> norms[:, 0].argmax(-1).tolist()  # where each layer is written to most
            [5, 5, 5, 5, 5, 5, 5, 5]
        """
        self.readout(matrix)
        return self._by_layer([self.capture[matrix, layer].norms for layer in self.layers])

    def is_zero(self, matrix: str) -> Bool[Tensor, "layer batch pos"]:
        """Where a position adds nothing to a matrix's gradient; true at padding.

        Args:
            matrix: Its name.

        Returns:
            The mask.

        Raises:
            InputError: If the matrix was not requested.

        Examples:
            >>> result.is_zero("W_out")[-1, 0].tolist()  # only the last token writes there
            [True, True, True, True, True, False]
        """
        self.readout(matrix)
        zero = self._by_layer([self.capture[matrix, layer].is_zero for layer in self.layers])
        return zero | (self.positions < 0)

    def _by_layer(self, values: list[Tensor]) -> Tensor:
        index = self.positions.clamp_min(0).expand(len(values), *self.positions.shape)
        return torch.stack(values).gather(2, index).masked_fill(self.positions < 0, 0)

    # --- tokens --------------------------------------------------------------------------------

    def top_tokens(
        self, matrix: str, layer: int, pos: int, k: int | None = None, batch: int = 0
    ) -> list[str]:
        """The most promoted tokens of one cell.

        Args:
            matrix: Name of the matrix.
            layer: The layer, negative from the end of the model.
            pos: Position in the prompt, negative from its end.
            k: Number of tokens; by default all that were kept.
            batch: Which prompt.

        Returns:
            Texts, best first; empty where the position adds nothing to the gradient.

        Examples:
            >>> result.top_tokens("W_out", layer=6, pos=-1, k=2)
            [' Paris', ' France']
        """
        return [entry.token for entry in self.cell(matrix, layer, pos, batch).top[: self._first(k)]]

    def bottom_tokens(
        self, matrix: str, layer: int, pos: int, k: int | None = None, batch: int = 0
    ) -> list[str]:
        """The least promoted tokens of one cell.

        Args:
            matrix: Name of the matrix.
            layer: The layer, negative from the end of the model.
            pos: Position in the prompt, negative from its end.
            k: Number of tokens; by default all that were kept.
            batch: Which prompt.

        Returns:
            Texts, smallest score first; empty where the position adds nothing to the gradient.

        Examples:
            >>> result.bottom_tokens("W_out", layer=6, pos=-1, k=1)
            [' Belgrade']
        """
        cell = self.cell(matrix, layer, pos, batch)
        return [entry.token for entry in cell.bottom[: self._first(k)]]

    def cell(self, matrix: str, layer: int, pos: int, batch: int = 0) -> Cell:
        """One matrix, layer and position, as tokens.

        Args:
            matrix: Name of the matrix.
            layer: The layer, negative from the end of the model.
            pos: Position in the prompt, negative from its end.
            batch: Which prompt.

        Returns:
            Its tokens, norm and rank.

        Raises:
            InputError: If it was not analysed.

        Examples:
            >>> cell = result.cell("W_out", layer=6, pos=-1)
            >>> cell.token, cell.top[0].token, cell.target_rank
            (' for', ' Paris', 0)
        """
        cells = self.cells(matrix, layer, batch)
        wanted = position_index(pos, len(self.capture.str_tokens[batch]), batch)
        for cell in cells:
            if cell.position == wanted:
                return cell
        raise InputError(
            f"position {shown(pos)} was not analysed in prompt {batch}; available: "
            f"{self.positions[batch].tolist()}"
        )

    def cells(self, matrix: str, layer: int, batch: int = 0) -> list[Cell]:
        """The cells of one matrix and layer, in the order of the analysed positions.

        Args:
            matrix: Name of the matrix.
            layer: The layer, negative from the end of the model.
            batch: Which prompt.

        Returns:
            One cell per analysed position.

        Raises:
            InputError: If it was not analysed.

        Examples:
            >>> [(cell.token, cell.target_leads) for cell in result.cells("W_out", layer=6)]
            [('<|endoftext|>', False), ('Li', False), ('onel', False), (' Messi', False), (' plays',
            False), (' for', True)]
        """
        self.readout(matrix)
        number = self.capture.layer_number(layer)
        self._check_prompt(batch)
        return cells_of(self._reader.columns(matrix, number, [int(batch)]))

    @property
    def _reader(self) -> CellReader:
        return CellReader(
            self.capture, self.readings[0], self.positions, self.token_texts, self.vjps_at
        )

    def _first(self, k: int | None) -> int:
        if k is None:
            return self.k
        if not is_index(k, self.k + 1) or k < 1:
            raise InputError(
                f"k is {shown(k)}; {self.k} tokens were kept, and backward_lens(..., k=...) keeps "
                "more"
            )
        return k
