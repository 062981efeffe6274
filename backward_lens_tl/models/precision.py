"""The precision that results are computed in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
