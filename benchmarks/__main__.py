"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import figures, machine, report
from benchmarks.estimates import limits_of
from benchmarks.sizes import MEDIUM, SIZES, SMALL

DOCS = Path(__file__).parents[1] / "docs"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """What is measured unless options say otherwise.

    Attributes:
        sizes: Sizes of the grid.
        rounds: Rounds at most.
        limit: Seconds that one run of the floor may take.
    """

    sizes: tuple[str, ...]
    rounds: int
    limit: float


# Some twenty minutes, and some five, on two cores.
FULL = Preset(sizes=tuple(SIZES), rounds=5, limit=10)
QUICK = Preset(sizes=(SMALL.name,), rounds=2, limit=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on every device, and write the results and the page.

    Args:
        arguments: Of the command; by default those of this process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    preset = QUICK if options.quick else FULL
    devices = options.devices or _devices()
    missing = [device for device in devices if device not in _devices()]
    if missing:
        parser.error(f"torch sees no {missing[0]} here; allowed: {', '.join(_devices())}")
    if find_spec("transformer_lens.HookedTransformer") is None:
        parser.error(
            "the floor runs on HookedTransformer, which ended with TransformerLens 3.9; install "
            "3.9 or older, as in .venv"
        )
    for device in devices if options.only else ():
        if not report.results_path(options.out, device).is_file():
            parser.error(
                f"{report.results_path(options.out, device)} is not there, so there is nothing "
                "that --only could keep; leave it out"
            )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks", *given])
    for device in devices:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        bench = figures.Bench(
            device=device,
            sizes=[SIZES[name] for name in options.sizes or preset.sizes],
            rounds=options.rounds or preset.rounds,
            limits=limits_of(device, options.limit or preset.limit),
        )
        if options.only:
            before = report.read_results(options.out)[device]
            again = {"figures": options.only, "date": date, "command": command}
            results = {**before, "again": [*before.get("again", ()), again]}
        else:
            results = {
                "date": date,
                "command": command,
                "machine": machine.describe(device),
                "versions": machine.versions(),
            }
        results |= figures.measure(bench, options.only or figures.FIGURES)
        log.info("wrote %s", report.write_results(options.out, device, results))
    log.info("wrote %s", report.write_page(options.out))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory against other ways to the same answers.",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{SMALL.name} only, few rounds, short runs"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        metavar="SIZE",
        help=f"sizes of the grid: {', '.join(SIZES)}; {MEDIUM.name} is timed against the "
        f"peers too, and the other figures are of {SMALL.name}",
    )
    parser.add_argument(
        "--rounds",
        type=_positive_integer,
        help=f"rounds at most (default: {FULL.rounds}, quick {QUICK.rounds})",
    )
    parser.add_argument(
        "--limit",
        type=_positive_number,
        metavar="SECONDS",
        help="leave out a cell where one run of the floor would take longer (default: "
        f"{FULL.limit:g}, quick {QUICK.limit:g})",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=("cpu", "cuda"),
        metavar="DEVICE",
        help=f"cpu, cuda (default: all that are here, {', '.join(_devices())})",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=figures.FIGURES,
        metavar="FIGURE",
        help=f"measure these again and keep the others of an earlier run: "
        f"{', '.join(figures.FIGURES)}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DOCS,
        metavar="FOLDER",
        help="gets benchmarks/DEVICE.json and benchmarks.md (default: docs)",
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
