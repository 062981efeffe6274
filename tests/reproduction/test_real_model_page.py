"""The page about the real model: it shows what was measured, all of it, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import HAS_BRIDGE, build

from backward_lens_tl.reproduction import EXPERIMENTS
from benchmarks import real_model
from benchmarks.real_model import collected
from benchmarks.real_model_page import page, with_verdicts
from benchmarks.real_model_reasons import CLAIMS, EXPLANATIONS

DOCS = Path(__file__).parents[2] / "docs"
ROWS = [
    {"prompt": "Messi plays for", "target": " Paris", "subject": "Messi", "answer": " the"},
    {"prompt": "Rome is in Italy and Paris is", "target": " the", "subject": "Paris"},
]


@pytest.fixture(scope="module")
def findings() -> Any:
    return json.loads((DOCS / "real-model" / "findings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text() -> str:
    return (DOCS / "real-model.md").read_text(encoding="utf-8")


def test_pages_are_rendered_from_the_findings(findings: Any, text: str):
    assert text == page(findings, real_model.REAL)
    reproducing = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    assert reproducing == with_verdicts(reproducing, findings)


def test_the_page_has_every_claim_and_explanation(findings: Any, text: str):
    names = {each.name for each in (*CLAIMS, *EXPLANATIONS)}
    assert list(findings["models"]) == list(real_model.MODELS)
    for model in findings["models"].values():
        assert set(model["findings"]) == names
    table = text.partition("## All claims")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.M) == [each.name for each in CLAIMS]
    for each in EXPLANATIONS:
        assert f"\n### {each.title.partition(' (')[0]}\n" in text


def test_every_number_was_measured(findings: Any, text: str):
    """Numbers are those of the findings, or of titles, statements and commands."""
    real = findings["models"][real_model.REAL]["findings"]
    counted = [
        sum(model["findings"][each.name]["verdict"] in verdicts for each in CLAIMS)
        for model in findings["models"].values()
        for verdicts in (("holds",), ("holds with exceptions",), ("does not hold here",))
    ]
    holding = [
        sum(model["findings"][each.name]["verdict"].startswith("holds") for each in CLAIMS)
        for model in findings["models"].values()
    ]
    about = [model["about"] for model in findings["models"].values()]
    times = [
        f"{sum(each['seconds'] for each in model['findings'].values()) / unit:.0f}"
        for model in findings["models"].values()
        for unit in (1, 60)
    ]
    cosines = [
        model["findings"]["residual_bases"]["checks"] for model in findings["models"].values()
    ]
    texts = [[each.title, each.statement] for each in EXPERIMENTS]
    tables = [
        row for each in real.values() for own in each.get("tables", ()) for row in own["rows"]
    ]
    rounded = [
        f"{float(value):.{digits}f}"
        for row in tables
        for value in row.values()
        if decimal(value)
        for digits in (0, 2)
    ]
    seconds = [f"{each['seconds']:.0f}" for each in real.values()]
    allowed = numbers(
        json.dumps(
            [real, about, texts, counted, holding, len(CLAIMS), rounded, seconds, times, cosines]
        )
    ) | {"5.2", "1", "4", "135"}
    text = re.sub(r"… \(\d+ more\)", "", text)
    shown = re.sub(r"```.*?```|\(#[^)]*\)|\([\w/-]+\.\w+\)|`[^`]*`", "", text, flags=re.S)
    shown = re.sub(r"\d,\d", lambda found: found[0].replace(",", ""), shown)
    assert numbers(shown) <= allowed | {"stories260K", "260"}


def decimal(value: str) -> bool:
    return re.fullmatch(r"-?\d+\.\d+", value) is not None


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text))


def claims(finding: Any) -> set[str]:
    return {check["claim"] for check in finding["checks"]}


def test_numbers_in_the_prose_of_other_pages(findings: Any):
    facts, stories = (findings["models"][name]["findings"] for name in ("facts", "stories260K"))
    failing = sum(stories[each.name]["verdict"] == "does not hold here" for each in CLAIMS)
    assert (failing, len(CLAIMS)) == (8, 19)
    limitations = (DOCS / "limitations.md").read_text(encoding="utf-8")
    assert "eight of nineteen statements of the paper do not hold" in limitations
    found = [[own["found"] for own in each["fig4"]["checks"][:2]] for each in (facts, stories)]
    counts = [[re.findall(r"^(\d+) of (\d+)", text)[0] for text in own] for own in found]
    assert [[sum(map(int, column)) for column in zip(*own, strict=True)] for own in counts] == [
        [1600, 1600],
        [1500, 1500],
    ]
    reproducing = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    assert "hold exactly for the two small models, in 1,600 and 1,500 gradients" in reproducing


def test_figures_exist(text: str):
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert shown
    for file in shown:
        assert (DOCS / file).exists()


def test_the_page_follows_the_verdicts(findings: Any):
    """Nothing is different if all claims hold, and no reason is found if no explanation holds."""
    good, bad = copy.deepcopy(findings), copy.deepcopy(findings)
    for each in CLAIMS:
        good["models"][real_model.REAL]["findings"][each.name]["verdict"] = "holds"
    shown = page(good, real_model.REAL)
    assert "### " not in shown.partition("## What is different")[2].partition("\n## ")[0]
    assert f"{len(CLAIMS)} of the paper's {len(CLAIMS)} experiments" in shown
    assert "we do not know" not in shown.partition("## What we do not know")[0]
    for each in EXPLANATIONS:
        bad["models"][real_model.REAL]["findings"][each.name] |= {
            "verdict": "does not hold here",
            "tables": [],
        }
    shown = page(bad, real_model.REAL)
    table = shown.partition("## All claims")[2].partition("\n## ")[0]
    failing = [line for line in table.splitlines() if "](#" in line]
    assert not failing
    assert "we do not know" in table


def test_the_command_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, findings: Any
):
    """Measured, collected and rendered, with the other models as they were."""
    small = build("bridge-llama" if HAS_BRIDGE else "hooked-llama").model
    monkeypatch.setattr(real_model, "DOCS", tmp_path)
    monkeypatch.setattr(real_model, "FINDINGS", tmp_path / "real-model" / "findings.json")
    monkeypatch.setattr(real_model, "MODELS", {real_model.REAL: (small, ROWS)})
    (tmp_path / "real-model").mkdir()
    kept = {"models": {name: findings["models"][name] for name in ("facts", "stories260K")}}
    (tmp_path / "real-model" / "findings.json").write_text(json.dumps(kept), encoding="utf-8")
    (tmp_path / "reproducing.md").write_text(
        "a\n<!-- verdicts: begin -->\n<!-- verdicts: end -->\nb\n", encoding="utf-8"
    )
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["real_model", "--out", str(out), "--prompts", "2"])
    real_model.main()
    # A changed experiment must be measured again: the claims on the page are those of the code.
    shown = findings["models"][real_model.REAL]["findings"]
    for name, finding in collected(out / real_model.REAL)["findings"].items():
        assert claims(finding) <= claims(shown[name]), name
    found = json.loads((tmp_path / "real-model" / "findings.json").read_text(encoding="utf-8"))
    assert list(found["models"]) == ["facts", "stories260K", real_model.REAL]
    assert found["models"]["facts"] == kept["models"]["facts"]
    assert (tmp_path / "real-model.md").read_text("utf-8") == page(found, real_model.REAL)
    between = (tmp_path / "reproducing.md").read_text("utf-8")
    assert between.startswith("a\n<!-- verdicts: begin -->\n| experiment | facts | stories260K |")
    assert between.endswith("<!-- verdicts: end -->\nb\n")
    assert {file.name for file in (tmp_path / "real-model").glob("*.svg")}
    before = (tmp_path / "real-model.md").read_text("utf-8")
    monkeypatch.setattr("sys.argv", ["real_model", "--page"])
    real_model.main()
    assert (tmp_path / "real-model.md").read_text("utf-8") == before
