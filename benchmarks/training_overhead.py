"""Time that watching adds to a training step of SmolLM2.

``python -m benchmarks.training_overhead`` writes ``docs/training/overhead.json`` and the section
"Cost" of docs/training.md. Steps with and without the watch take turns on one model, in seconds of
the process on one thread, so other processes on the machine hardly matter.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backward_lens_tl.files.storage import write_text
from backward_lens_tl.models.gguf import read_gguf
from backward_lens_tl.models.smollm2 import download_smollm2, find_smollm2
from backward_lens_tl.training import TrainingRecord, TrainingWatch, watch
from benchmarks import machine
from benchmarks.report import table
from benchmarks.timing import Effort, Timings, interleave

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- cost: begin -->\n", "<!-- cost: end -->\n"
"""The generated part of docs/training.md is between these lines."""

SEQUENCES, TOKENS = 4, 128
MATRICES = ("W_out", "mlp", "all")
EVERY = 10
NONE, OTHER = "none", "not watched"
RECORDED = "W_out"
WITH_RECORD = f"{RECORDED}, recorded"
"""Kinds of steps, besides those that are named after the watched matrices."""

MODES = {"full": "full fine-tuning", "lora": "LoRA"}
RANK = 8
"""Of the LoRA, which adapts all matrices."""

MOST_WATCHED, MOST_OTHERWISE = 15.0, 1.0
"""Goals, in percent of a step."""

Row = Mapping[str, Any]

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results and the section.

    Args:
        arguments: Command-line arguments; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of steps (default: 8)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=tuple(MODES))
    parser.add_argument("--page", action="store_true", help="only write the section again")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = options.out / "training" / "overhead.json"
    if not options.page:
        torch.set_num_threads(1)
        for mode in options.modes:
            _write(path, mode, measure(*load(), mode, options.rounds))
    page = options.out / "training.md"
    found = json.loads(path.read_text(encoding="utf-8"))
    write_text(page, with_cost(page.read_text(encoding="utf-8"), found))


def _write(path: Path, mode: str, rows: Sequence[Row]) -> None:
    """Write the rows of one way to train, and keep those of the others."""
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    kept = [row for row in before if row["mode"] != mode]
    found = {
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        "sequences": SEQUENCES,
        "tokens": TOKENS,
        "rows": sorted([*kept, *rows], key=lambda row: list(MODES).index(row["mode"])),
    }
    write_text(path, json.dumps(found, indent=1) + "\n")


def load() -> tuple[Any, Any]:
    """SmolLM2 as a transformers model in float32, and its tokenizer."""
    path = find_smollm2() or download_smollm2()
    if path.is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        with TemporaryDirectory() as folder:
            _, model, tokenizer = read_gguf(path, Path(folder), with_weights=False)
    model.set_attn_implementation("sdpa")  # the default of transformers
    return model, tokenizer


def measure(
    model: Any, tokenizer: Any, mode: str, rounds: int, size: tuple[int, int] = (SEQUENCES, TOKENS)
) -> list[dict[str, Any]]:
    """Measure the steps of one way to train.

    Args:
        model: A transformers model, which is trained.
        tokenizer: Its tokenizer; `None` leaves the tokens out of the record.
        mode: A key of `MODES`.
        rounds: Number of rounds; each has every kind of step once.
        size: Number of sequences and tokens of a step.

    Returns:
        One row for each kind of step: without a watch, left out by a watch, watched for each choice
        of matrices, and watched with a record.
    """
    train = _training_step(_adapted(model) if mode == "lora" else model, size)
    train()  # the first step is slower, and allocates the optimizer's state
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        steps: dict[str, Callable[[], object]] = {NONE: train}
        for matrices in MATRICES:
            watched = stack.enter_context(watch(model, matrices, every=EVERY, tokenizer=tokenizer))
            watched.resume(1)
            steps[matrices] = partial(_watched_step, watched, train)
            if matrices == RECORDED:
                steps[OTHER] = partial(_other_step, watched, train)
                record = TrainingRecord(folder)
                steps[WITH_RECORD] = partial(_recorded_step, watched, train, record)
        effort = Effort(rounds, seconds=0, at_least=rounds)
        timings = interleave(steps, effort, clock=time.process_time)
    rows = [{"mode": mode, "steps": name, **_times(timings, name)} for name in steps]
    for row in rows:
        log.info("%s", json.dumps(row))
    return rows


def _training_step(model: Any, size: tuple[int, int]) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _watched_step(watched: TrainingWatch, train: Callable[[], object]) -> object:
    """A step with its hooks, whose gradients are dropped."""
    watched.resume(0)
    train()
    return watched.step()


def _other_step(watched: TrainingWatch, train: Callable[[], object]) -> object:
    """A step that the watch leaves out."""
    watched.resume(1)
    train()
    return watched.step()


def _recorded_step(
    watched: TrainingWatch, train: Callable[[], object], record: TrainingRecord
) -> object:
    """A step whose gradients are measured and written."""
    watched.resume(0)
    train()
    step = watched.step()
    return None if step is None else record.add(step)


def _times(timings: Timings, name: str) -> dict[str, Any]:
    seconds, plain = timings.seconds[name], timings.seconds[NONE]
    added = [100 * (own / other - 1) for own, other in zip(seconds, plain, strict=True)]
    return {
        "rounds": timings.rounds,
        "seconds": round(timings.median(name), 3),
        "added_percent": [round(each, 2) for each in (statistics.median(added), *_ends(added))],
    }


def _ends(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(draws)
    )
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def with_cost(text: str, found: Mapping[str, Any]) -> str:
    """Replace the generated part of docs/training.md.

    Args:
        text: The page.
        found: The results.

    Returns:
        The page with these results.
    """
    start, rest = text.split(BEGIN)
    return f"{start}{BEGIN}{section(found)}{END}{rest.partition(END)[2]}"


def section(found: Mapping[str, Any]) -> str:
    """Render the section.

    Args:
        found: The results.

    Returns:
        Markdown.
    """
    rows = found["rows"]
    head = ["training", "watched", "seconds per step", "added, percent", "average, percent"]
    body = [_cells(row) for row in rows]
    goals = table(["goal", "measured, percent", ""], _goals(rows))
    return "\n".join([_intro(found), table(head, body), goals])


def _intro(found: Mapping[str, Any]) -> str:
    about = found["machine"]
    records = ""
    if any(row["steps"] == WITH_RECORD for row in found["rows"]):
        records = " *Recorded* steps are also added to a `TrainingRecord`, with tokens."
    adapters = f" The LoRA of rank {RANK} adapts all matrices." if _has_lora(found) else ""
    text = (
        f"Steps of AdamW on SmolLM2 (135M) with {found['sequences']} x {found['tokens']} tokens in "
        f"float32, on one core of {about['processor']} ({about['system']}, torch "
        f"{found['versions']['torch']}), with a load of {about['load before']} on "
        f"{about['cores']} cores.{adapters} The kinds of steps alternate on one model, in "
        f"{found['rows'][0]['rounds']} rounds. Seconds are those of the process. Percentages are "
        "medians over rounds, with 95 % bootstrap intervals. With "
        f"`every={EVERY}`, one of {EVERY} steps is watched, so the average step takes a tenth of "
        f"the added time.{records} "
        "`python -m benchmarks.training_overhead` writes this section "
        "([overhead.json](training/overhead.json))."
    )
    return textwrap.fill(text, 104, break_on_hyphens=False, break_long_words=False) + "\n"


def _has_lora(found: Mapping[str, Any]) -> bool:
    return any(row["mode"] == "lora" for row in found["rows"])


def _cells(row: Row) -> list[str]:
    added = average = ""
    if row["steps"] != NONE:
        added = _with_interval(row["added_percent"])
    if row["steps"] not in (NONE, OTHER):
        average = f"{row['added_percent'][0] / EVERY:.2f}"
    return [MODES[row["mode"]], row["steps"], f"{row['seconds']:.2f}", added, average]


def _goals(rows: Sequence[Row]) -> list[list[str]]:
    goals = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = {row["steps"]: row["added_percent"] for row in rows if row["mode"] == mode}
        worst = max((own[matrices] for matrices in MATRICES if matrices in own), key=lambda a: a[0])
        for name, added, most in (
            ("a watched step", worst, MOST_WATCHED),
            ("another step", own[OTHER], MOST_OTHERWISE),
        ):
            goal = f"{MODES[mode]}: at most {most:g} % added to {name}"
            goals.append([goal, _with_interval(added), _verdict(added, most)])
    return goals


def _with_interval(added: Sequence[float]) -> str:
    middle, low, high = added
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _verdict(added: Sequence[float], most: float) -> str:
    """Whether a goal is met, if the interval says so."""
    _, low, high = added
    return "✓" if high <= most else "✗" if low > most else "undecided"


if __name__ == "__main__":
    main()
