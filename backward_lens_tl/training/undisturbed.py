"""Extra passes of a model that somebody else trains, of which the training sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore its modes and torch's random numbers afterwards.

    Args:
        model: The model. Its modes are set one by one, because `train()` of a module may do more
            than that.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    gpus = {each.device.index for each in model.parameters() if each.device.type == "cuda"}
    with torch.random.fork_rng(devices=[gpu for gpu in gpus if gpu is not None]):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
