"""Checksums that identify weights and data."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

_PIECE = 2**22
"""Number of values per step of a checksum, to save memory."""

_ODD = 0x1E3779B97F4A7C15
"""An odd factor with irregular bits."""


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """A checksum of tensors: their names, shapes, dtypes and every bit of their values.

    Args:
        tensors: The tensors, by name; their order does not matter.
        about: A text to include.

    Returns:
        SHA-256, in hexadecimal.
    """
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def checksum(tensor: Tensor) -> int:
    """A quick checksum of a tensor's bits, computed on its device.

    It detects any single change and any exchange of two values, but unlike `tensors_digest` it can
    be fooled deliberately.

    Args:
        tensor: The tensor.

    Returns:
        An integer of 64 bits.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    values = tensor.detach().contiguous().reshape(-1)
    bits = values.view(kinds[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for index, piece in enumerate(bits.split(_PIECE)):
        # Odd weights, so that no bit of a single change is lost when the sum overflows.
        places = torch.arange(len(piece), device=bits.device) + index * _PIECE
        # Mixed before it is weighted: the signs of two doubles are bits that would cancel.
        mixed = piece.long()
        mixed = (mixed ^ (mixed >> 31)) * _ODD
        mixed = mixed ^ (mixed >> 29)
        total += (mixed * (2 * places + 1)).sum()
    return int(total)


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """A quick checksum of tensors: their names, shapes, dtypes and bits.

    Of tensors in the CPU's memory it is the CRC, which also detects any single change, and takes
    less time there than `checksum`.

    Args:
        tensors: The tensors, by name; their order does not matter.

    Returns:
        A text of 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        own = zlib.crc32(_bytes(tensor)) if tensor.device.type == "cpu" else checksum(tensor)
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)} {own}\n"
        digest.update(about.encode())
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    found: memoryview = values.view(torch.uint8).numpy().data
    return found
