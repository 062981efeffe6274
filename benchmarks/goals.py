"""The goals, and the measurements that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import LARGE_VOCABULARY, Row
from benchmarks.figures import MANY, ONE, SHORT
from benchmarks.sizes import SMALL

Results = Mapping[str, Any]
"""Contents of a results file: the rows of each figure, the machine, versions and the command."""

_MB = 1e6


class NotMeasured(Exception):
    """Why a number is missing."""


@dataclass(frozen=True)
class Goal:
    """A bound for a measurement.

    Attributes:
        what: What is measured, with its unit.
        bound: The bound.
        is_lower: Whether it is a lower bound; otherwise it is an upper bound.
        measure: Function that finds the number in the results, or raises `NotMeasured`.
        at_floor: Function that finds the number that the floor would reach; only for comparisons
            with other implementations.
    """

    what: str
    bound: float
    is_lower: bool
    measure: Callable[[Results], float]
    at_floor: Callable[[Results], float] | None = None

    def is_reached(self, value: float) -> bool:
        """Whether a number satisfies the bound."""
        return value >= self.bound if self.is_lower else value <= self.bound


def find(results: Results, figure: str, **wanted: object) -> Row:
    """Find a row of a figure.

    Args:
        results: The results.
        figure: Name of the figure.
        **wanted: Values that the row must have.

    Returns:
        The row.

    Raises:
        NotMeasured: If there is no such row, or it has no numbers.
    """
    for row in results.get(figure, ()):
        if wanted.items() <= row.items():
            if "skipped" in row:
                raise NotMeasured(row["skipped"])
            return dict(row)
    what = ", ".join(f"{name} {value}" for name, value in wanted.items())
    raise NotMeasured(f"this run had no {figure} of {what}")


def beyond_forward(row: Row) -> float:
    """Peak memory beyond that of a plain forward pass, in MB."""
    return float(row["bytes"]["contestant"] - row["bytes"]["forward"]) / _MB


def _peer_row(results: Results, peer: str) -> Row:
    return find(results, "peers", size=SMALL.name, dtype="float32", peer=peer)


def _peer(peer: str, number: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        return float(_peer_row(results, peer)[number])

    return measure


def _floor_against(peer: str, batch: int) -> Callable[[Results], float]:
    """Speedup of the floor over a peer, per prompt."""

    def measure(results: Results) -> float:
        theirs = _peer_row(results, peer)["seconds"]["peer"]
        return float(theirs * batch / _cell_row(results, batch)["seconds"]["floor"])

    return measure


def _cell_row(results: Results, batch: int) -> Row:
    cell = {"size": SMALL.name, "dtype": "float32", "batch": batch, "positions": SHORT}
    return find(results, "grid", **cell)


def _cell(batch: int, number: str) -> Callable[[Results], float]:
    return lambda results: float(_cell_row(results, batch)[number])


def _slope(along: str) -> Callable[[Results], float]:
    return lambda results: float(find(results, "scaling", along=along)["slope"])


def _rank(results: Results) -> float:
    return float(find(results, "rank")["faster"])


def _memory_of_the_tool(results: Results) -> float:
    ours, tool = (
        find(results, "memory", contestant=name)["bytes"]["contestant"]
        for name in ("ours, of texts", "tool")
    )
    return float(ours / tool)


def _memory_beyond(results: Results, d_vocab: int) -> float:
    row = find(results, "memory", contestant="ours", batch=MANY, d_vocab=d_vocab)
    return beyond_forward(row)


def _memory(results: Results) -> float:
    return _memory_beyond(results, SMALL.d_vocab)


def _memory_growth(results: Results) -> float:
    return _memory_beyond(results, LARGE_VOCABULARY) - _memory_beyond(results, SMALL.d_vocab)


_TOOL, _AUTHORS = "TransformerLens's tool", "the authors' way"

GOALS = (
    Goal(
        f"{ONE} prompt, times as fast as {_TOOL}",
        6,
        True,
        _peer("tool", "faster"),
        _floor_against("tool", ONE),
    ),
    Goal(
        f"{ONE} prompt, fraction of the extra peak memory of {_TOOL}",
        0.4,
        False,
        _memory_of_the_tool,
    ),
    Goal(
        f"a prompt of a batch of {MANY}, times as fast as {_TOOL}",
        15,
        True,
        _peer("tool", "faster_in_batch"),
        _floor_against("tool", MANY),
    ),
    Goal(
        f"a prompt of a batch of {MANY}, times as fast as {_AUTHORS}",
        25,
        True,
        _peer("authors' way", "faster_in_batch"),
        _floor_against("authors' way", MANY),
    ),
    Goal(f"{ONE} prompt, times as long as the floor", 1.5, False, _cell(ONE, "whole")),
    Goal(f"batch of {MANY}, times as long as the floor", 1.3, False, _cell(MANY, "whole")),
    Goal(
        f"batch of {MANY}, projection with top, bottom and ranks, times as long as the bare "
        "product",
        1.35,
        False,
        _cell(MANY, "reading"),
    ),
    Goal(
        f"batch of {MANY}, the Jacobian Lens, times as long as the Logit Lens",
        1.15,
        False,
        lambda results: float(find(results, "lenses", batch=MANY)["carried_slower"]),
    ),
    Goal(
        "rank of a `W_out` gradient, times as fast as `matrix_rank` of the dense matrix",
        200,
        True,
        _rank,
    ),
    Goal("slope of log time over log number of prompts", 1.1, False, _slope("prompts")),
    Goal("slope of log time over log number of layers", 1.1, False, _slope("layers")),
    Goal("slope of log time over log number of positions", 1.1, False, _slope("positions")),
    Goal(
        f"batch of {MANY}, MB of peak memory beyond the model and a plain forward pass",
        300,
        False,
        _memory,
    ),
    Goal(
        f"the same with a vocabulary of {LARGE_VOCABULARY:,}, MB more than with {SMALL.d_vocab:,}",
        0,
        False,
        _memory_growth,
    ),
)
