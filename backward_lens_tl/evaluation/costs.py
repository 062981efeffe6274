"""The cost of computing an edit: time, and memory beyond what was in use before."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

_T = TypeVar("_T")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Cost:
    """The cost of a call.

    Attributes:
        seconds: Duration of the call.
        memory: Peak memory beyond what was in use before, in bytes; NaN where it is unknown. With
            CUDA it is that of the GPUs; on a CPU it is the process's. C libraries other than glibc
            may keep freed memory, and what they reuse of it is not counted.
    """

    seconds: float
    memory: float


def with_cost(call: Callable[[], _T], devices: Iterable[torch.device]) -> tuple[_T, Cost]:
    """Call a function and measure its cost.

    On Linux this resets the process's own peak of memory (`VmHWM`), after freed memory was given
    back to the system.

    Args:
        call: The function.
        devices: Where its tensors are.

    Returns:
        Its return value and its cost.
    """
    gpus = {device for device in devices if device.type == "cuda"}
    before = _reset_peak(gpus)
    began = time.perf_counter()
    found = call()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - began
    return found, Cost(seconds, _peak(gpus) - before)


def _reset_peak(gpus: set[torch.device]) -> float:
    """Reset the peak, and return the bytes in use."""
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    if gpus:
        return float(sum(torch.cuda.memory_allocated(gpu) for gpu in gpus))
    if not _CLEAR.exists():  # not Linux
        return math.nan
    _give_back_free_memory()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # not allowed
        return math.nan
    return _resident("VmRSS")


def _peak(gpus: set[torch.device]) -> float:
    if gpus:
        return float(sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus))
    return _resident("VmHWM")


def _resident(field: str) -> float:
    """Resident memory of this process, in bytes; NaN where the system does not say."""
    if not _STATUS.exists():
        return math.nan
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return float(lines[field].split()[0]) * 1024 if field in lines else math.nan


def _give_back_free_memory() -> None:
    """Return freed memory to the system, so that reusing it counts."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's
        library.malloc_trim(0)
