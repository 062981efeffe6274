"""The editing experiments: verdicts for and against on synthetic tables, and small real runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from models import HAS_BRIDGE, build
from torch import nn

import backward_lens_tl as blt
from backward_lens_tl.data.records import BadRecord
from backward_lens_tl.editing import (
    MEMIT,
    EditRequest,
    ForwardPassShift,
    GradientStep,
    facts_moments,
)
from backward_lens_tl.editing.methods.presets import preset_settings
from backward_lens_tl.editing.tokens import compare_tokens
from backward_lens_tl.errors import EvaluationError, InputError
from backward_lens_tl.evaluation.rates import least_rates_by_layer
from backward_lens_tl.evaluation.summary import METRICS
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_checksum
from backward_lens_tl.models.loading import FACTS_MODEL
from backward_lens_tl.reproduction import (
    Finding,
    editing_methods,
    folder,
    least_learning_rates,
    optimizer_steps,
    reproduce,
    several_facts,
    whitening,
)
from backward_lens_tl.reproduction import evidence as evidence_module
from backward_lens_tl.reproduction.evidence import Evidence

WHITE, PLAIN, CONTROL = "whitened", "scale free", "whitened, another layer's C"


class Fake(Evidence):
    """Evidence with the given attributes only."""

    model, model_name, n_layers, d_vocab = None, "fake", 4, 1001
    prepend_bos, progress, n_prompts = False, False, 100

    def __init__(self, **given: Any) -> None:
        self.__dict__.update({"requests": [object()] * 100} | given)


def holds(finding: Finding) -> list[bool]:
    found = [check.holds for check in finding.checks]
    assert all(type(each) is bool for each in found)  # JSON does not support numpy's bools
    return found


def drawn(finding: Finding) -> None:
    assert finding.figures
    for draw in finding.figures.values():
        for backend in ("plotly", "matplotlib"):
            draw(backend=backend)


def summaries(methods: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """A table like `Evaluation.summary` with the given values."""
    ends = ("", "_std", "_low", "_high")
    names = [f"{metric.name}{end}" for metric in METRICS for end in ends]
    usual: dict[str, Any] = dict.fromkeys([*names, "score"], 1.0) | {"records": 100, "failed": 0}
    return pd.DataFrame([{"method": name, **usual, **own} for name, own in methods.items()])


def evaluated(summary: pd.DataFrame) -> Any:
    texts = {"n": 7, "name": "texts.raw"}
    return SimpleNamespace(summary=lambda: summary, about={"texts": texts})


# --- table 1 --------------------------------------------------------------------------------------

METHODS: Mapping[str, Mapping[str, float]] = {
    "none": {"efficacy": 0, "ngram_entropy": 600, "corpus_perplexity": 50, "perplexity": 1},
    "ft_first": {"efficacy": 96, "paraphrase": 7},
    "rome": {"efficacy": 99, "paraphrase": 72, "neighborhood": 11},
    "memit": {"efficacy": 79, "neighborhood": 10},
    "shift": {
        "efficacy": 95, "paraphrase": 42, "neighborhood": 6, "ngram_entropy": 594.1,
        "corpus_perplexity": 50.4, "perplexity": 9,
    },
}  # fmt: skip
"""As in the paper."""


def of_methods(model_name: str = "fake", **changed: Mapping[str, float]) -> tuple[Finding, Any]:
    table = summaries({name: {**own, **changed.get(name, {})} for name, own in METHODS.items()})
    asked = []

    def evaluation(name: str, methods: Any, **settings: Any) -> Any:
        asked.append((name, methods, settings))
        return evaluated(table)

    named = type("Named", (Fake,), {"model_name": model_name})
    finding = editing_methods.editing_methods(
        named(evaluation=evaluation, presets=lambda: "all of them")
    )
    [call] = asked
    return finding, call


def test_table_1_as_in_the_paper() -> None:
    finding, (name, methods, settings) = of_methods()
    assert finding.verdict == "holds"
    assert holds(finding) == [True] * 4
    assert (name, methods, settings) == ("methods", "all of them", {"generation_length": 100})
    assert of_methods("facts")[1][2] == {"generation_length": 20}
    assert [check.found for check in finding.checks] == [
        "ft_first 96.0 %, rome 99.0 %, memit 79.0 %, shift 95.0 %",
        "99.0 % of the entropy; perplexity 50.000 before, 50.400 after",
        "shift 6.0 %, rome 11.0 %, memit 10.0 %",
        "ft_first 7.0 %, shift 42.0 %, rome 72.0 %",
    ]
    assert "7 texts of 'texts.raw'" in finding.notes[1]
    assert len(finding.notes) == 2
    assert finding.tables["methods"]["method"].tolist() == list(METHODS)
    # The published table.
    published = finding.tables["published, GPT-2 xl"].set_index("method")
    assert published.loc["shift"].tolist() == [99.4, 41.55, 6.02, 622.45, 93.66]
    assert published.loc["rome", "neighborhood"] == 10.91
    assert published.loc["none", "efficacy"] == 0.4


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        ("shift", {"efficacy": 94.9}, [False, True, True, True]),
        ("shift", {"ngram_entropy": 593.9}, [True, False, True, True]),
        ("shift", {"corpus_perplexity": 50.6}, [True, False, True, True]),
        ("shift", {"corpus_perplexity": math.inf}, [True, False, True, True]),
        # The mean over texts is not checked.
        ("shift", {"perplexity": 1e6}, [True] * 4),
        ("shift", {"neighborhood": 10}, [True, True, False, True]),
        ("rome", {"neighborhood": 6}, [True, True, False, True]),
        ("memit", {"neighborhood": 5}, [True, True, False, True]),
        ("shift", {"paraphrase": 7}, [True, True, True, False]),
        ("shift", {"paraphrase": 72}, [True, True, True, False]),
        ("ft_first", {"paraphrase": 43}, [True, True, True, False]),
    ],
)
def test_table_1_otherwise(method: str, values: dict[str, float], expected: list[bool]) -> None:
    finding, _ = of_methods(**{method: values})
    assert holds(finding) == expected
    first = expected[0]
    fails = "holds with exceptions" if False in expected else "holds"
    assert finding.verdict == (fails if first else "does not hold here")


@pytest.mark.parametrize("metric", ["ngram_entropy", "neighborhood", "paraphrase"])
def test_table_1_without_prompts_for_a_metric(metric: str) -> None:
    finding, _ = of_methods(**{name: {metric: math.nan} for name in METHODS})
    assert holds(finding) == [True] * 3
    assert finding.notes[-1] == f"The data have no prompts for {metric}, so it is not checked."


# --- figure 24 ------------------------------------------------------------------------------------

RATES = {"sgd": (1.0, 100.0), "adam": (0.1, 0.1), "shift": (1.0, 10.0)}
"""Rates of two requests in all layers: the spread is 1 for SGD and 0.5 for the shift."""


def rates_table(
    n_layers: int = 4,
    rates: Mapping[tuple[str, int], tuple[float, float]] = {},
    perplexity: Mapping[tuple[str, int], float] = {},
) -> pd.DataFrame:
    """As in the paper, with the given exceptions: SGD and Adam do damage in early layers only."""
    return pd.DataFrame(
        {
            "request": request,
            "layer": layer,
            "step": step,
            "rate": rates.get((step, layer), usual)[request],
            "perplexity": perplexity.get(
                (step, layer), 14.0 if step != "shift" and layer < n_layers // 2 else 10.0
            ),
        }
        for request in (0, 1)
        for step, usual in RATES.items()
        for layer in range(n_layers)
    )


def of_rates(monkeypatch: pytest.MonkeyPatch, table: pd.DataFrame, n_layers: int = 4) -> Finding:
    asked = []

    def least_rates(model: Any, requests: Any, **given: Any) -> pd.DataFrame:
        asked.append((model, requests, given))
        return table

    monkeypatch.setattr(least_learning_rates, "least_rates", least_rates)
    evidence = Fake(perplexity=9.0, evaluation_config=lambda: "settings", requests=[*range(60)])
    monkeypatch.setattr(Fake, "n_layers", n_layers)
    finding = least_learning_rates.least_learning_rates(evidence)
    assert asked == [(None, [*range(50)], {"config": "settings", "progress": False})]
    return finding


def test_figure_24_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = of_rates(monkeypatch, rates_table())
    drawn(finding)
    assert finding.verdict == "holds"
    assert [check.found for check in finding.checks] == [
        "4 of 4 (100 %) layers; mean standard deviation of its decimal logarithm: "
        "sgd 1.00, adam 0.00, shift 0.50",
        "2 of 2 (100 %) layers; mean perplexity sgd 14.00, adam 14.00, shift 10.00",
        "2 of 2 (100 %) layers; mean perplexity sgd 10.00, adam 10.00, shift 10.00",
    ]
    assert finding.tables["by layer"]["unedited"].tolist() == [9.0] * 12
    assert "sgd 0, adam 0, shift 0 of 200 each" in finding.notes[1]


WIDE = (1.0, 100.0)
NEVER = (math.nan, math.nan)


@pytest.mark.parametrize(
    ("rates", "perplexity", "expected"),
    [
        # Half of the layers is not more than half.
        ({("shift", layer): WIDE for layer in (0, 3)}, {}, [False, True, True]),
        ({("shift", 0): WIDE}, {}, [True, True, True]),
        # The shift is compared with SGD only.
        ({("adam", layer): (1e-4, 1e4) for layer in range(4)}, {}, [True, True, True]),
        ({("sgd", layer): (1.0, 1.0) for layer in range(4)}, {}, [False, True, True]),
        # Without sufficient rates, there is no spread and nothing to compare.
        ({("shift", layer): NEVER for layer in range(4)}, {}, [False, False, False]),
        ({("sgd", layer): NEVER for layer in range(4)}, {}, [False, False, False]),
        ({}, {("shift", 1): 14.0}, [True, False, True]),
        ({}, {("adam", 1): 10.0}, [True, False, True]),
        ({}, {("sgd", 0): 9.0}, [True, False, True]),
        ({}, {("shift", 0): 13.9, ("shift", 1): 13.9}, [True, True, True]),
        # Equal means neither worse nor better.
        ({}, {("shift", 2): 10.2}, [True, True, False]),
        ({}, {("shift", 3): 9.8}, [True, True, False]),
        ({}, {("shift", 3): 10.09, ("shift", 2): 9.91}, [True, True, True]),
        # An edit that never works has no perplexity.
        ({}, {("shift", layer): math.nan for layer in range(4)}, [True, False, False]),
    ],
)
def test_figure_24_otherwise(
    monkeypatch: pytest.MonkeyPatch, rates: Any, perplexity: Any, expected: list[bool]
) -> None:
    finding = of_rates(monkeypatch, rates_table(rates=rates, perplexity=perplexity))
    assert holds(finding) == expected
    n_missing = sum(2 for (step, _), own in rates.items() if own is NEVER and step == "shift")
    assert f"shift {n_missing} of 200" in finding.notes[1]


def test_figure_24_of_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single layer is a late one, and so is the middle one of three."""
    assert holds(of_rates(monkeypatch, rates_table(1), 1)) == [True, True]
    found = of_rates(monkeypatch, rates_table(3, perplexity={("shift", 0): 20.0}), 3)
    assert holds(found) == [True, False, True]
    assert "0 of 1 (0 %)" in found.checks[1].found
    found = of_rates(
        monkeypatch, rates_table(3, perplexity={("shift", 1): 20, ("shift", 2): 20}), 3
    )
    assert holds(found) == [True, True, False]


