"""Weights that lie in linear modules, torch's or Hugging Face's."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.sites import MatrixName, MatrixSite, Stored, Tap


def linear_site(matrix: MatrixName, layer: int, linear: nn.Module, **details: Any) -> MatrixSite:
    """A matrix that a linear module multiplies by, tapped at that module.

    Args:
        matrix: TransformerLens's name of the matrix.
        layer: The layer.
        linear: The module.
        **details: Further fields of the site.

    Returns:
        The site.
    """
    found: dict[str, Any] = {
        "input": Tap(linear, "input"),
        "output": Tap(linear, "output"),
        "weight": Stored(
            float_parameter(linear.weight, matrix, layer), stored_layout(linear, matrix, layer)
        ),
        "bias": linear.bias,
    }
    return MatrixSite(matrix, layer, **(found | details))


def stored_layout(linear: nn.Module, matrix: str, layer: int) -> Literal["in_out", "out_in"]:
    """How a linear module keeps its weight, by its class.

    Args:
        linear: The module.
        matrix: Whose weight it is, for the message.
        layer: Whose weight it is, for the message.

    Returns:
        `"out_in"` for torch's `Linear`, `"in_out"` for Hugging Face's `Conv1D`.

    Raises:
        UnsupportedModelError: If it is neither, or its weight is computed on the way.
    """
    if not is_parametrized(linear):
        if isinstance(linear, nn.Linear):
            return "out_in"
        if type(linear).__name__ == "Conv1D":
            return "in_out"
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} is a {type(linear).__name__}; the lens knows torch.nn.Linear "
        "and transformers' Conv1D, without parametrizations"
    )


def float_parameter(weight: object, matrix: str, layer: int) -> Tensor:
    """A weight that has a gradient.

    Args:
        weight: What the model holds.
        matrix: Whose it is, for the message.
        layer: Whose it is, for the message.

    Returns:
        The weight.

    Raises:
        UnsupportedModelError: If it is not a tensor of real numbers, as a quantised one is not.
    """
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} is stored as {kind}, which has no gradient; load the model "
        "without quantisation"
    )
