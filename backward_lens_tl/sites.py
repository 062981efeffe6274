"""Weight matrices, and where each meets its input and its output in a forward pass.

The places are the matrix's *own* input and output. Three hook points look right and are not:
`ln2.hook_normalized` (before the norm's gain and bias), `hook_mlp_in` (before the norm, and only
with `use_hook_mlp_in`), and `hook_mlp_out` on models that normalise the MLP's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

MatrixName = Literal["W_in", "W_gate", "W_out"]
MATRIX_NAMES: tuple[MatrixName, ...] = get_args(MatrixName)
"""Every matrix that can be asked for, in the order in which a layer uses them."""

READING_MATRICES = frozenset({"W_in", "W_gate"})
"""Matrices that read the residual stream: their inputs have width `d_model`."""


@dataclass(frozen=True)
class Tap:
    """A place in the forward pass: a module's first input, or its output."""

    module: nn.Module
    side: Literal["input", "output"]


@dataclass(frozen=True)
class MatrixSite:
    """Where one weight matrix of one layer meets its input and its output.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        input: Where `x` passes, `[batch, pos, d_in]`, after every edit by the caller's hooks.
        output: Where `y = x @ W + b` passes, `[batch, pos, d_out]`, before any such edit.
        weight: The stored parameter.
        transposed: Whether the parameter is stored as `[d_out, d_in]`.
    """

    matrix: MatrixName
    layer: int
    input: Tap
    output: Tap
    weight: Tensor
    transposed: bool

    def in_out(self, tensor: Float[Tensor, "rows columns"]) -> Float[Tensor, "d_in d_out"]:
        """Turn a tensor laid out like the parameter into TransformerLens's `[d_in, d_out]`."""
        return tensor.T if self.transposed else tensor
