"""Input directions of a shift: what its outer products respond to.

For the inputs `x_i` of `W_out` where the edit is made, all keys but the paper's choose `l_i` with

    x_i l_i^T = 1,   x_j l_i^T = 0 for the others,   and least   l_i A l_i^T

so that each output changes by its own value alone. `A` says where else the edit shall write little:

    plain      A = 1
    whitened   A = C + ridge                    C = E[x x^T] on ordinary text
    contrast   A = C + ridge + weight Z^T Z     Z: inputs for other subjects in the same prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import EditError

_READ_BY: Mapping[str, tuple[str, ...]] = {
    "contrast": ("contrast",),
    "n_contrast": ("contrast",),
    "moments": ("whitened", "contrast"),
    "ridge": ("whitened", "contrast"),
}
"""Settings that only some keys read."""

_DEPENDENT = 1e-6
"""Fraction of its mean diagonal that is added to the Gram matrix of several inputs, which may be
linearly dependent."""

Solve = Callable[[Float[Tensor, "d_in n"]], Float[Tensor, "d_in n"]]
"""Computes `A^-1 K` in float64."""


def check_read(key: str | None, given: Mapping[str, object]) -> None:
    """Refuse settings that a key does not read.

    Args:
        key: The key; by default it depends on the request, and none is refused.
        given: The settings by name, `None` where they are left out.

    Raises:
        EditError: If there is one.
    """
    for name, value in given.items():
        if key is not None and value is not None and key not in _READ_BY[name]:
            keys = " or ".join(f"key={each!r}" for each in _READ_BY[name])
            raise EditError(
                f"{name} is {value!r}, but key={key!r} does not read it; leave it out, or pass "
                f"{keys}"
            )


def input_directions(inputs: Float[Tensor, "n d_in"], solve: Solve) -> Float[Tensor, "d_in n"]:
    """Find the directions that respond to one input each, and least to what `A` describes.

    Args:
        inputs: The inputs.
        solve: Computes `A^-1 K`.

    Returns:
        The directions, as columns.
    """
    keys = solve(inputs.T.double())
    gram = inputs.double() @ keys
    gram.diagonal().add_(_DEPENDENT * gram.diagonal().mean() * (len(inputs) > 1))
    solution: Tensor = torch.linalg.solve(gram.T, keys.T).T
    return solution.to(inputs.dtype)


def with_low_rank(solve: Solve, rows: Float[Tensor, "r d_in"]) -> Solve:
    """Add `R^T R` to `A`, by Woodbury's identity: only a matrix of the number of rows is inverted.

    Args:
        solve: Computes `A^-1 K`.
        rows: `R`.

    Returns:
        A function that computes `(A + R^T R)^-1 K`.
    """

    def solved(keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        both = solve(torch.cat([keys.double(), rows.T.double()], dim=1))
        own, responses = both[:, : keys.shape[1]], both[:, keys.shape[1] :]
        inner = torch.eye(len(rows)).to(both) + rows.double() @ responses
        correction: Tensor = responses @ torch.linalg.solve(inner, rows.double() @ own)
        return own - correction

    return solved


def fewer_rows(rows: Float[Tensor, "r d_in"]) -> Float[Tensor, "s d_in"]:
    """At most `d_in` rows with the same `R^T R`.

    Args:
        rows: `R`.

    Returns:
        The rows themselves, or the triangular factor of their QR decomposition in float64.
    """
    if len(rows) <= rows.shape[1]:
        return rows
    triangle: Tensor = torch.linalg.qr(rows.double(), mode="r").R
    return triangle
