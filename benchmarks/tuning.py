"""Tuning of the editing methods for a model, on records that are not used for evaluation.

``python -m benchmarks.tuning`` evaluates every candidate for the facts model on `FACTS_TUNING`,
prints the results, and writes them to ``docs/editing/tuning.json``. ``--model smollm2 --data
COUNTERFACT --statistics TEXTS`` does the same for SmolLM2 in ``docs/editing/tuning-smollm2.json``,
after causal tracing, which says around which layers to look. `editing/methods/presets.py` has the
chosen settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from backward_lens_tl._checks import listed
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record, Records
from backward_lens_tl.editing.mend.mend import MEND
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.mend.training import train_mend
from backward_lens_tl.editing.methods.fact_method import FactMethod
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.pair_method import PairMethod
from backward_lens_tl.editing.methods.presets import (
    METHODS,
    TOKENS_PER_INPUT,
    preset_methods,
    preset_settings,
)
from backward_lens_tl.editing.methods.ultraedit import UltraEdit
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.statistics.moment_cache import cached_moments
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.plan import unused_records
from backward_lens_tl.evaluation.tuning import ACCURACIES, SUCCESSES, search
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.models import host_of
from backward_lens_tl.models.loading import FACTS_MODEL, load_model
from backward_lens_tl.models.smollm2 import SMOLLM2
from benchmarks.tracing import known_facts, traced

DOCS = Path(__file__).parents[1] / "docs" / "editing"

FACTS_TEST = range(200)
"""Rows of the facts model's records on which no setting was chosen."""

FACTS_TUNING = range(200, 250)
"""Rows on which the facts model's settings are chosen."""

Grid = Mapping[str, tuple[Any, ...]]

GRIDS: Mapping[str, Grid] = {
    "ft_first": {"layers": (0,), "lr": (1e-4, 2e-4, 5e-4)},
    "ft_late": {"layers": (6, 7), "lr": (1e-3, 2e-3)},
    "ft_constrained": {"layers": (0,), "lr": (5e-4, 2e-3), "norm_constraint": (5e-3, 7e-3)},
    "sgd_step": {"optimizer": ("sgd",), "layers": (6,), "lr": (0.5, 1.0, 2.0)},
    "adam_step": {"optimizer": ("adam",), "layers": (6,), "lr": (0.02, 0.04, 0.08)},
    "muon_step": {"optimizer": ("muon",), "layers": (6,), "lr": (0.3, 1.0, 3.0)},
    "mend": {"layers": (0,), "training": (MENDTraining(lr=1e-3),)},
    "normalized_gradient": {"layers": ((5, 6, 7), (0,)), "lr": (1e-3, 3e-3)},
    "ultraedit": {"layers": ((5,), (6,)), "lr": (1e-3, 3e-3)},
    "rome": {
        "layer": (0,),
        "key_mode": ("mean", "bare", "rome"),
        "prefixes": (((5, 3), (10, 3)),),
    },
    "memit": {"layers": ((0,), (0, 1)), "regularization": (5.0, 20.0)},
    "shift": {"layer": (5, 6, 7), "size": (0.1, 0.2, 0.3, 0.5, 1.0)},
    "shift_iterated": {"layer": (4, 5, 6, 7), "size": (4.0,)},
    "shift_whitened": {"layer": (4, 5, 6, 7), "size": (4.0,)},
}
"""The facts model's grids. Other settings are those in `_KEYS` and the preset's own."""

_LAST_THREE = (27, 28, 29)

SMOLLM2_GRIDS: Mapping[str, Grid] = {
    "ft_first": {"layers": (0,), "lr": (2e-4, 5e-4, 1e-3)},
    "ft_late": {"layers": (22, 26), "lr": (2e-4, 5e-4, 1e-3)},
    "ft_constrained": {"layers": (0,), "norm_constraint": (5e-4, 2e-3, 5e-3)},
    "sgd_step": {"optimizer": ("sgd",), "layers": (22,), "lr": (1.0, 2.0, 4.0, 8.0)},
    "adam_step": {"optimizer": ("adam",), "layers": (22,), "lr": (3e-3, 1e-2, 3e-2)},
    "muon_step": {"optimizer": ("muon",), "layers": (22,), "lr": (1.0, 2.0, 4.0, 8.0)},
    "mend": {"layers": (_LAST_THREE,), "training": (MENDTraining(),)},
    "normalized_gradient": {"layers": (_LAST_THREE, (22,)), "lr": (3e-4, 1e-3, 3e-3)},
    "ultraedit": {"layers": (_LAST_THREE, (22,)), "lr": (1e-3, 3e-3, 1e-2)},
    "rome": {
        "layer": (3, 6, 9, 12),
        "key_mode": ("mean",),
        "prefixes": (((5, 3), (10, 3)),),
    },
    "memit": {
        "layers": ((5, 6, 7, 8, 9), (8, 9, 10, 11, 12)),
        # The strongest first: of two equal candidates, the first is chosen.
        "regularization": (5000.0, 500.0, 50.0),
    },
}
"""SmolLM2's. At the subject's last token, causal tracing finds the windows around layers 0 to 3,
which contain layer 0, and above them weak maxima at layers 6 and 10 to 11."""

