"""States of a model, or of torch, in which gradients would be wrong or missing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from backward_lens_tl.errors import ModelStateError


def check_gradients_exist(model: nn.Module) -> None:
    """Raise where autograd cannot run.

    Args:
        model: The model.

    Raises:
        ModelStateError: Inside `torch.inference_mode()`, or if a parameter was created in it or is
            on the meta device.
    """
    if torch.is_inference_mode_enabled():
        raise ModelStateError(
            "gradients do not exist inside torch.inference_mode(); leave it, or use "
            "torch.no_grad(), under which this package works"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ModelStateError(
                f"parameter {name!r} was created in torch.inference_mode(), so autograd cannot "
                "run through it; load the model outside inference mode"
            )
        if parameter.is_meta:
            raise ModelStateError(
                f"parameter {name!r} is on the meta device and has no values; load the weights"
            )


def check_deterministic(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise where a forward pass drops values or runs layers twice.

    Args:
        modules: All modules, by name.

    Raises:
        ModelStateError: If gradient checkpointing or dropout is active.
    """
    for name, module in modules:
        if not module.training:
            continue
        if getattr(module, "gradient_checkpointing", False):
            raise ModelStateError(
                f"gradient checkpointing is on in {name!r} (the model is in train mode), which "
                "runs layers again where nothing is captured; call model.eval(), or "
                "gradient_checkpointing_disable() on the Hugging Face model"
            )
        if _drops_values(module):
            raise ModelStateError(
                f"dropout is active in {name!r} (the model is in train mode), so the gradient "
                "would be random; call model.eval() first"
            )


def _drops_values(module: nn.Module) -> bool:
    """Whether a module in train mode drops values, as a layer or through an attribute."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        "dropout" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )
