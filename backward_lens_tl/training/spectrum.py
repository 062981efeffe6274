"""The main directions of the gradient of many positions, without decomposing all of them.

With the Gram matrices `A = X X^T` and `B = Delta Delta^T`, the gradient `G = X^T Delta` has

    ||G||^2 = tr(A B),   sum of s^4 = tr(A B A B),   u = X^T B c / s,   v = Delta^T c

where `A B c = s^2 c` and `c^T B c = 1`. The largest `s` are found by subspace iteration, whose
products are with a few vectors only. Where it does not converge, or a direction is too small for
the squares that it works with, all of the gradient is decomposed.

More positions than the matrix is wide or high would make `A` and `B` larger than the gradient. Then
`G` itself is built, and `A` is `G^T G` or `G G^T`, whichever is smaller, with the identity as `B`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.directions import PrincipalDirections
from backward_lens_tl.training.step_gradient import WatchedGradient

_FEW = 64
"""Positions that are decomposed faster than their Gram matrices are iterated on."""

_AT_ONCE = 1024
"""Positions whose factors are converted to float64 together."""

_EXTRA = 8
"""Vectors that are iterated on in addition to those that are wanted; they speed up convergence."""

_ITERATIONS = 60

_PRECISION = 1e-9
"""Largest residual of `s^2`, relative to the largest one."""

_SMALLEST = 1e-8
"""Smallest `s^2`, relative to the largest one, whose direction is known to about 1e-6."""


@dataclass(frozen=True)
class Spectrum:
    """What a record keeps of the singular values and vectors of a gradient.

    Attributes:
        norm: Frobenius norm.
        effective_rank: `(sum of s^2)^2 / (sum of s^4)`.
        energy: Shares of the first directions in the squared norm.
        resid: Their sides of width `d_model`, with the sign of `PrincipalDirections`.
    """

    norm: float
    effective_rank: float
    energy: list[float]
    resid: Float[Tensor, "k d_model"]


def spectrum_of(main: PrincipalDirections, k: int) -> Spectrum:
    """Summarise a whole decomposition.

    Args:
        main: All directions of a gradient.
        k: Number of directions to keep.

    Returns:
        The summary.
    """
    squares = main.values.square()
    total = float(squares.sum())
    rank = total**2 / float(squares.square().sum()) if total else 0.0
    return Spectrum(math.sqrt(total), rank, main.energy[:k].tolist(), main.resid[:k])


def leading_spectrum(gradient: WatchedGradient, k: int) -> Spectrum:
    """Find the first directions of a gradient.

    Takes a few matrices of float64 that are no larger than `n x n`, and no larger than
    `d_in x d_out`.

    Args:
        gradient: The gradient, with finite factors.
        k: Number of directions.

    Returns:
        The summary, as of a whole decomposition.
    """
    inputs, vjps = (factor[0].flatten(1) for factor in (gradient.inputs, gradient.vjps))
    n = len(inputs)
    found = None
    if n > max(_FEW, min(inputs.shape[1], vjps.shape[1])):
        found = _of_matrix(inputs, vjps, k, gradient.reads_residual)
    elif n > _FEW:
        found = _of_factors(inputs.double(), vjps.double(), k, gradient.reads_residual)
    return found or spectrum_of(gradient.principal_directions(n), k)


def _of_factors(
    inputs: Float[Tensor, "n d_in"], vjps: Float[Tensor, "n d_out"], k: int, reads_residual: bool
) -> Spectrum | None:
    """By subspace iteration on the Gram matrices; `None` if it does not converge."""
    gram_in, gram_out = inputs @ inputs.T, vjps @ vjps.T
    total = float((gram_in * gram_out).sum())
    pairs = _eigenpairs(gram_in, gram_out, k) if total > 0 else None
    if pairs is None:
        return None
    squares, c = pairs
    product = gram_in @ gram_out
    across = gram_out @ c
    along = gram_in @ across / squares.sqrt()
    resid = inputs.T @ across / squares.sqrt() if reads_residual else vjps.T @ c
    fourth = float((product * product.T).sum())
    return _spectrum(squares, total, fourth, resid * _signs(along, across))


def _of_matrix(
    inputs: Float[Tensor, "n d_in"], vjps: Float[Tensor, "n d_out"], k: int, reads_residual: bool
) -> Spectrum | None:
    """By subspace iteration on the product of the gradient with itself; `None` as above."""
    matrix = inputs.new_zeros(inputs.shape[1], vjps.shape[1], dtype=torch.float64)
    for x, delta in zip(inputs.split(_AT_ONCE), vjps.split(_AT_ONCE), strict=True):
        matrix += x.double().T @ delta.double()
    is_wide = matrix.shape[0] < matrix.shape[1]
    gram = matrix @ matrix.T if is_wide else matrix.T @ matrix
    total = float(gram.trace())
    pairs = _eigenpairs(gram, torch.eye(len(gram)).to(gram), k) if total > 0 else None
    if pairs is None:
        return None
    squares, own = pairs
    other = (matrix.T if is_wide else matrix) @ own / squares.sqrt()
    u, v = (own, other) if is_wide else (other, own)
    along, across = (
        torch.cat([rows.double() @ vectors for rows in factor.split(_AT_ONCE)])
        for factor, vectors in ((inputs, u), (vjps, v))
    )
    resid = u if reads_residual else v
    return _spectrum(squares, total, float(gram.square().sum()), resid * _signs(along, across))


def _signs(along: Float[Tensor, "n k"], across: Float[Tensor, "n k"]) -> Float[Tensor, "1 k"]:
    """Those for which both factors are positive at the position that contributes most."""
    at = (along * across).argmax(0, keepdim=True)
    return across.take_along_dim(at, 0).sign()


def _spectrum(
    squares: Float[Tensor, "k"], total: float, fourth: float, resid: Float[Tensor, "d_model k"]
) -> Spectrum:
    """From the largest `s^2`, and the sums of all `s^2` and `s^4`."""
    return Spectrum(math.sqrt(total), total**2 / fourth, (squares / total).tolist(), resid.T)


def _eigenpairs(
    gram_in: Float[Tensor, "n n"], gram_out: Float[Tensor, "n n"], k: int
) -> tuple[Float[Tensor, "k"], Float[Tensor, "n k"]] | None:
    """The largest `s^2` and their `c`; `None` if they are not found."""
    n = len(gram_in)
    generator = torch.Generator().manual_seed(0)  # not the training's
    start = torch.randn(n, min(k + _EXTRA, n), generator=generator, dtype=torch.float64)
    span = start.to(gram_in.device)
    for _ in range(_ITERATIONS):
        span = torch.nn.functional.normalize(span, dim=0)
        across = gram_out @ span
        along = gram_in @ across  # A B span
        # Rayleigh and Ritz: the eigenvectors within the span, in the metric B.
        lengths, axes = torch.linalg.eigh(span.T @ across)
        is_real = lengths > _SMALLEST * lengths[-1]
        axes = axes[:, is_real] / lengths[is_real].sqrt()
        squares, turned = torch.linalg.eigh(axes.T @ (across.T @ along) @ axes)
        axes = (axes @ turned).flip(1)
        squares, c, next_span = squares.flip(0), span @ axes, along @ axes
        if len(squares) < k or not float(squares[k - 1]) > _SMALLEST * float(squares[0]):
            return None
        rest = next_span[:, :k] - c[:, :k] * squares[:k]
        residual = (rest * (gram_out @ rest)).sum(0).clamp_min(0).sqrt()
        if bool((residual < _PRECISION * squares[0]).all()):
            return squares[:k], c[:, :k]
        span = next_span
    return None
