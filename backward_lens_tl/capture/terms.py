"""The terms `x^T delta` that the gradients of a batch are sums of, in blocks.

A matrix with heads is one matrix if its heads share a factor, and otherwise one matrix per head;
each expert is a matrix of its own. Terms of different matrices are orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.capture.factors import Factors
from backward_lens_tl.models.precision import at_least_float32


@dataclass(frozen=True)
class Block:
    """Some of the terms of one matrix.

    Attributes:
        prompts: The prompt of each term, ascending.
        inputs: `x` of each term.
        vjps: `delta` of each term, divided by its prompt's scale.
        scales: The scale of each prompt in `among`.
    """

    prompts: Int[Tensor, "n"]
    inputs: Float[Tensor, "n d_in"]
    vjps: Float[Tensor, "n d_out"]
    scales: Float[Tensor, "some"]

    @property
    def among(self) -> range:
        """The prompts from that of the first term to that of the last one."""
        return range(int(self.prompts[0]), int(self.prompts[-1]) + 1)


@dataclass(frozen=True)
class Terms:
    """The terms of one matrix that are not zero, in the order of their prompts.

    Attributes:
        gradient: The gradients that they belong to.
        prompts: The prompt of each term, ascending.
        inputs_at: Where `x` of each term is in the inputs, an index per leading axis.
        vjps_at: Where `delta` of each term is in the VJPs.
        scales: The largest entry of each prompt's VJPs.
    """

    gradient: Factors
    prompts: Int[Tensor, "n"]
    inputs_at: tuple[Tensor, ...]
    vjps_at: tuple[Tensor, ...]
    scales: Float[Tensor, "batch"]

    def blocks(
        self, size: int, dtype: torch.dtype, device: torch.device, first: int = 0
    ) -> Iterator[Block]:
        """The terms in blocks.

        Args:
            size: Number of terms in each block but the last one.
            dtype: The dtype of the blocks.
            device: Their device.
            first: The first block.

        Yields:
            The blocks from the first one on.
        """
        for start in range(first * size, len(self.prompts), size):
            here = slice(start, start + size)
            prompts = self.prompts[here]
            # A product of two VJPs of confident predictions may be too small for float32.
            vjps = _taken(self.gradient.vjps, self.vjps_at, here) / self.scales[prompts, None]
            inputs = _taken(self.gradient.inputs, self.inputs_at, here)
            own = self.scales[int(prompts[0]) : int(prompts[-1]) + 1]
            yield Block(
                prompts.to(device),
                inputs.to(device, dtype),
                vjps.to(device, dtype),
                own.to(device, torch.float64),
            )


def terms_by_matrix(gradient: Factors, *, by_head: bool) -> list[Terms]:
    """The terms of each matrix that the gradient of a weight consists of.

    Args:
        gradient: The gradients of a batch.
        by_head: Whether to divide a matrix into its heads, even if they share a factor.

    Returns:
        The terms of the whole matrix, or of each head or expert.
    """
    scales = _scales(gradient)
    adds = gradient.mask & ~gradient.is_zero
    if gradient.experts is not None:
        parts = [
            ((gradient.experts == expert) & adds[..., None]).nonzero(as_tuple=True)
            for expert in range(gradient.n_experts or 0)
        ]
    else:
        at = adds.nonzero(as_tuple=True)
        heads = range(gradient.n_heads or 0) if by_head else ()
        parts = [(*at, torch.full_like(at[0], head)) for head in heads] or [at]
    # A factor without an axis for heads or slots is the same for all of them.
    axes = [factor.ndim - 1 for factor in (gradient.inputs, gradient.vjps)]
    return [Terms(gradient, at[0], at[: axes[0]], at[: axes[1]], scales) for at in parts]


def _taken(
    factor: Float[Tensor, "batch pos *part d"], at: tuple[Tensor, ...], terms: slice
) -> Float[Tensor, "n d_joined"]:
    return at_least_float32(factor[tuple(each[terms] for each in at)].flatten(1))


def _scales(gradient: Factors) -> Float[Tensor, "batch"]:
    """The largest entry of each prompt's VJPs; 1 if they are zero."""
    vjps = gradient.vjps.flatten(1)
    largest = at_least_float32(torch.maximum(vjps.amax(1), -vjps.amin(1)))  # without a copy
    return torch.where(largest > 0, largest, torch.ones_like(largest))
