"""The section of docs/editing.md: what was measured, and from the records that it names."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from models import Case
from test_evaluation import ROWS, Nudge, small_config

from backward_lens_tl.evaluation.comparison import compare
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.run import evaluate
from benchmarks import editing, editing_experiments
from benchmarks.editing_experiments import collected_experiments, run_experiments
from benchmarks.editing_page import LENS, PAPER, section, with_results
from benchmarks.editing_results import collected
from benchmarks.editing_subjects import SUBJECTS
from benchmarks.tuning import TASKS, counterfact_split

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads((DOCS / "editing" / "results.json").read_text(encoding="utf-8"))


def test_the_section_is_rendered_from_the_results(results: Any) -> None:
    text = (DOCS / "editing.md").read_text(encoding="utf-8")
    assert text == with_results(text, results)


def test_goals_without_a_measurement_are_left_out(results: Any) -> None:
    found = deepcopy(results)
    [row] = [
        row
        for row in next(iter(found.values()))["methods"]
        if (row["name"], row["facts"], row["run"]) == (LENS, 1, "defaults")
    ]
    assert f"| {LENS}: kept at least" in section(found)
    row["kept"] = [None, None, None]  # no record has neighbors
    text = section(found)
    assert f"| {LENS}: kept at least" not in text
    assert f"| {LENS}: efficacy at least" in text


def test_every_table_is_rectangular(results: Any) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", section(results), re.MULTILINE)
    assert len(tables) >= 5
    for each in tables:
        head, _, *body = each.splitlines()
        assert body, head
        assert {line.count("|") for line in body} == {head.count("|")}


def test_no_record_was_used_for_a_choice() -> None:
    """All rows of all trials are among those that benchmarks/tuning.py leaves for evaluation.

    Those of attempts are in the tuning split, but presets were not tuned on them.
    """
    subject = SUBJECTS["SmolLM2"]
    order = [*counterfact_split()[0], *counterfact_split()[1]]
    attempts = editing.settings(subject, editing.TRIALS["attempts"], 0).rows or ()
    assert list(attempts) == list(range(140, 170))
    assert not {order[place] for place in attempts} & set(TASKS["smollm2"].tuning)
    for trial in (each for each in editing.TRIALS.values() if not each.is_spare):
        places = [
            place
            for part in range(editing.n_parts(trial))
            for place in editing.settings(subject, trial, part).rows or ()
        ]
        assert places == list(range(300, 300 + trial.records))
        assert not {order[place] for place in places} & {*counterfact_split()[0]}


def test_a_lens_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["editing", "--subjects", "SmolLM2", "--runs", "forms"])
    with pytest.raises(SystemExit):
        editing.main()
    assert "--jacobian is needed" in capsys.readouterr().err


@pytest.mark.usefixtures("as_for_a_user")
def test_parts_are_joined(gpt2: Case, tmp_path: Path) -> None:
    """Values are those of one evaluation of all records."""
    methods = {LENS: Nudge(size=9.0), PAPER: Nudge(size=60.0)}
    (tmp_path / "texts.raw").write_text("Rome is in Italy.\nMessi plays the ball.\n")
    texts = str(tmp_path / "texts.raw")
    parts = [
        evaluate(gpt2.model, ROWS, tmp_path / name, methods, small_config(texts, rows=rows))
        for name, rows in (("a", [0]), ("b", [1, 2]), ("whole", [0, 1, 2]))
    ]
    found = collected({"defaults": parts[:2], "none yet": []}, PAPER)
    summary = parts[2].summary().set_index("method")
    assert [row["name"] for row in found["methods"]] == ["none", LENS, PAPER]
    for row in found["methods"]:
        own = summary.loc[row["name"]]
        assert row["records"] == 3
        for name in ("efficacy_success", "neighborhood_kl", "text_kl_median", "kept"):
            ends = [own[f"{name}{end}"] for end in ("", "_low", "_high")]
            assert row[name] == pytest.approx(ends, rel=1e-5)
    expected = compare(parts[2].edits(), PAPER, LENS, seed=0, resamples=1000)
    expected = expected.set_index(["metric", "statistic"]).loc[("neighborhood_kl", "median")]
    [pair] = found["pairs"]
    assert (pair["name"], pair["records"]) == (LENS, 2)  # one record has no neighbors
    ratio = expected[["ratio", "ratio_low", "ratio_high"]].tolist()
    assert pair["ratio"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.usefixtures("as_for_a_user")
def test_methods_without_all_records_of_a_part_are_left_out(gpt2: Case, tmp_path: Path) -> None:
    methods = {LENS: Nudge(size=9.0), PAPER: Nudge(size=60.0)}
    config = EvaluationConfig(generation_length=0, n_texts=0)
    found = evaluate(gpt2.model, ROWS, tmp_path / "all", methods, config, progress=False)
    (tmp_path / "all" / "edits" / "shard-000008.parquet").unlink()
    begun = evaluate(gpt2.model, ROWS, tmp_path / "begun", methods, config, progress=False)
    for shard in (tmp_path / "begun" / "edits").iterdir():
        shard.unlink()
    [none, complete] = collected({"defaults": [found], "begun": [begun]}, PAPER)["methods"]
    assert (none["name"], complete["name"], complete["records"]) == ("none", LENS, 3)


def test_experiments_are_shown_with_their_claims(results: Any) -> None:
    claims = [
        {"claim": "all facts are learned", "holds": True, "found": "10 of 10", "exceptions": ""},
        {"claim": "MEMIT preserves more", "holds": False, "found": "3 of 10", "exceptions": "one"},
    ]
    about = {"name": "several_facts", "title": "Several facts", "records": 10, "seconds": 130}
    rows = [["none", 0.0, 0.0, 10.0, 72.27, None], ["ultraedit", 90.0, 90.0, 0.0, 1.865e10, 0.23]]
    shown = {"verdict": "holds with exceptions", "checks": claims}
    found = [
        {**about, **shown, "methods": []},
        {**about, "title": "Table", **shown, "methods": rows},
    ]
    real = next(iter(results.values()))
    text = section({"SmolLM2": {**real, "experiments": found}, "facts": results["facts"]})
    own = text.partition("### The paper's experiments on editing\n")[2].partition("\n###")[0]
    assert "**Several facts**: holds with exceptions (`several_facts`, 10 records, 2 min)" in own
    assert "- ✓ All facts are learned: 10 of 10\n" in own
    assert "- ✗ MEMIT preserves more: 3 of 10 (exceptions: one)\n" in own
    [first, second] = own.split("**Table**")
    assert "| method |" not in first
    assert (
        "| `none` | 0 | 0 | 10 | 72.3 |  |\n| `ultraedit` | 90 | 90 | 0 | 1.86e+10 | 0.23 |"
        in second
    )
    assert "experiments on editing" not in section({"SmolLM2": {**real, "experiments": []}})


def test_experiments_that_were_not_run_are_left_out(tmp_path: Path) -> None:
    assert collected_experiments(tmp_path / "none") == []


@pytest.mark.usefixtures("as_for_a_user")
def test_findings_of_an_experiment_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing_experiments, "PROMPTS", {"optimizers": 2})
    texts = tmp_path / "texts.txt"
    texts.write_text("too short\n" + "A long text about a city in Italy. " * 20 + "\n")
    run_experiments(
        "facts", "facts", tmp_path / "out", jacobian=None, texts=str(texts), statistics=None
    )
    assert (tmp_path / "out" / "texts.txt").read_text().count("\n") == 1
    [found] = collected_experiments(tmp_path / "out")
    assert (found["name"], found["records"]) == ("optimizers", 2)
    assert found["verdict"]
    assert found["checks"]
