"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, machine, memory, report
from benchmarks.bench import BATCHES, POSITIONS, Bench
from benchmarks.estimates import limits_of
from benchmarks.results import read_results, results_path, write_results
from benchmarks.sizes import LLAMA, MEDIUM, SIZES, SMALL, XL, shrunk
from benchmarks.timing import settled

DOCS = Path(__file__).parents[1] / "docs"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """Default settings of a run.

    Attributes:
        sizes: Names of the grid's sizes.
        rounds: Largest number of rounds.
        limit: Largest number of seconds for one run of the floor.
        order: Names of the figures, in the order of measurement.
        batches: Batches of the grid.
        positions: Prompt lengths of the grid.
        peer_sizes: Names of the sizes for the comparison with the peers. Sizes that are not in the
            grid are left out, except for the one that the goals use.
        peer_dtypes: Names of the dtypes for the comparison with the peers.
    """

    sizes: tuple[str, ...]
    rounds: int
    limit: float
    order: tuple[str, ...] = figures.FIGURES
    batches: tuple[int, ...] = BATCHES
    positions: tuple[int, ...] = POSITIONS
    peer_sizes: tuple[str, ...] = (SMALL.name, MEDIUM.name)
    peer_dtypes: tuple[str, ...] = ("float32",)


# About twenty minutes, and about five, on two cores.
FULL = Preset(sizes=tuple(SIZES), rounds=5, limit=10)
QUICK = Preset(sizes=(SMALL.name,), rounds=2, limit=3)

