"""What computing an edit costs: time, and memory beyond what was in use before."""

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
    """What a call cost.

    Attributes:
        seconds: How long it took.
        memory: The most memory in use beyond what was before, in bytes; NaN where that cannot be
            told. With CUDA it is that of the GPUs; on a CPU it is the process's, and leaves out
            memory that Python or torch had free already.
    """

    seconds: float
    memory: float


def with_cost(run: Callable[[], _T], devices: Iterable[torch.device]) -> tuple[_T, Cost]:
    """Call something, and see what it costs.

    On Linux the process's own peak of memory (`VmHWM`) begins anew.

    Args:
        run: What is called.
        devices: Where its tensors are.

    Returns:
        What it returned, and its cost.
    """
    gpus = {device for device in devices if device.type == "cuda"}
    before = _begin(gpus)
    began = time.perf_counter()
    found = run()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - began
    return found, Cost(seconds, _peak(gpus) - before)


def _begin(gpus: set[torch.device]) -> float:
    """Let peaks begin anew; gives the bytes in use."""
    if gpus:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        return float(sum(torch.cuda.memory_allocated(gpu) for gpu in gpus))
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc's; what is free would be used again unseen
            library.malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
        return _resident("VmRSS")
    except (OSError, TypeError):  # no Linux, or a process that may not
        return math.nan


def _peak(gpus: set[torch.device]) -> float:
    if gpus:
        return float(sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus))
    try:
        return _resident("VmHWM")
    except OSError:
        return math.nan


def _resident(field: str) -> float:
    """Resident memory of this process, in bytes; NaN where the system does not say."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return float(lines[field].split()[0]) * 1024 if field in lines else math.nan
