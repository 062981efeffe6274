"""Tuning of the editing methods for the facts model, on a split that is not used for evaluation.

``python -m benchmarks.tuning`` evaluates every candidate on `FACTS_TUNING`, prints the results, and
writes them to ``docs/editing/tuning.json``. `editing/methods/presets.py` has the chosen settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import METHODS, preset_methods, preset_settings
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.plan import unused_records
from backward_lens_tl.evaluation.tuning import search
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.models.loading import FACTS_MODEL, load_facts_model

RESULTS = Path(__file__).parents[1] / "docs" / "editing" / "tuning.json"

FACTS_TEST = range(200)
"""Rows of the facts model's records on which no setting was chosen."""

FACTS_TUNING = range(200, 250)
"""Rows on which the facts model's settings are chosen."""

GRIDS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
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
"""The grid of each preset. Other settings are those in `_KEYS` and the preset's own."""

_KEYS: Mapping[str, Mapping[str, Any]] = {
    "shift": {"key": "paper", "target_tokens": "first"},
    "shift_iterated": {"key": "plain", "iterations": 25},
    "shift_whitened": {"key": "whitened", "iterations": 25},
}

log = logging.getLogger(__name__)


def candidates(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The candidates for a preset.

    Args:
        name: The preset.

    Yields:
        A name and the settings.
    """
    grid = GRIDS[name]
    for values in product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        label = ", ".join(f"{key}={value}" for key, value in own.items()) or "as it is"
        yield label, {**_KEYS.get(name, {}), **own}


def main() -> None:
    """Tune the given presets, and update their results in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*METHODS, []], help="default: all presets")
    parser.add_argument("--folder", help="folder for trained networks and statistics")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        for name in options.names or METHODS:
            own = tuned(name, folder)
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found[name] = own
            with replacing(RESULTS) as partial:
                partial.write_text(json.dumps(found, indent=1) + "\n")
            log.info("%s: %s", name, own["best"])


def tuned(name: str, folder: Path) -> dict[str, Any]:
    """Evaluate the candidates of one preset.

    Args:
        name: The preset.
        folder: Folder for trained networks and statistics.

    Returns:
        The best candidate, and the results of all of them.
    """
    model, records = load_facts_model(), read_records(FACTS_MODEL)
    methods = candidate_methods(name, model, records, folder)
    tried = search(model, methods, records, FACTS_TUNING, progress=False)
    sys.stdout.write(f"\n{name}\n{tried.table.round(2).to_string(index=False)}\n")
    return {
        "best": tried.best_name,
        "rows": [FACTS_TUNING.start, FACTS_TUNING.stop],
        "tried": json.loads(tried.table.to_json(orient="records", double_precision=4)),
    }


def candidate_methods(
    name: str, model: Any, records: Records, folder: Path
) -> dict[str, EditMethod]:
    """Create the candidates of one preset.

    Args:
        name: The preset.
        model: The facts model.
        records: Its records.
        folder: Folder for trained networks and statistics.

    Returns:
        The methods by candidate.
    """
    reserved = EvaluationConfig(rows=sorted({*FACTS_TEST, *FACTS_TUNING}))
    training = unused_records(records, reserved)
    presets = preset_methods(model, name, folder=folder, training=training, progress=False)
    preset: Any = presets[name]
    chosen = preset_settings(FACTS_MODEL, model.cfg.n_layers)[name]
    return {
        label: preset if settings == chosen else replace(preset, **settings)
        for label, settings in candidates(name)
    }


if __name__ == "__main__":
    main()