# Large sizes first, because a run with a time limit may not reach the end.
GPU = Preset(
    sizes=(XL.name, LLAMA.name, SMALL.name),
    rounds=5,
    limit=2,
    order=("grid", "peers", "lenses", "rank", "orders", "scaling", "phases", "memory"),
    batches=(figures.ONE, figures.MANY),
    positions=(figures.SHORT, 50),
    peer_sizes=(XL.name, LLAMA.name, SMALL.name),
    peer_dtypes=("float32", "bfloat16"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on every device, and write the results and the page.

    Args:
        arguments: Command-line arguments; `None` for those of this process.

    Raises:
        SystemExit: With status 1 if a figure failed, after the others were measured.
    """
    until = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    until += options.seconds
    out = options.out or DOCS
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.page:
        log.info("wrote %s", report.write_page(out))
        return
    devices = options.devices or _devices()
    _check(parser, options, devices)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks", *given])
    failed: list[str] = []
    for device in devices:
        bench, names = _bench(options, device, until)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        if options.only:
            before = read_results(out)[device]
            again = {"figures": options.only, "date": date, "command": command}
            results = {**before, "again": [*before.get("again", ()), again]}
        else:
            results = {
                "date": date,
                "command": command,
                "machine": machine.describe(device),
                "versions": machine.versions(),
            }
        with settled():
            failed += _measure(bench, names, results, out)
    log.info("wrote %s", report.write_page(out))
    if failed:
        log.error("failed: %s", ", ".join(failed))
        raise SystemExit(1)


def _measure(bench: Bench, names: Sequence[str], results: dict[str, Any], out: Path) -> list[str]:
    """Measure figures, and write the results file after each.

    Args:
        bench: The run.
        names: Names of the figures.
        results: The results, to which rows are added.
        out: Folder for the results file.

    Returns:
        Names of the figures that raised an error. They keep their rows up to then.
    """
    failed = []
    for name in names:
        rows = results[name] = []
        try:
            for row in figures.measure(bench, name):
                rows.append(row)
        # A machine with a GPU may be available for minutes only, so the other figures are still
        # measured. The command fails at the end.
        except Exception:
            log.exception("%s failed", name)
            failed.append(name)
        log.info("wrote %s", write_results(out, bench.device, results))
    return failed


def _bench(options: argparse.Namespace, device: str, until: float) -> tuple[Bench, Sequence[str]]:
    """The run on one device, and the names of its figures."""
    preset = GPU if options.gpu else QUICK if options.quick else FULL
    sizes = [SIZES[name] for name in options.sizes or preset.sizes]
    bench = Bench(
        device=device,
        sizes=sizes,
        rounds=options.rounds or preset.rounds,
        limits=limits_of(device, options.limit or preset.limit),
        batches=preset.batches,
        positions=preset.positions,
        peer_sizes=[
            SIZES[name]
            for name in preset.peer_sizes
            if SIZES[name] in sizes or SIZES[name] == SMALL
        ],
        peer_dtypes=preset.peer_dtypes,
        until=until,
    )
    names: Sequence[str] = options.only or preset.order
    if not options.dry_run:
        return bench, names
    dry = replace(
        bench,
        main=shrunk(bench.main),
        sizes=[shrunk(size) for size in sizes],
        peer_sizes=[shrunk(size) for size in bench.peer_sizes],
        positions=preset.positions[:1],
        depths=(1, 2, 3),
        large_vocabulary=2**12,
        cell_seconds=0.0,
        goal_seconds=0.0,
        rounds=1,
        peaks=memory.measure_here,
    )
    return dry, names


def _check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, devices: Sequence[str]
) -> None:
    """Exit with an error if the options cannot be used here."""
    missing = [device for device in devices if device not in _devices()]
    if missing:
        parser.error(f"torch sees no {missing[0]} here; allowed: {', '.join(_devices())}")
    if options.dry_run and (options.out is None or options.out.resolve() == DOCS.resolve()):
        parser.error("--dry-run measures tiny models; pass --out with a folder other than docs")
    if find_spec("transformer_lens.HookedTransformer") is None:
        parser.error(
            "the floor runs on HookedTransformer, which ended with TransformerLens 3.9; install "
            "3.9 or older, as in .venv"
        )
    for device in devices if options.only else ():
        path = results_path(options.out or DOCS, device)
        if not path.is_file():
            parser.error(
                f"--only keeps the other figures of {path}, which does not exist; leave out --only"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare speed and memory with other implementations.",
    )
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument(
        "--quick", action="store_true", help=f"{SMALL.name} only, few rounds, short runs"
    )
    presets.add_argument(
        "--gpu",
        action="store_true",
        help=f"{', '.join(GPU.sizes)} in {' and '.join(GPU.peer_dtypes)}, compared with the floor "
        "and the peers, then what the goals need: about five minutes on a large GPU",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        metavar="SIZE",
        help=f"sizes of the grid: {', '.join(SIZES)}; {MEDIUM.name} (with --gpu, the preset's) is "
        f"also compared with the peers, and the other figures use {SMALL.name}",
    )
    parser.add_argument(
        "--rounds",
        type=_positive_integer,
        help=f"maximum rounds (default: {FULL.rounds}, quick {QUICK.rounds}, gpu {GPU.rounds})",
    )
    parser.add_argument(
        "--limit",
        type=_positive_number,
        metavar="SECONDS",
        help="skip cells in which one run of the floor would take longer (default: "
        f"{FULL.limit:g}, quick {QUICK.limit:g}, gpu {GPU.limit:g})",
    )
    parser.add_argument(
        "--seconds",
        type=_positive_number,
        default=math.inf,
        metavar="SECONDS",
        help="skip the rows that have not started after this time (default: no limit)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=("cpu", "cuda"),
        metavar="DEVICE",
        help=f"cpu, cuda (default: all available devices, {', '.join(_devices())})",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=figures.FIGURES,
        metavar="FIGURE",
        help=f"measure these figures again and keep the others of an earlier run: "
        f"{', '.join(figures.FIGURES)}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for benchmarks/DEVICE.json and benchmarks.md (default: docs)",
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="only generate the page from the existing results files",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run tiny models for one round as a test; the numbers are meaningless",
    )
    return parser


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; pass 1 or more")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; pass a number above 0")
    return value


if __name__ == "__main__":
    main()
