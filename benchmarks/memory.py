"""Peak memory of a contestant, in its own process."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from backward_lens_tl.evaluation.costs import with_cost
from benchmarks import contestants
from benchmarks.contestants import Contestant
from benchmarks.sizes import Size, bridge, hooked, question
from benchmarks.timing import Thunk

MODELS = {"HookedTransformer": hooked, "TransformerBridge": bridge}
CONTESTANTS: dict[str, Contestant] = {
    "ours": contestants.lens,
    "ours, of texts": contestants.lens_of_texts,
    "tool": contestants.tool,
    "authors' way": contestants.authors_way,
    "floor": contestants.floor,
}

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        contestant: A name among `CONTESTANTS`.
        model: A name among `MODELS`.
        size: Size of the model.
        batch: Number of prompts.
        positions: Prompt length in tokens.
        device: `"cpu"` or `"cuda"`.
    """

    contestant: str
    model: str
    size: Size
    batch: int
    positions: int
    device: str


@dataclass(frozen=True)
class Peaks:
    """Peak memory relative to the memory in use before, in bytes.

    Attributes:
        contestant: Peak of the contestant's first run.
        forward: Peak of a forward pass without gradients, the second one.
    """

    contestant: int
    forward: int


def why_not_measured(device: str) -> str | None:
    """Why peaks cannot be measured here, or `None` if they can."""
    if device == "cuda" or (_CLEAR.exists() and "VmHWM:" in _STATUS.read_text()):
        return None
    return f"peak memory is read from /proc, which {sys.platform} does not have"


def measure(case: Case) -> Peaks:
    """Measure in a new process.

    Args:
        case: What to measure.

    Returns:
        The peaks.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_here, case).result()


def measure_here(case: Case) -> Peaks:
    """Measure in this process.

    Args:
        case: What to measure.

    Returns:
        The peaks.
    """
    model = MODELS[case.model](case.size, case.device)
    asked = question(case.size, case.batch, case.positions, case.device)
    forward = partial(contestants.plain_forward, model, asked)
    forward()
    return Peaks(
        forward=extra_peak(forward, case.device),
        contestant=extra_peak(partial(CONTESTANTS[case.contestant], model, asked), case.device),
    )


def extra_peak(run: Thunk, device: str) -> int:
    """Peak memory of a run relative to the memory in use before.

    Args:
        run: The run. Its return value counts.
        device: Device whose memory is measured.

    Returns:
        Bytes.
    """
    gc.collect()
    _, cost = with_cost(run, [torch.device(device)])
    return int(cost.memory)
