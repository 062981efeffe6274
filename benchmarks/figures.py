"""What is measured: rows of plain numbers, which a results file keeps.

A row that could not be measured has the reason under `skipped` and no numbers.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from benchmarks import contestants, memory
from benchmarks.estimates import Limits
from benchmarks.phases import phases
from benchmarks.sizes import DTYPES, SMALL, Question, Size, bridge, hooked, question
from benchmarks.timing import Effort, OutOfMemory, Thunk, Timings, interleave

Row = dict[str, Any]

BATCHES = (1, 8, 32, 128)
POSITIONS = (10, 50, 500)
ONE, MANY, SHORT = 1, 32, 10
"""The goals' batches and the length of their prompts."""

LARGE_VOCABULARY = 2**18
DEPTHS = (3, 6, 12)
SCALED_POSITIONS = (10, 50, 100, 250, 500)
SCALED_PROMPTS, SCALED_LENGTH = 8, 50

FLOOR = ("passes", "product")

RANKS = 100
"""Ranks that are taken in a row, since one is over before a clock can tell."""

_GOAL_ROUNDS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        sizes: Sizes of the grid.
        rounds: Rounds at most.
        limits: What one run of the floor may take.
        main: The size that the goals are about.
        batches: Batches of the grid.
        positions: Lengths of prompts of the grid.
        peer_sizes: Sizes that are timed against the peers.
        peer_dtypes: Names of the dtypes that they are timed in.
        depths: Layers of the main size in the scaling.
        large_vocabulary: The vocabulary that memory must not depend on.
        cell_seconds: Time after which no further round of a row is begun.
        goal_seconds: The same for a row that a goal is judged by.
        until: Deadline of the run, by `time.monotonic`; no row starts after it.
        peaks: Measures peak memory.
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
        """Time contestants that take turns.

        Args:
            runs: The contestants.
            is_goal: Whether a goal is judged by them, which takes more rounds.

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
        about: What the row is about.
        numbers: Measures the rest of the row.
        skipped: Why it is not measured, if it is not.
    """

    about: Row
    numbers: Callable[[], Row]
    skipped: str | None = None


class NotRun(Exception):
    """Why a contestant cannot run."""


FIGURES = ("peers", "grid", "lenses", "rank", "orders", "scaling", "memory", "phases")
"""Names of all figures."""


def measure(bench: Bench, name: str) -> Iterator[Row]:
    """Measure a figure.

    Args:
        bench: The run.
        name: Which figure.

    Yields:
        Its rows, each as soon as it is measured.
    """
    figures: dict[str, Callable[[Bench], Iterator[Cell]]] = {
        "peers": peers,
        "grid": grid,
        "lenses": lenses,
        "rank": rank,
        "orders": orders,
        "scaling": scaling,
        "memory": peak_memory,
        "phases": where_time_goes,
    }
    for cell in figures[name](bench):
        row = cell.about | _numbers_or_reason(bench, cell)
        log.info("%s %s", name, row)
        yield row
        # Free a model that is no longer needed before the next one is built.
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _numbers_or_reason(bench: Bench, cell: Cell) -> Row:
    """What was measured, or why nothing was."""
    if cell.skipped is not None:
        return {"skipped": cell.skipped}
    if bench.seconds_left <= 0:
        return {"skipped": "the run reached its time limit before this row (--seconds)"}
    try:
        return cell.numbers()
    except (OutOfMemory, NotRun) as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError:
        return {"skipped": "ran out of the device's memory before anything was timed"}


# ------------------------------------------------------------------------------------------- peers


