"""Extra passes of a model that somebody else trains, of which the training sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from backward_lens_tl.models import host_of_trained
from backward_lens_tl.models.own_passes import own_passes

_FORWARD = "_original_forward"
"""Where Accelerate keeps `forward` when it puts autocast around it."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore its modes and torch's random numbers afterwards.

    The passes are in the precision of the weights, whether the training's are under autocast or
    not, and no watch takes them for the training's.

    Args:
        model: The model. Its modes are set one by one, because `train()` of a module may do more
            than that.

    Yields:
        Nothing.
    """
    host = host_of_trained(model)
    # The Hugging Face model is not a submodule of its bridge.
    modules = list(model.modules()) if host is None else host.modules
    modes = [(module, module.training) for module in modules]
    gpus = {each.device.index for each in model.parameters() if each.device.type == "cuda"}
    with (
        own_passes(),
        torch.random.fork_rng(devices=[gpu for gpu in gpus if gpu is not None]),
        _without_autocast(model),
    ):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Disable autocast, also that of Accelerate, which replaces the `forward` of the model."""
    device = next(model.parameters()).device.type
    wrapped = vars(model).get("forward")
    with torch.autocast(device, enabled=False):
        if wrapped is None or _FORWARD not in vars(model):
            yield
            return
        model.forward = vars(model)[_FORWARD]
        try:
            yield
        finally:
            model.forward = wrapped
