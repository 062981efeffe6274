"""Gradients of weight matrices, kept as their two factors.

For `y = x @ W + b` and a loss read from one forward pass of `n` positions,

    dL/dW = sum_i x_i^T delta_i = X^T Delta,   X: [n, d_in],   Delta: [n, d_out]

where `delta_i = dL/dy_i` is the vector-Jacobian product (VJP) at position `i` (paper, equation 8).
The rank is at most `n` (lemma 4.1), so everything about the gradient follows from the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from backward_lens_tl.errors import InputError
from backward_lens_tl.sites import READING_MATRICES, MatrixName


@dataclass(frozen=True, repr=False)
class MatrixGradient:
    """The gradient of one weight matrix for each prompt of a batch, as factors.

    Signs are those of the raw gradient: gradient descent *subtracts* it. Padded positions hold
    zeros.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        inputs: `x_i`, what the matrix reads.
        vjps: `delta_i`, the gradient of the prompt's loss at the matrix's own output.
        mask: False at padding.
    """

    matrix: MatrixName
    layer: int
    inputs: Float[Tensor, "batch pos d_in"]
    vjps: Float[Tensor, "batch pos d_out"]
    mask: Bool[Tensor, "batch pos"]

    def __repr__(self) -> str:
        inputs, vjps = list(self.inputs.shape), list(self.vjps.shape)
        return f"MatrixGradient({self.matrix} of layer {self.layer}, x {inputs}, delta {vjps})"

    @property
    def spanning_set(self) -> Float[Tensor, "batch pos d_model"]:
        """The factor of the residual stream's width: `x_i` of `W_in` and `W_gate`, else `delta_i`.

        Every neuron of the gradient is a combination of these vectors (paper, section 4.2).
        """
        return self.inputs if self.matrix in READING_MATRICES else self.vjps

    @cached_property
    def norms(self) -> Float[Tensor, "batch pos"]:
        """`||delta_i||_2`, how strongly each position writes; the colour of the paper's tables."""
        norms: Tensor = torch.linalg.vector_norm(self.vjps, dim=-1)
        return norms

    @cached_property
    def is_zero(self) -> Bool[Tensor, "batch pos"]:
        """Where a position adds nothing to the gradient, because `x_i` or `delta_i` is zero.

        With a loss on the last position alone this is every other position of the last layer
        (paper, appendix A). Padding is zero as well.
        """
        return (self.inputs == 0).all(-1) | (self.vjps == 0).all(-1)

    def factored(self, batch: int = 0) -> FactoredMatrix:
        """The gradient of one prompt as TransformerLens's `FactoredMatrix`.

        Args:
            batch: Which prompt.

        Returns:
            `A @ B` with `A = X^T`, `[d_in, n]`, and `B = Delta`, `[n, d_out]`; `n` is the
            prompt's own length.
        """
        inputs, vjps = self._real(batch)
        return FactoredMatrix(inputs.T, vjps)

    def dense(self, batch: int = 0) -> Float[Tensor, "d_in d_out"]:
        """The gradient of one prompt as a matrix.

        This is the only method that allocates `d_in * d_out` numbers: 9.4 MB for a matrix of
        GPT-2 small in float32, 41 MB for GPT-2 xl.

        Args:
            batch: Which prompt.

        Returns:
            `X^T Delta`.
        """
        inputs, vjps = self._real(batch)
        return einsum(inputs, vjps, "pos d_in, pos d_out -> d_in d_out")

    def neuron(self, index: int, batch: int = 0) -> Float[Tensor, "d_model"]:
        """One neuron of the gradient: the vector of width `d_model` that one hidden unit receives.

        Args:
            index: The hidden unit, from 0 to `d_mlp - 1`.
            batch: Which prompt.

        Returns:
            For index `j`, column `j` of the gradient of `W_in` or `W_gate`, `sum_i delta_i[j] x_i`
            (paper, equation 9), or row `j` of that of `W_out`, `sum_i x_i[j] delta_i`
            (equation 10).

        Raises:
            InputError: If there is no such hidden unit.
        """
        inputs, vjps = self._real(batch)
        coefficients, vectors = (
            (vjps, inputs) if self.matrix in READING_MATRICES else (inputs, vjps)
        )
        if not isinstance(index, int) or not 0 <= index < coefficients.shape[1]:
            raise InputError(
                f"neuron {index!r} does not exist; allowed are 0 to {coefficients.shape[1] - 1}"
            )
        return einsum(coefficients[:, index], vectors, "pos, pos d_model -> d_model")

    def singular_values(self, batch: int = 0) -> Float[Tensor, "rank_bound"]:
        """Singular values of one prompt's gradient, largest first.

        With the QR factorisations `X^T = Q_x R_x` and `Delta^T = Q_d R_d` they are those of the
        core `R_x R_d^T`, which is at most `n x n`. Computed in float64.

        Args:
            batch: Which prompt.

        Returns:
            The `min(n, d_in, d_out)` values that can differ from zero.
        """
        core_in, core_out = (torch.linalg.qr(factor.double().T).R for factor in self._real(batch))
        values: Tensor = torch.linalg.svdvals(core_in @ core_out.T)
        return values

    def rank(self, batch: int = 0) -> int:
        """Rank of one prompt's gradient.

        Args:
            batch: Which prompt.

        Returns:
            The number of singular values above numpy's default tolerance for the full matrix,
            `S.max() * max(d_in, d_out) * eps` with float64's `eps`.
        """
        values = self.singular_values(batch)
        largest_side = max(self.inputs.shape[-1], self.vjps.shape[-1])
        tolerance = values.max() * largest_side * torch.finfo(values.dtype).eps
        return int((values > tolerance).sum())

    def _real(self, batch: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        if not 0 <= batch < len(self.mask):
            raise InputError(
                f"prompt {batch!r} does not exist; allowed are 0 to {len(self.mask) - 1}"
            )
        real = self.mask[batch]
        return self.inputs[batch, real], self.vjps[batch, real]


@dataclass(frozen=True, repr=False)
class GradientCapture:
    """The gradients of several weight matrices from one forward and backward pass.

    `capture["W_out", 5]` is one of them; iterating goes through all in model order.

    Attributes:
        gradients: By matrix and layer, in model order.
        tokens: Token ids, continuations included, 0 at padding.
        mask: False at padding, which is on the right.
        str_tokens: Text of each real token of each prompt.
        loss: Loss of each prompt.
        targets: The token that readouts are compared with, if the objective has one.
        objective: How the objective was made.
        model_name: The model's name.
    """

    gradients: Mapping[tuple[str, int], MatrixGradient]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    str_tokens: tuple[tuple[str, ...], ...]
    loss: Float[Tensor, "batch"]
    targets: Int[Tensor, "batch"] | None
    objective: str
    model_name: str

    def __getitem__(self, key: tuple[str, int]) -> MatrixGradient:
        if key in self.gradients:
            return self.gradients[key]
        raise InputError(
            f"{key!r} was not captured; there are {', '.join(self.matrices)} in layers "
            f"{', '.join(map(str, self.layers))}"
        )

    def __iter__(self) -> Iterator[MatrixGradient]:
        return iter(self.gradients.values())

    def __len__(self) -> int:
        return len(self.gradients)

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the captured matrices, in the order in which a layer uses them."""
        return tuple(dict.fromkeys(gradient.matrix for gradient in self))

    @property
    def layers(self) -> tuple[int, ...]:
        """The captured layers, ascending."""
        return tuple(dict.fromkeys(gradient.layer for gradient in self))

    def __repr__(self) -> str:
        return (
            f"GradientCapture({', '.join(self.matrices)} of layers "
            f"{self.layers[0]} to {self.layers[-1]}, {len(self.mask)} prompts of up to "
            f"{self.mask.shape[1]} tokens, {self.objective}, model {self.model_name!r})"
        )
