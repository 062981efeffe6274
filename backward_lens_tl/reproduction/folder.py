"""The folder of what was reproduced: a folder per experiment, with its tables and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain, count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from backward_lens_tl.files.exports import write_csv
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.reproduction.experiments import EXPERIMENTS, Experiment
from backward_lens_tl.reproduction.finding import Draw, Finding

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.result import BackwardLensResult

_PREVIEW_ROWS = 12
_SCRIPT = "plotly.min.js"
_FINDING = "finding.json"

_T = TypeVar("_T")

_HEAD, _PANEL, _ROW, _HIGHEST = 230, 230, 26, 1200
"""Pixels of a layers x tokens table's page, about."""


def write_finding(
    folder: Path, experiment: Experiment, finding: Finding, about: Mapping[str, Any]
) -> None:
    """Write what an experiment found: tables as CSV, figures as pages and as SVG, words as JSON.

    Args:
        folder: Of all experiments.
        experiment: The experiment.
        finding: What it found.
        about: What it was measured on.
    """
    own = folder / experiment.name
    own.mkdir(parents=True, exist_ok=True)
    _write_script(folder)
    written = {
        "name": experiment.name,
        "covers": experiment.covers,
        "title": experiment.title,
        "statement": experiment.statement,
        "verdict": finding.verdict,
        "checks": [asdict(check) for check in finding.checks],
        "notes": finding.notes,
        "about": about,
        "results": [
            _write_result(own / stem, name, result)
            for stem, (name, result) in _with_stems(finding.results)
        ],
        "figures": [
            _write_figure(own / stem, name, draw)
            for stem, (name, draw) in _with_stems(finding.figures)
        ],
        "tables": [
            _write_table(own / stem, name, table)
            for stem, (name, table) in _with_stems(finding.tables)
        ],
    }
    with replacing(own / _FINDING) as partial:
        partial.write_text(json.dumps(written, indent=2, ensure_ascii=False), encoding="utf-8")


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """What is in the folder, also of earlier runs.

    Args:
        folder: Of all experiments.

    Returns:
        What `write_finding` wrote of each experiment, in the order of the paper.
    """
    files = (folder / experiment.name / _FINDING for experiment in EXPERIMENTS)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _write_script(folder: Path) -> None:
    """What the figures' pages are drawn by, once for all of them; they need no network."""
    from plotly.offline import get_plotlyjs

    if not (folder / _SCRIPT).exists():
        with replacing(folder / _SCRIPT) as partial:
            partial.write_text(get_plotlyjs(), encoding="utf-8")


def _write_result(path: Path, name: str, result: BackwardLensResult) -> dict[str, Any]:
    file = path.with_name(f"{path.name}.html")
    result.save_html(file)
    # Two panels stand side by side where there is room.
    height = _HEAD + ceil(len(result.matrices) / 2) * (_PANEL + _ROW * len(result.layers))
    return {"name": name, "file": _address(file), "height": min(height, _HIGHEST)}


def _write_figure(path: Path, name: str, draw: Draw) -> dict[str, Any]:
    figure, file = draw(backend="plotly"), path.with_name(f"{path.name}.html")
    with replacing(file) as partial:
        figure.write_html(partial, include_plotlyjs=f"../{_SCRIPT}")
    written = {
        "name": name,
        "file": _address(file),
        "height": figure.layout.height or 450,
    }
    if find_spec("matplotlib") is not None:
        with replacing(file.with_suffix(".svg")) as partial:
            draw(backend="matplotlib").savefig(partial)
        written["svg"] = _address(file.with_suffix(".svg"))
    return written


def _write_table(path: Path, name: str, table: pd.DataFrame) -> dict[str, Any]:
    file = path.with_name(f"{path.name}.csv")
    write_csv(table, file)
    return {
        "name": name,
        "file": _address(file),
        "n_rows": len(table),
        "columns": list(table.columns),
        "rows": [list(map(_shown, row)) for row in _first_rows(table)],
    }


def _first_rows(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    return table.head(_PREVIEW_ROWS).itertuples(index=False, name=None)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, str):
        return value
    if str(value) in ("<NA>", "nan", "None"):  # pandas' several ways to say that there is none
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_stems(named: Mapping[str, _T]) -> Iterator[tuple[str, tuple[str, _T]]]:
    """Each with a name for its files, which no two of them share."""
    taken: set[str] = set()
    for item in named.items():
        stem = _file_name(item[0])
        numbers = (f"{stem}-{number}" for number in count(2))
        own = next(each for each in chain([stem], numbers) if each not in taken)
        taken.add(own)
        yield own, item


def _file_name(name: str) -> str:
    """A name that any file system takes, cut where a prompt is long."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "unnamed"


def _address(file: Path) -> str:
    """Where a file is, from the report."""
    return f"{file.parent.name}/{file.name}"
