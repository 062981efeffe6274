"""The page docs/benchmarks.md, generated from the results files of all machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Row
from benchmarks.contestants import PIECE_BYTES, K
from benchmarks.figures import MANY, RANKS, SHORT
from benchmarks.goals import GOALS, Goal, NotMeasured, Results, beyond_forward
from benchmarks.phases import PHASES
from benchmarks.results import read_results
from benchmarks.sizes import SMALL

_NO_ROW = "·"

HEAD = f"""\
# Benchmarks

Generated, do not edit. `make bench` runs the benchmarks, writes `docs/benchmarks/DEVICE.json`, and
generates this page from all such files. `make gpu-check` runs on a GPU, large sizes first, for
seven minutes. `python -m benchmarks --help` lists the options.

Models have random weights and the sizes of well-known models, because time and memory do not depend
on the weights. Prompts are random tokens of equal length. All contestants project the gradients of
`W_in` and `W_out` of all layers for `-log p(target)` after each prompt: they apply the final norm
and the unembedding to every `x_i` of `W_in` and every `delta_i` of `W_out`, and compute the top
{K}, the bottom {K} and the rank of the target. `tests/test_benchmarks.py` checks that they agree.

- **ours** is `backward_lens_tl.backward_lens(model, prompts, target, projection="logit_lens")`.
- **tool** is `transformer_lens.tools.analysis.BackwardLens(model).analyze(...)` of TransformerLens
  3.9. It supports one prompt and a raw GPT-2 `TransformerBridge`; ours uses the same bridge and
  texts in this comparison.
- **authors' way** is a full backward pass with the gradients of all parameters, followed by a loop
  over the vectors, one prompt at a time. It follows the paper's description and is not the authors'
  code. It uses a `HookedTransformer`, like everything below.
- **floor** is a lower bound: a forward pass of the whole batch, one `autograd.grad` of the summed
  losses with respect to the outputs of `W_in` and `W_out` without this package's hooks, and one
  product of all spanning vectors with `W_U`, without norm, tokens or ranks. If the scores exceed
  {PIECE_BYTES / 2**30:g} GiB, the product is computed in pieces of that size.

Contestants alternate on the same model, in the opposite order every second round. Each ratio is the
median of the ratios per round, so that a slowdown of the machine affects both sides. The first
round is a warm-up and not counted, unless a cell is so slow that there is no time for a second one.
Parameters require gradients, as in a newly loaded model.

`[n]` refers to the reason for a missing number at the end of the page. `{_NO_ROW}`: not measured.
"""

PEERS = f"""\
## One prompt at a time

Milliseconds per prompt of {SHORT} tokens. *batch* is the time of ours for {MANY} prompts at once,
divided by {MANY}. The last two columns are the speedups of ours, for one prompt and in the batch.
"""

GRID = """\
## Against the floor

Ratios of the times of ours and the floor: **whole** for everything, **capture** for the forward and
backward pass, **reading** for our projection with top, bottom and ranks relative to the floor's
product. Below 1, ours is faster. *ours* is in milliseconds per prompt.
"""

ORDERS = """\
### The transposed product

The floor's product can also be computed as its transpose, `W_U^T V^T`. Which one is faster depends
on the machine's library. The table has the speedup of the transposed product. The ratio of our
reading to the transposed product is *reading* times this number.
"""

MEMORY = """\
## Peak memory

In MB (10^6 bytes). Each contestant runs in its own process. Its peak is measured relative to the
memory in use after loading the model and one forward pass without gradients. *forward* is the peak
of a second such pass in the same process, and *beyond* is the difference. On a CPU this is resident
memory, whose peak is reset before the run; on a GPU it is the memory allocated by torch.
"""

SCALING = """\
## Scaling

Milliseconds of ours, in total and per unit, in float32. The slope of log time over log size, by
least squares, is 1 if time is proportional to size, and smaller if there is a fixed cost, such as
the embedding and the unembedding when the number of layers varies.
"""

PHASE = f"""\
## Where the time goes

Milliseconds of ours under torch's profiler, {SMALL.name} in float32, prompts of {SHORT} tokens.
*forward* is the model and all tensor operations before the backward pass. After the backward pass,
*product* is all matrix products, and *top, bottom, ranks* is all other operations: the final norm,
the selection of tokens, the ranks and the checks of the factors. *everything else* is time without
tensor operations: Python code, the profiler, token texts.
"""

LENSES = f"""\
## Several lenses

By default, the logit lens and the normalized lens are both computed. The Jacobian Lens, here with
identities, carries the vectors of each layer before one product with the unembedding. Prompts
of {SHORT} tokens.
"""

RANK = f"""\
## Rank

