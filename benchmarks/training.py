"""What training runs write, on the facts model and on SmolLM2.

``python -m benchmarks.training`` runs ``backward-lens reproduce training`` on each model, writes
what it found to ``docs/training-runs/findings.json`` and the figures next to it, and renders
``docs/training_runs.md``. It resumes, run by run. ``--page`` only renders.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from backward_lens_tl.files.storage import write_text
from backward_lens_tl.reproduction import reproduce
from benchmarks.training_page import SHOWN, page

DOCS = Path(__file__).parents[1] / "docs"
FINDINGS = DOCS / "training-runs" / "findings.json"
SHARED = Path(__file__).parents[2] / "shared"

MODELS = {
    "facts": ("facts", "facts"),
    "SmolLM2": ("smollm2", str(SHARED / "data" / "counterfact" / "counterfact_flat_1919.json")),
}
"""The name of each model on the page, for `load_model`, and its data."""

_KEYS = ("optimizer", "weights", "answers", "step", "matrix")
_LAYERS = (
    *("optimizer", "weights", "answers", "step", "layer"),
    *("relative_norm", "answers_found", "taught_near", "permuted_near"),
)
_LOSSES = ("optimizer", "weights", "answers", "step", "loss", "learned")


def main() -> None:
    """Measure what was asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="training-runs", help="folder for the reproductions")
    parser.add_argument("--only", choices=MODELS, help="measure one model, keep the others")
    parser.add_argument("--data", help="the data instead of CounterFact, with --only")
    parser.add_argument("--page", action="store_true", help="only render the page")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = json.loads(FINDINGS.read_text("utf-8")) if FINDINGS.exists() else {}
    for name, (model, data) in MODELS.items():
        if options.page or options.only not in (None, name):
            continue
        folder = Path(options.out) / name
        reproduce(model, options.data or data, folder, "training", progress=False)
        found[name] = collected(folder)
        copy_figures(folder, FINDINGS.parent, name)
        found = {each: found[each] for each in MODELS if each in found}
        write_text(FINDINGS, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(DOCS / "training_runs.md", page(found))


def collected(folder: Path) -> dict[str, Any]:
    """Read what the page needs from a reproduction.

    Args:
        folder: The folder.

    Returns:
        The finding, the means over layers, and the losses.
    """
    own = folder / "training"
    finding = json.loads((own / "finding.json").read_text("utf-8"))
    return {
        "about": {name: finding["about"][name] for name in ("n_layers", "d_vocab")},
        **{name: finding[name] for name in ("verdict", "checks", "notes")},
        "means": _rows(own / "means.csv", (*_KEYS, *SHOWN)),
        "layers": _table(_of_w_out(pd.read_csv(own / "by-layer.csv"))),
        "losses": _rows(own / "losses.csv", _LOSSES),
    }


def _of_w_out(changes: pd.DataFrame) -> pd.DataFrame:
    """What is shown by layer: readings of `W_out` after the last step, and of the controls."""
    last = changes["step"].isin([0, changes["step"].max()])
    return changes.loc[last & (changes["matrix"] == "W_out"), [*_LAYERS]]


def _table(table: pd.DataFrame) -> list[list[Any]]:
    rows = [[_value(str(value)) for value in row] for row in table.itertuples(index=False)]
    return [list(table.columns), *rows]


def _rows(file: Path, columns: tuple[str, ...]) -> list[list[Any]]:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [{name: row[name] for name in columns} for row in csv.DictReader(stream)]
    return [list(columns), *([_value(each) for each in row.values()] for row in rows)]


def _value(text: str) -> Any:
    try:
        number = float(text or "nan")
    except ValueError:
        return text
    return None if math.isnan(number) else float(f"{number:.4g}")


def copy_figures(folder: Path, to: Path, name: str) -> None:
    """Copy the figures of the page.

    Args:
        folder: The folder of a reproduction.
        to: The folder of figures.
        name: The name of the model.
    """
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted((folder / "training").glob("*.svg")):
        shutil.copy(file, to / f"{name}-{file.name}")


if __name__ == "__main__":
    main()
