"""The largest singular vectors of a large matrix.

A random subspace is multiplied by `M M^T` until the singular vectors in it satisfy `M v = s u`
(randomised subspace iteration; Halko, Martinsson and Tropp, 2011). Their residual is checked: where
singular values are too close to each other to converge, the dense decomposition is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 512
"""Matrices with a side up to this are decomposed densely, which is as fast."""

_MORE = 16
"""Dimensions of the subspace in addition to twice the number of singular vectors."""

_ITERATIONS = 60
_CLOSE = 1e-9
"""Largest residual, relative to the largest singular value."""


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
    wide = matrix.double()
    found = None
    if 2 * k + _MORE < min(wide.shape) // 2 and min(wide.shape) > _SMALL:
        found = _iterated(wide, k)
    if found is None:
        found = torch.linalg.svd(wide, full_matrices=False)
    u, s, vh = found
    # Smaller values are those of the rounding of the checkpoints' difference.
    n = min(k, int((s > max(wide.shape) * torch.finfo(wide.dtype).eps * s[0]).sum()))
    kept = float((s[:n] / wide.norm()).square().sum())
    return TruncatedSvd(u[:, :n], s[:n], vh[:n], max(0.0, 1.0 - kept))


def _iterated(matrix: Float[Tensor, "m n"], k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The `k` largest by subspace iteration; `None` if they do not converge."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(
        matrix.shape[1],
        2 * k + _MORE,
        generator=generator,
        dtype=matrix.dtype,
        device=matrix.device,
    )
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u, s, vh = basis @ u[:, :k], s[:k], vh[:k]
        if float((matrix @ vh.T - u * s).norm(dim=0).max()) <= _CLOSE * float(s[0]):
            return u, s, vh
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    return None
