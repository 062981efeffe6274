"""Which explanations of a failing claim hold on a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backward_lens_tl.reproduction.experiments import EXPERIMENTS, Experiment

Model = Mapping[str, Any]
"""The findings on one model, as `benchmarks.real_model.collected` returns them."""

HOLDS = ("holds", "holds with exceptions")
"""The verdicts under which a claim or an explanation holds."""

REFERENCES = ("as in the paper", "as it is", "read directly")
"""How conditions begin that are those of the paper."""

CLAIMS = tuple(each for each in EXPERIMENTS if each.group == "gradients")
EXPLANATIONS = tuple(each for each in EXPERIMENTS if each.group == "explanations")


def verdict_of(model: Model, experiment: Experiment) -> str:
    """The verdict on a claim or an explanation."""
    finding = model["findings"].get(experiment.name)
    return "not measured" if finding is None else str(finding["verdict"])


def found_by(model: Model, name: str, check: int = 0) -> str:
    """What a claim's measurement found."""
    found = all_found(model, name)
    return found[check] if found else "not measured"


def all_found(model: Model, name: str) -> list[str]:
    """What an experiment found, claim by claim."""
    return [str(check["found"]) for check in model["findings"][name]["checks"]]


def candidates(experiment: Experiment, model: Model) -> list[Experiment]:
    """The explanations that were measured and may account for a claim."""
    return [
        each
        for each in EXPLANATIONS
        if experiment.name in each.explains and each.name in model["findings"]
    ]


def reasons_of(experiment: Experiment, model: Model) -> list[Experiment]:
    """Explanations of a claim: one that measures it again must restore it, others must hold."""
    return [
        each
        for each in candidates(experiment, model)
        if (
            _restoring(experiment, each, model)
            if remeasured(experiment, each, model)
            else verdict_of(model, each) in HOLDS
        )
    ]


def remeasured(
    experiment: Experiment, explanation: Experiment, model: Model
) -> list[Mapping[str, str]]:
    """A claim as an explanation measured it under other conditions; none if it did not."""
    tables = model["findings"][explanation.name].get("tables", ())
    rows = next((each["rows"] for each in tables if each["name"] == "verdicts"), ())
    return [row for row in rows if row["experiment"] == experiment.name]


def _restoring(experiment: Experiment, explanation: Experiment, model: Model) -> list[str]:
    """The conditions under which a claim holds that fails as in the paper."""
    rows = remeasured(experiment, explanation, model)
    references = [row for row in rows if row["condition"].startswith(REFERENCES)]
    if any(row["holds"] == "True" for row in references):
        return []
    return [row["condition"] for row in rows if row["holds"] == "True"]
