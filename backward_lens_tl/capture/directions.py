"""The main directions of a gradient: its singular vectors, and the positions that carry them.

With the QR factorisations `X^T = Q_x R_x` and `Delta^T = Q_d R_d`, the gradient `X^T Delta` is
`Q_x (R_x R_d^T) Q_d^T`. The core in the middle has at most `n` rows and columns. Its singular value
decomposition `U S V^T` gives that of the gradient, `(Q_x U) S (Q_d V)^T`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, repr=False)
class PrincipalDirections:
    """The largest terms of the singular value decomposition of one weight gradient.

    The gradient is `sum_j values[j] u_j^T v_j` with unit vectors `u_j` and `v_j`, so a step of
    gradient descent adds `-values[j] v_j` to the matrix's output for inputs along `u_j`.

    Each position `i` contributes `(x_i . u_j)(delta_i . v_j)` to `values[j]`. The signs of `u_j`
    and `v_j`, which can only be changed together, are those for which both factors are positive
    at the position that contributes most. Directions of equal value are arbitrary within their
    span.

    Attributes:
        values: Singular values, largest first.
        energy: The share of each direction in the squared norm of the gradient.
        inputs: `u_j`, in the space of the matrix's inputs.
        vjps: `v_j`, in the space of the matrix's outputs.
        contributions: What each position contributes to each value; rows sum to `values`.
        reads_residual: Whether the matrix reads the residual stream; otherwise it writes to it.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll(" Paris")
        >>> gradient = blt.capture_gradients(model, "Lionel Messi plays for", loss)["W_out", 6]
        >>> main = gradient.principal_directions(2)
        >>> main
        PrincipalDirections(2 directions, 99.8 % of the squared norm, u [512], v [128])
        >>> blt.read_vectors(model, -main.resid[0], k=2).top_tokens  # what the update adds
        [' Paris', ' France']
        >>> int(main.contributions[0].argmax())  # at the last of 6 positions
        5
    """

    values: Float[Tensor, "k"]
    energy: Float[Tensor, "k"]
    inputs: Float[Tensor, "k d_in"]
    vjps: Float[Tensor, "k d_out"]
    contributions: Float[Tensor, "k n"]
    reads_residual: bool

    @property
    def resid(self) -> Float[Tensor, "k d_model"]:
        """The side of width `d_model`: `u_j` if the matrix reads the residual stream, else `v_j`.

        `read_vectors` reads it as tokens.
        """
        return self.inputs if self.reads_residual else self.vjps

    @property
    def neurons(self) -> Float[Tensor, "k d_hidden"]:
        """The other side, with a number per neuron of the MLP or dimension of the heads."""
        return self.vjps if self.reads_residual else self.inputs

    def __repr__(self) -> str:
        return (
            f"PrincipalDirections({len(self.values)} directions, "
            f"{100 * float(self.energy.sum()):.1f} % of the squared norm, "
            f"u [{self.inputs.shape[1]}], v [{self.vjps.shape[1]}])"
        )


def principal_directions(
    inputs: Float[Tensor, "n d_in"], vjps: Float[Tensor, "n d_out"], k: int, reads_residual: bool
) -> PrincipalDirections:
    """Decompose `inputs^T vjps`; see `MatrixGradient.principal_directions`."""
    rows, columns = inputs.double(), vjps.double()
    basis_in, core_in = torch.linalg.qr(rows.T)
    basis_out, core_out = torch.linalg.qr(columns.T)
    core = core_in @ core_out.T
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    # The vectors of values that are zero up to rounding are arbitrary.
    k = min(k, numerical_rank(values, rtol=max(core.shape) * torch.finfo(core.dtype).eps))
    u, v = (basis_in @ left[:, :k]).T, (basis_out @ right[:k].T).T
    along = u @ rows.T
    contributions = along * (v @ columns.T)
    if k:
        signs = along.take_along_dim(contributions.argmax(1, keepdim=True), 1).sign()
        u, v = signs * u, signs * v
    energy = values.square() / values.square().sum()
    return PrincipalDirections(values[:k], energy[:k], u, v, contributions, reads_residual)


def numerical_rank(singular_values: Float[Tensor, "rank_bound"], rtol: float) -> int:
    """The number of singular values above `rtol` times the largest; 0 if there are none."""
    if not len(singular_values):
        return 0
    return int((singular_values > rtol * singular_values.max()).sum())