# --- several facts --------------------------------------------------------------------------------

SEVERAL = ("shift once", "shift iterated", "shift whitened", "shift auto", "shift summed", "MEMIT")


def of_several(
    values: Mapping[tuple[str, int], Mapping[str, float]] = {},
    n_records: int = 100,
) -> tuple[Finding, list[Any]]:
    usual = {
        "shift once": {1: 100, 10: 90, 50: 60},
        "shift iterated": {1: 100, 10: 100, 50: 95},
    }
    asked: list[Any] = []

    def evaluation(name: str, methods: Any, *, edits_at_once: int, **given: Any) -> Any:
        asked.append((name, methods, edits_at_once, given))
        own = {
            method: {
                "efficacy": usual.get(method, {}).get(edits_at_once, 90),
                "kept": 60 if method == "MEMIT" else 40,
                **values.get((method, edits_at_once), {}),
            }
            for method in ("none", *methods)
        }
        return evaluated(summaries(own))

    iterated = ForwardPassShift(layer=3, size=4.0, key="plain", iterations=15)
    presets = {
        "shift": ForwardPassShift(layer=7, size=0.3, key="paper"),
        "shift_iterated": iterated,
        "shift_whitened": ForwardPassShift(layer=3, size=4.0, key="whitened", moments=MOMENTS),
        "shift_auto": ForwardPassShift(),
        "memit": MEMIT(layers=(0,), moments=MOMENTS),
    }

    def chosen(names: Sequence[str]) -> Any:
        return {name: presets[name] for name in names}

    requests = [object()] * n_records
    fake = Fake(evaluation=evaluation, presets=chosen, requests=requests, _edits=Path("edits"))
    with patch.object(several_facts, "_usual_size", return_value=32.0):
        finding = several_facts.several_facts(fake)
    return finding, asked