def peers(bench: Bench) -> Iterator[Cell]:
    """Ours against TransformerLens's tool and the authors' way, which take one prompt at a time."""
    rivals: Mapping[str, tuple[Callable[[Size, str, str], Any], _Pair]] = {
        "tool": (bridge, (contestants.lens_of_texts, contestants.tool)),
        "authors' way": (hooked, (contestants.lens, contestants.authors_way)),
    }
    for size, (peer, (build, pair)) in product(bench.peer_sizes, rivals.items()):
        for dtype in bench.peer_dtypes:
            about: Row = {"size": size.name, "dtype": dtype, "peer": peer}
            about |= {"positions": SHORT, "batch": MANY}
            numbers = partial(_against_peer, bench, size, dtype, build, pair)
            reason = contestants.why_no_tool(size) if peer == "tool" else None
            yield Cell(about, numbers, reason)


_Pair = tuple[contestants.Contestant, contestants.Contestant]


def _against_peer(
    bench: Bench, size: Size, dtype: str, build: Callable[[Size, str, str], Any], pair: _Pair
) -> Row:
    is_goal = (size, dtype) == (bench.main, "float32")
    lens, other = pair
    model = build(size, bench.device, dtype)
    one, many = bench.ask(size, ONE, SHORT), bench.ask(size, MANY, SHORT)
    runs: dict[str, Thunk] = {
        "ours": partial(lens, model, one),
        "peer": partial(other, model, one),
    }
    if is_goal or bench.limits.reason_to_skip(size, MANY, SHORT, dtype) is None:
        runs["batch"] = partial(lens, model, many)
    _check_that_it_runs(runs["peer"])
    timings = bench.interleave(runs, is_goal=is_goal)
    found = _times(timings) | {"faster": timings.ratio(["peer"], ["ours"])}
    if "batch" in runs:
        found["faster_in_batch"] = MANY * timings.ratio(["peer"], ["batch"])
    return found


def _check_that_it_runs(peer: Thunk) -> None:
    """Run a peer once before it is timed; errors in its code are not ours."""
    try:
        peer()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise NotRun(f"the peer raises {type(error).__name__}: {first}") from error


# -------------------------------------------------------------------------------------------- grid


def grid(bench: Bench) -> Iterator[Cell]:
    """Ours against the floor, in whole and in parts, for sizes, dtypes, batches and lengths."""
    for size in bench.sizes:
        build = cache(partial(hooked, size, bench.device))
        for dtype, batch, positions in product(DTYPES, bench.batches, bench.positions):
            is_goal = (size, dtype, positions) == (bench.main, "float32", SHORT)
            is_goal = is_goal and batch in (ONE, MANY)
            reason = bench.limits.reason_to_skip(size, batch, positions, dtype)
            yield Cell(
                {"size": size.name, "dtype": dtype, "batch": batch, "positions": positions},
                partial(_cell, bench, build, dtype, bench.ask(size, batch, positions), is_goal),
                None if is_goal else reason,
            )


def _cell(
    bench: Bench, build: Callable[[], Any], dtype: str, asked: Question, is_goal: bool
) -> Row:
    model = build()
    if model.cfg.dtype != DTYPES[dtype]:
        model.to(DTYPES[dtype], print_details=False)
    return against_floor(bench, model, asked, is_goal=is_goal)


def against_floor(bench: Bench, model: Any, asked: Question, *, is_goal: bool = False) -> Row:
    """Ours and its two parts against the floor and its two parts.

    Args:
        bench: The run.
        model: A `HookedTransformer`.
        asked: The prompts.
        is_goal: Whether a goal is judged by it.

    Returns:
        Median seconds of each, and the ratios `whole`, `capture` and `reading`.
    """
    vectors = contestants.passes(model, asked)
    read = contestants.vectors_of(contestants.capture(model, asked))
    runs: dict[str, Thunk] = {
        "ours": partial(contestants.lens, model, asked),
        "passes": partial(contestants.passes, model, asked),
        "product": partial(contestants.product, vectors, model.W_U),
        "capture": partial(contestants.capture, model, asked),
        "reading": partial(contestants.reading, model, *read),
    }
    timings = bench.interleave(runs, is_goal=is_goal)
    found = _times(timings)
    found["seconds"]["floor"] = timings.median(*FLOOR)
    return found | {
        "whole": timings.ratio(["ours"], FLOOR),
        "capture": timings.ratio(["capture"], ["passes"]),
        "reading": timings.ratio(["reading"], ["product"]),
    }


