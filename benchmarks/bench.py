"""A run of the benchmark: its settings, and the rows that it measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import memory
from benchmarks.estimates import Limits
from benchmarks.sizes import SMALL, Question, Size, question
from benchmarks.timing import Effort, Thunk, Timings, interleave

Row = dict[str, Any]

BATCHES = (1, 8, 32, 128)
POSITIONS = (10, 50, 500)
DEPTHS = (3, 6, 12)
LARGE_VOCABULARY = 2**18
_GOAL_ROUNDS = 3


@dataclass(frozen=True)
class Bench:
    """Settings of one run of the benchmark.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        sizes: Sizes of the grid.
        rounds: Largest number of rounds.
        limits: Limits for one run of the floor.
        main: The size for the goals.
        batches: Batches of the grid.
        positions: Prompt lengths of the grid.
        peer_sizes: Sizes for the comparison with the peers.
        peer_dtypes: Names of the dtypes for the comparison with the peers.
        depths: Numbers of layers of the main size in the scaling.
        large_vocabulary: A large vocabulary, on which memory must not depend.
        cell_seconds: Time after which no further round of a row starts.
        goal_seconds: The same for a row that a goal depends on.
        until: Deadline of the run, by `time.monotonic`; no row starts after it.
        peaks: Function that measures peak memory.
    """

    device: str
    sizes: Sequence[Size]
    rounds: int
    limits: Limits
    main: Size = SMALL
    batches: Sequence[int] = BATCHES
    positions: Sequence[int] = POSITIONS
    peer_sizes: Sequence[Size] = (SMALL,)
    peer_dtypes: Sequence[str] = ("float32",)
    depths: Sequence[int] = DEPTHS
    large_vocabulary: int = LARGE_VOCABULARY
    cell_seconds: float = 8.0
    goal_seconds: float = 40.0
    until: float = math.inf
    peaks: Callable[[memory.Case], memory.Peaks] = memory.measure

    @property
    def seconds_left(self) -> float:
        """Time until the deadline; negative afterwards."""
        return self.until - time.monotonic()

    def interleave(self, runs: Mapping[str, Thunk], *, is_goal: bool = False) -> Timings:
        """Time contestants in turns.

        Args:
            runs: The contestants.
            is_goal: Whether a goal depends on them, which takes more rounds.

        Returns:
            Their times.
        """
        seconds = self.goal_seconds if is_goal else self.cell_seconds
        at_least = min(self.rounds, _GOAL_ROUNDS) if is_goal else 1
        effort = Effort(self.rounds, min(seconds, self.seconds_left), at_least)
        wait = torch.cuda.synchronize if self.device == "cuda" else _nothing
        return interleave(runs, effort, synchronize=wait)

    def ask(self, size: Size, batch: int, positions: int) -> Question:
        """Random prompts on the device."""
        return question(size, batch, positions, self.device)


@dataclass(frozen=True)
class Cell:
    """A row before it is measured.

    Attributes:
        about: The columns that identify the row.
        numbers: Function that measures the other columns.
        skipped: Why it is not measured; `None` if it is.
    """

    about: Row
    numbers: Callable[[], Row]
    skipped: str | None = None


class NotRun(Exception):
    """Why a contestant cannot run."""


def _nothing() -> None:
    """Synchronize with no device."""
