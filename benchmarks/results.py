"""Results files, one per kind of machine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.goals import Results


def read_results(folder: Path) -> dict[str, Results]:
    """Results of all machines, by kind, which is the name of their file."""
    paths = sorted((folder / "benchmarks").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def results_path(folder: Path, kind: str) -> Path:
    """The file with the results of one kind of machine."""
    return folder / "benchmarks" / f"{kind}.json"


def write_results(folder: Path, kind: str, results: Results) -> Path:
    """Write the results of one kind of machine.

    Args:
        folder: Folder for `benchmarks/KIND.json`.
        kind: Kind of machine.
        results: The results.

    Returns:
        The file.
    """
    path = results_path(folder, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
