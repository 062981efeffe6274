"""The factors of a gradient with the fields of TransformerLens's own tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

WeightLayout = Literal["in_out", "out_in"]
"""Which axis of a stored weight is the input axis."""


@dataclass(frozen=True)
class LinearGradientFactors:
    """The gradient of one weight matrix, `X^T Delta`, as its factors.

    Attributes:
        forward_inputs: `x_i`, the inputs of the matrix.
        output_gradients: `delta_i`, the gradient of the loss at the output of the matrix.
        weight_layout: `"in_out"`, TransformerLens's orientation, on every model.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> found = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [6])
        >>> factors = found.layer(6).output_projection.factors
        >>> factors.forward_inputs.shape, factors.output_gradients.shape
        (torch.Size([6, 512]), torch.Size([6, 128]))
        >>> factors.relative_reconstruction_error < 1e-5
        True
    """

    forward_inputs: Float[Tensor, "pos d_in"]
    output_gradients: Float[Tensor, "pos d_out"]
    _by_autograd: Callable[[], Float[Tensor, "d_in d_out"]] = field(repr=False, compare=False)
    weight_layout: ClassVar[WeightLayout] = "in_out"

    @cached_property
    def weight_gradient(self) -> Float[Tensor, "d_in d_out"]:
        """Autograd's own weight gradient, on the model as it is at the first access."""
        return self._by_autograd()

    @cached_property
    def reconstructed_gradient(self) -> Float[Tensor, "d_in d_out"]:
        """`X^T Delta`, a `d_in x d_out` matrix that is computed on first access."""
        return einsum(
            self.forward_inputs, self.output_gradients, "pos d_in, pos d_out -> d_in d_out"
        )

    @cached_property
    def absolute_reconstruction_error(self) -> float:
        """The largest difference between entries of the two gradients."""
        return float((self.reconstructed_gradient - self.weight_gradient).abs().max())

    @cached_property
    def relative_reconstruction_error(self) -> float:
        """Frobenius norm of the difference, relative to the larger of the two gradients' norms."""
        ours, autograd = self.reconstructed_gradient, self.weight_gradient
        # The eps of float32 keeps it finite if both are zero.
        scale = max(float(ours.norm()), float(autograd.norm()), torch.finfo(torch.float32).eps)
        return float((ours - autograd).norm()) / scale
