"""The check on a GPU: tests, then benchmarks, within a time limit.

`tests/test_cuda.py` runs first, followed by `python -m benchmarks --gpu`. Rows that do not fit the
time limit are written as skipped, and a step that hangs is killed.

It needs a machine with one NVIDIA GPU, and no network. Its Python (3.10 or newer) has torch for
CUDA, transformers 5.9 or newer, pytest, hypothesis, accelerate, einops, jaxtyping, pandas, pyarrow,
rich, safetensors, sentencepiece, tqdm and xxhash. The remaining packages are copied as wheels:
`make gpu-wheels` downloads them into the folder `gpu-wheels`, 7 MB. Copy the repository with this
folder, 30 MB in all without `.git` and environments, and run there

    python3 -m benchmarks.gpu_check --out FOLDER

Then copy `FOLDER/benchmarks/cuda.json` to `docs/benchmarks` here, and generate the page with
`python -m benchmarks --page`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Only the standard library: the wheels are not installed yet.

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "gpu-wheels"

SECONDS = 420.0
"""Total time."""

TESTS_SECONDS = 150.0
"""Time for the tests at most. The measurements get the rest."""

RESERVE = 40.0
"""Time for the last row, between the deadline of the measurements and the total time."""


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    Attributes:
        what: The step.
        seconds: Its duration.
        problem: What went wrong; `None` if it passed.
    """

    what: str
    seconds: float
    problem: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.problem or 'passed'} ({self.seconds:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps and print how each of them ended.

    Args:
        arguments: Command-line arguments; `None` for those of this process.

    Raises:
        SystemExit: With status 1 if a step failed.
    """
    options = _parser().parse_args(arguments)
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as temporary:
        site, dry_out = Path(temporary) / "site", Path(temporary) / "results"
        ended: list[Ended] = []

        def step(what: str, command: Sequence[str], at_most: float) -> None:
            seconds = min(at_most, until - time.monotonic())
            ended.append(run(what, command, seconds, environment(site, dry_run=options.dry_run)))

        if any(WHEELS.glob("*.whl")):
            step("wheels", install(site), SECONDS)
        step("tests", tests(), TESTS_SECONDS)
        out = dry_out if options.dry_run else options.out
        left = max(1.0, until - time.monotonic() - RESERVE)
        step("measurements", measurements(left, out, dry_run=options.dry_run), SECONDS)
    sys.stdout.write("".join(f"{each}\n" for each in ended))
    if any(each.problem for each in ended):
        raise SystemExit(1)


def install(site: Path) -> list[str]:
    """The command that unpacks the wheels.

    Args:
        site: Target folder.

    Returns:
        The command.
    """
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    return [*pip, "--target", str(site), *map(str, sorted(WHEELS.glob("*.whl")))]


def tests() -> list[str]:
    """The command that runs the tests."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "cuda",
        "--durations=5",
        "tests/test_cuda.py",
    ]


def measurements(seconds: float, out: Path | None, *, dry_run: bool) -> list[str]:
    """The command for the measurements.

    Args:
        seconds: Time after which no further row starts.
        out: Folder for results and page; `None` for docs.
        dry_run: Whether to run tiny models on the CPU instead.

    Returns:
        The command.
    """
    command = [sys.executable, "-m", "benchmarks", "--gpu", "--seconds", f"{seconds:.0f}"]
    command += ["--devices", "cpu" if dry_run else "cuda"]
    command += [] if out is None else ["--out", str(out)]
    return [*command, "--dry-run"] if dry_run else command


def environment(site: Path, *, dry_run: bool = False) -> dict[str, str]:
    """Environment of a step: offline, with the wheels, and with the tests on the right device.

    Args:
        site: Folder with the unpacked wheels.
        dry_run: Whether to use the CPU instead of the GPU.

    Returns:
        The variables.
    """
    # The folder of wheels has the package's own metadata, in which its version is.
    paths = [str(ROOT), str(site), str(WHEELS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "BACKWARD_LENS_DEVICE": "cpu" if dry_run else "cuda",
    }


def run(what: str, command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> Ended:
    """Run a step, and stop it and its child processes when its time is up.

    Args:
        what: The step.
        command: The command, which runs in the repository's root.
        seconds: Time for the step.
        variables: Environment variables.

    Returns:
        How it ended.
    """
    start = time.monotonic()
    if seconds <= 0:
        return Ended(what, 0.0, "not started: the time limit was reached")
    with subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True) as process:
        try:
            status = process.wait(seconds)
            problem = None if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            problem = f"FAILED: stopped after {seconds:.0f} s"
        finally:
            # Also ends child processes that are still running.
            _end(process.pid)
    return Ended(what, time.monotonic() - start, problem)


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="total time in seconds (default: %(default).0f)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for benchmarks/cuda.json and benchmarks.md (default: docs)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the tests and tiny models on the CPU, and keep no results",
    )
    return parser


if __name__ == "__main__":
    main()
