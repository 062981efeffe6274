"""Time of our pipeline by phase, from its tensor operations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import Thunk

PHASES = ("forward", "backward", "product", "top, bottom, ranks", "everything else")

_FORWARD = "benchmarks: forward"
_NODE = "autograd::engine::evaluate_function"
_OPERATION = "aten::"
_PRODUCTS = {f"aten::{name}" for name in ("addmm", "bmm", "einsum", "linear", "matmul", "mm", "mv")}


@dataclass(frozen=True)
class Step:
    """A tensor operation that is not part of another one.

    Attributes:
        name: Its name in torch.
        start: Start time in seconds.
        seconds: Its time on the device.
    """

    name: str
    start: float
    seconds: float


def phases(run: Thunk, model: Any, device: str) -> dict[str, float]:
    """Profile one run.

    Args:
        run: Forward passes, each followed by a backward pass and a readout.
        model: The model.
        device: Its device.

    Returns:
        Seconds by phase. They add up to the time of the run under the profiler.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _marked(model), profile(activities=activities) as trace:
        start = time.perf_counter()
        _ = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = trace.events()
    return by_phase([] if events is None else _steps(events, device), seconds)


def by_phase(steps: Iterable[Step], seconds: float) -> dict[str, float]:
    """Sort operations into phases.

    From one call of the model to the next, operations up to the first node of the backward pass
    belong to the forward pass, followed by the nodes and then by the readout, in which matrix
    products are the product. Operations before the first call belong to the forward pass too.

    Args:
        steps: The operations of a run.
        seconds: Time of the whole run.

    Returns:
        Seconds by phase. Time without operations is everything else.
    """
    found = dict.fromkeys(PHASES, 0.0)
    has_turned = False
    for step in sorted(steps, key=attrgetter("start")):
        if step.name == _FORWARD:
            has_turned = False
        is_node = step.name.startswith(_NODE)
        has_turned |= is_node
        if is_node:
            phase = "backward"
        elif not has_turned:
            phase = "forward"
        else:
            phase = "product" if step.name in _PRODUCTS else "top, bottom, ranks"
        found[phase] += step.seconds
    found["everything else"] = max(0.0, seconds - sum(found.values()))
    return found


@contextmanager
def _marked(model: Any) -> Iterator[None]:
    """Mark each call of a model for the profiler.

    This does not use a hook, because a pipeline may behave differently for a model with hooks.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    forward = model.forward

    @wraps(forward)
    def marked(*args: object, **kwargs: object) -> object:
        with record_function(_FORWARD):
            return forward(*args, **kwargs)

    model.forward = marked
    try:
        yield
    finally:
        del model.forward


def _steps(events: Iterable[Any], device: str) -> list[Step]:
    return [
        Step(
            name=event.name,
            start=event.time_range.start / 1e6,
            seconds=(event.device_time_total if device == "cuda" else event.time_range.elapsed_us())
            / 1e6,
        )
        for event in events
        if event.device_type.name == "CPU"
        and event.cpu_parent is None
        and event.name.startswith((_FORWARD, _NODE, _OPERATION))
    ]
