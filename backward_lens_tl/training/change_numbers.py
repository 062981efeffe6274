"""The optimizer's change of a matrix, compared with the gradient of the step.

With the singular value decomposition `G = U^T S V` of the gradient, whose rows `u_j` and `v_j` span
its column and row spaces, and the core `C = U dW V^T`, the inner product with the gradient is
`sum_j s_j C_jj`, and the part of the change inside both spaces has the norm of `C`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.directions import PrincipalDirections, numerical_rank
from backward_lens_tl.training.step_gradient import WatchedGradient
from backward_lens_tl.training.weight_change import WeightChange


@dataclass(frozen=True)
class ChangeNumbers:
    """How a change compares with the gradient.

    Attributes:
        norm: Frobenius norm of the change.
        cosine: Cosine between the change and minus the gradient; NaN if one of them is zero. It is
            1 for plain SGD on the matrix itself, up to the digits of the weights.
        outside: Share of the change's squared norm outside the gradient's column and row spaces;
            NaN if nothing changed.
        written: What the change writes in its first singular direction, on the side of width
            `d_model`; no row if nothing changed.
    """

    norm: float
    cosine: float
    outside: float
    written: Float[Tensor, "n d_model"]


def compare_change(
    change: WeightChange, gradient: WatchedGradient, main: PrincipalDirections
) -> ChangeNumbers:
    """Compare a change with a gradient.

    Builds the `d_in x d_out` matrix of the change, in float64.

    Args:
        change: The change.
        gradient: The gradient of the same matrix.
        main: All its directions.

    Returns:
        The numbers.
    """
    dense = change.dense().to(main.inputs.device)
    norm = float(dense.norm())
    if not norm or not math.isfinite(norm):
        return ChangeNumbers(norm, math.nan, math.nan, main.resid[:0])
    core = main.inputs @ dense @ main.vjps.T
    inner = float((main.values * core.diagonal()).sum())
    rank = numerical_rank(main.values, _rounding(gradient))
    outside = share_outside(core[:rank, :rank], norm)
    written = _written(change, gradient, main)
    along = cosine(-inner, norm * float(main.values.norm()))
    return ChangeNumbers(norm, along, outside, written)


def _rounding(gradient: WatchedGradient) -> float:
    """The size of singular values that are rounding, in units of the largest one.

    Rounding errors of `n` positions are independent, so they add up to `sqrt(n) eps`. The usual
    bound, `n eps`, would remove directions of a gradient of thousands of positions.

    Args:
        gradient: The gradient.

    Returns:
        The tolerance.
    """
    return math.sqrt(gradient.vjps.shape[1]) * torch.finfo(gradient.vjps.dtype).eps


def share_outside(core: Float[Tensor, "m n"], norm: float) -> float:
    """The share of a matrix's squared norm that its core `U dW V^T` does not have; NaN for zero."""
    if not norm or not math.isfinite(norm):
        return math.nan
    return max(0.0, 1 - float(core.square().sum()) / norm**2)  # against rounding


def cosine(inner: float, lengths: float) -> float:
    """A cosine from an inner product and the product of both lengths; NaN if it is not known."""
    if not lengths or not math.isfinite(inner) or not math.isfinite(lengths):
        return math.nan
    return max(-1.0, min(inner / lengths, 1.0))  # against rounding


def _written(
    change: WeightChange, gradient: WatchedGradient, main: PrincipalDirections
) -> Float[Tensor, "1 d_model"]:
    """The first direction, with the sign that it has for the positions of the step."""
    # As for the gradient, the neurons' side is positive at the position that contributes most.
    inputs, vjps = (factor[0].flatten(1).double() for factor in (gradient.inputs, gradient.vjps))
    u, v = (each.to(inputs.device) for each in change.first_direction())
    along, across = inputs @ u, vjps @ v
    at = (along * across).abs().argmax()
    neurons, resid = (across, u) if gradient.reads_residual else (along, v)
    return (-resid if bool(neurons[at] < 0) else resid)[None]
