"""Least rates compared with really changed weights, and the search for settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import Case
from torch import Tensor, nn

import backward_lens_tl as blt
from backward_lens_tl.editing import EditRequest, ForwardPassShift, GradientStep
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError, EvaluationError, InputError
from backward_lens_tl.evaluation import rates, tuning
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.perplexity import perplexity, read_texts
from backward_lens_tl.evaluation.rates import RATES, STEPS, least_rates, least_rates_by_layer
from backward_lens_tl.evaluation.tuning import SUCCESSES, search
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_checksum

REQUESTS = [
    EditRequest("Lionel Messi plays for", " Paris"),
    # A target of two tokens, of which only the first counts.
    EditRequest("The Eiffel Tower is in the city of", " Rome painting"),
]
GRID = (0.02, 0.05, 0.1, 0.2, 0.8)
FEW = EvaluationConfig(n_texts=2)


def checksum(model: nn.Module) -> str:
    return tensors_checksum(host_of(model).parameters())


def said(model: Any, prompt: str) -> int:
    """The model's most probable token."""
    with torch.no_grad():
        tokens = model.to_tokens(prompt, prepend_bos=False)
        logits: Tensor = model(tokens)
    return int(logits[0, -1].argmax())


def step_of(
    model: nn.Module, request: EditRequest, step: str, layer: int, rate: float
) -> WeightDelta:
    """The step recomputed at that rate, if its class has a rate."""
    method: Any
    if step == "shift":
        method = ForwardPassShift.paper(layer, rate, prepend_bos=False)
    else:
        method = GradientStep(step, lr=rate, layers=[layer], prepend_bos=False)  # type: ignore[arg-type]
    delta: WeightDelta = method(model, request)
    return delta


@pytest.mark.usefixtures("as_for_a_user")
def test_least_rates_match_really_changed_weights(facts_model: Any) -> None:
    model, before = facts_model, checksum(facts_model)
    request = REQUESTS[1]
    table = least_rates(model, request, layers=[0, -1], rates=GRID, config=FEW, progress=False)
    assert list(table) == ["request", "layer", "step", "rate", "perplexity"]
    expected_rows = [(0, step, layer) for step in STEPS for layer in (0, 7)]
    assert list(zip(table["request"], table["step"], table["layer"], strict=True)) == expected_rows
    host = host_of(model)
    texts = read_texts(host, FEW).tokens(host, FEW)
    unedited = perplexity(host, texts, "n")
    for row in table.itertuples():
        first = int(model.to_tokens(request.target, prepend_bos=False)[0, 0])
        own = replace(request, target=first)
        expected, after = math.nan, math.nan
        for rate in GRID:
            with step_of(model, own, row.step, row.layer, rate).applied(model):
                if said(model, request.prompt) == first:
                    expected, after = rate, perplexity(host, texts, "n").corpus
                    break
        np.testing.assert_equal(row.rate, expected)
        assert row.perplexity == pytest.approx(after, rel=1e-4, nan_ok=True)
        assert abs(row.perplexity - unedited.corpus) > 1e-6 or math.isnan(after)
    assert table["rate"].nunique() > 2
    assert checksum(model) == before


@pytest.mark.usefixtures("as_for_a_user")
def test_models_of_both_classes_in_float64(gpt2: Case) -> None:
    model, prompts = gpt2.model, ("Rome is in", "The dog of")
    requests = [EditRequest(prompt, second_best(model, prompt)) for prompt in prompts]
    grid = tuple(10.0**exponent for exponent in range(-4, 3))
    config = EvaluationConfig(n_texts=0)
    table = least_rates(model, requests, rates=grid, layers=1, config=config, progress=False)
    assert table["request"].tolist() == [0] * 3 + [1] * 3
    for row in table.itertuples():
        request = requests[row.request]
        enough = []
        for size in grid:
            with step_of(model, request, row.step, 1, size).applied(model):
                enough.append(said(model, request.prompt) == request.target)
        assert any(enough)
        assert not enough[0]
        assert row.rate == grid[enough.index(True)]
    assert table["rate"].nunique() > 1