def orders(bench: Bench) -> Iterator[Cell]:
    """The floor's product against the same product as its transpose."""
    for batch in (ONE, MANY):
        n_vectors = 2 * bench.main.n_layers * batch * SHORT
        yield Cell({"batch": batch, "vectors": n_vectors}, partial(_turned, bench, n_vectors))


def _turned(bench: Bench, n_vectors: int) -> Row:
    size = bench.main
    weight = torch.ones(size.d_model, size.d_vocab, device=bench.device)
    vectors = torch.ones(n_vectors, size.d_model, device=bench.device)
    runs: dict[str, Thunk] = {
        "product": partial(contestants.product, vectors, weight),
        "turned": partial(contestants.turned_product, vectors, weight),
    }
    timings = bench.interleave(runs)
    return _times(timings) | {"turned_faster": timings.ratio(["product"], ["turned"])}


# ------------------------------------------------------------------------------------------ lenses


def lenses(bench: Bench) -> Iterator[Cell]:
    """The default, which reads both lenses, against the Logit Lens alone."""
    build = cache(partial(hooked, bench.main, bench.device))
    for batch in (ONE, MANY):
        asked = bench.ask(bench.main, batch, SHORT)
        yield Cell({"batch": batch}, partial(_both, bench, build, asked))


def _both(bench: Bench, build: Callable[[], Any], asked: Question) -> Row:
    model = build()
    timings = bench.interleave(
        {
            "one": partial(contestants.lens, model, asked),
            "both": partial(contestants.both_lenses, model, asked),
        }
    )
    return _times(timings) | {"slower": timings.ratio(["both"], ["one"])}


# -------------------------------------------------------------------------------------------- rank


def rank(bench: Bench) -> Iterator[Cell]:
    """Rank of one gradient from its factors against that of the dense matrix."""
    yield Cell({"shape": [bench.main.d_mlp, bench.main.d_model]}, partial(_ranks, bench))


