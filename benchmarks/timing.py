"""Times of contestants that take turns, so that a machine's drift meets them all alike."""

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
        rounds: Rounds to measure at most.
        seconds: Time after which no further round is begun.
        at_least: Rounds to measure whatever they take.
    """

    rounds: int
    seconds: float
    at_least: int = 1


@dataclass(frozen=True)
class Timings:
    """Seconds of each contestant, round by round.

    Attributes:
        seconds: By contestant, one number per round.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.seconds.values())))

    def median(self, *names: str) -> float:
        """Median over rounds of the time of contestants together.

        Args:
            *names: The contestants.

        Returns:
            Seconds.
        """
        return statistics.median(self._together(names))

    def ratio(self, over: Sequence[str], under: Sequence[str]) -> float:
        """How many times as long some contestants take as others.

        Args:
            over: The contestants whose times are added above the line.
            under: Those below it.

        Returns:
            The median over rounds of each round's ratio.
        """
        pairs = zip(self._together(over), self._together(under), strict=True)
        return statistics.median(above / below for above, below in pairs)

    def _together(self, names: Sequence[str]) -> list[float]:
        return [sum(turns) for turns in zip(*(self.seconds[name] for name in names), strict=True)]


class OutOfMemory(Exception):
    """A contestant needed more memory than the device has.

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
    """Let contestants take turns, every second round in the opposite order.

    The first round warms up and does not count, unless it was so long that it has to.

    Args:
        contestants: What is timed, by name. Results are dropped after the clock has stopped.
        effort: How long to go on.
        synchronize: Waits for the device.
        clock: Seconds.

    Returns:
        The times of the rounds that count.

    Raises:
        OutOfMemory: If a contestant needs more memory than the device has.
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
    """Restrict garbage collections to objects that are made inside, which makes them fast.

    Nested contexts do nothing.

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
    """Leave it to the caller to collect garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
