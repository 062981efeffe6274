"""The tuning of presets: splits, causal tracing against Hugging Face, the speed of statistics."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_pairs import EITHER, Pair, pair
from models import hf_matrices, relative_error
from torch import Tensor

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend.mend import MEND
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.methods.pair_method import PairMethod
from backward_lens_tl.editing.methods.presets import METHODS, preset_settings
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.evaluation.tuning import ACCURACIES
from backward_lens_tl.models import host_of
from benchmarks import moment_speed, tracing, tuning
from benchmarks.tracing import TOKENS, Fact

pytestmark = pytest.mark.usefixtures("as_for_a_user")


@pytest.fixture(scope="module", params=[("gpt2", EITHER), ("llama", "bridge")], ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


def slowly(
    own: Pair, fact: Fact, noise: Tensor | None, restored: tuple[int, range] | None = None
) -> float:
    """The answer's probability by Hugging Face's model, for one sample of the noise."""
    ids = torch.tensor([fact.ids])
    kept: dict[int, Tensor] = {}

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        if noise is not None:
            for row, at in zip(noise, fact.subject, strict=True):
                changed[0, at] += row
        return changed

    def run(hook: Any, embedding: Any) -> float:
        modules = [hf_matrices(own.raw)["W_out", layer] for layer in range(2)]
        handles = [own.raw.get_input_embeddings().register_forward_hook(embedding)]
        handles += [
            module.register_forward_hook(lambda _, args, output, layer=layer: hook(layer, output))
            for layer, module in enumerate(modules)
        ]
        with torch.no_grad():
            logits = own.raw(ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits.double().softmax(-1)[fact.answer])

    def keep(layer: int, output: Tensor) -> None:
        kept[layer] = output.clone()

    def restore(layer: int, output: Tensor) -> Tensor | None:
        if restored is None or layer not in restored[1]:
            return None
        changed = output.clone()
        changed[0, restored[0]] = kept[layer][0, restored[0]]
        return changed

    clean = run(keep, lambda *_: None)
    return clean if noise is None else run(restore, disturb)


def test_effects_are_those_of_a_slow_trace(each: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_ROWS", 4)
    monkeypatch.setattr(tracing, "_WINDOW", 0.0)  # the layer itself
    host = host_of(each.model)
    facts = [
        Fact(tuple(each.ids("Messi plays for Paris and")), (0,), 7),
        Fact(tuple(each.ids("The capital of France is")), (2, 3), 11),
    ]
    found = tracing.traced(host, facts, seed=3)
    embedding = each.raw.get_input_embeddings().weight.detach().float()
    std = torch.cat([embedding[[f.ids[at] for at in f.subject]] for f in facts]).std()
    assert found["noise_std"] == pytest.approx(3 * float(std), rel=1e-5)
    generator = torch.Generator().manual_seed(3)
    clean, corrupted, effects = 0.0, 0.0, torch.zeros(len(TOKENS), 2)
    for fact in facts:
        shape = (3, len(fact.subject), embedding.shape[1])
        for noise in found["noise_std"] * torch.randn(shape, generator=generator):
            clean += slowly(each, fact, None) / 6
            without = slowly(each, fact, noise) / 6
            corrupted += without
            for token, at in enumerate(fact.positions):
                for layer in range(2):
                    now = slowly(each, fact, noise, (at, range(layer, layer + 1))) / 6
                    effects[token, layer] += now - without
    assert found["facts"] == 2
    assert found["clean"] == pytest.approx(clean, rel=1e-5)
    assert found["corrupted"] == pytest.approx(corrupted, rel=1e-4)
    assert effects.abs().max() > 1e-5
    assert relative_error(torch.tensor([found["effects"][each] for each in TOKENS]), effects) < 0.01
    assert [fact.positions for fact in facts] == [
        (0, 1, len(facts[0].ids) - 1),
        (3, 4, len(facts[1].ids) - 1),
    ]


def test_known_facts_are_those_that_the_model_answers(facts_model: Any) -> None:
    host = host_of(facts_model)
    rows = [row for row in read_records("facts").rows[:6] if isinstance(row, Record)]
    found = tracing.known_facts(host, rows, 4)
    assert len(found) == 4
    with torch.no_grad():
        for fact in found:
            logits = facts_model(torch.tensor([fact.ids]), return_type="logits")[0, -1]
            assert int(logits.argmax()) == fact.answer
    wrong = [Record(0, "0", "Lionel Messi plays for", " Rome", "Lionel Messi", answer=" Rome")]
    assert tracing.known_facts(host, wrong, 4) == []


def test_the_split_of_counterfact() -> None:
    """Records for choices and for evaluation; disjoint, and the same everywhere."""
    tune, test = tuning.counterfact_split()
    assert len(tune) == 300
    assert sorted([*tune, *test]) == list(range(1919))
    assert tuple(tune[:3]) == (360, 1100, 907)
    task = tuning.TASKS["smollm2"]
    assert set(task.tuning) < set(tune)
    assert not set(task.tuning) & set(task.reserved)
    assert task.traced is not None
    assert set(task.traced[0]) == set(tune)
    assert set(task.grids) < set(METHODS)


SHORT = MENDTraining(steps=1, edits_per_step=1, n_statistics=4, n_locality=2)

OTHER = tuning.Task(
    "other",
    "none.json",
    {
        "ft_late": {"layers": ((6,), (7,)), "lr": (1e-3,)},
        "mend": {"layers": (7,), "training": (SHORT, replace(SHORT, lr=1e-2))},
        "normalized_gradient": {"layers": ((6, 7), (5,)), "lr": (1e-3,)},
        "ultraedit": {"layers": ((6,),), "lr": (1e-3, 3e-3)},
    },
    range(2),
    range(2, 560),
    ACCURACIES,
)


@pytest.mark.parametrize("name", OTHER.grids)
def test_candidates_for_another_model(
    name: str, facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own settings, and learns from records that are neither tried nor evaluated."""
    monkeypatch.setitem(tuning.TASKS, "other", OTHER)
    records = read_records("facts")
    seen: list[Any] = []

    def statistics(model: Any, requests: Any, **given: Any) -> Any:
        seen.extend(requests)
        return pair_statistics(model, requests, **given)

    monkeypatch.setattr(tuning, "pair_statistics", statistics)
    found = tuning.candidate_methods(name, facts_model, records, tmp_path, task=OTHER)
    settings = dict(tuning.candidates(name, "other"))
    assert found.keys() == settings.keys()
    assert {type(method) for method in found.values()} == {METHODS[name]}
    for label, method in found.items():
        if isinstance(method, MEND):
            assert method.editor.training["lr"] == settings[label]["training"].lr
            assert method.editor.training["n_records"] <= len(records.rows) - 560
        else:
            assert {key: getattr(method, key) for key in settings[label]} == settings[label]
    if issubclass(METHODS[name], PairMethod):
        used = {row.prompt for row in records.rows[:560] if isinstance(row, Record)}
        assert seen
        assert not {request.prompt for request in seen} & used
    [*_, last] = found.values()
    first: Any = records.rows[0]
    assert last(facts_model, EditRequest.of(first)).norm > 0