MOMENTS = facts_moments()


def test_several_facts() -> None:
    finding, asked = of_several()
    drawn(finding)
    assert finding.verdict == "holds"
    assert [(name, size) for name, _, size, _ in asked] == [
        ("1-at-once", 1), ("10-at-once", 10), ("50-at-once", 50),
    ]  # fmt: skip
    assert all(given == {"generation_length": 0, "records": 100} for *_, given in asked)
    methods = asked[0][1]
    assert tuple(methods) == SEVERAL
    assert (methods["shift once"].iterations, methods["shift once"].size) == (1, 32.0)
    assert methods["shift iterated"].iterations == 15
    assert methods["shift summed"].key == "paper"
    assert methods["MEMIT"].layers == (0,)
    assert methods["MEMIT"].value_folder == Path("edits") / "memit-values"
    assert finding.checks[0].claim.startswith("50 facts at once")
    assert finding.checks[1].found == (
        "1: iterated 100.0 %, once 100.0 %; 10: iterated 100.0 %, once 90.0 %; "
        "50: iterated 95.0 %, once 60.0 %"
    )
    table = finding.tables["several facts"]
    assert len(table) == 3 * len(SEVERAL)
    assert "none" not in set(table["method"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({("shift iterated", 50): {"efficacy": 94.9}}, [False, True, True]),
        # Fewer facts are not checked.
        ({("shift iterated", 10): {"efficacy": 94.9}}, [True, True, True]),
        ({("shift iterated", 10): {"efficacy": 89.9}}, [True, False, True]),
        ({("shift once", 1): {"efficacy": 100.1}}, [True, False, True]),
        ({("shift once", 50): {"efficacy": 95}}, [True, False, True]),
        ({("shift once", 50): {"efficacy": 94}}, [True, True, True]),
        ({("MEMIT", 50): {"kept": 40}}, [True, True, False]),
        ({("MEMIT", 10): {"kept": 4}}, [True, True, True]),
        ({("shift whitened", 50): {"kept": 61}}, [True, True, False]),
        ({("shift iterated", 50): {"kept": 61}}, [True, True, True]),
    ],
)
def test_several_facts_otherwise(values: Any, expected: list[bool]) -> None:
    assert holds(of_several(values)[0]) == expected