def _ranks(bench: Bench) -> Row:
    asked = bench.ask(bench.main, ONE, SHORT)
    captured = contestants.capture(hooked(bench.main, bench.device), asked)
    gradient = captured["W_out", bench.main.n_layers // 2]
    dense = gradient.dense()
    timings = bench.interleave(
        {
            # A new object each time, so that nothing is kept from the last one.
            "ours": lambda: [replace(gradient).rank() for _ in range(RANKS)],
            "dense": lambda: int(torch.linalg.matrix_rank(dense)),
        },
        is_goal=True,
    )
    times = _times(timings)
    times["seconds"]["ours"] /= RANKS
    return {
        "ranks": {"ours": gradient.rank(), "dense": int(torch.linalg.matrix_rank(dense))},
        **times,
        "faster": timings.ratio(["dense"], ["ours"]) * RANKS,
    }


# ----------------------------------------------------------------------------------------- scaling


def scaling(bench: Bench) -> Iterator[Cell]:
    """Our time against the number of prompts, of layers and of positions."""
    prompts = _deepest(bench, BATCHES[-1], SCALED_LENGTH)
    positions = _deepest(bench, ONE, SCALED_POSITIONS[-1])
    points: dict[str, dict[int, _Point]] = {
        "prompts": {n: (prompts, n, SCALED_LENGTH) for n in BATCHES},
        "layers": {
            n: (replace(bench.main, n_layers=n), SCALED_PROMPTS, SCALED_LENGTH)
            for n in bench.depths
        },
        "positions": {n: (positions, ONE, n) for n in SCALED_POSITIONS},
    }
    for along, sizes in points.items():
        about: Row = {
            "along": along,
            "layers": sorted({size.n_layers for size, _, _ in sizes.values()}),
            "prompts": sorted({batch for _, batch, _ in sizes.values()}),
            "positions": sorted({positions for _, _, positions in sizes.values()}),
        }
        yield Cell(about, partial(_grown, bench, sizes))


_Point = tuple[Size, int, int]
"""Size of the model, number of prompts, and their length."""


def _grown(bench: Bench, points: Mapping[int, _Point]) -> Row:
    models = {size: hooked(size, bench.device) for size, _, _ in points.values()}
    runs: dict[str, Thunk] = {
        str(n): partial(contestants.lens, models[size], bench.ask(size, batch, positions))
        for n, (size, batch, positions) in points.items()
    }
    found = _times(bench.interleave(runs))
    slope = log_slope({int(size): seconds for size, seconds in found["seconds"].items()})
    return found | {"slope": slope}


def _deepest(bench: Bench, batch: int, positions: int) -> Size:
    """The main size with as many layers as fit the limit, and with the fewest otherwise."""
    sizes = [replace(bench.main, n_layers=n_layers) for n_layers in bench.depths]
    fitting = [
        size
        for size in sizes
        if bench.limits.reason_to_skip(size, batch, positions, "float32") is None
    ]
    return fitting[-1] if fitting else sizes[0]


def log_slope(seconds: Mapping[int, float]) -> float:
    """Slope of log time against log size, by least squares; 1 where time is proportional to size.

    Args:
        seconds: Time by size.

    Returns:
        The slope.
    """
    sizes = [math.log(size) for size in seconds]
    times = [math.log(time) for time in seconds.values()]
    return statistics.linear_regression(sizes, times).slope


# ------------------------------------------------------------------------------------------ memory


def peak_memory(bench: Bench) -> Iterator[Cell]:
    """Peak memory of every contestant, each in a new process."""
    small, large = bench.main, replace(bench.main, d_vocab=bench.large_vocabulary)
    cases = [
        ("ours, of texts", "TransformerBridge", small, ONE),
        ("tool", "TransformerBridge", small, ONE),
        ("ours", "HookedTransformer", small, ONE),
        ("authors' way", "HookedTransformer", small, ONE),
        ("ours", "HookedTransformer", small, MANY),
        ("floor", "HookedTransformer", small, MANY),
        ("ours", "HookedTransformer", large, MANY),
    ]
    for contestant, model, size, batch in cases:
        about: Row = {
            "contestant": contestant,
            "model": model,
            "d_vocab": size.d_vocab,
            "layers": size.n_layers,
            "batch": batch,
            "positions": SHORT,
        }
        on_bridge = model == "TransformerBridge"
        reason = memory.why_not_measured(bench.device)
        reason = reason or (contestants.why_no_tool(size) if on_bridge else None)
        case = memory.Case(contestant, model, size, batch, SHORT, bench.device)
        yield Cell(about, partial(_peaks, bench, case), reason)


def _peaks(bench: Bench, case: memory.Case) -> Row:
    return {"bytes": asdict(bench.peaks(case))}


# ------------------------------------------------------------------------------------------ phases


def where_time_goes(bench: Bench) -> Iterator[Cell]:
    """Our time by phase, under torch's profiler."""
    build = cache(partial(hooked, bench.main, bench.device))
    for batch in (ONE, MANY):
        asked = bench.ask(bench.main, batch, SHORT)
        yield Cell({"batch": batch, "positions": SHORT}, partial(_profiled, bench, build, asked))


def _profiled(bench: Bench, build: Callable[[], Any], asked: Question) -> Row:
    model = build()
    run = partial(contestants.lens, model, asked)
    run()
    return {"seconds": phases(run, model, bench.device)}


def _times(timings: Timings) -> Row:
    """Median seconds of every contestant."""
    seconds = {name: timings.median(name) for name in timings.seconds}
    return {"rounds": timings.rounds, "seconds": seconds}


def _nothing() -> None:
    """Waits for no device."""
