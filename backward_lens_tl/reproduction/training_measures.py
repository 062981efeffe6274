"""How low-rank a change is, and how it relates to the gradient.

With the singular values `s_1 >= s_2 >= ...` of a matrix:

    effective rank   exp(-sum_i p_i log p_i) with p_i = s_i / sum_j s_j   (Roy and Vetterli, 2007)
    stable rank      sum_i s_i^2 / s_1^2                                  (Rudelson and Vershynin)
    energy of k      sum_{i <= k} s_i^2 / sum_i s_i^2, as in figure 4's low-rank statement

All three depend on the matrix's direction only, not on its length. The effective rank of
`TrainingRecord` is another one, `(sum_i s_i^2)^2 / sum_i s_i^4`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.training import change_numbers


def effective_rank(singular_values: Float[Tensor, "n"]) -> float:
    """The exponential of the entropy of singular values that are scaled to sum to one.

    Args:
        singular_values: The values.

    Returns:
        The rank, between 1 and their number; NaN if there are none.
    """
    shares = singular_values / singular_values.sum()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else float("nan")


def stable_rank(singular_values: Float[Tensor, "n"]) -> float:
    """The squared norm in units of the largest squared singular value; NaN if there are none."""
    return 1.0 / energy(singular_values, 1) if len(singular_values) else float("nan")


def energy(singular_values: Float[Tensor, "n"], k: int) -> float:
    """The share of the `k` largest values, in descending order, in the squared norm."""
    squares = singular_values.square()
    return float(squares[:k].sum() / squares.sum()) if len(squares) else float("nan")


def cosine(first: Float[Tensor, "m n"], second: Float[Tensor, "m n"]) -> float:
    """The cosine of two matrices as vectors of all their entries; NaN if one is zero."""
    first, second = first.double(), second.double()
    lengths = float(first.norm() * second.norm())
    return change_numbers.cosine(float((first * second).sum()), lengths)


def share_outside(step: MatrixDelta, gradient: MatrixDelta) -> float:
    """The share of a step that a matrix in the gradient's row and column space cannot have.

    With the singular vectors `U` and `V` of the gradient, it is
    `1 - ||U^T step V||^2 / ||step||^2`: 0 for every step `U C V^T`, such as those of gradient
    descent and of exact orthogonalisation.

    Args:
        step: The step.
        gradient: The gradient of the same matrix.

    Returns:
        The share in the squared norm; NaN for a step of zero.
    """
    u, _, vh = gradient.svd()
    dense = step.dense().double()
    return change_numbers.share_outside(u.T @ dense @ vh.T, float(dense.norm()))
