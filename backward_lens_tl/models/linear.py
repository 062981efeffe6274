"""Weights of linear modules, torch's or Hugging Face's."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.sites import MatrixName, MatrixSite, Stored


def linear_site(matrix: MatrixName, layer: int, linear: nn.Module, **details: Any) -> MatrixSite:
    """The site of a linear module's weight.

    Args:
        matrix: TransformerLens's name of the matrix.
        layer: The layer.
        linear: The module.
        **details: Other fields of the site.

    Returns:
        The site.
    """
    base = _base_layer(linear, matrix, layer)
    found: dict[str, Any] = {
        "input": Tap(linear, "input"),
        "output": Tap(linear, "output"),
        "weight": Stored(
            float_parameter(base.weight, matrix, layer), stored_layout(base, matrix, layer)
        ),
        "bias": base.bias,
    }
    return MatrixSite(matrix, layer, **(found | details))


def is_adapted(linear: object) -> bool:
    """Whether PEFT has wrapped a module in an adapter."""
    return isinstance(linear, nn.Module) and hasattr(linear, "base_layer")


def _base_layer(linear: Any, matrix: MatrixName, layer: int) -> Any:
    """The linear module that holds a matrix: itself, or the one inside a LoRA adapter."""
    # With `y = x @ (W + s A B) + b`, the gradient of the effective weight is that of `W`.
    if not is_adapted(linear):
        return linear
    is_lora = hasattr(linear, "lora_A") and hasattr(linear, "lora_B")
    is_variant = any(getattr(linear, "use_dora", {}).values()) or bool(
        getattr(linear, "lora_variant", None)
    )
    if is_lora and not is_variant:
        return linear.base_layer
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} has an adapter of PEFT ({type(linear).__name__}) that does "
        "more than add a low-rank matrix to it; merge it into the weight before the model is "
        "wrapped: hf_model = peft_model.merge_and_unload()"
    )


def stored_layout(linear: nn.Module, matrix: str, layer: int) -> Literal["in_out", "out_in"]:
    """The layout of a linear module's weight.

    Args:
        linear: The module.
        matrix: Name of the matrix, for the message.
        layer: The layer, for the message.

    Returns:
        `"out_in"` for torch's `Linear`, `"in_out"` for Hugging Face's `Conv1D`.

    Raises:
        UnsupportedModelError: If it is neither, or its weight is parametrized.
    """
    if not is_parametrized(linear):
        if isinstance(linear, nn.Linear):
            return "out_in"
        if type(linear).__name__ == "Conv1D":
            return "in_out"
    if hasattr(linear, "original_component"):
        raise UnsupportedModelError(
            f"{matrix} of layer {layer} is inside two bridges: its Hugging Face model was wrapped "
            "twice; load it again for each TransformerBridge"
        )
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} is a {type(linear).__module__}.{type(linear).__qualname__}; "
        "supported: torch.nn.Linear and transformers' Conv1D, without parametrizations, and "
        "LoRA adapters around them"
    )


def float_parameter(weight: object, matrix: str, layer: int) -> Tensor:
    """Check that a weight can have a gradient.

    Args:
        weight: The model's weight.
        matrix: Name of the matrix, for the message.
        layer: The layer, for the message.

    Returns:
        The weight.

    Raises:
        UnsupportedModelError: If it is not a tensor of real numbers, as if quantised.
    """
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} is stored as {kind}, which has no gradient; load the model "
        "without quantisation"
    )