`gradient.rank()` uses the factors of one prompt; the time is for {RANKS} calls in a row divided by
their number. `torch.linalg.matrix_rank` uses the dense gradient, which is computed beforehand.
"""


class Notes:
    """Reasons, numbered by first use."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        """The mark of a reason."""
        return f"[{self._numbers.setdefault(reason, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        """The numbered reasons."""
        return [f"{number}. {reason}" for reason, number in self._numbers.items()]


def write_page(folder: Path) -> Path:
    """Generate the page from all results files.

    Args:
        folder: The folder with `benchmarks/*.json`.

    Returns:
        The page, `benchmarks.md` in the folder.
    """
    page = folder / "benchmarks.md"
    page.write_text(render(read_results(folder)), encoding="utf-8")
    return page


def render(machines: Mapping[str, Results]) -> str:
    """Render the page.

    Args:
        machines: Results by kind.

    Returns:
        The page in Markdown.
    """
    notes = Notes()
    sections = [
        HEAD,
        _machines(machines),
        "## Goals\n",
        _goals(machines, notes),
        PEERS,
        _peers(machines, notes),
        LENSES,
        _lenses(machines, notes),
        RANK,
        _rank(machines, notes),
        GRID,
        _grid(machines, notes),
        ORDERS,
        _orders(machines, notes),
        PHASE,
        _phases(machines, notes),
        SCALING,
        _scaling(machines, notes),
        MEMORY,
        _memory(machines, notes),
        "## Missing numbers\n",
        "\n".join(notes.lines()) or "Everything was measured.",
    ]
    return "\n".join(sections) + "\n"


# ---------------------------------------------------------------------------------------- sections


def _machines(machines: Mapping[str, Results]) -> str:
    lines = ["## Machines\n"]
    for kind, results in machines.items():
        parts = (f"{name}: {value}" for name, value in results["machine"].items())
        made_with = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
        lines += [
            f"- **{kind}**, {results['date']}, `{results['command']}`",
            f"  - {'; '.join(parts)}",
            f"  - {made_with}",
        ]
        lines += [
            f"  - repeated {', '.join(again['figures'])}: {again['date']}, `{again['command']}`"
            for again in results.get("again", ())
        ]
    return "\n".join(lines) + "\n"


def _goals(machines: Mapping[str, Results], notes: Notes) -> str:
    def cells(goal: Goal) -> list[str]:
        texts = []
        for results in machines.values():
            try:
                value = goal.measure(results)
            except NotMeasured as error:
                texts += [notes.mark(str(error)), "", ""]
            else:
                reached = "yes" if goal.is_reached(value) else "**no**"
                texts += [number(value), reached, at_floor(goal, results)]
        return texts

    def at_floor(goal: Goal, results: Results) -> str:
        try:
            return _NO_ROW if goal.at_floor is None else number(goal.at_floor(results))
        except NotMeasured as error:
            return notes.mark(str(error))

    columns = ("", "reached", "the floor's")
    head = ["", "goal", *(f"{kind} {text}".strip() for kind in machines for text in columns)]
    body = [
        [goal.what, f"at {'least' if goal.is_lower else 'most'} {goal.bound:g}", *cells(goal)]
        for goal in GOALS
    ]
    about = (
        f"{SMALL.name}, prompts of {SHORT} tokens, all layers and both matrices, float32. For\n"
        "missed goals, see *Where the time goes*. *The floor's* is the value that the floor would "
        "reach;\n"
        "only fewer or better ordered operations could exceed it.\n"
    )
    return f"{about}\n{table(head, body)}"


def _peers(machines: Mapping[str, Results], notes: Notes) -> str:
    names = ("ours", "batch", "peer", "times as fast", "in the batch")

    def numbers(row: Row) -> list[str]:
        batch = row["seconds"].get("batch")
        return [
            milliseconds(row["seconds"]["ours"]),
            _NO_ROW if batch is None else milliseconds(batch / row["batch"]),
            milliseconds(row["seconds"]["peer"]),
            number(row["faster"]),
            _NO_ROW if batch is None else number(row["faster_in_batch"]),
        ]

    return _by_machine(machines, "peers", ("size", "dtype", "peer"), names, numbers, notes)


def _grid(machines: Mapping[str, Results], notes: Notes) -> str:
    names = ("whole", "capture", "reading", "ours", "rounds")

    def numbers(row: Row) -> list[str]:
        ours = milliseconds(row["seconds"]["ours"] / row["batch"])
        ratios = [number(row[name]) for name in ("whole", "capture", "reading")]
        return [*ratios, ours, str(row["rounds"])]

    keys = ("size", "dtype", "batch", "positions")
    return _by_machine(machines, "grid", keys, names, numbers, notes)


def _orders(machines: Mapping[str, Results], notes: Notes) -> str:
    def numbers(row: Row) -> list[str]:
        return [number(row["turned_faster"])]

    return _by_machine(machines, "orders", ("batch", "vectors"), ("times as fast",), numbers, notes)


def _lenses(machines: Mapping[str, Results], notes: Notes) -> str:
    def numbers(row: Row) -> list[str]:
        one, both, carried = (
            milliseconds(row["seconds"][name] / row["batch"]) for name in ("one", "both", "carried")
        )
        return [one, both, number(row["slower"]), carried, number(row["carried_slower"])]

    names = (
        "logit lens, ms per prompt",
        "both",
        "times as long",
        "Jacobian Lens",
        "times as long as the logit lens",
    )
    return _by_machine(machines, "lenses", ("batch",), names, numbers, notes)


def _rank(machines: Mapping[str, Results], notes: Notes) -> str:
    def numbers(row: Row) -> list[str]:
        return [
            f"{row['ranks']['ours']}, {row['ranks']['dense']}",
            milliseconds(row["seconds"]["ours"]),
            milliseconds(row["seconds"]["dense"]),
            number(row["faster"]),
        ]

    names = ("ranks", "ours, ms", "dense, ms", "times as fast")
    return _by_machine(machines, "rank", ("shape",), names, numbers, notes)


def _phases(machines: Mapping[str, Results], notes: Notes) -> str:
    def numbers(row: Row) -> list[str]:
        whole = sum(row["seconds"].values())
        return [
            f"{milliseconds(row['seconds'][phase])} ({row['seconds'][phase] / whole:.0%})"
            for phase in PHASES
        ]

    return _by_machine(machines, "phases", ("batch",), PHASES, numbers, notes)


def _scaling(machines: Mapping[str, Results], notes: Notes) -> str:
    lines = []
    for kind, results in machines.items():
        for row in results.get("scaling", ()):
            fixed = ", ".join(
                f"{row[name][0]} {name}"
                for name in ("layers", "prompts", "positions")
                if name != row["along"]
            )
            title = f"**{kind}, {row['along']}** ({fixed})"
            if "skipped" in row:
                lines.append(f"{title}: {notes.mark(row['skipped'])}\n")
                continue
            points = {int(size): seconds for size, seconds in row["seconds"].items()}
            head = [row["along"], *map(str, points)]
            body = [
                ["ms", *(milliseconds(seconds) for seconds in points.values())],
                ["ms per unit", *(milliseconds(time / size) for size, time in points.items())],
            ]
            rounds = f"rounds: {row['rounds']}"
            lines.append(f"{title}: slope {row['slope']:.3f}; {rounds}\n\n{table(head, body)}")
    return "\n".join(lines)


def _memory(machines: Mapping[str, Results], notes: Notes) -> str:
    def numbers(row: Row) -> list[str]:
        peaks = (row["bytes"]["contestant"], row["bytes"]["forward"])
        return [*(f"{peak / 1e6:.0f}" for peak in peaks), f"{beyond_forward(row):.0f}"]

    keys = ("contestant", "model", "d_vocab", "layers", "batch", "positions")
    return _by_machine(machines, "memory", keys, ("peak", "forward", "beyond"), numbers, notes)


# ------------------------------------------------------------------------------------------ tables


def _by_machine(
    machines: Mapping[str, Results],
    figure: str,
    keys: Sequence[str],
    names: Sequence[str],
    numbers: Callable[[Row], list[str]],
    notes: Notes,
) -> str:
    """A table with the rows of all machines, and columns per machine.

    Args:
        machines: Results by kind.
        figure: The figure.
        keys: Columns that identify a row.
        names: Names of the columns per machine.
        numbers: Function that returns their text for a row with numbers.
        notes: Collects the reasons of rows without numbers.

    Returns:
        The table in Markdown.
    """
    rows = {
        kind: {tuple(str(row[key]) for key in keys): row for row in results.get(figure, ())}
        for kind, results in machines.items()
    }
    body = []
    for about in dict.fromkeys(key for by_key in rows.values() for key in by_key):
        cells: list[str] = []
        for by_key in rows.values():
            row: Any = by_key.get(about)
            if row is None or "skipped" in row:
                mark = _NO_ROW if row is None else notes.mark(row["skipped"])
                cells += [mark, *[""] * (len(names) - 1)]
            else:
                cells += numbers(row)
        body.append([*about, *cells])
    return table([*keys, *(f"{kind}<br>{name}" for kind in machines for name in names)], body)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    return number(1000 * seconds)
