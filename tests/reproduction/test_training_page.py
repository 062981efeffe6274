"""The page about training runs: it shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import backward_lens_tl as blt
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.requests import EditRequest, tokenize_requests
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.reproduction.training_facts import TaughtFacts
from backward_lens_tl.reproduction.training_loop import train
from backward_lens_tl.reproduction.training_measures import effective_rank
from backward_lens_tl.reproduction.training_relations import relations
from backward_lens_tl.reproduction.training_runs import CHANGES, TrainingConfig
from benchmarks import training
from benchmarks.training_conclusions import CONCLUSIONS
from benchmarks.training_page import SHOWN, page

DOCS = Path(__file__).parents[2] / "docs"


def table_of(found: list[list[Any]]) -> pd.DataFrame:
    """A table of the findings, whose first row names its columns."""
    columns, *rows = found
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture(scope="module")
def findings() -> Any:
    return json.loads(training.FINDINGS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text() -> str:
    return (DOCS / "training_runs.md").read_text(encoding="utf-8")


def test_the_page_is_rendered_from_the_findings(findings: Any, text: str) -> None:
    assert text == page(findings)
    assert {*SHOWN} <= {column.name for column in CHANGES}


def test_the_page_names_what_was_measured(findings: Any, text: str) -> None:
    for name, (model, _) in training.MODELS.items():
        assert f"--model {model}" in text
        assert name in findings
    for found in findings.values():
        holds = [check["holds"] for check in found["checks"]]
        assert f"\n{sum(holds)} of {len(holds)} claims hold. Verdict: {found['verdict']}." in text


def test_the_page_has_the_size_of_each_run(findings: Any, text: str) -> None:
    columns, *rows = findings["facts"]["means"]
    own = [dict(zip(columns, row, strict=True)) for row in rows]
    keys = ("optimizer", "weights", "answers")
    [first, second] = [
        row["relative_norm"]
        for row in own
        if [*map(row.get, keys)] == ["muon", "full", "taught"] and row["step"] == 200
    ]
    [line] = re.findall(
        r"^\| muon, full, taught \|.*", text.partition("### Low rank")[0], flags=re.M
    )
    assert line.endswith(f"| {(first + second) / 2:#.2g} |")


def test_layers_are_those_of_the_findings(findings: Any, text: str) -> None:
    columns, *rows = findings["facts"]["layers"]
    own = [dict(zip(columns, row, strict=True)) for row in rows]
    [row] = [
        row
        for row in own
        if (row["optimizer"], row["weights"], row["answers"]) == ("sgd", "full", "shuffled")
        and row["layer"] == 7
    ]
    shares = (row[name] for name in ("answers_found", "taught_near", "permuted_near"))
    cell = ", ".join(f"{100 * share:.0f} %" for share in shares)
    part = text.partition("### By layer")[2]
    assert re.search(rf"^\| sgd, full, shuffled \|.*\| {cell} \|$", part, flags=re.M)


def test_conclusions_have_the_numbers_of_the_findings(findings: Any) -> None:
    own = table_of(findings["facts"]["means"]).query("answers == 'taught' and step == 200")
    full = own[own["weights"] == "full"].groupby("optimizer")
    shares, sizes = full["energy_10"].mean() * 100, full["relative_norm"].mean() * 100
    writing = own[own["matrix"] == "W_out"].set_index(["weights", "optimizer"])
    found, near = writing["answers_found"] * 100, writing["taught_near"] * 100
    by_layer = table_of(findings["facts"]["layers"]).query(
        "weights == 'full' and answers == 'taught'"
    )
    late = by_layer["layer"] >= 5
    descent = by_layer[by_layer["optimizer"] != "muon"]
    parts = [
        f"directions have {shares['sgd']:.0f} % of its squared\n",
        f"ten largest directions have {shares['adam']:.0f} %,\n",
        f"its ten largest have {shares['muon']:.0f} %, those",
        f"norm is {sizes['muon']:.0f} % of that of the weights\n",
        f"and {100 * by_layer['relative_norm'].max():.0f} % for `W_out` of layer 3",
        f"Adam's is {sizes['adam']:.0f} % and SGD's is {sizes['sgd']:.0f} %",
        f"{found['full', 'sgd']:.0f} % and {found['full', 'adam']:.0f} %, random",
        f"all three show {found['lora'].min():.0f} to {found['lora'].max():.0f} %",
        f"SGD's change promotes {near['lora', 'sgd']:.0f} % of the taught answers",
        f"layers 5 to 7 promotes {100 * by_layer['taught_near'][late].min():.0f} % or more",
        f"layers 0 to 4 promotes {100 * by_layer['taught_near'][~late].max():.0f} % or fewer",
        f"SGD and Adam show {100 * descent['answers_found'].min():.0f} % or more in every layer",
    ]
    text = CONCLUSIONS["facts"].replace("\n  ", " ")
    assert [part for part in parts if part.replace("\n", "") not in text] == []


def test_conclusions_about_smollm2_have_its_numbers(findings: Any) -> None:
    last = table_of(findings["SmolLM2"]["means"]).query("step == 200")
    own = last[last["answers"] == "taught"]
    full = own[own["weights"] == "full"].groupby("optimizer").mean(numeric_only=True) * 100
    writing = own[own["matrix"] == "W_out"].set_index(["weights", "optimizer"])
    found, near, other, unseen = (
        100 * writing[name]
        for name in ("answers_found", "taught_near", "permuted_near", "unseen_found")
    )
    shuffled = last[(last["answers"] == "shuffled") & (last["matrix"] == "W_out")]
    turned = shuffled[shuffled["weights"] == "full"].set_index("optimizer").loc["sgd"]
    layers = table_of(findings["SmolLM2"]["layers"]).query("answers == 'taught'")
    sizes = layers[(layers["optimizer"] == "sgd") & (layers["weights"] == "full")].set_index(
        "layer"
    )["relative_norm"]
    ends, shown = [0, 29], layers.set_index(["layer", "optimizer", "weights"])["answers_found"]
    near_the_end = shown[25].drop(("muon", "full")) * 100
    shares, norms = full["energy_10"], full["relative_norm"]
    ranks = full["effective_rank"]
    parts = [
        f"have {shares['sgd']:.0f} % of the squared norm of SGD's change, "
        f"{shares['adam']:.0f} % of Adam's, {shares['muon']:.0f} % of Muon's",
        f"{norms['sgd']:.2f} % (SGD), {norms['adam']:.1f} % (Adam) and {norms['muon']:.1f} %",
        f"whole change and descent is\n  {full['cosine']['adam'] / 100:.2f}.",
        f"show {found['full', 'sgd']:.0f} % of the\n  taught answers with SGD and Adam",
        f"With LoRA it is {found['lora'].min():.0f} to {found['lora'].max():.0f} %, and at most "
        f"{unseen['lora'].max():.0f} %",
        f"The last one shows {100 * shown[29].min():.0f} to {100 * shown[29].max():.0f} %",
        f"shows {near_the_end.min():.0f} to {near_the_end.max():.0f} % except for Muon with",
        f"promoted in {near['full'].min():.0f} to {near['full'].max():.0f} %",
        f"in {other['full'].min():.0f} to {other['full'].max():.0f} %",
        f"still promotes {100 * turned['taught_near']:.0f} %",
        f"as the {100 * turned['permuted_near']:.0f} % of those that were",
    ]
    text = CONCLUSIONS["SmolLM2"].replace("\n  ", " ")
    assert [part for part in parts if part.replace("\n  ", " ") not in text] == []
    assert 3.5 < ranks["adam"] / ranks["sgd"] < 4.5
    assert found["full", "sgd"] == pytest.approx(found["full", "adam"], abs=1)
    assert sizes[ends].min() > 2 * sizes.drop(ends).max()
    assert (shown[[0, 4, 8, 12, 17]] <= 0.05).all()


def test_the_page_has_every_model_and_claim(findings: Any, text: str) -> None:
    assert re.findall(r"^## (\w+)$", text, flags=re.M)[1:] == [*findings]
    assert [*findings] == [*training.MODELS]
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
    """SGD with full fine-tuning, on the CPU: the same seed has the same losses and ranks."""
    host = host_of(facts_model)
    rows = [row for row in blt.read_records("facts").rows if isinstance(row, Record)]
    requests = tokenize_requests(host, [EditRequest.of(row) for row in rows], False)
    facts = TaughtFacts.of(requests, relations(rows), [None] * len(rows)).first(20)
    ends = train(
        host,
        facts,
        find_editable(host, "mlp", None, mlp_only=True),
        "sgd",
        rate_of=facts,
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
