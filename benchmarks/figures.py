"""What is measured: rows of plain numbers, which a results file keeps.

A row that could not be measured has the reason under `skipped` and no numbers.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import contestants, memory
from benchmarks.estimates import Limits
from benchmarks.phases import phases
from benchmarks.sizes import DTYPES, MEDIUM, SMALL, Question, Size, bridge, hooked, question
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

_CELL_SECONDS, _GOAL_SECONDS, _GOAL_ROUNDS = 8.0, 40.0, 3

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
    """

    device: str
    sizes: Sequence[Size]
    rounds: int
    limits: Limits
    main: Size = SMALL

    def interleave(self, runs: Mapping[str, Thunk], *, is_goal: bool = False) -> Timings:
        """Time contestants that take turns.

        Args:
            runs: The contestants.
            is_goal: Whether a goal is judged by them, which takes more rounds.

        Returns:
            Their times.
        """
        effort = Effort(self.rounds, _CELL_SECONDS)
        if is_goal:
            effort = Effort(self.rounds, _GOAL_SECONDS, min(self.rounds, _GOAL_ROUNDS))
        wait = torch.cuda.synchronize if self.device == "cuda" else _nothing
        return interleave(runs, effort, synchronize=wait)

    def ask(self, size: Size, batch: int, positions: int) -> Question:
        """Random prompts on the device."""
        return question(size, batch, positions, self.device)


FIGURES = ("peers", "grid", "lenses", "rank", "orders", "scaling", "memory", "phases")
"""Names of all figures."""


def measure(bench: Bench, names: Sequence[str] = FIGURES) -> dict[str, list[Row]]:
    """Measure figures.

    Args:
        bench: The run.
        names: Which.

    Returns:
        Rows by figure.
    """
    figures: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "peers": peers,
        "grid": grid,
        "lenses": lenses,
        "rank": rank,
        "orders": orders,
        "scaling": scaling,
        "memory": peak_memory,
        "phases": where_time_goes,
    }
    return {name: list(_logged(name, figures[name](bench))) for name in names}


# ------------------------------------------------------------------------------------------- peers


def peers(bench: Bench) -> Iterator[Row]:
    """Ours against TransformerLens's tool and the authors' way, which take one prompt at a time."""
    without_tool = contestants.why_no_tool()
    for size in dict.fromkeys((bench.main, *(size for size in bench.sizes if size == MEDIUM))):
        if without_tool is None:
            lens = contestants.lens_of_texts
            yield _against(bench, size, "tool", bridge, lens, contestants.tool)
        else:
            yield {"size": size.name, "peer": "tool", "skipped": without_tool}
        lens = contestants.lens
        yield _against(bench, size, "authors' way", hooked, lens, contestants.authors_way)


def _against(
    bench: Bench,
    size: Size,
    peer: str,
    build: Callable[[Size, str], Any],
    lens: contestants.Contestant,
    other: contestants.Contestant,
) -> Row:
    row: Row = {"size": size.name, "peer": peer, "positions": SHORT, "batch": MANY}
    is_goal = size == bench.main
    model = build(size, bench.device)
    one, many = bench.ask(size, ONE, SHORT), bench.ask(size, MANY, SHORT)
    runs: dict[str, Thunk] = {
        "ours": partial(lens, model, one),
        "peer": partial(other, model, one),
    }
    if is_goal or bench.limits.reason_to_skip(size, MANY, SHORT, "float32") is None:
        runs["batch"] = partial(lens, model, many)

    def compare() -> Row:
        timings = bench.interleave(runs, is_goal=is_goal)
        found = _times(timings) | {"faster": timings.ratio(["peer"], ["ours"])}
        if "batch" in runs:
            found["faster_in_batch"] = MANY * timings.ratio(["peer"], ["batch"])
        return found

    return row | _numbers_or_reason(compare)


# -------------------------------------------------------------------------------------------- grid


def grid(bench: Bench) -> Iterator[Row]:
    """Ours against the floor, in whole and in parts, for sizes, dtypes, batches and lengths."""
    for size in bench.sizes:
        model = None
        for dtype, batch, positions in product(DTYPES, BATCHES, POSITIONS):
            row: Row = {"size": size.name, "dtype": dtype, "batch": batch, "positions": positions}
            is_goal = (size, dtype, positions) == (bench.main, "float32", SHORT)
            is_goal = is_goal and batch in (ONE, MANY)
            reason = bench.limits.reason_to_skip(size, batch, positions, dtype)
            if reason is not None and not is_goal:
                yield row | {"skipped": reason}
                continue
            if model is None:
                model = hooked(size, bench.device)
            if model.cfg.dtype != DTYPES[dtype]:
                model.to(DTYPES[dtype], print_details=False)
            asked = bench.ask(size, batch, positions)
            yield row | _numbers_or_reason(
                partial(against_floor, bench, model, asked, is_goal=is_goal)
            )


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
    groups = contestants.groups_of(contestants.capture(model, asked))
    runs: dict[str, Thunk] = {
        "ours": partial(contestants.lens, model, asked),
        "passes": partial(contestants.passes, model, asked),
        "product": partial(contestants.product, vectors, model.W_U),
        "capture": partial(contestants.capture, model, asked),
        "reading": partial(contestants.reading, model, groups),
    }
    timings = bench.interleave(runs, is_goal=is_goal)
    found = _times(timings)
    found["seconds"]["floor"] = timings.median(*FLOOR)
    return found | {
        "whole": timings.ratio(["ours"], FLOOR),
        "capture": timings.ratio(["capture"], ["passes"]),
        "reading": timings.ratio(["reading"], ["product"]),
    }


