"""Where the time of our pipeline goes, by what the tensor operations are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Thunk

PHASES = ("forward", "backward", "product", "top, bottom, ranks", "everything else")

_NODE = "autograd::engine::evaluate_function"
_OPERATION = "aten::"
_PRODUCTS = {f"aten::{name}" for name in ("addmm", "bmm", "einsum", "linear", "matmul", "mm", "mv")}


@dataclass(frozen=True)
class Step:
    """One operation that is not part of another one.

    Attributes:
        name: Torch's name of it.
        start: When it began, in seconds.
        end: When it ended.
        seconds: What it took of the device that computes.
    """

    name: str
    start: float
    end: float
    seconds: float


def phases(run: Thunk, device: str) -> dict[str, float]:
    """Profile one run.

    Args:
        run: What is run: a forward pass, a backward pass, and then the reading.
        device: Where it computes.

    Returns:
        Seconds by phase; they add up to the time of the run under the profiler.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        start = time.perf_counter()
        _ = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = trace.events()
    return by_phase([] if events is None else _steps(events, device), seconds)


def by_phase(steps: Iterable[Step], seconds: float) -> dict[str, float]:
    """Sort operations into phases.

    A node of the backward pass belongs to it, and what else comes before the last node, to the
    forward pass. What comes behind is the product, if it multiplies matrices, and otherwise the
    choice of tokens.

    Args:
        steps: The operations of a run.
        seconds: Time of the whole run.

    Returns:
        Seconds by phase; what no operation took is everything else.
    """
    steps = list(steps)
    turn = max((step.end for step in steps if _is_node(step.name)), default=0.0)
    found = dict.fromkeys(PHASES, 0.0)
    for step in steps:
        if _is_node(step.name):
            phase = "backward"
        elif step.start < turn:
            phase = "forward"
        else:
            phase = "product" if step.name in _PRODUCTS else "top, bottom, ranks"
        found[phase] += step.seconds
    found["everything else"] = max(0.0, seconds - sum(found.values()))
    return found


def _steps(events: Iterable[Any], device: str) -> list[Step]:
    return [
        Step(
            name=event.name,
            start=event.time_range.start / 1e6,
            end=event.time_range.end / 1e6,
            seconds=(event.device_time_total if device == "cuda" else event.time_range.elapsed_us())
            / 1e6,
        )
        for event in events
        if event.device_type.name == "CPU"
        and event.cpu_parent is None
        and (_is_node(event.name) or event.name.startswith(_OPERATION))
    ]


def _is_node(name: str) -> bool:
    return name.startswith(_NODE)