@pytest.mark.parametrize(
    ("n_records", "expected"),
    [
        (10, {1: 10, 10: 10}),
        # Only full blocks are evaluated.
        (49, {1: 49, 10: 40}),
        (60, {1: 60, 10: 60, 50: 50}),
        (230, {1: 230, 10: 230, 50: 200, 200: 200}),
    ],
)
def test_only_full_blocks_count(n_records: int, expected: dict[int, int]) -> None:
    finding, asked = of_several(n_records=n_records)
    assert {size: given["records"] for _, _, size, given in asked} == expected
    assert finding.checks[0].claim.startswith(f"{max(expected)} facts at once")


def test_one_size_is_enough_for_most_facts(facts_model: nn.Module) -> None:
    records = blt.read_records("facts").rows[200:215]
    requests = [EditRequest.of(record) for record in records]
    shift = ForwardPassShift(layer=6, key="plain", prepend_bos=False)
    fake: Any = Fake(model=facts_model, requests=requests)
    size = several_facts._usual_size(fake, shift)
    # Only the first ten are asked.
    alone = [shift(facts_model, request).outcomes[0].size for request in requests[:10]]
    assert size == pytest.approx(1.5 * statistics.median(alone))
    once = replace(shift, size=size, iterations=2)  # the second step only shows the margin of one
    edits = [once(facts_model, request) for request in requests]
    assert sum(edit.outcomes[0].tried[0][1] > 0 for edit in edits) >= 10


