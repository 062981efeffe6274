"""The paper's experiments on editing on a real model, for docs/editing.md."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backward_lens_tl.data.texts import read_lines
from backward_lens_tl.files.storage import write_text
from backward_lens_tl.reproduction import reproduce
from backward_lens_tl.reproduction.folder import read_findings

PROMPTS: Mapping[str, int] = {"table1": 10, "several_facts": 10, "whitening": 10, "fig24": 5}
"""The number of records of each experiment. Table 1 also trains MEND, which takes half an hour."""

_COLUMNS = (
    "method",
    "efficacy",
    "paraphrase",
    "neighborhood",
    "corpus_perplexity",
    "seconds",
)
"""What is shown of each method of table 1."""

_N_TEXTS, _LEAST, _LENGTH = 3, 400, 250

log = logging.getLogger(__name__)


def run_experiments(
    model: Any,
    data: str,
    folder: Path,
    *,
    jacobian: str | None,
    texts: str,
    statistics: Sequence[str] | None,
) -> None:
    """Run the experiments.

    Args:
        model: The model.
        data: Its records.
        folder: The folder to write.
        jacobian: Its lens.
        texts: A file with a text per line, of which perplexity uses a few, shortened.
        statistics: Texts of second moments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    short = folder / "texts.txt"
    long = [line.strip() for line in read_lines(texts) if len(line) > _LEAST][:_N_TEXTS]
    write_text(short, "".join(f"{line[:_LENGTH]}\n" for line in long))
    for name, prompts in PROMPTS.items():
        log.info("%s", name)
        reproduce(
            model,
            data,
            folder,
            name,
            prompts=prompts,
            jacobian=jacobian,
            statistics=statistics,
            texts=str(short),
            progress=False,
        )


def _methods(file: Path) -> Sequence[Sequence[Any]]:
    """A row per method of table 1; none for the other experiments."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [[row[name] for name in _COLUMNS] for row in csv.DictReader(stream)]
    return [
        [name, *(float(f"{float(value):.4g}") if value else None for value in values)]
        for name, *values in rows
    ]


def collected_experiments(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Read what the page needs from the experiments so far.

    Args:
        folder: The folder of `run_experiments`.

    Returns:
        The name, title, verdict and checks of each, its number of records, and for table 1 the
        values of the methods.
    """
    return [
        {
            **{key: each[key] for key in ("name", "title", "verdict", "checks")},
            "records": each["about"]["prompts"],
            "seconds": round(each["about"]["seconds"]),
            "methods": _methods(folder / each["name"] / "methods.csv"),
        }
        for each in (read_findings(folder) if folder.exists() else ())
        if each["name"] in PROMPTS
    ]
