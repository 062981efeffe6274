"""The paper's claims on a real model, next to two small ones, and why they hold or do not.

``python -m benchmarks.real_model`` runs ``backward-lens reproduce gradients explanations`` on each
model, writes the findings to ``docs/real-model/findings.json`` and the figures next to it, and
renders ``docs/real-model.md`` and the table in ``docs/reproducing.md``. ``--page`` only renders.

Reading through average Jacobians needs Jacobian Lenses in the folder ``--fits``: ``NAME-N.pt`` for
every model except facts, fitted on N prompts. ``--fit`` makes them, and resumes.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backward_lens_tl.files.storage import write_text
from backward_lens_tl.jacobians.fitting import fit_jacobian_lens
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.reproduction import EXPERIMENTS, reproduce
from backward_lens_tl.reproduction.folder import read_findings
from benchmarks.real_model_page import SHOWN_TABLES, page, with_verdicts

DOCS = Path(__file__).parents[1] / "docs"
FINDINGS = DOCS / "real-model" / "findings.json"
SHARED = Path(__file__).parents[2] / "shared"
COUNTERFACT = SHARED / "data" / "counterfact" / "counterfact_flat_1919.json"

MODELS: dict[str, tuple[Any, Any]] = {
    "facts": ("facts", "facts"),
    "stories260K": (str(SHARED / "models" / "stories260K"), str(COUNTERFACT)),
    "SmolLM2": ("smollm2", str(COUNTERFACT)),
}
"""The name of each model on the page, for `load_model`, and its data."""

REAL = "SmolLM2"
"""The model that the page is about."""

FIGURES = {
    "residual_bases": ("the-target-near-the-top.svg",),
    "early_layers": (
        "rank-of-the-target.svg",
        "readings-and-controls.svg",
        "the-subject-s-last-token.svg",
        "prompts-of-the-fit.svg",
    ),
    "gated_neurons": ("copies-in-w-out.svg",),
    "junk_tokens": ("rank-of-the-target.svg",),
}
"""The figures of the real model that the page shows, by experiment."""

FIT_SIZES = (8, 32, 100)
"""Numbers of prompts of the fits."""

WIKITEXT = SHARED / "data" / "wikitext2" / "wiki.test.raw"
"""The texts of the fits."""

_FIT_LENGTH = 40

log = logging.getLogger(__name__)


def main() -> None:
    """Measure what was asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="real-model", help="folder for the reproductions")
    parser.add_argument("--prompts", type=int, default=100, help="default: 100")
    parser.add_argument("--only", choices=MODELS, help="measure one model, keep the others")
    parser.add_argument("--names", nargs="+", help="measure these experiments, keep the others")
    parser.add_argument("--fits", default="real-model/fits", help="folder of Jacobian Lenses")
    parser.add_argument("--fit", action="store_true", help="fit them, measure nothing; hours")
    parser.add_argument("--model", help=f"what to load as {REAL}, such as a folder")
    parser.add_argument("--collect", action="store_true", help="read --out, measure nothing")
    parser.add_argument("--page", action="store_true", help="only render the page")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = json.loads(FINDINGS.read_text("utf-8")) if FINDINGS.exists() else {"models": {}}
    for name, (model, data) in MODELS.items():
        if options.page or options.only not in (None, name):
            continue
        folder, fits = Path(options.out) / name, Path(options.fits)
        loaded = options.model if name == REAL and options.model else model
        if options.fit:
            fit(loaded, name, fits)
            continue
        if not options.collect:
            names = options.names or ["gradients", "explanations"]
            measure(loaded, data, folder, options.prompts, names, fits_of(name, fits))
        own = collected(folder)
        if name == REAL:
            own["figures"] = copy_figures(folder, FINDINGS.parent)
        kept = found["models"].get(name, own) if options.names else own
        found["models"][name] = merged(kept, own)
    write_pages(found, DOCS)


def measure(
    model: Any, data: Any, folder: Path, prompts: int, names: Sequence[str], fits: Sequence[Path]
) -> None:
    """Run experiments about gradients on a model.

    Args:
        model: The model, for `load_model`.
        data: Its data.
        folder: The folder to write.
        prompts: Number of prompts.
        names: Names of experiments or groups.
        fits: Files of Jacobian Lenses of the model.
    """
    log.info("%s", folder.name)
    jacobian = [*fits] or None
    reproduce(model, data, folder, names, prompts=prompts, jacobian=jacobian, progress=False)


