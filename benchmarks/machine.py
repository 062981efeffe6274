"""The machine and the versions of a run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "transformers", "torch")


def versions() -> dict[str, str]:
    """Versions by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in _DISTRIBUTIONS}


def describe(device: str) -> dict[str, str]:
    """Describe the machine.

    Args:
        device: `"cpu"` or `"cuda"`.

    Returns:
        Its properties as text, by name.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch's threads": str(torch.get_num_threads()),
        "memory": f"{memory / 1e9:.0f} GB",
        # On a busy machine, threads that wait for each other are much slower.
        "load before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
        found["float32 products"] = torch.get_float32_matmul_precision()
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
