"""The largest singular vectors of a large matrix.

A random subspace is multiplied by `M M^T` until the singular vectors in it satisfy `M v = s u`
(randomised subspace iteration; Halko, Martinsson and Tropp, 2011). Their residual is checked. Where
it converges too slowly, because singular values are close to each other as in noise, or where the
matrix is small, the eigenvectors of `M M^T` cost less. Squaring loses half of the digits, so they
are used only if the singular values that are asked for are large enough; otherwise the matrix
itself is decomposed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_TINY, _SMALL = 256, 1024
"""Shorter sides up to which the matrix itself, or `M M^T`, is decomposed at once."""

_MORE = 16
"""Dimensions of the subspace in addition to twice the number of singular vectors."""

_CLOSE = 1e-9
"""Largest residual, relative to the largest singular value."""

_SETTLED = 3
"""Iterations after which the residual decreases by about the same factor each time."""

_SQUARED = 1e-3
"""Smallest singular value, relative to the largest, that `M M^T` has to ten digits."""


class TruncatedSvd(NamedTuple):
    """The largest terms of a singular value decomposition, in float64.

    Attributes:
        u: Left singular vectors, as columns.
        s: Singular values, largest first.
        vh: Right singular vectors, as rows.
        discarded: The share of the terms that are left out in the squared norm.
    """

    u: Float[Tensor, "m k"]
    s: Float[Tensor, "k"]
    vh: Float[Tensor, "k n"]
    discarded: float


def truncated_svd(matrix: Float[Tensor, "m n"], k: int) -> TruncatedSvd:
    """Compute the largest singular values and vectors.

    Args:
        matrix: The matrix, which is not zero.
        k: Their number; fewer if the matrix has fewer that are above rounding.

    Returns:
        The decomposition.
    """
    exact = matrix.double()
    is_tall = exact.shape[0] > exact.shape[1]
    u, s, vh = _largest(exact.T if is_tall else exact, k)
    if is_tall:
        u, vh = vh.T, u.T
    # Smaller values are those of the rounding of the checkpoints' difference.
    n = min(k, int((s > max(exact.shape) * torch.finfo(exact.dtype).eps * s[0]).sum()))
    kept = float((s[:n] / exact.norm()).square().sum())
    return TruncatedSvd(u[:, :n], s[:n], vh[:n], max(0.0, 1.0 - kept))


_Terms = tuple[Float[Tensor, "m k"], Float[Tensor, "k"], Float[Tensor, "k n"]]


def _largest(wide: Float[Tensor, "m n"], k: int) -> _Terms:
    """At least the `k` largest terms, or all, the cheapest way."""
    side = len(wide)
    found = None
    if side > _SMALL and 2 * k + _MORE < side // 2:
        found = _iterated(wide, k)
    if found is None and side > _TINY:
        found = _squared(wide, k)
    return torch.linalg.svd(wide, full_matrices=False) if found is None else found


def _iterated(matrix: Float[Tensor, "m n"], k: int) -> _Terms | None:
    """The `k` largest by subspace iteration; `None` if `M M^T` costs less."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(
        matrix.shape[1],
        2 * k + _MORE,
        generator=generator,
        dtype=matrix.dtype,
        device=matrix.device,
    )
    basis = torch.linalg.qr(matrix @ start).Q
    limit = len(matrix) // (2 * basis.shape[1])  # they cost as much as M M^T
    previous = math.inf
    for done in range(1, limit + 1):
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u, s, vh = basis @ u[:, :k], s[:k], vh[:k]
        residual = float((matrix @ vh.T - u * s).norm(dim=0).max())
        bound = _CLOSE * float(s[0])
        if residual <= bound:
            return u, s, vh
        if done > _SETTLED and done + _more(residual, previous, bound) > limit:
            break
        previous = residual
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    return None


def _more(residual: float, previous: float, bound: float) -> float:
    """Iterations until the residual is small enough, if it keeps on decreasing by one factor."""
    if residual >= previous:
        return math.inf
    return math.log(bound / residual) / math.log(residual / previous)


def _squared(matrix: Float[Tensor, "m n"], k: int) -> _Terms | None:
    """The `k` largest from the eigenvectors of `M M^T`; `None` if some of them are too small."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    s, u = squares[-k:].flip(0).clamp(min=0).sqrt(), vectors[:, -k:].flip(1)
    if s[-1] < _SQUARED * s[0]:
        return None
    return u, s, (u.T @ matrix) / s[:, None]