@torch.no_grad()
def second_best(model: Any, prompt: str) -> int:
    """The second most probable next token."""
    logits: Tensor = model(model.to_tokens(prompt, prepend_bos=False))[0, -1]
    return int(logits.argsort(descending=True)[1])


@pytest.mark.usefixtures("as_for_a_user")
def test_no_rate_suffices(facts_model: Any) -> None:
    given: Any = {"layers": 3, "config": FEW, "progress": False}
    table = least_rates(facts_model, REQUESTS[0], rates=(1e-6, 2e-6), **given)
    assert table["rate"].isna().all()
    assert table["perplexity"].isna().all()
    assert len(table) == 3
    summary = least_rates_by_layer(table, 4.0)
    assert summary["missing"].tolist() == [1] * 3
    assert summary[["rate", "rate_low", "spread", "perplexity"]].isna().all(axis=None)
    table = least_rates(facts_model, REQUESTS[0], layers=7, config=FEW, progress=False)
    assert set(table["rate"]) <= set(RATES)
    none = EvaluationConfig(n_texts=0)
    without = least_rates(facts_model, REQUESTS[0], layers=7, config=none, progress=False)
    assert without["rate"].tolist() == table["rate"].tolist()
    assert without["perplexity"].isna().all()


@pytest.mark.usefixtures("as_for_a_user")
def test_settings_of_rates(facts_model: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text("Lionel Messi plays for Paris.\nRome is in Italy, and Paris is not in Italy.\n")
    given: Any = {"layers": 7, "steps": ["shift"], "rates": (0.3, 1, 3), "progress": False}
    found = {}
    for name, config in {
        "n": EvaluationConfig(texts=str(file), min_characters=1),
        "n-1": EvaluationConfig(texts=str(file), min_characters=1, denominator="n-1"),
        "bos": EvaluationConfig(texts=str(file), min_characters=1, prepend_bos=True),
    }.items():
        [row] = least_rates(facts_model, REQUESTS, config=config, **given).to_dict("records")[:1]
        host = host_of(facts_model)
        texts = read_texts(host, config).tokens(host, config)
        size = float(row["rate"])
        shift = ForwardPassShift.paper(7, size, prepend_bos=config.prepend_bos)
        with shift(facts_model, REQUESTS[0]).applied(facts_model):
            expected = perplexity(host, texts, config.denominator).corpus
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
        found[name] = expected
    assert len(set(found.values())) == 3
    # Tensors and arrays of rates are lists of numbers.
    array = least_rates(facts_model, REQUESTS[0], **{**given, "rates": np.array([0.3, 1.0, 3.0])},
                        config=EvaluationConfig(n_texts=0))  # fmt: skip
    assert array["rate"].tolist() == [row["rate"]] or array["rate"].notna().all()


@pytest.mark.usefixtures("as_for_a_user")
def test_errors_of_rates(facts_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(
        error: type[Exception], message: str, requests: Any = REQUESTS, **given: Any
    ) -> None:
        usual = {"rates": (1.0,), "layers": [7], "config": FEW, "progress": False}
        with pytest.raises(error, match=message):
            least_rates(facts_model, requests, **(usual | given))

    before = checksum(facts_model)
    for wrong in ((), (0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (math.nan,), (1.0, math.inf),
                  ("1",), (True,)):  # fmt: skip
        refused(EvaluationError, "rates", rates=wrong)
    refused(EvaluationError, "steps is 'muon'", steps=["muon"])
    refused(InputError, "8", layers=[8])
    refused(EditError, "target", EditRequest("Lionel Messi plays for", ""))
    refused(InputError, "request", [])
    # Interrupted in the middle of an edit.
    monkeypatch.setattr(rates, "perplexity", lambda *_: 1 / 0)
    refused(ZeroDivisionError, "division", rates=(3.0,), steps=["shift"])
    assert checksum(facts_model) == before


def test_least_rates_by_layer_by_hand() -> None:
    table = pd.DataFrame(
        {
            "request": [0, 1, 2, 3, 0, 1, 2, 3],
            "layer": [5] * 4 + [0] * 4,
            "step": ["sgd"] * 8,
            "rate": [1.0, 10.0, 100.0, math.nan, 2.0, 2.0, 2.0, 2.0],
            "perplexity": [3.0, 4.0, 8.0, math.nan, 7.0, 7.0, 7.0, math.inf],
        }
    )
    other = table.assign(step="shift", rate=1.0)
    found = least_rates_by_layer(pd.concat([table, other]), 2.5)
    assert list(zip(found["step"], found["layer"], strict=True)) == [
        ("sgd", 5), ("sgd", 0), ("shift", 5), ("shift", 0),
    ]  # fmt: skip
    first, second = found.to_dict("records")[:2]
    assert first == {
        "step": "sgd", "layer": 5, "n": 4, "missing": 1, "rate": 10.0, "rate_low": 5.5,
        "rate_high": 55.0, "spread": pytest.approx(math.sqrt(2 / 3)), "perplexity": 5.0,
        "unedited": 2.5,
    }  # fmt: skip
    assert (second["missing"], second["rate"], second["spread"]) == (0, 2.0, 0.0)
    assert second["perplexity"] == math.inf
    assert found["unedited"].tolist() == [2.5] * 4


# --------------------------------------------------------------------------- settings by trial

CANDIDATES = {name: ForwardPassShift(layer=0, size=1.0) for name in "abcd"}


def searched(
    monkeypatch: pytest.MonkeyPatch, rates_of: dict[str, tuple[float, ...]], **given: Any
) -> Any:
    """A search over given results: efficacy, paraphrase and neighborhood of each candidate."""
    asked: list[Any] = []

    class Made:
        def summary(self) -> pd.DataFrame:
            names = ("efficacy", "paraphrase", "neighborhood")
            rows = [{"method": "none", **dict.fromkeys(names, 100.0)}]
            rows += [
                {"method": name, **dict(zip(names, own, strict=True))}
                for name, own in rates_of.items()
            ]
            return pd.DataFrame(rows).assign(seconds=1.0, failed=0, rank=7)

    def evaluate(model: Any, data: Any, out: Any, methods: Any, config: Any, **more: Any) -> Made:
        asked.append((model, methods, data, config, more))
        return Made()

    monkeypatch.setattr(tuning, "evaluate", evaluate)
    model = nn.Identity()
    methods = {name: CANDIDATES[name] for name in rates_of}
    found = search(model, methods, "data", range(3, 6), **given)
    config = EvaluationConfig(rows=(3, 4, 5), generation_length=0, n_texts=0)
    assert asked == [(model, methods, "data", config, {"progress": given.get("progress", True)})]
    assert found.best is methods[found.best_name]
    return found


@pytest.mark.parametrize(
    ("rates_of", "best"),
    [
        # The largest harmonic mean of all three.
        ({"a": (100, 50, 50), "b": (96, 60, 60)}, "b"),
        ({"a": (96, 90, 30), "b": (96, 50, 50)}, "b"),
        # Unless it is unreliable.
        ({"a": (100, 50, 50), "b": (94, 99, 99)}, "a"),
        ({"a": (100, 50, 50), "b": (95, 99, 99)}, "b"),
        # If none is reliable, the most reliable one, and the best of several.
        ({"a": (60, 90, 90), "b": (80, 20, 20), "c": (80, 30, 30)}, "c"),
        # No neighbors are preserved: the harmonic mean is 0.
        ({"a": (100, 50, 0), "b": (100, 1, 1)}, "b"),
        ({"a": (100, 50, 0), "b": (100, 0, 60)}, "a"),  # ties: the first
        ({"a": (0, 0, 100), "b": (0, 0, 50)}, "a"),
        # Without paraphrases, the mean of the others.
        ({"a": (100, math.nan, 50), "b": (100, math.nan, 60)}, "b"),
        ({"a": (96, math.nan, math.nan), "b": (100, math.nan, math.nan)}, "b"),
    ],
)
def test_the_choice(monkeypatch: pytest.MonkeyPatch, rates_of: Any, best: str) -> None:
    found = searched(monkeypatch, rates_of)
    assert found.best_name == best
    assert found.table["name"].tolist() == list(rates_of)


def test_the_table_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    found = searched(monkeypatch, {"a": (100, 50, 25), "b": (90, 60, 60)}, progress=False)
    assert list(found.table) == [
        "name", "efficacy", "paraphrase", "neighborhood", "score", "seconds", "failed",
    ]  # fmt: skip
    assert found.table["score"].tolist() == pytest.approx([300 / 7, 3 / (1 / 90 + 2 / 60)])
    least = searched(monkeypatch, {"a": (100, 50, 25), "b": (90, 60, 60)}, least_efficacy=90.0)
    assert (found.best_name, least.best_name) == ("a", "b")


def test_a_search_by_success(monkeypatch: pytest.MonkeyPatch, facts_model: Any) -> None:
    """Of the paraphrases and neighbors, which of two answers is more probable counts."""
    shown = pd.DataFrame(
        {
            "method": ["none", "a", "b"],
            "efficacy": [0.0, 100.0, 100.0],
            "paraphrase": [0.0, 90.0, 10.0],
            "neighborhood": [20.0, 20.0, 10.0],
            "paraphrase_success": [0.0, 60.0, 80.0],
            "neighborhood_success": [90.0, 60.0, 90.0],
            "seconds": [0.0, 1.0, 1.0],
            "failed": [0, 0, 0],
        }
    )
    monkeypatch.setattr(tuning, "evaluate", lambda *_, **__: SimpleNamespace(summary=shown.copy))
    methods = {name: CANDIDATES[name] for name in "ab"}
    assert search(facts_model, methods, "data", [1]).best_name == "a"
    found = search(facts_model, methods, "data", [1], metrics=SUCCESSES)
    assert found.best_name == "b"
    assert list(found.table)[1:5] == [*SUCCESSES, "score"]
    # Efficacy is needed for the choice, whichever metrics the mean is of.
    found = search(facts_model, methods, "data", [1], metrics=["neighborhood"])
    assert found.best_name == "a"
    assert list(found.table)[1:4] == ["efficacy", "neighborhood", "score"]
    assert found.table["score"].tolist() == [20.0, 10.0]


@pytest.mark.parametrize("metrics", [(), ("efficacy", "neighborhood_kl"), ("accuracy",), "name"])
@pytest.mark.usefixtures("as_for_a_user")
def test_metrics_that_are_refused(metrics: Any) -> None:
    with pytest.raises(EvaluationError, match=r"metrics is .*; pass some of efficacy, "):
        search(nn.Identity(), {"a": CANDIDATES["a"]}, "data", [1], metrics=metrics)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_search_resumes_from_its_folder(
    facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = ForwardPassShift(layer=6, size=40.0, key="plain", prepend_bos=False)
    methods = {"a": shift, "b": shift}
    given: Any = {"folder": tmp_path / "search", "progress": False}
    found = search(facts_model, methods, "facts", [200], **given)
    monkeypatch.setattr(ForwardPassShift, "compute", None)  # not called again
    again = search(facts_model, methods, "facts", [200], **given)
    assert again.table.equals(found.table)
    assert found.best_name == "a"
    # Both are equal, and the first one of this call is chosen.
    turned = search(facts_model, dict(reversed(methods.items())), "facts", [200], **given)
    assert turned.best_name == "b"
    assert turned.table["name"].tolist() == ["b", "a"]


@pytest.mark.usefixtures("as_for_a_user")
def test_a_search_on_the_facts_model(facts_model: Any) -> None:
    model, before = facts_model, checksum(facts_model)
    methods = {
        f"c={size}": ForwardPassShift(layer=6, size=size, key="plain", prepend_bos=False)
        for size in (1.0, 40.0)
    }
    found = search(model, methods, "facts", [200], progress=False)
    assert found.best_name == "c=40.0"
    assert found.table["efficacy"].tolist() == [0.0, 100.0]
    request = EditRequest.of(blt.read_records("facts").rows[200])
    with found.best(model, request).applied(model):
        assert said(model, request.prompt) == int(
            model.to_tokens(request.target, prepend_bos=False)[0, 0]
        )
    assert checksum(model) == before
    with pytest.raises(EvaluationError, match="candidates is empty"):
        search(model, {}, "facts", range(3), progress=False)
    with pytest.raises(EvaluationError, match="rows is empty"):
        search(model, methods, "facts", [], progress=False)
    with pytest.raises(EvaluationError, match="row 99999"):
        search(model, methods, "facts", [99999], progress=False)
