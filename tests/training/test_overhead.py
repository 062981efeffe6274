"""The benchmark of what watching costs, and its section of docs/training.md."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from architectures import hf_model

from benchmarks import training_overhead as overhead
from benchmarks.timing import Timings


def row(mode: str, steps: str, added: float) -> dict[str, Any]:
    """A row as the results file has it."""
    return {
        "mode": mode,
        "steps": steps,
        "rounds": 5,
        "seconds": 6.0,
        "added_percent": [added, added - 1, added + 1],
    }


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"processor": "a processor", "system": "Linux", "load before": "0.1", "cores": "2"}
    return {
        "machine": about,
        "versions": {"torch": "2.13.0"},
        "sequences": 4,
        "tokens": 128,
        "rows": [row("full", "none", 0), row("full", "not watched", 0.25), *rows],
    }


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("mode", overhead.MODES)
def test_every_kind_of_step_is_measured(mode: str) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    model = hf_model("llama")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rows = overhead.measure(model, None, mode, 1, (2, 6))
    assert [each["steps"] for each in rows] == [
        *("none", "W_out", "not watched", "W_out, recorded", "mlp", "all")
    ]
    assert all(each["seconds"] > 0 for each in rows)
    assert rows[0]["added_percent"] == [0, 0, 0]
    after = model.state_dict()
    changed = [
        name for name, each in before.items() if not torch.equal(after.get(name, each), each)
    ]
    assert bool(changed) == (mode == "full")  # a step trains the adapters alone, or all weights
    assert not any(module._forward_hooks for module in model.modules())


def test_percentages_compare_steps_of_one_round() -> None:
    """The machine is twice as slow in the second round."""
    timings = Timings({"none": [1.0, 2.0, 1.0], "mlp": [1.1, 2.2, 1.2]})
    found = overhead._times(timings, "mlp")
    assert found["added_percent"][0] == 10.0
    assert found["added_percent"][1:] == [10.0, 20.0]
    assert found["seconds"] == 1.2


def test_goals_are_of_the_worst_choice_of_matrices() -> None:
    page = overhead.section(results(row("full", "W_out", 3.0), row("full", "all", 13.5)))
    assert "| full fine-tuning | W_out | 6.00 | 3.0 [2.0, 4.0] | 0.30 |" in page
    watched = "full fine-tuning: at most 15 % added to a watched step"
    assert f"| {watched} | 13.5 [12.5, 14.5] | ✓ |" in page
    # An interval around the goal does not say whether it is met.
    other = "full fine-tuning: at most 1 % added to another step"
    assert f"| {other} | 0.2 [-0.8, 1.2] | undecided |" in page
    assert "LoRA" not in page
    page = overhead.section(results(row("full", "mlp", 20.0)))
    assert f"| {watched} | 20.0 [19.0, 21.0] | ✗ |" in page


def test_the_page_has_the_measured_numbers() -> None:
    page = (overhead.DOCS / "training.md").read_text(encoding="utf-8")
    path = overhead.DOCS / "training" / "overhead.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert overhead.with_cost(page, found) == page
