"""The editing methods on a real model and on the facts model, for the tables of docs/editing.md.

``python -m benchmarks.editing`` evaluates the forms of the forward pass shift, fine-tuning, ROME
and MEMIT on records of CounterFact that no choice was made on, and on the facts model's own, writes
the results to ``docs/editing/results.json``, and renders the section of ``docs/editing.md``. It
resumes, and several processes may share the runs with ``--runs``. ``--page`` only renders.

SmolLM2 needs a Jacobian Lens (``--jacobian``), CounterFact, and texts for second moments; the last
two are read from ``../shared``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.run import Evaluation, evaluate
from backward_lens_tl.files.storage import write_text
from backward_lens_tl.models.loading import load_model
from benchmarks.editing_experiments import collected_experiments, run_experiments
from benchmarks.editing_page import LENS, OWN, PAPER, PUBLISHED_SIZE, with_results
from benchmarks.editing_results import collected
from benchmarks.editing_subjects import SUBJECTS, Methods, Subject
from benchmarks.paraphrases import ATTEMPTS

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "editing" / "results.json"

_N_TEXTS = 5
"""Texts of perplexity."""

_PART = 50
"""Records of one evaluation."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """Methods that are evaluated in one folder.

    Attributes:
        methods: Functions that create them, by name.
        records: The number of records.
        facts: The number of facts that an edit teaches at once.
        is_spare: Whether the records are others than those of the other trials.
    """

    methods: Mapping[str, Callable[[Methods], EditMethod]]
    records: int
    facts: int = 1
    is_spare: bool = False


_MARGINS = (1.0, 2.0, 4.0)


def _preset(name: str) -> Callable[[Methods], EditMethod]:
    return lambda methods: methods.preset(name)


def _sized(make: Callable[..., EditMethod], margin: float) -> Callable[[Methods], EditMethod]:
    return lambda methods: make(methods, margin=margin)


_MEMIT: Mapping[str, Callable[[Methods], EditMethod]] = {"memit": Methods.memit}
_TOGETHER: Mapping[str, Callable[[Methods], EditMethod]] = {
    LENS: Methods.lens,
    PAPER: Methods.paper,
}

TRIALS: Mapping[str, Trial] = {
    "defaults": Trial(
        {LENS: Methods.lens, OWN: lambda _: ForwardPassShift(), PAPER: Methods.paper}, 200
    ),
    "fine-tuning": Trial({"ft_late": _preset("ft_late")}, 200),
    "fine-tuning-first": Trial({"ft_first": _preset("ft_first")}, 50),
    # Without kept values, which would make the time of an edit that of reading a file.
    "at-the-subject": Trial({"rome": _preset("rome"), "memit": _preset("memit")}, 50),
    "sizes": Trial(
        {
            f"{name}, {margin:g}": _sized(make, margin)
            for name, make in ((LENS, Methods.lens), (PAPER, Methods.paper))
            for margin in _MARGINS
        },
        50,
    ),
    "forms": Trial(
        {
            "shift with the gradient": lambda _: ForwardPassShift(value="vjp"),
            "shift with a lens, plain key": lambda methods: methods.lens(key="plain"),
            PUBLISHED_SIZE: Methods.published,
        },
        200,
    ),
    "phrasings": Trial(
        {"shift with a lens, phrasings": lambda methods: methods.lens(phrasings="generic")}, 200
    ),
    **{f"{n}-facts": Trial(_TOGETHER, max(n, 50), facts=n) for n in (10, 50, 200)},
    **{f"memit-{n}-facts": Trial(_MEMIT, max(n, 50), facts=n) for n in (10, 50, 200)},
    "attempts": Trial(ATTEMPTS, 30, is_spare=True),
}
"""The trials, the most important first."""

EXPERIMENTS = "experiments"
RUNS = [*TRIALS, EXPERIMENTS]


def main() -> None:
    """Evaluate what was asked for, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="editing-results", help="folder for the evaluations")
    parser.add_argument("--jacobian", help="SmolLM2's Jacobian Lens")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--records", type=int, help="evaluate at most this number of each part")
    parser.add_argument("--collect", action="store_true", help="read --out, evaluate nothing")
    parser.add_argument("--page", action="store_true", help="only render the section")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (options.page or options.collect or options.jacobian) and "SmolLM2" in options.subjects:
        parser.error("--jacobian is needed: SmolLM2 is edited with a lens, too")
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if not options.page:
        for name in options.subjects:
            folder = Path(options.out) / name
            if not options.collect:
                measure(SUBJECTS[name], folder, options.runs, options.jacobian, options.records)
            found[name] = collected({run: parts_of(folder / run) for run in TRIALS}, PAPER)
            found[name]["experiments"] = collected_experiments(folder / EXPERIMENTS)
    write_text(RESULTS, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    page = DOCS / "editing.md"
    write_text(page, with_results(page.read_text("utf-8"), found))


def parts_of(folder: Path) -> list[Evaluation]:
    """The evaluations of a trial so far."""
    return [Evaluation.load(file.parent) for file in sorted(folder.glob("*/run.json"))]


def measure(
    subject: Subject, out: Path, runs: Sequence[str], jacobian: str | None, most: int | None
) -> None:
    """Evaluate a model.

    Args:
        subject: The model and its data.
        out: The folder.
        runs: The names of trials.
        jacobian: The model's lens, if it does not ship with the model.
        most: The largest number of records of each part.
    """
    model = load_model(subject.model)
    out.mkdir(parents=True, exist_ok=True)
    own = subject if subject.jacobian else replace(subject, jacobian=jacobian)
    methods = Methods(model, own, out)
    for part in range(max(map(n_parts, TRIALS.values()))):
        # Part by part, so that all methods have the same records when time runs out.
        for name, trial in TRIALS.items():
            if name in runs and part < n_parts(trial):
                log.info("%s, part %d", name, part)
                made = {each: make(methods) for each, make in trial.methods.items()}
                folder, config = out / name / f"part-{part}", settings(own, trial, part, most)
                evaluate(model, own.data, folder, made, config, progress=False)
    if EXPERIMENTS in runs and own.texts is not None:
        run_experiments(
            model,
            own.data,
            out / EXPERIMENTS,
            jacobian=own.jacobian,
            texts=own.texts,
            statistics=own.statistics(),
        )


def n_parts(trial: Trial) -> int:
    """The number of evaluations of a trial, each of as many records as may share an edit."""
    return math.ceil(trial.records / max(trial.facts, _PART))


def settings(
    subject: Subject, trial: Trial, part: int, most: int | None = None
) -> EvaluationConfig:
    """The settings of an evaluation.

    Args:
        subject: The model and its data.
        trial: What is evaluated.
        part: Which of its parts.
        most: The largest number of records of a part.

    Returns:
        The settings.
    """
    size = max(trial.facts, _PART)
    first = (subject.spare if trial.is_spare else subject.first) + part * size
    n_records = min(size, trial.records - part * size, size if most is None else most)
    return EvaluationConfig(
        shuffle=subject.shuffle,
        rows=range(first, first + n_records),
        edits_at_once=trial.facts,
        continuations=False,  # which would take longer than most edits
        generation_length=0,
        texts=subject.texts,
        n_texts=_N_TEXTS,
        max_tokens=32,
    )


if __name__ == "__main__":
    main()