_KEYS: Mapping[str, Mapping[str, Any]] = {
    "shift": {"key": "paper", "target_tokens": "first"},
    "shift_iterated": {"key": "plain", "iterations": 25},
    "shift_whitened": {"key": "whitened", "iterations": 25},
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A model that is tuned.

    Attributes:
        model: Its name in `load_model`.
        file: The file of results in `DOCS`.
        grids: The candidates of each preset.
        tuning: Rows on which candidates are tried.
        reserved: Rows that no choice may depend on.
        metrics: What candidates are compared by.
        traced: Rows of the facts for causal tracing, and the largest number of them.
    """

    model: str
    file: str
    grids: Mapping[str, Grid]
    tuning: Sequence[int]
    reserved: Sequence[int]
    metrics: Sequence[str]
    traced: tuple[Sequence[int], int] | None = None


def counterfact_split(n: int = 1919) -> tuple[Sequence[int], Sequence[int]]:
    """The rows of flattened CounterFact for tuning, and those for evaluation.

    Args:
        n: Number of rows.

    Returns:
        300 rows that choices may depend on, and the others.
    """
    order = list(range(n))
    random.Random("F counterfact split 1").shuffle(order)
    return order[:300], order[300:]


_TUNE, _TEST = counterfact_split()

TASKS: Mapping[str, Task] = {
    FACTS_MODEL: Task(FACTS_MODEL, "tuning.json", GRIDS, FACTS_TUNING, FACTS_TEST, ACCURACIES),
    SMOLLM2: Task(
        SMOLLM2,
        "tuning-smollm2.json",
        SMOLLM2_GRIDS,
        _TUNE[:12],
        _TEST,
        SUCCESSES,
        (_TUNE, 24),
    ),
}


def candidates(name: str, model: str = FACTS_MODEL) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The candidates for a preset.

    Args:
        name: The preset.
        model: The model's name in `TASKS`.

    Yields:
        A name and the settings.
    """
    grid = TASKS[model].grids[name]
    for values in product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        label = ", ".join(f"{key}={value}" for key, value in own.items()) or "as it is"
        yield label, {**_KEYS.get(name, {}), **own}


def main() -> None:
    """Tune the given presets, and update their results in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: all presets that have candidates")
    parser.add_argument("--model", choices=TASKS, default=FACTS_MODEL)
    parser.add_argument("--data", default=FACTS_MODEL, help="the model's records")
    parser.add_argument("--statistics", help="texts of second moments, one per line")
    parser.add_argument(
        "--folder", help="folder for trained networks, pair statistics and unfinished searches"
    )
    options = parser.parse_args()
    task = TASKS[options.model]
    names = options.names or [name for name in METHODS if name in task.grids]
    if unknown := set(names) - {*task.grids, "tracing"}:
        parser.error(f"no candidates for {', '.join(unknown)}; allowed: {', '.join(task.grids)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model, records = load_model(options.model), read_records(options.data)
    if task.traced is not None and (not options.names or "tracing" in names):
        _update(task, "tracing", tracing(task, model, records))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        for name in (each for each in names if each != "tracing"):
            own = tuned(task, name, model, records, folder, options.statistics)
            _update(task, name, own)
            log.info("%s: %s", name, own["best"])


def _update(task: Task, name: str, own: Mapping[str, Any]) -> None:
    results = DOCS / task.file
    found = json.loads(results.read_text()) if results.exists() else {}
    found[name] = own
    with replacing(results) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")


def tracing(task: Task, model: Any, records: Records) -> dict[str, Any]:
    """Trace the facts that a model knows.

    Args:
        task: The task.
        model: The model.
        records: Its records.

    Returns:
        The effect of each layer's MLPs, and the layer with the largest one by token.
    """
    rows, n = task.traced or ((), 0)
    host = host_of(model)
    some = [row for row in (records.rows[at] for at in rows) if isinstance(row, Record)]
    found = traced(host, known_facts(host, some, n))
    peaks = {token: own.index(max(own)) for token, own in found["effects"].items()}
    effects = {t: [round(each, 4) for each in own] for t, own in found["effects"].items()}
    sys.stdout.write(f"{json.dumps({'peaks': peaks} | found | {'effects': effects})}\n")
    return {**found, "effects": effects, "peaks": peaks}


def tuned(
    task: Task,
    name: str,
    model: Any,
    records: Records,
    folder: Path,
    texts: str | None = None,
) -> dict[str, Any]:
    """Evaluate the candidates of one preset.

    Args:
        task: The task.
        name: The preset.
        model: The model.
        records: Its records.
        folder: Folder for trained networks, pair statistics and unfinished searches.
        texts: Texts of second moments.

    Returns:
        The best candidate, and the results of all of them.
    """
    methods = candidate_methods(name, model, records, folder, task=task, texts=texts)
    tried = search(
        model,
        methods,
        records,
        task.tuning,
        metrics=task.metrics,
        folder=folder / f"search-{name}",
        progress=False,
    )
    sys.stdout.write(f"\n{name}\n{tried.table.round(2).to_string(index=False)}\n")
    rows = task.tuning
    return {
        "best": tried.best_name,
        "rows": [rows.start, rows.stop] if isinstance(rows, range) else list(rows),
        "tried": json.loads(tried.table.to_json(orient="records", double_precision=4)),
    }


def candidate_methods(
    name: str,
    model: Any,
    records: Records,
    folder: Path,
    *,
    task: Task = TASKS[FACTS_MODEL],
    texts: str | None = None,
) -> dict[str, EditMethod]:
    """Create the candidates of one preset.

    Args:
        name: The preset.
        model: The model.
        records: Its records.
        folder: Folder for trained networks and pair statistics.
        task: The task.
        texts: Texts of second moments.

    Returns:
        The methods by candidate.
    """
    settings = dict(candidates(name, task.model))
    reserved = EvaluationConfig(rows=sorted({*task.reserved, *task.tuning}))
    training = unused_records(records, reserved)
    if task.model != FACTS_MODEL:
        return _created(METHODS[name], model, settings, folder, texts=texts, training=training)
    presets = preset_methods(model, name, folder=folder, training=training, progress=False)
    preset: Any = presets[name]
    chosen = preset_settings(task.model, model.cfg.n_layers)[name]
    return {
        label: preset if own == chosen else replace(preset, **own)
        for label, own in settings.items()
    }


def _created(
    kind: Any,
    model: Any,
    settings: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    texts: str | None,
    training: Sequence[Record],
) -> dict[str, EditMethod]:
    """The candidates, which share statistics; each of MEND's has networks of its own."""
    if kind is MEND:
        files = [folder / f"mend-{at}.safetensors" for at in range(len(settings))]
        return {
            label: MEND(
                train_mend(model, training, **own, prepend_bos=False, out=file), prepend_bos=False
            )
            for file, (label, own) in zip(files, settings.items(), strict=True)
        }
    tried = [listed(own.get("layers", own.get("layer"))) for own in settings.values()]
    layers = sorted({layer for own in tried for layer in own})
    needed: dict[str, Any] = {}
    if issubclass(kind, FactMethod):
        needed["moments"] = cached_moments(
            model,
            texts,
            layers=layers,
            max_tokens=TOKENS_PER_INPUT * host_of(model).d_mlp,
            prepend_bos=False,
            progress=True,
        )
    if kind is MEMIT:  # the regularization does not change the values
        needed["value_folder"] = folder / "memit-values"
    if issubclass(kind, PairMethod):
        needed["statistics"] = pair_statistics(
            model,
            [EditRequest.of(record) for record in training],
            layers=layers,
            positions="answer" if kind is UltraEdit else "all",
            prepend_bos=False,
        )
    return {label: kind(**needed, **own, prepend_bos=False) for label, own in settings.items()}


if __name__ == "__main__":
    main()