def orders(bench: Bench) -> Iterator[Row]:
    """The floor's product against the same product as its transpose."""
    size = bench.main
    weight = torch.ones(size.d_model, size.d_vocab, device=bench.device)
    for batch in (ONE, MANY):
        n_vectors = 2 * size.n_layers * batch * SHORT
        vectors = torch.ones(n_vectors, size.d_model, device=bench.device)
        runs: dict[str, Thunk] = {
            "product": partial(contestants.product, vectors, weight),
            "turned": partial(contestants.turned_product, vectors, weight),
        }
        timings = bench.interleave(runs)
        yield {
            "batch": batch,
            "vectors": n_vectors,
            **_times(timings),
            "turned_faster": timings.ratio(["product"], ["turned"]),
        }


# ------------------------------------------------------------------------------------------ lenses


def lenses(bench: Bench) -> Iterator[Row]:
    """The default, which reads both lenses, against the Logit Lens alone."""
    model = hooked(bench.main, bench.device)
    for batch in (ONE, MANY):
        asked = bench.ask(bench.main, batch, SHORT)
        timings = bench.interleave(
            {
                "one": partial(contestants.lens, model, asked),
                "both": partial(contestants.both_lenses, model, asked),
            }
        )
        yield {"batch": batch, **_times(timings), "slower": timings.ratio(["both"], ["one"])}


# -------------------------------------------------------------------------------------------- rank


def rank(bench: Bench) -> Iterator[Row]:
    """Rank of one gradient from its factors against that of the dense matrix."""
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
    yield {
        "shape": list(dense.shape),
        "ranks": {"ours": gradient.rank(), "dense": int(torch.linalg.matrix_rank(dense))},
        **times,
        "faster": timings.ratio(["dense"], ["ours"]) * RANKS,
    }


# ----------------------------------------------------------------------------------------- scaling


def scaling(bench: Bench) -> Iterator[Row]:
    """Our time against the number of prompts, of layers and of positions."""
    prompts = partial(_deepest, bench, BATCHES[-1], SCALED_LENGTH)
    positions = partial(_deepest, bench, ONE, SCALED_POSITIONS[-1])
    points: dict[str, dict[int, tuple[Size, int, int]]] = {
        "prompts": {n: (prompts(), n, SCALED_LENGTH) for n in BATCHES},
        "layers": {
            n: (replace(bench.main, n_layers=n), SCALED_PROMPTS, SCALED_LENGTH) for n in DEPTHS
        },
        "positions": {n: (positions(), ONE, n) for n in SCALED_POSITIONS},
    }
    for along, sizes in points.items():
        models = {size: hooked(size, bench.device) for size, _, _ in sizes.values()}
        runs: dict[str, Thunk] = {
            str(n): partial(contestants.lens, models[size], bench.ask(size, batch, positions))
            for n, (size, batch, positions) in sizes.items()
        }
        row: Row = {
            "along": along,
            "layers": sorted({size.n_layers for size, _, _ in sizes.values()}),
            "prompts": sorted({batch for _, batch, _ in sizes.values()}),
            "positions": sorted({positions for _, _, positions in sizes.values()}),
        }
        yield row | _numbers_or_reason(partial(_grown, bench, runs))


def _grown(bench: Bench, runs: Mapping[str, Thunk]) -> Row:
    found = _times(bench.interleave(runs))
    slope = log_slope({int(size): seconds for size, seconds in found["seconds"].items()})
    return found | {"slope": slope}


def _deepest(bench: Bench, batch: int, positions: int) -> Size:
    """The main size with as many layers as fit the limit, and with the fewest otherwise."""
    sizes = [replace(bench.main, n_layers=n_layers) for n_layers in DEPTHS]
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


def peak_memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of every contestant, each in a new process."""
    small, large = bench.main, replace(bench.main, d_vocab=LARGE_VOCABULARY)
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
        row: Row = {
            "contestant": contestant,
            "model": model,
            "d_vocab": size.d_vocab,
            "layers": size.n_layers,
            "batch": batch,
            "positions": SHORT,
        }
        on_bridge = model == "TransformerBridge"
        reason = memory.why_not_measured(bench.device)
        reason = reason or (contestants.why_no_tool() if on_bridge else None)
        if reason is not None:
            yield row | {"skipped": reason}
            continue
        case = memory.Case(contestant, model, size, batch, SHORT, bench.device)
        yield row | _numbers_or_reason(partial(_peaks, case))


def _peaks(case: memory.Case) -> Row:
    return {"bytes": asdict(memory.measure(case))}


# ------------------------------------------------------------------------------------------ phases


def where_time_goes(bench: Bench) -> Iterator[Row]:
    """Our time by phase, under torch's profiler."""
    model = hooked(bench.main, bench.device)
    for batch in (ONE, MANY):
        run = partial(contestants.lens, model, bench.ask(bench.main, batch, SHORT))
        run()
        yield {"batch": batch, "positions": SHORT, "seconds": phases(run, model, bench.device)}


def _times(timings: Timings) -> Row:
    """Median seconds of every contestant."""
    seconds = {name: timings.median(name) for name in timings.seconds}
    return {"rounds": timings.rounds, "seconds": seconds}


def _numbers_or_reason(measure: Callable[[], Row]) -> Row:
    """What was measured, or that the memory did not suffice for it."""
    try:
        return measure()
    except OutOfMemory as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError:
        return {"skipped": "ran out of the device's memory before anything was timed"}


def _logged(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        log.info("%s %s", name, row)
        yield row
        # A model that is no longer needed goes before the next one comes.
        gc.collect()


def _nothing() -> None:
    """Waits for no device."""