def test_several_facts_need_several_records() -> None:
    with pytest.raises(InputError, match=r"9 records are too few.*pass at least 10 prompts"):
        of_several(n_records=9)


@pytest.mark.parametrize("model", [FACTS_MODEL, "gpt2-xl", "SmolLM2-135M", "another"])
def test_the_preset_that_is_summed_has_the_papers_key(model: str) -> None:
    """With other keys, several facts are solved for jointly, and nothing is summed."""
    assert preset_settings(model, 30)["shift"]["key"] == "paper"


# --- the whitened shift ---------------------------------------------------------------------------


def of_whitening(
    monkeypatch: pytest.MonkeyPatch,
    values: Mapping[tuple[str, int], Mapping[str, float]] = {},
    layers: tuple[int, ...] = (0, 1, 2, 3),
    everywhere: Mapping[str, float] = {},
) -> tuple[Finding, Any]:
    kept = {PLAIN: 60.0, WHITE: 90.0, CONTROL: 70.0}
    asked = []

    def evaluation(name: str, methods: Any, **given: Any) -> Any:
        asked.append((name, methods, given))
        rows = {"none": {"kept": 100.0, **everywhere}}
        for method in methods:
            form, _, layer = method.rpartition("@")
            own = {"kept": kept[form], "efficacy": 99.0, "paraphrase": 30.0}
            rows[method] = {**own, **values.get((form, int(layer)), {}), **everywhere}
        return evaluated(summaries(rows))

    def presets(names: Sequence[str]) -> Any:
        assert names == ("shift_whitened",)
        own = replace(MOMENTS, layers=layers, moments=MOMENTS.moments[: len(layers)])
        shift = ForwardPassShift(
            layer=2, size=4.0, key="whitened", iterations=15, moments=own, prepend_bos=False
        )
        return {"shift_whitened": shift}

    finding = whitening.whitening(Fake(evaluation=evaluation, presets=presets))
    [call] = asked
    return finding, call


def test_whitening(monkeypatch: pytest.MonkeyPatch) -> None:
    finding, (name, methods, given) = of_whitening(monkeypatch)
    drawn(finding)
    assert finding.verdict == "holds"
    assert holds(finding) == [True] * 4
    assert (name, given) == ("whitening", {"records": 40, "generation_length": 0, "n_texts": 0})
    assert len(methods) == 12
    for layer in range(4):
        plain, white, control = (methods[f"{form}@{layer}"] for form in (PLAIN, WHITE, CONTROL))
        assert {each.layer for each in (plain, white, control)} == {layer}
        assert {each.iterations for each in (plain, white, control)} == {15}
        assert (plain.key, plain.moments) == ("plain", None)
        assert white.key == control.key == "whitened"
        assert white.moments.layers == (0, 1, 2, 3)
        own, above = MOMENTS.moments[layer], MOMENTS.moments[(layer + 1) % 4]
        assert torch.equal(control.moments.moments[layer], above)
        assert not torch.equal(own, above)
    assert finding.checks[1].found == "4 of 4 (100 %) layers" + "".join(
        f"; layer {layer}: 75 %" for layer in range(4)
    )
    assert finding.notes[0].startswith("Number of records: 100. Each fact gets ")
    assert "efficacy is at least 99.0 %" in finding.notes[0]
    assert finding.tables["by layer"]["layer"].tolist() == [
        each for each in range(4) for _ in "abc"
    ]


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        # Half of the layers is not more than half.
        (WHITE, {"kept": 60.0}, [False, False, False, True]),
        (WHITE, {"kept": 89.0}, [True, False, True, True]),
        (WHITE, {"kept": 100.0}, [True] * 4),
        (PLAIN, {"kept": 61.0}, [True, False, True, True]),
        (CONTROL, {"kept": 90.0}, [True, True, False, True]),
        (CONTROL, {"kept": 10.0}, [True] * 4),
        (WHITE, {"paraphrase": 29.0}, [True, True, True, False]),
        (WHITE, {"paraphrase": 31.0}, [True] * 4),
    ],
)
def test_whitening_otherwise(
    monkeypatch: pytest.MonkeyPatch, form: str, values: Any, expected: list[bool]
) -> None:
    finding, _ = of_whitening(monkeypatch, {(form, layer): values for layer in (0, 2)})
    assert holds(finding) == expected
    finding, _ = of_whitening(monkeypatch, {(form, 1): values})
    assert holds(finding) == [True] * 4


