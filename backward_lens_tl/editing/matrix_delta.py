"""What an edit adds to one weight matrix: low-rank factors, or a dense matrix.

In TransformerLens's orientation, `y = x @ W + b`, the edit is `W <- W + left @ right`. Attention
heads are concatenated along the axis of the matrix that they divide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import checked_number
from backward_lens_tl.capture.directions import numerical_rank
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import EditError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName


@dataclass(frozen=True, repr=False, eq=False)
class MatrixDelta:
    """What is added to one weight matrix, and to its bias.

    Pass either both factors or `values`.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        left: The input directions that the edit responds to, one column per outer product.
        right: What it writes for them, one row per outer product.
        values: The change as a dense matrix.
        bias: What is added to the matrix's bias, if anything.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> left, right = torch.ones(512, 2), torch.ones(2, 128)
        >>> change = blt.editing.MatrixDelta("W_out", 5, left, right)
        >>> change.shape, change.rank()  # both outer products are the same
        ((512, 128), 1)
    """

    matrix: MatrixName
    layer: int
    left: Float[Tensor, "d_in rank"] | None = None
    right: Float[Tensor, "rank d_out"] | None = None
    values: Float[Tensor, "d_in d_out"] | None = None
    bias: Float[Tensor, "d_out"] | None = None

    def __post_init__(self) -> None:
        parts = [each for each in (self.left, self.right, self.values) if each is not None]
        if len(parts) != (2 if self.values is None else 1):
            raise EditError(f"the delta of {self.name} needs both factors, or values instead")
        if self.layer < 0:
            raise EditError(f"the delta of {self.name} needs its layer counted from 0")
        if any(each.ndim != 2 or not each.is_floating_point() for each in parts):
            shapes = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in parts)
            raise EditError(f"the delta of {self.name} must be real matrices; it is {shapes}")
        if len(parts) == 2 and len(parts[1]) != parts[0].shape[1]:
            raise EditError(
                f"the factors of {self.name} have {parts[0].shape[1]} columns and "
                f"{len(parts[1])} rows; pass one row for each column"
            )
        if self.bias is not None and self.bias.shape != (self.shape[1],):
            raise EditError(
                f"the delta of {self.name} has a bias of shape {tuple(self.bias.shape)}; it must "
                f"be ({self.shape[1]},)"
            )

    @property
    def name(self) -> str:
        """The matrix and its layer, for messages."""
        return f"{self.matrix} of layer {self.layer}"

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is stored as factors."""
        return self.values is None

    @property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """The factors, or the dense matrix twice: rows of the first, columns of the second."""
        if self.left is not None and self.right is not None:
            return self.left, self.right
        if self.values is not None:
            return self.values, self.values
        raise EditError(f"the delta of {self.name} needs both factors, or values instead")

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`, with heads concatenated."""
        left, right = self._stored
        return len(left), right.shape[1]

    @cached_property
    def factors(self) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_out"]]:
        """Two factors whose product is the change.

        For a dense change they are `u` and `s * vh` of its singular value decomposition, with as
        many singular values as its dtype (at least float32) can distinguish from zero: the product
        differs from the matrix by rounding only.
        """
        if self.values is None:
            return self._stored
        wide = at_least_float32(self.values)
        u, s, vh = _svd(wide.double())
        # The norm of what is left out if the factors are truncated at each index.
        tail = s.flip(0).square().cumsum(0).sqrt().flip(0)
        n = int((tail > torch.finfo(wide.dtype).eps * s.norm()).sum())
        return u[:, :n].to(wide.dtype), (s[:, None] * vh)[:n].to(wide.dtype)

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """Return the change as a matrix of `d_in * d_out` numbers.

        Returns:
            The matrix.

        Examples:
            >>> delta["W_out", 5].dense().shape  # [d_in, d_out]
            torch.Size([512, 128])
        """
        if self.values is not None:
            return self.values
        left, right = self._stored
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    def svd(
        self,
    ) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank"], Float[Tensor, "rank d_out"]]:
        """Compute the singular value decomposition in float64, of factors without a dense matrix.

        The sign of each pair of singular vectors makes the largest entry of the left one, by
        absolute value, positive: the right one is what is written where that input is active.

        Returns:
            `u`, `s`, `vh` with `u @ diag(s) @ vh` the change: the singular values above rounding,
            largest first.

        Examples:
            >>> u, s, vh = delta["W_out", 5].svd()
            >>> u.shape, s.shape, vh.shape
            (torch.Size([512, 1]), torch.Size([1]), torch.Size([1, 128]))
            >>> torch.allclose(u * s @ vh, delta["W_out", 5].dense().double(), atol=1e-5)
            True
        """
        left, right = (each.double() for each in self._stored)
        if self.values is not None:
            u, s, vh = _svd(left)
        else:
            (q_in, r_in), (q_out, r_out) = torch.linalg.qr(left), torch.linalg.qr(right.T)
            u, s, vh = _svd(r_in @ r_out.T)
            u, vh = q_in @ u, vh @ q_out.T
        n = numerical_rank(s, self._rounding)
        u, s, vh = u[:, :n], s[:n], vh[:n]
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0] if n else s
        sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
        return u * sign, s, vh * sign[:, None]

    def singular_values(self) -> Float[Tensor, "rank_bound"]:
        """Compute the singular values of the change in float64.

        Returns:
            The values, largest first; of factors at most as many as there are outer products.

        Examples:
            >>> len(delta["W_out", 5].singular_values())
            1
        """
        values: Tensor = torch.linalg.svdvals(self._core())
        return values

    def rank(self) -> int:
        """Count the singular values above rounding.

        Returns:
            The number.

        Examples:
            >>> delta["W_out", 5].rank()
            1
        """
        return numerical_rank(self.singular_values(), self._rounding)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, without the bias."""
        return float(torch.linalg.norm(self._core()))

    @property
    def _rounding(self) -> float:
        """The fraction of the largest singular value up to which others count as zero.

        As for gradients: `eps` of the dtype, or of float32 for half precision, times the number of
        outer products, or times the larger side of a dense change.
        """
        n = max(self.shape) if self.left is None else self.left.shape[1]
        # In half precision, eps times a width exceeds 1, so no singular value would count.
        dtype = at_least_float32(self._stored[0][:0]).dtype
        return n * float(torch.finfo(dtype).eps)

    def _core(self) -> Float[Tensor, "rows columns"]:
        """A matrix with the change's singular values, in float64; small if there are factors."""
        if self.values is not None:
            return self.values.double()
        left, right = (each.double() for each in self._stored)
        r_in, r_out = (torch.linalg.qr(each, mode="r").R for each in (left, right.T))
        core: Tensor = r_in @ r_out.T
        return core

    def scale(self, factor: int | float) -> MatrixDelta:
        """Multiply the change by a number.

        Args:
            factor: The number.

        Returns:
            The scaled change.

        Raises:
            EditError: If the number is not finite.

        Examples:
            >>> change = delta["W_out", 5]
            >>> round(change.scale(0.5).norm / change.norm, 3)
            0.5
        """
        number = checked_number("factor", factor, error=EditError)
        scaled = {
            name: value * number
            for name in ("right", "values", "bias")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **scaled)

    def __add__(self, other: object) -> MatrixDelta:
        if not isinstance(other, MatrixDelta):
            return NotImplemented
        if (self.matrix, self.layer, self.shape) != (other.matrix, other.layer, other.shape):
            raise EditError(f"{self!r} and {other!r} are not of one matrix")
        biases = [each.bias for each in (self, other) if each.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        if self.is_low_rank and other.is_low_rank:
            (left, right), (more_left, more_right) = self.factors, other.factors
            both = torch.cat((left, more_left), dim=1), torch.cat((right, more_right))
            return replace(self, left=both[0], right=both[1], bias=bias)
        return replace(self, left=None, right=None, values=self.dense() + other.dense(), bias=bias)

    def gradient(self) -> MatrixGradient:
        """Return the gradient for which one step of gradient descent at rate 1 is this change.

        Its positions are the outer products, its `inputs` are `left`, its `vjps` are `-right`. So
        everything that gradients have is available: `spanning_set`, `norms`, `neuron_norms` and
        others. For the tokens of an edit use `delta_tokens`.

        Returns:
            The gradient of a batch of one.

        Examples:
            >>> delta["W_out", 5].gradient()
            MatrixGradient(W_out of layer 5, x [1, 1, 512], delta [1, 1, 128])
        """
        left, right = self.factors
        inputs, vjps = left.T[None], -right[None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return MatrixGradient(self.matrix, self.layer, inputs.contiguous(), vjps, mask)

    def __repr__(self) -> str:
        kind = "dense" if self.left is None else f"rank <= {self.left.shape[1]}"
        bias = "" if self.bias is None else ", with bias"
        d_in, d_out = self.shape
        return f"MatrixDelta({self.name}, [{d_in}, {d_out}], {kind}{bias})"


def _svd(matrix: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh
