"""Timing of contestants in turns, so that changes of the machine's speed affect all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Maximum number of rounds.
        seconds: Time after which no further round starts.
        at_least: Minimum number of rounds, however long they take.
    """

    rounds: int
    seconds: float
    at_least: int = 1


@dataclass(frozen=True)
class Timings:
    """Seconds of each contestant, round by round.

    Attributes:
        seconds: Seconds per round, by contestant.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.seconds.values())))

    def median(self, *names: str) -> float:
        """Median over rounds of the total time of some contestants.

        Args:
            *names: The contestants.

        Returns:
            Seconds.
        """
        return statistics.median(self._together(names))

    def ratio(self, over: Sequence[str], under: Sequence[str]) -> float:
        """Ratio of the times of two groups of contestants.

        Args:
            over: Contestants in the numerator, whose times are added.
            under: Contestants in the denominator.

        Returns:
            The median of the ratios per round.
        """
        pairs = zip(self._together(over), self._together(under), strict=True)
        return statistics.median(above / below for above, below in pairs)

    def _together(self, names: Sequence[str]) -> list[float]:
        return [sum(turns) for turns in zip(*(self.seconds[name] for name in names), strict=True)]


class OutOfMemory(Exception):
    """A contestant ran out of the device's memory.

    Args:
        name: The contestant.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} ran out of the device's memory")


def interleave(
    contestants: Mapping[str, Thunk],
    effort: Effort,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time contestants in turns, in the opposite order every second round.

    The first round is a warm-up and not counted, unless there is no time for another one.

    Args:
        contestants: The contestants by name. Results are freed after the clock has stopped.
        effort: How long to measure.
        synchronize: Function that waits for the device.
        clock: Function that returns seconds.

    Returns:
        The times of the counted rounds.

    Raises:
        OutOfMemory: If a contestant runs out of the device's memory.
    """
    rounds: list[dict[str, float]] = []
    warm_up = 0
    with settled(), _no_collection():
        start = before = clock()
        while True:
            names = list(contestants)
            if len(rounds) % 2:
                names.reverse()
            rounds.append({n: _timed(n, contestants[n], synchronize, clock) for n in names})
            gc.collect()
            now = clock()
            if len(rounds) == 1:
                warm_up = int((now - start) * (effort.at_least + 1) <= effort.seconds)
            counted = len(rounds) - warm_up
            runs_over = now - start + (now - before) > effort.seconds
            if counted >= effort.rounds or (counted >= effort.at_least and runs_over):
                break
            before = now
    kept = rounds[warm_up:]
    return Timings({name: [turns[name] for turns in kept] for name in contestants})


def _timed(
    name: str, contestant: Thunk, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    synchronize()
    start = clock()
    try:
        result = contestant()
        synchronize()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(name) from error
    seconds = clock() - start
    del result
    return seconds


@contextmanager
def settled() -> Iterator[None]:
    """Restrict garbage collection to objects created inside, which makes it fast.

    Nested contexts have no effect.

    Yields:
        Nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable automatic garbage collection."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
