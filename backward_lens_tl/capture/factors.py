"""The two factors of a weight matrix's gradient, for each prompt, head and expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl._checks import check_index
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import READING_MATRICES, MatrixName

_Own = TypeVar("_Own", bound="Factors")


@dataclass(frozen=True, repr=False)
class Factors:
    """The inputs `x_i` and VJPs `delta_i` of one weight matrix; see `MatrixGradient`."""

    matrix: MatrixName
    layer: int
    inputs: Float[Tensor, "batch pos *head d_in"]
    vjps: Float[Tensor, "batch pos *head_ d_out"]
    mask: Bool[Tensor, "batch pos"]
    experts: Int[Tensor, "batch pos slot"] | None = None
    n_experts: int | None = None
    joined_vjps: Float[Tensor, "batch pos d_model"] | None = None
    input_hook: str | None = None
    output_hook: str | None = None

    def __repr__(self) -> str:
        inputs, vjps = list(self.inputs.shape), list(self.vjps.shape)
        experts = "" if self.n_experts is None else f", {self.n_experts} experts"
        name = f"{self.matrix} of layer {self.layer}"
        return f"{type(self).__name__}({name}, x {inputs}, delta {vjps}{experts})"

    @property
    def reads_residual(self) -> bool:
        """Whether the matrix reads the residual stream; otherwise it writes to it."""
        return self.matrix in READING_MATRICES

    @property
    def spanning_set(self) -> Float[Tensor, "batch pos d_model"]:
        """The factor of width `d_model`: `x_i` of matrices that read the stream, else `delta_i`.

        Every neuron of the gradient, of every head, is a combination of these vectors (paper,
        section 4.2). The experts of one token get the same `delta_i` times the router's weight;
        theirs are summed.

        Raises:
            InputError: If heads, or experts, read or write different vectors.
        """
        factor = self.inputs if self.reads_residual else self.vjps
        if factor.ndim == 3:
            return factor
        if self.experts is not None and not self.reads_residual:
            return factor.sum(2)
        raise InputError(
            f"the {self._part}s of {self.matrix} in layer {self.layer} differ at the residual "
            f"stream, as under a patch; select one with .{self._part}(index)"
        )

    @property
    def resid_vjps(self) -> Float[Tensor, "batch pos d_model"]:
        """The VJPs where the output of a writing matrix is added to the residual stream.

        They equal `vjps` unless a norm, a scale, a router or a caller's hook comes in between.
        `-resid_vjps` is the direction in which gradient descent wants to change the stream; `-vjps`
        is what a step adds to the matrix's own output, before the norm.

        Raises:
            InputError: If the matrix reads the residual stream.
        """
        if self.reads_residual:
            raise InputError(
                f"{self.matrix} reads the residual stream and does not write to it; W_O and W_out "
                "have resid_vjps"
            )
        return self.spanning_set if self.joined_vjps is None else self.joined_vjps

    @cached_property
    def norms(self) -> Float[Tensor, "batch pos"]:
        """`||delta_i||_2`, how strongly each position writes; the color of the paper's tables.

        Over all heads, or all of a token's experts.
        """
        return _norms(self.vjps)

    @cached_property
    def input_norms(self) -> Float[Tensor, "batch pos"]:
        """`||x_i||_2`, over all heads, or all of a token's experts."""
        return _norms(self.inputs)

    @cached_property
    def write_norms(self) -> Float[Tensor, "batch pos"]:
        """`||x_i|| ||delta_i||`, the Frobenius norm of the term that each position writes.

        The gradient is the sum of the terms `x_i^T delta_i`. If both factors are divided into
        heads, or into a token's experts, each has a block of its own, and the norm is over all
        blocks.
        """
        inputs, vjps = (
            _norms(factor if factor.ndim == 4 else factor[:, :, None], start=3)
            for factor in (self.inputs, self.vjps)
        )
        norms: Tensor = torch.linalg.vector_norm(inputs * vjps, dim=-1)
        return norms

    @cached_property
    def is_zero(self) -> Bool[Tensor, "batch pos"]:
        """Positions that add nothing to the gradient, because `x_i` or `delta_i` is zero.

        With a loss on the last position alone, these are all other positions of the last layer
        (paper, appendix A). Padding is zero too.
        """
        no_input, no_vjp = (
            (factor if factor.ndim == 4 else factor[:, :, None]).eq(0).all(-1)
            for factor in (self.inputs, self.vjps)
        )
        return (no_input | no_vjp).all(-1)

    @property
    def n_heads(self) -> int | None:
        """Number of heads that the matrix is divided into, or `None`."""
        if self.experts is not None or self.inputs.ndim + self.vjps.ndim == 6:
            return None
        return max(factor.shape[2] for factor in (self.inputs, self.vjps) if factor.ndim == 4)

    def head(self: _Own, index: int) -> _Own:
        """The gradient of one head of an attention matrix.

        Args:
            index: The head, from 0; a key-value head for `W_K` and `W_V`.

        Returns:
            The gradient, without an axis for heads.

        Raises:
            InputError: If there is no such head.

        Examples:
            >>> prompt, loss = "Lionel Messi plays for", blt.target_nll(" Paris")
            >>> capture = blt.capture_gradients(model, prompt, loss, matrices="W_Q")
            >>> capture["W_Q", 5].n_heads
            4
            >>> capture["W_Q", 5].head(2)
            MatrixGradient(W_Q of layer 5, x [1, 6, 128], delta [1, 6, 32])
        """
        if self.n_heads is None:
            raise InputError(f"{self.matrix} of layer {self.layer} is not divided into heads")
        check_index("head", index, self.n_heads)
        inputs, vjps = (
            factor[:, :, index] if factor.ndim == 4 else factor
            for factor in (self.inputs, self.vjps)
        )
        return replace(self, inputs=inputs, vjps=vjps, input_hook=None, output_hook=None)

    def expert(self: _Own, index: int) -> _Own:
        """The gradient of one expert's matrix.

        Args:
            index: The expert, from 0.

        Returns:
            The gradient, without an axis for slots; `mask` is True only at tokens that were routed
            to the expert.

        Raises:
            InputError: If there is no such expert.

        Examples:
            >>> gradient = blt.MatrixGradient(
            ...     "W_out",
            ...     layer=0,
            ...     inputs=torch.ones(1, 3, 1, 8),  # [batch, pos, slot, d_in]
            ...     vjps=torch.ones(1, 3, 4),  # [batch, pos, d_out]
            ...     mask=torch.ones(1, 3, dtype=torch.bool),
            ...     experts=torch.tensor([[[0], [1], [1]]]),
            ...     n_experts=2,
            ... )
            >>> gradient.expert(1).mask.tolist()
            [[False, True, True]]
        """
        if self.experts is None or self.n_experts is None:
            raise InputError(f"{self.matrix} of layer {self.layer} has no experts")
        check_index("expert", index, self.n_experts)
        routed = self.experts == index
        here = routed.any(-1)
        elsewhere = ~here[..., None]
        inputs = self.inputs
        if inputs.ndim == 4:
            slot = routed.int().argmax(-1)[..., None, None]
            inputs = inputs.take_along_dim(slot, 2)[:, :, 0]
        vjps = self.vjps if self.vjps.ndim == 4 else self.vjps.unsqueeze(2)
        joined = self.joined_vjps
        return replace(
            self,
            inputs=inputs.masked_fill(elsewhere, 0),
            # An expert that a token is routed to twice reads the same vector both times.
            vjps=vjps.masked_fill(~routed[..., None], 0).sum(2),
            mask=here,
            experts=None,
            n_experts=None,
            joined_vjps=None if joined is None else joined.masked_fill(elsewhere, 0),
        )

    def total(self: _Own) -> _Own:
        """The gradient of the batch's summed loss, still as factors.

        `sum_b X_b^T Delta_b` is one product `X^T Delta` whose rows are the positions of all
        prompts. The mean loss of `n` prompts has this gradient divided by `n`.

        Returns:
            The gradient with one prompt, whose positions are the real ones of all prompts in
            order. It is a copy of the factors.

        Examples:
            >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
            >>> both = blt.capture_gradients(model, prompts, blt.target_nll(" Paris"))["W_out", 6]
            >>> both.total()
            MatrixGradient(W_out of layer 6, x [1, 12, 512], delta [1, 12, 128])
            >>> torch.allclose(both.total().dense(), both.dense(0) + both.dense(1), atol=1e-6)
            True
        """
        real, experts, joined = self.mask, self.experts, self.joined_vjps
        return replace(
            self,
            inputs=self.inputs[real][None],
            vjps=self.vjps[real][None],
            mask=real[real][None],
            experts=None if experts is None else experts[real][None],
            joined_vjps=None if joined is None else joined[real][None],
            input_hook=None,
            output_hook=None,
        )

    @property
    def has_joint_factors(self) -> bool:
        """Whether all heads share one pair of factors; False for experts and heads that differ."""
        return self.experts is None and self.inputs.ndim + self.vjps.ndim < 8

    @property
    def _part(self) -> str:
        return "head" if self.experts is None else "expert"

    def _real(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n *head d_in"], Float[Tensor, "n *head_ d_out"]]:
        prompt = self._prompt(batch)
        real = self.mask[prompt]
        inputs, vjps = self.inputs[prompt, real], self.vjps[prompt, real]
        return at_least_float32(inputs), at_least_float32(vjps)

    def _prompt(self, batch: int | None) -> int:
        if batch is None and len(self.mask) > 1:
            raise InputError(
                f"batch is None, but there are {len(self.mask)} prompts, each with its own "
                "gradient; select one, as in gradient.dense(batch=0), or use gradient.total(), "
                "the gradient of their summed loss"
            )
        prompt = 0 if batch is None else batch
        check_index("prompt", prompt, len(self.mask))
        return prompt

    def _joined(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Both factors, with heads concatenated."""
        if not self.has_joint_factors:
            raise InputError(
                f"each {self._part} of {self.matrix} in layer {self.layer} has its own factors; "
                f"select one with .{self._part}(index)"
            )
        inputs, vjps = self._real(batch)
        return inputs.flatten(1), vjps.flatten(1)


def _norms(
    factor: Float[Tensor, "batch pos *parts d"], start: int = 2
) -> Float[Tensor, "batch pos *part"]:
    """Norms over all axes from `start`."""
    norms: Tensor = torch.linalg.vector_norm(at_least_float32(factor.flatten(start)), dim=-1)
    return norms
