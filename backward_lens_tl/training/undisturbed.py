"""Extra passes of a model that somebody else trains, of which the training sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from backward_lens_tl.models import host_of_trained


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore its modes and torch's random numbers afterwards.

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
    with torch.random.fork_rng(devices=[gpu for gpu in gpus if gpu is not None]):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
