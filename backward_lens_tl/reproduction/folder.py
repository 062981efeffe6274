"""The folder of a reproduction: for each experiment, a folder with its tables and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain, count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from backward_lens_tl.files.exports import write_csv
from backward_lens_tl.files.storage import replacing, write_text
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
"""Approximate sizes of the page of a layers x tokens table, in pixels."""


def write_finding(
    folder: Path, experiment: Experiment, finding: Finding, about: Mapping[str, Any]
) -> None:
    """Write a finding: tables as CSV, figures as HTML and SVG, the rest as JSON.

    Args:
        folder: The folder of all experiments.
        experiment: The experiment.
        finding: What it found.
        about: What it was measured on.
    """
    own = folder / experiment.name
    own.mkdir(parents=True, exist_ok=True)
    if not (folder / _SCRIPT).exists():  # once for the figures of all experiments
        from plotly.offline import get_plotlyjs

        write_text(folder / _SCRIPT, get_plotlyjs())
    written = {
        "name": experiment.name,
        "covers": experiment.covers,
        "title": experiment.title,
        "statement": experiment.statement,
        "verdict": finding.verdict,
        "checks": [asdict(check) for check in finding.checks],
        "notes": finding.notes,
        "about": about,
        "results": _write_each(own, finding.results, _write_result),
        "figures": _write_each(own, finding.figures, _write_figure),
        "tables": _write_each(own, finding.tables, _write_table),
    }
    write_text(own / _FINDING, json.dumps(written, indent=2, ensure_ascii=False))


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """Read the findings in the folder, including those of earlier calls.

    Args:
        folder: The folder of all experiments.

    Returns:
        What `write_finding` wrote for each experiment, in the order of the paper.
    """
    files = (folder / experiment.name / _FINDING for experiment in EXPERIMENTS)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _write_each(
    folder: Path, named: Mapping[str, _T], write: Callable[[Path, _T], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write each value to files with a unique name, shortened for long prompts."""
    stems: list[str] = []
    for name in named:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "unnamed"
        numbered = (f"{stem}-{number}" for number in count(2))
        stems.append(next(each for each in chain([stem], numbered) if each not in stems))
    return [
        {"name": name, **write(folder / stem, value)}
        for stem, (name, value) in zip(stems, named.items(), strict=True)
    ]


def _write_result(path: Path, result: BackwardLensResult) -> dict[str, Any]:
    file = path.with_name(f"{path.name}.html")
    result.save_html(file)
    # Two panels are side by side where there is room.
    height = _HEAD + ceil(len(result.matrices) / 2) * (_PANEL + _ROW * len(result.layers))
    return {"file": _address(file), "height": min(height, _HIGHEST)}


def _write_figure(path: Path, draw: Draw) -> dict[str, Any]:
    figure, file = draw(backend="plotly"), path.with_name(f"{path.name}.html")
    with replacing(file) as partial:
        figure.write_html(partial, include_plotlyjs=f"../{_SCRIPT}")
    written = {"file": _address(file), "height": figure.layout.height or 450}
    if find_spec("matplotlib") is not None:
        with replacing(file.with_suffix(".svg")) as partial:
            draw(backend="matplotlib").savefig(partial)
        written["svg"] = _address(file.with_suffix(".svg"))
    return written


def _write_table(path: Path, table: pd.DataFrame) -> dict[str, Any]:
    file = path.with_name(f"{path.name}.csv")
    write_csv(table, file)
    rows = table.head(_PREVIEW_ROWS).itertuples(index=False, name=None)
    return {
        "file": _address(file),
        "n_rows": len(table),
        "columns": list(table.columns),
        "rows": [list(map(_shown, row)) for row in rows],
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, str):
        return value
    if str(value) in ("<NA>", "nan", "None"):  # missing, in pandas
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _address(file: Path) -> str:
    """The path of a file from the report."""
    return f"{file.parent.name}/{file.name}"