def test_whitening_of_layers_with_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets of other models have statistics of some layers only."""
    finding, (_, methods, _) = of_whitening(monkeypatch, layers=(1, 3))
    assert {each.layer for each in methods.values()} == {1, 3}
    assert finding.checks[0].found.startswith("2 of 2 (100 %) layers")


def test_layers_without_damage_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"kept": 100.0}
    values = {(PLAIN, layer): whole for layer in range(3)} | {(WHITE, 0): whole}
    finding, _ = of_whitening(monkeypatch, values)
    assert finding.checks[1].found == "1 of 1 (100 %) layers; layer 3: 75 %"
    assert finding.checks[1].holds
    finding, _ = of_whitening(monkeypatch, {(PLAIN, layer): whole for layer in range(4)})
    assert finding.checks[1].found == "none of 0 layers"
    assert holds(finding)[:2] == [False, False]


def test_whitening_without_prompts_or_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    finding, _ = of_whitening(monkeypatch, everywhere={"paraphrase": math.nan})
    assert holds(finding) == [True] * 3
    with pytest.raises(InputError, match="no neighborhood prompts"):
        of_whitening(monkeypatch, everywhere={"kept": math.nan})
    # A model with one layer has no other layer's statistics.
    finding, _ = of_whitening(monkeypatch, layers=(2,))
    assert len(finding.checks) == 3
    assert not any("another layer" in check.claim for check in finding.checks)


# --- steps of optimizers --------------------------------------------------------------------------


def steps_table(**changed: Mapping[str, Any]) -> pd.DataFrame:
    """A row per matrix, layer and optimizer."""
    usual = {
        "sgd": {"rank": 5, "answer_overlap": 1.0},
        "adam": {"rank": 100, "answer_overlap": 0.7},
        "muon": {"rank": 5, "answer_overlap": 0.9},
    }
    columns = dict.fromkeys(("top_energy", "stable_rank", "alignment"), 1.0)
    return pd.DataFrame(
        {
            "matrix": matrix,
            "layer": layer,
            "edit": edit,
            **columns,
            "answer_target_rank": 10 if matrix == "W_out" else 900,
            **own,
            **changed.get(edit, {}),
            **changed.get(f"{edit}_{matrix}", {}),
            **changed.get(f"{edit}_{matrix}_{layer}", {}),
        }
        for matrix in ("W_in", "W_out")
        for layer in range(4)
        for edit, own in usual.items()
    )


def of_optimizers(monkeypatch: pytest.MonkeyPatch, table: pd.DataFrame) -> Finding:
    monkeypatch.setattr(GradientStep, "__call__", lambda self, model, request: self)
    monkeypatch.setattr(optimizer_steps, "compare_tokens", lambda *_, **__: table)
    requests = [SimpleNamespace(target=" Paris")] * 30
    return optimizer_steps.optimizer_steps(Fake(requests=requests))


def test_steps_of_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = of_optimizers(monkeypatch, steps_table())
    assert finding.verdict == "holds"
    assert [check.found for check in finding.checks] == [
        "Muon keeps it in 160 of 160 (100 %) steps; mean ranks: sgd 5.0, adam 100.0, muon 5.0",
        "sgd 100 %, adam 70 %, muon 90 %",
        "sgd 100 %, adam 100 %, muon 100 %",
    ]
    assert len(finding.tables["steps"]) == 20 * 24
    assert "20 facts" in finding.notes[0]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"muon_W_in_2": {"rank": 6}}, [False, True, True]),
        ({"adam": {"rank": 25}}, [False, True, True]),
        ({"adam": {"rank": 26}}, [True, True, True]),
        ({"adam": {"answer_overlap": 0.49}}, [True, False, True]),
        ({"muon": {"answer_overlap": 0.49}}, [True, False, True]),
        ({"muon": {"answer_overlap": 0.5}}, [True, True, True]),
        # Ranks up to 10 are the most probable 1 % of 1001 tokens.
        ({"adam_W_out": {"answer_target_rank": 11}}, [True, True, False]),
        ({"sgd_W_out": {"answer_target_rank": 11}}, [True, True, False]),
        ({f"muon_W_out_{n}": {"answer_target_rank": 11} for n in (0, 1)}, [True, True, False]),
        ({"muon_W_out_0": {"answer_target_rank": 11}}, [True, True, True]),
        # W_in is not checked.
        ({"sgd_W_in": {"answer_target_rank": 1000}}, [True, True, True]),
    ],
)
def test_steps_of_optimizers_otherwise(
    monkeypatch: pytest.MonkeyPatch, changed: Any, expected: list[bool]
) -> None:
    assert holds(of_optimizers(monkeypatch, steps_table(**changed))) == expected


# --- the evidence ---------------------------------------------------------------------------------


def evidence_of(model: Any, data: Any, folder: Path, **given: Any) -> Evidence:
    usual = {"n_prompts": 2, "seed": 0, "prepend_bos": False, "progress": False}
    return Evidence(model, blt.read_records(data), folder, **(usual | given))


def test_requests_are_the_first_rows(facts_model: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": 5},
        {"prompt": "Rome is in", "target": " Paris"},
        {"prompt": "a", "target": 3},
    ]
    evidence = evidence_of(facts_model, rows, tmp_path)
    assert isinstance(evidence.records.rows[0], BadRecord)
    assert [(each.prompt, each.target) for each in evidence.requests] == [("Rome is in", " Paris")]
    with pytest.raises(InputError, match="none of the first rows"):
        _ = evidence_of(facts_model, rows, tmp_path, n_prompts=1).requests
    with pytest.raises(InputError, match="none of the first rows"):
        reproduce(facts_model, rows, tmp_path, "optimizers", prompts=1, progress=False)
    # After a prompt that ends in a space, the answer has no tokens.
    row = {"prompt": "Rome is in ", "target": "Paris"}
    with pytest.raises(
        InputError, match=r"none of the records can be evaluated; the first: .*toke"
    ):
        evidence_of(facts_model, [row], tmp_path).evaluation("none", {})


def test_presets_are_trained_on_other_rows(
    facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def preset_methods(*args: Any, **given: Any) -> dict[str, Any]:
        asked.update(given, args=args)
        return {}

    monkeypatch.setattr(evidence_module, "preset_methods", preset_methods)
    given = {"statistics": "other.txt", "texts": "texts.txt", "jacobian": "facts"}
    evidence = evidence_of(facts_model, "facts", tmp_path, n_prompts=30, **given)
    evidence.presets(("rome",))
    assert asked["texts"] == "other.txt"
    assert asked["jacobian"] is evidence.jacobian_lenses[0].jacobians
    assert evidence.evaluation_config().texts == "texts.txt"
    edited = {(row.prompt, row.subject) for row in evidence.records.rows[:30]}
    subjects = {subject for _, subject in edited}
    assert len(asked["training"]) > 300
    assert not any(row.index < 30 or row.subject in subjects for row in asked["training"])
    assert asked["args"] == (facts_model, ("rome",))
    assert asked["folder"].is_dir()


# --- small real runs ------------------------------------------------------------------------------


@pytest.fixture
def quick_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with plotly only, as without matplotlib."""
    monkeypatch.setattr(folder, "find_spec", lambda _: None)


