"""The page about training runs: it shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import backward_lens_tl as blt
from backward_lens_tl.editing.requests import EditRequest, tokenize_requests
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.reproduction.training_facts import TaughtFacts
from backward_lens_tl.reproduction.training_loop import train
from backward_lens_tl.reproduction.training_measures import effective_rank
from backward_lens_tl.reproduction.training_runs import CHANGES, TrainingConfig
from benchmarks import training
from benchmarks.training_page import SHOWN, page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def findings() -> Any:
    return json.loads(training.FINDINGS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text() -> str:
    return (DOCS / "training_runs.md").read_text(encoding="utf-8")


def test_the_page_is_rendered_from_the_findings(findings: Any, text: str) -> None:
    assert text == page(findings)
    assert {*SHOWN} <= {column.name for column in CHANGES}


def test_the_page_has_every_model_and_claim(findings: Any, text: str) -> None:
    assert re.findall(r"^## (\w+)$", text, flags=re.M)[1:] == [*findings]
    assert [*findings] == [name for name in training.MODELS if name in findings]
    for found in findings.values():
        for check in found["checks"]:
            mark = "✓" if check["holds"] else "✗"
            assert f"- {mark} {check['claim']}: {check['found']}\n" in text


def test_figures_are_there(text: str) -> None:
    files = re.findall(r"\]\((training-runs/[^)]*\.svg)\)", text)
    assert files
    assert all((DOCS / file).is_file() for file in files)
    assert {*files} == {f"training-runs/{file.name}" for file in DOCS.glob("training-runs/*.svg")}


def test_cells_are_means_of_the_findings(findings: Any, text: str) -> None:
    """One cell of each table, computed again."""
    columns, *rows = findings["facts"]["means"]
    own = [dict(zip(columns, row, strict=True)) for row in rows]
    adam = [
        row
        for row in own
        if (row["optimizer"], row["weights"], row["answers"]) == ("adam", "full", "taught")
    ]
    first = [row["effective_rank"] for row in adam if row["step"] == 1]
    assert f"| adam, full | {sum(first) / 2:.1f} |" in text
    [last] = [row for row in adam if row["step"] == 200 and row["matrix"] == "W_out"]
    assert f"| adam, full | {last['peak']:.2f} | {100 * last['answers_found']:.0f} % |" in text


@pytest.mark.slow
def test_a_run_again_has_the_numbers_of_the_page(findings: Any, facts_model: Any) -> None:
    """SGD in full, on the CPU: the same seed has the same losses and ranks."""
    host = host_of(facts_model)
    rows = blt.read_records("facts").rows[:20]
    requests = tokenize_requests(host, [EditRequest.of(row) for row in rows], False)
    ends = train(
        host,
        TaughtFacts.of(requests),
        find_editable(host, "mlp", None, mlp_only=True),
        "sgd",
        rank=None,
        steps=TrainingConfig().steps,
        batch_size=2,
        seed=0,
    )
    key = ["sgd", "full", "taught"]
    losses = {row[3]: row[4] for row in findings["facts"]["losses"] if row[:3] == key}
    columns, *means = findings["facts"]["means"]
    at = columns.index("effective_rank")
    ranks = {(row[3], row[4]): row[at] for row in means if row[:3] == key}
    for end in ends:
        # Other machines round differently, which 200 steps enlarge.
        assert end.loss == pytest.approx(losses[end.step], rel=0.02)
        for matrix in ("W_in", "W_out"):
            own = [each.change for each in end.changes if each.change.matrix == matrix]
            mean = sum(effective_rank(each.singular_values()) for each in own) / len(own)
            assert mean == pytest.approx(ranks[end.step, matrix], rel=0.02)


def test_runs_that_were_not_made_are_named(findings: Any) -> None:
    found = dict(findings["facts"])
    found["checks"] = []
    columns, *rows = found["losses"]
    found["losses"] = [columns, *(row for row in rows if row[:3] != ["muon", "lora", "shuffled"])]
    text = page({"facts": found})
    assert "Missing: muon, lora, shuffled.\n" in text
    assert ".svg" not in text
