"""What an optimizer's step really does to a matrix: its weight after the step minus before.

    Delta W = W_after - W_before,     with an adapter of PEFT   W + s A B   instead of W

A copy of the weight is taken in the first forward pass of a step. Weights that are not trained are
not copied, so with LoRA only `A` and `B` are, and the change stays a product of thin matrices:
`s (A + dA)(B + dB) - s A B = s (dA (B + dB) + A dB)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.capture.directions import principal_directions
from backward_lens_tl.editing.truncated_svd import truncated_svd
from backward_lens_tl.models import host_of_trained
from backward_lens_tl.models.linear import is_adapted
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import READING_MATRICES, MatrixName
from backward_lens_tl.training.trained_matrices import TrainedMatrix


@dataclass(frozen=True, repr=False)
class WeightChange:
    """The change of one weight matrix in one optimizer step, `left @ right`.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        left: The change itself, or its first factor if an adapter's weights alone were trained.
        right: The second factor; `None` if `left` is the change itself.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> tokens = model.to_tokens("Lionel Messi plays for Paris")
        >>> with blt.training.watch(model, "W_out", layers=6, changes=True) as watched:
        ...     model(tokens, return_type="loss").backward()
        ...     optimizer.step()
        ...     step = watched.step()
        >>> change = step.changes["W_out", 6]
        >>> change
        WeightChange(W_out of layer 6, [512, 128])
        >>> expected = -0.01 * step["W_out", 6].dense().double()
        >>> torch.allclose(change.dense(), expected, atol=1e-6)
        True
    """

    matrix: MatrixName
    layer: int
    left: Float[Tensor, "d_in r"]
    right: Float[Tensor, "r d_out"] | None = None

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The change as a matrix of `d_in * d_out` numbers, in float64.

        Returns:
            `W_after - W_before`, with heads concatenated.

        Examples:
            >>> from backward_lens_tl.training import WeightChange
            >>> WeightChange("W_out", 0, torch.ones(3, 1), torch.ones(1, 2)).dense().shape
            torch.Size([3, 2])
        """
        left = self.left.double()
        return left if self.right is None else left @ self.right.double()

    def first_direction(
        self,
    ) -> tuple[Float[Tensor, "d_in"], Float[Tensor, "d_out"]]:
        """The singular vectors of the largest singular value, in float64.

        Returns:
            `u` and `v`, whose signs can only be changed together; zero vectors if nothing changed.

        Examples:
            >>> from backward_lens_tl.training import WeightChange
            >>> change = WeightChange("W_out", 0, torch.ones(4, 1), torch.tensor([[0.0, 2.0]]))
            >>> u, v = change.first_direction()
            >>> u.abs().tolist(), v.abs().tolist()
            ([0.5, 0.5, 0.5, 0.5], [0.0, 1.0])
        """
        if not bool(self.left.any()):
            columns = self.left if self.right is None else self.right
            zeros = self.left.new_zeros(len(self.left) + columns.shape[1], dtype=torch.float64)
            return zeros[: len(self.left)], zeros[len(self.left) :]
        if self.right is not None:
            main = principal_directions(self.left.T, self.right, 1, self._reads_residual)
            return main.inputs.sum(0), main.vjps.sum(0)  # of one row, or none
        found = truncated_svd(self.left, 1)
        return found.u[:, 0], found.vh[0]

    @property
    def _reads_residual(self) -> bool:
        return self.matrix in READING_MATRICES

    def __repr__(self) -> str:
        d_in, d_out = len(self.left), (self.left if self.right is None else self.right).shape[1]
        rank = "" if self.right is None else f", rank <= {len(self.right)}"
        return f"WeightChange({self.matrix} of layer {self.layer}, [{d_in}, {d_out}]{rank})"


class WeightBefore:
    """A copy of what a matrix consists of, as far as it is trained.

    Args:
        matrix: The matrix.
    """

    def __init__(self, matrix: TrainedMatrix) -> None:
        self._matrix = matrix
        weight = matrix.site.weight.parameter
        self._version = weight._version
        self._weight = _in_out(matrix).clone() if weight.requires_grad else None
        self._adapter = _adapter(matrix)

    def change(self) -> WeightChange | None:
        """Subtract the copy from the weight as it is now.

        Returns:
            The change; `None` if it is not known: an adapter was added, merged or switched, or a
            weight that is not trained was written into.
        """
        site, now = self._matrix.site, _adapter(self._matrix)
        parameter = site.weight.parameter
        if self._weight is None and parameter._version != self._version:
            return None
        factors = _difference(self._adapter, now)
        if factors is None:
            return None
        left, right = factors
        if self._weight is None:
            return WeightChange(site.matrix, site.layer, left, right)
        dense = at_least_float32(_in_out(self._matrix)) - at_least_float32(self._weight)
        if left.shape[1]:
            dense += left @ right
        return WeightChange(site.matrix, site.layer, dense)


class CurrentWeights:
    """The modules and parameters that a model consists of now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        host = host_of_trained(model)
        modules: list[Any] = list(model.modules()) if host is None else list(host.modules)
        inside = {id(each.base_layer) for each in modules if is_adapted(each)}
        self._modules = {id(each) for each in modules} - inside
        self._parameters = {id(own) for each in modules for own in each._parameters.values()}

    def are_of(self, matrix: TrainedMatrix) -> bool:
        """Whether the model still uses a matrix as it did when it was found.

        Args:
            matrix: The matrix.

        Returns:
            False if its parameter was replaced, or an adapter was put around its module.
        """
        site = matrix.site
        is_used = id(site.output.module) in self._modules
        return is_used and id(site.weight.parameter) in self._parameters


_Factors = tuple[Float[Tensor, "d_in r"], Float[Tensor, "r d_out"]]


def copied_bytes(matrix: TrainedMatrix) -> int:
    """Bytes that the copy of a matrix takes, or its change if that takes more."""
    weight, adapter = matrix.site.weight.parameter, _adapter(matrix)
    base = _in_out(matrix) if weight.requires_grad else None
    kept = [each for each in (base, *adapter) if each is not None]
    return sum(each.numel() * max(each.element_size(), 4) for each in kept)


def _in_out(matrix: TrainedMatrix) -> Float[Tensor, "d_in d_out"]:
    """The weight as the model stores it now, without its adapter, with heads concatenated."""
    site = matrix.site
    weight = site.joined(site.weight.in_out(site.weight.parameter.detach()))
    return matrix.own_columns(weight)


def _adapter(matrix: TrainedMatrix) -> _Factors:
    """Copies of the factors of the active adapters, `A` and `s B`; without any, of rank 0."""
    module: Any = matrix.site.output.module
    weight = _in_out(matrix)
    left, right = [weight.new_zeros(len(weight), 0)], [weight.new_zeros(0, weight.shape[1])]
    if is_adapted(module) and not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                left.append(module.lora_A[name].weight.detach().T)
                b = module.lora_B[name].weight.detach().T * module.scaling[name]
                right.append(matrix.own_columns(b))
    return torch.cat([at_least_float32(each) for each in left], dim=1), torch.cat(
        [at_least_float32(each) for each in right]
    )


def _difference(before: _Factors, now: _Factors) -> _Factors | None:
    """`left right` of the second minus that of the first; `None` if they have other ranks."""
    if before[0].shape != now[0].shape:
        return None
    left = torch.cat([now[0] - before[0], before[0]], dim=1)
    return left, torch.cat([now[1], now[1] - before[1]])
