"""Estimates of the time and memory of the floor, to skip cells that would need too much."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.sizes import DTYPES, Size

_GB = 1e9
_PROBE = (512, 1024, 16384)


def floor_flops(size: Size, batch: int, positions: int) -> int:
    """Floating-point operations of the floor: forward pass, gradients of activations, one product.

    Only matrix products count, with two operations per multiplication. Each product in attention
    needs two gradients, each product with a weight one. Those before the first MLP are not needed
    but included, so the estimate is too high by less than one layer.

    Args:
        size: Size of the model.
        batch: Number of prompts.
        positions: Prompt length in tokens.

    Returns:
        The number of operations.
    """
    tokens = batch * positions
    key_value_width = (size.n_key_value_heads or size.n_heads) * size.d_head
    attention_weights = 2 * size.d_model * (size.d_model + key_value_width)
    mlp_weights = (3 if size.is_llama else 2) * size.d_model * size.d_mlp
    unembedding = size.d_model * size.d_vocab
    with_weights = size.n_layers * (attention_weights + mlp_weights) + unembedding
    of_attention = size.n_layers * 2 * positions * size.d_model
    spanning = 2 * size.n_layers * unembedding
    return 2 * tokens * (2 * with_weights + 3 * of_attention + spanning)


def floor_bytes(size: Size, batch: int, positions: int, itemsize: int) -> int:
    """Approximate memory of the model and of the floor's passes.

    Args:
        size: Size of the model.
        batch: Number of prompts.
        positions: Prompt length in tokens.
        itemsize: Bytes of one number.

    Returns:
        Bytes. `HookedTransformer` keeps transposed copies of the weights of attention and of the
        unembedding. Per token and layer, the backward pass needs about twenty tensors of width
        `d_model`, six of width `d_mlp`, and three attention patterns. The logits, their gradient
        and a copy are in memory at the same time.
    """
    tokens = batch * positions
    attention = 4 * size.d_model**2
    mlp = (3 if size.is_llama else 2) * size.d_model * size.d_mlp
    model = size.n_layers * (2 * attention + mlp) + 3 * size.d_model * size.d_vocab
    per_layer = 20 * size.d_model + 6 * size.d_mlp + 3 * size.n_heads * positions
    return itemsize * (model + tokens * (size.n_layers * per_layer + 3 * size.d_vocab))


@dataclass(frozen=True)
class Limits:
    """Limits for a run on this machine.

    Attributes:
        seconds: Time for one run of the floor.
        memory: Bytes, including the model.
        speed: Operations per second of a small product, by dtype.
    """

    seconds: float
    memory: int
    speed: Mapping[str, float]

    def floor_seconds(self, size: Size, batch: int, positions: int, dtype: str) -> float:
        """Estimated time of one run of the floor.

        Args:
            size: Size of the model.
            batch: Number of prompts.
            positions: Prompt length in tokens.
            dtype: Name of the dtype.

        Returns:
            Seconds.
        """
        return floor_flops(size, batch, positions) / self.speed[dtype]

    def reason_to_skip(self, size: Size, batch: int, positions: int, dtype: str) -> str | None:
        """Whether to skip a cell.

        Args:
            size: Size of the model.
            batch: Number of prompts.
            positions: Prompt length in tokens.
            dtype: Name of the dtype.

        Returns:
            The reason; `None` to measure it.
        """
        memory = floor_bytes(size, batch, positions, DTYPES[dtype].itemsize)
        if memory > self.memory:
            needed = _roughly(memory / _GB)
            return f"needs about {needed} GB, and {self.memory / _GB:.0f} GB are available"
        seconds = self.floor_seconds(size, batch, positions, dtype)
        if seconds > self.seconds:
            return (
                f"one run of the floor would take about {_roughly(seconds)} s, and the limit is "
                f"{self.seconds:g} s (--limit)"
            )
        return None


def _roughly(value: float) -> str:
    """One significant digit, so that similar estimates have the same text."""
    return f"{float(f'{value:.0e}'):,g}"


def limits_of(device: str, seconds: float) -> Limits:
    """Measure the limits of this machine.

    Args:
        device: `"cpu"` or `"cuda"`.
        seconds: Time for one run of the floor.

    Returns:
        The limits.
    """
    speed = {name: product_speed(dtype, device) for name, dtype in DTYPES.items()}
    return Limits(seconds, available_memory(device), speed)


def product_speed(dtype: torch.dtype, device: str) -> float:
    """Speed of a small matrix product.

    Args:
        dtype: Dtype of the factors.
        device: The device.

    Returns:
        Operations per second, the best of three.
    """
    n, d_in, d_out = _PROBE
    left = torch.ones(n, d_in, dtype=dtype, device=device)
    right = torch.ones(d_in, d_out, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        # Reading a number synchronizes with the device.
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * n * d_in * d_out / best


def available_memory(device: str) -> int:
    """Memory that is currently free.

    Args:
        device: `"cpu"` or `"cuda"`.

    Returns:
        Bytes; the total memory if the system does not report free memory.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
