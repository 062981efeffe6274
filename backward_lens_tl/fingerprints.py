"""Checksums, by which the same weights and the same data are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """A checksum of tensors: their names, shapes, dtypes and every bit of their values.

    Args:
        tensors: The tensors, by name; their order does not matter.
        about: A text that belongs to them.

    Returns:
        SHA-256, in hexadecimal.
    """
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
