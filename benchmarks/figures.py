"""The figures of the benchmark, as rows for the results file.

A row that could not be measured has the reason under `skipped` and no numbers.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from benchmarks import contestants, memory
from benchmarks.bench import BATCHES, Bench, Cell, NotRun, Row
from benchmarks.phases import phases
from benchmarks.sizes import DTYPES, Question, Size, bridge, hooked
from benchmarks.timing import OutOfMemory, Thunk, Timings

ONE, MANY, SHORT = 1, 32, 10
"""Batches and prompt length of the goals."""

SCALED_POSITIONS = (10, 50, 100, 250, 500)
SCALED_PROMPTS, SCALED_LENGTH = 8, 50

FLOOR = ("passes", "product")

RANKS = 100
"""Number of ranks per measurement, because one is too fast to be timed."""

log = logging.getLogger(__name__)

FIGURES = ("peers", "grid", "lenses", "rank", "orders", "scaling", "memory", "phases")
"""Names of all figures."""


def measure(bench: Bench, name: str) -> Iterator[Row]:
    """Measure a figure.

    Args:
        bench: The run.
        name: Name of the figure.

    Yields:
        The rows, each as soon as it is measured.
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
    """The numbers of a row, or why it has none."""
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
    """Ours compared with TransformerLens's tool and the authors' way, one prompt at a time."""
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
        "peer": _reporting_errors(partial(other, model, one)),
    }
    if is_goal or bench.limits.reason_to_skip(size, MANY, SHORT, dtype) is None:
        runs["batch"] = partial(lens, model, many)
    timings = bench.interleave(runs, is_goal=is_goal)
    found = _times(timings) | {"faster": timings.ratio(["peer"], ["ours"])}
    if "batch" in runs:
        found["faster_in_batch"] = MANY * timings.ratio(["peer"], ["batch"])
    return found


def _reporting_errors(peer: Thunk) -> Thunk:
    """A peer whose own errors are the reason why the row is skipped."""

    def run() -> object:
        try:
            return peer()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise NotRun(f"the peer raises {type(error).__name__}: {first}") from error

    return run


# -------------------------------------------------------------------------------------------- grid


def grid(bench: Bench) -> Iterator[Cell]:
    """Ours compared with the floor, by size, dtype, batch and prompt length."""
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
    """Ours and its two phases compared with the floor and its two phases.

    Args:
        bench: The run.
        model: A `HookedTransformer`.
        asked: The prompts.
        is_goal: Whether a goal depends on it.

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
    """The floor's product compared with the same product as its transpose."""
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
    """Both lenses, the default, and a Jacobian Lens, compared with the Logit Lens alone."""
    build = cache(partial(hooked, bench.main, bench.device))
    for batch in (ONE, MANY):
        asked = bench.ask(bench.main, batch, SHORT)
        yield Cell({"batch": batch}, partial(_more, bench, build, asked))


def _more(bench: Bench, build: Callable[[], Any], asked: Question) -> Row:
    model = build()
    carrying = contestants.identities(bench.main)
    runs: dict[str, Thunk] = {
        "one": partial(contestants.lens, model, asked),
        "both": partial(contestants.both_lenses, model, asked),
        "carried": partial(contestants.carried_lens, model, asked, carrying),
    }
    timings = bench.interleave(runs, is_goal=True)
    return _times(timings) | {
        "slower": timings.ratio(["both"], ["one"]),
        "carried_slower": timings.ratio(["carried"], ["one"]),
    }


# -------------------------------------------------------------------------------------------- rank


def rank(bench: Bench) -> Iterator[Cell]:
    """Rank of one gradient from its factors, compared with the rank of the dense matrix."""
    yield Cell({"shape": [bench.main.d_mlp, bench.main.d_model]}, partial(_ranks, bench))


def _ranks(bench: Bench) -> Row:
    asked = bench.ask(bench.main, ONE, SHORT)
    captured = contestants.capture(hooked(bench.main, bench.device), asked)
    gradient = captured["W_out", bench.main.n_layers // 2]
    dense = gradient.dense()
    timings = bench.interleave(
        {
            # A new object each time, without cached properties.
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
    """Our time by number of prompts, layers and positions."""
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
"""Size of the model, number of prompts and prompt length."""


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
    """The main size with as many layers as the limit allows, at least the fewest."""
    sizes = [replace(bench.main, n_layers=n_layers) for n_layers in bench.depths]
    fitting = [
        size
        for size in sizes
        if bench.limits.reason_to_skip(size, batch, positions, "float32") is None
    ]
    return fitting[-1] if fitting else sizes[0]


def log_slope(seconds: Mapping[int, float]) -> float:
    """Slope of log time over log size, by least squares; 1 if time is proportional to size.

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
    """Peak memory of every contestant, each in its own process."""
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
    """Our time by phase, with torch's profiler."""
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
    """Number of rounds, and median seconds of every contestant."""
    seconds = {name: timings.median(name) for name in timings.seconds}
    return {"rounds": timings.rounds, "seconds": seconds}