@pytest.mark.usefixtures("as_for_a_user")
def test_optimizers_on_a_small_model(tmp_path: Path) -> None:
    model = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model
    before = tensors_checksum(host_of(model).parameters())
    rows = [
        {"prompt": "Messi plays for", "target": " Paris"},
        {"prompt": "Rome is in", "target": " the"},
        {"prompt": "The dog of the king", "target": " Paris"},
    ]
    found = reproduce(model, rows, tmp_path, "optimizers", prompts=2, progress=False)
    finding = found["optimizers"]
    steps = finding.tables["steps"]
    assert len(steps) == 2 * 2 * 3 * 3
    assert len(finding.checks) == 3
    request = evidence_of(model, rows, tmp_path).requests[1]
    step = {"sgd": GradientStep("sgd", lr=1.0, matrices=("W_in", "W_out"), prepend_bos=False)}
    own = compare_tokens(
        model, {"sgd": step["sgd"](model, request)}, target=request.target, multi_token="first"
    )
    again = steps[(steps["request"] == 1) & (steps["edit"] == "sgd")]
    assert again["rank"].tolist() == own["rank"].tolist()
    assert again["answer_target_rank"].tolist() == own["answer_target_rank"].tolist()
    assert tensors_checksum(host_of(model).parameters()) == before
    assert not (tmp_path / "sweep").exists()  # not needed for editing
    assert (tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("as_for_a_user", "quick_pages")
def test_figure_24_on_the_facts_model(
    facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last layer, a coarse grid, and few texts."""
    measured, config = least_learning_rates.least_rates, Evidence.evaluation_config
    monkeypatch.setattr(
        Evidence, "evaluation_config", lambda self, **given: config(self, n_texts=2, **given)
    )

    def few(*args: Any, **given: Any) -> pd.DataFrame:
        return measured(*args, **given, layers=(0, 7), rates=(0.1, 1.0, 10.0))

    monkeypatch.setattr(least_learning_rates, "least_rates", few)
    found = reproduce(facts_model, "facts", tmp_path, "fig24", prompts=2, progress=False)
    finding = found["fig24"]
    table = finding.tables["rates"]
    assert len(table) == 2 * 3 * 2
    assert set(table["rate"].dropna()) <= {0.1, 1.0, 10.0}
    evidence = evidence_of(facts_model, "facts", tmp_path)
    expected = least_rates_by_layer(table, evidence.perplexity)
    pd.testing.assert_frame_equal(finding.tables["by layer"], expected)
    # Recompute a layer in which both work.
    own = finding.tables["by layer"].set_index(["step", "layer"]).loc[("sgd", 7)]
    rates = table[(table["step"] == "sgd") & (table["layer"] == 7)]["rate"].to_numpy()
    assert own["spread"] == pytest.approx(np.log10(rates).std())
    assert len(list((tmp_path / "fig24").glob("*.csv"))) == 2


@pytest.mark.usefixtures("as_for_a_user", "quick_pages")
def test_whitening_on_the_facts_model(
    facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of one record, in two iterations."""
    preset = Evidence.shift_preset
    few: dict[str, Any] = {
        "iterations": 2,
        "moments": replace(MOMENTS, layers=(0, 1), moments=MOMENTS.moments[:2]),
    }
    monkeypatch.setattr(
        Evidence, "shift_preset", lambda self, name: replace(preset(self, name), **few)
    )
    monkeypatch.setattr(whitening, "_MOST_RECORDS", 1)
    options: dict[str, Any] = {"prompts": 5, "progress": False}
    found = reproduce(facts_model, "facts", tmp_path, "whitening", **options)
    table = found["whitening"].tables["by layer"]
    assert table["method"].tolist() == [PLAIN, WHITE, CONTROL] * 2
    assert table["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["whitening"].notes[0].startswith("Number of records: 1. Each fact gets ")
    evaluation = blt.Evaluation.load(tmp_path / "edits" / "whitening")
    assert evaluation.is_complete
    assert evaluation.edits()["record"].unique().tolist() == [0]
    # The folder cannot be resumed as another evaluation.
    monkeypatch.setattr(whitening, "_MOST_RECORDS", 2)
    with pytest.raises(EvaluationError, match=r"other settings \(config\)"):
        reproduce(facts_model, "facts", tmp_path, "whitening", **options)