def fits_of(name: str, folder: Path) -> list[Path]:
    """The Jacobian Lenses of a model; none for facts, which ships with its own.

    Args:
        name: The name of the model on the page.
        folder: The folder of all of them.

    Returns:
        The files.
    """
    return sorted(folder.glob(f"{name}-*.pt"))


def fit(model: Any, name: str, folder: Path) -> None:
    """Fit the Jacobian Lenses of a model, or resume; a fit of more prompts continues a smaller one.

    Args:
        model: The model, for `load_model`.
        name: The name of the model on the page.
        folder: The folder of all of them.
    """
    if name == model:
        return  # the facts model
    folder.mkdir(parents=True, exist_ok=True)
    loaded, texts = load_model(model), str(WIKITEXT)
    before: Path | None = None
    for size in FIT_SIZES:
        file = folder / f"{name}-{size}.pt"
        if before is not None and not file.exists():
            shutil.copy(before, file)
        log.info("%s", file)
        fit_jacobian_lens(loaded, texts, file, prompts=size, max_length=_FIT_LENGTH, progress=False)
        before = file


def merged(kept: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Findings on a model with those measured again replaced.

    Args:
        kept: The findings, as `collected` returned them.
        found: Newer ones, perhaps of fewer experiments.

    Returns:
        Both, and the figures of both.
    """
    drawn = sorted({*kept.get("figures", ()), *found.get("figures", ())})
    return {
        "about": kept["about"],
        "findings": {**kept["findings"], **found["findings"]},
        **({"figures": drawn} if drawn else {}),
    }


def collected(folder: Path) -> dict[str, Any]:
    """Read what the page needs from a reproduction.

    Args:
        folder: The folder.

    Returns:
        What was measured on what, and the findings by experiment.
    """
    findings = {each["name"]: each for each in read_findings(folder)}
    groups = {each.name: each.group for each in EXPERIMENTS}
    about = next(iter(findings.values()))["about"]
    return {
        "about": {name: about[name] for name in ("n_layers", "d_vocab", "prompts", "cut")},
        "findings": {
            name: {
                **{key: each[key] for key in ("verdict", "checks", "notes")},
                "seconds": round(each["about"]["seconds"], 1),
                **(
                    {
                        "tables": [
                            _rows(folder, own)
                            for own in each["tables"]
                            if own["name"] in ("verdicts", *SHOWN_TABLES)
                        ]
                    }
                    if groups[name] == "explanations"
                    else {}
                ),
            }
            for name, each in findings.items()
            if groups[name] != "editing"
        },
    }


def _rows(folder: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    with (folder / table["file"]).open(encoding="utf-8", newline="") as stream:
        return {"name": table["name"], "rows": list(csv.DictReader(stream))}


def copy_figures(folder: Path, to: Path) -> list[str]:
    """Copy the figures of the page.

    Args:
        folder: The folder of a reproduction.
        to: The folder of figures.

    Returns:
        Their names: the experiment, with a number from the second one on.
    """
    to.mkdir(parents=True, exist_ok=True)
    drawn = []
    for experiment, files in FIGURES.items():
        for number, file in enumerate(files, start=1):
            name = experiment if number == 1 else f"{experiment}-{number}"
            if (folder / experiment / file).exists():
                shutil.copy(folder / experiment / file, to / f"{name}.svg")
                drawn.append(name)
    return drawn


def write_pages(found: Mapping[str, Any], docs: Path) -> None:
    """Write the findings, the page about them, and the table of verdicts.

    Args:
        found: The findings by model.
        docs: The folder of the documentation.
    """
    (docs / "real-model").mkdir(exist_ok=True)
    write_text(
        docs / "real-model" / "findings.json",
        json.dumps(found, indent=1, ensure_ascii=False) + "\n",
    )
    if REAL not in found["models"]:
        return
    write_text(docs / "real-model.md", page(found, REAL))
    reproducing = docs / "reproducing.md"
    write_text(reproducing, with_verdicts(reproducing.read_text("utf-8"), found))


if __name__ == "__main__":
    main()
