"""The product with `W_U`, with a backward pass that keeps its digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_FEW = 16

_COLUMNS = 2048
"""Tokens whose terms are summed in float32; their sums are added in float64."""


def product(
    vectors: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_model d_vocab"]
) -> Float[Tensor, "n d_vocab"]:
    """The product, in the order in which BLAS is faster.

    Args:
        vectors: What the unembedding reads.
        weight: `W_U`.

    Returns:
        The logits, but for a bias and what becomes of them.
    """
    # Transposed is one and a half times as fast on a CPU at 200 vectors and more, and five times
    # slower at two.
    return vectors @ weight if len(vectors) < _FEW else (weight.T @ vectors.T).T


def connected(
    vectors: Float[Tensor, "*rows d_model"],
    logits: Float[Tensor, "*rows d_vocab"],
    weight: Float[Tensor, "d_model d_vocab"],
) -> Float[Tensor, "*rows d_vocab"]:
    """Logits as a function of the vectors that they were made from, for autograd.

    The VJP sums over the vocabulary. A CPU adds up all terms in float32, with a few rows per thread
    one after the other: at 49,152 tokens that loses a digit, and where `p - onehot` is small much
    more. Here it is the sum of short sums.

    Args:
        vectors: What the unembedding reads.
        logits: `vectors @ weight`, and perhaps a bias.
        weight: `W_U`.

    Returns:
        The logits.
    """
    apply: Callable[..., Tensor] = _Connected.apply
    return apply(vectors, logits.detach(), weight.detach())


def needs_digits(vectors: Float[Tensor, "*rows d_model"]) -> bool:
    """Whether the VJP of a product with these vectors is one that would lose digits."""
    is_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    return is_cpu and vectors.requires_grad and torch.is_grad_enabled()


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [weight], [gradient] = ctx.saved_tensors, gradients
        shape = (*gradient.shape[:-1], len(weight))
        total = gradient.new_zeros(shape, dtype=torch.float64)
        some = zip(gradient.split(_COLUMNS, -1), weight.split(_COLUMNS, -1), strict=True)
        for upstream, columns in some:
            total += upstream @ columns.T
        return total.to(gradient.dtype), None, None