def test_rates_are_of_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts_model: Any
) -> None:
    monkeypatch.setattr(moment_speed, "load_model", lambda name: facts_model)
    texts = tmp_path / "texts.txt"
    texts.write_text("Paris is in France.\n\nRome is a city.\n")
    out = tmp_path / "speed.json"
    moment_speed.main(["--texts", str(texts), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layers"], row["last"]) for row in rows] == [
        ("middle", 3),
        ("late", 6),
        ("all", 7),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_the_documentation_has_the_measured_numbers() -> None:
    folder = Path(__file__).parents[1] / "docs"
    page = (folder / "editing.md").read_text()
    rows = json.loads((folder / "editing" / "moment-speed.json").read_text())["rows"]
    ours = [round(row["tokens_per_second"]) for row in rows]
    loop = [round(row["loop_tokens_per_second"]) for row in rows]
    assert f"reads {ours[0]} tokens per second for layer {rows[0]['last']} of 30" in page
    assert f"{ours[1]} for layer {rows[1]['last']}, and {ours[2]} for" in page
    assert f"reads {loop[0]}, {loop[1]} and {loop[2]}" in page
    found = json.loads((folder / "editing" / "tuning-smollm2.json").read_text())
    metrics = tuning.TASKS["smollm2"].metrics
    tried = {name: own["tried"] for name, own in found.items() if name != "tracing"}
    assert {*tried} == {*tuning.TASKS["smollm2"].grids}
    for name, own in tried.items():
        [best] = [each for each in own if each["name"] == found[name]["best"]]
        rates = " / ".join(f"{best[each]:.0f}" for each in metrics)
        assert re.search(rf"^\| `{name}` \| {len(own)} \| [^|]* \| {rates} \|$", page, re.M), name
    others = {each["name"]: [round(each[own]) for own in metrics] for each in tried["memit"]}
    assert others["layers=(5, 6, 7, 8, 9), regularization=5000.0"] == [83, 92, 75]
    assert {rates[2] for name, rates in others.items() if "12)" in name} == {67}


def test_presets_are_the_selected_candidates() -> None:
    folder = Path(__file__).parents[1] / "docs" / "editing"
    found = json.loads((folder / "tuning-smollm2.json").read_text())
    presets = preset_settings("SmolLM2-135M", 30)
    for name in tuning.TASKS["smollm2"].grids:
        own = dict(tuning.candidates(name, "smollm2"))[found[name]["best"]]
        assert presets[name] == own
