"""Presets of the editing methods: settings, stored statistics, and training data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import HAS_BRIDGE, build, relative_error
from torch import nn

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing import (
    MEMIT,
    MEND,
    ROME,
    EditRequest,
    FineTuning,
    ForwardPassShift,
    NormalizedGradient,
    UltraEdit,
    facts_moments,
)
from backward_lens_tl.editing.methods import presets
from backward_lens_tl.editing.methods.presets import METHODS, preset_methods, preset_settings
from backward_lens_tl.editing.statistics import moment_cache
from backward_lens_tl.editing.statistics.moment_cache import CACHE_FOLDER
from backward_lens_tl.editing.statistics.moment_collection import second_moments
from backward_lens_tl.errors import EditError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.plan import unused_records
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_checksum
from backward_lens_tl.models.loading import load_facts_model
from benchmarks.tuning import FACTS_TEST, FACTS_TUNING, TASKS, candidate_methods, candidates

TEXTS = ["The capital of France is Paris.", "Rome is in Italy and Paris is not."]
ROWS = [
    {"prompt": "The capital of France is", "target": " the"},
    {"prompt": "Messi plays for", "target": " Paris"},
    {"prompt": "A river runs through", "target": " Rome"},
]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A random model of three layers, of an available class."""
    return build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model


@pytest.fixture(scope="module")
def training() -> tuple[Record, ...]:
    """Training records allowed when evaluating on `FACTS_TEST`; a few are enough here."""
    return unused_records(read_records("facts"), EvaluationConfig(rows=FACTS_TEST))[:12]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, facts_model: nn.Module) -> list[Any]:
    """Record the arguments of MEND's training, without training."""
    asked: list[Any] = []

    def train_mend(*args: Any, **given: Any) -> Any:
        asked.append((args, given))
        return SimpleNamespace(fingerprint="networks", requests="")

    monkeypatch.setattr(presets, "train_mend", train_mend)
    monkeypatch.setattr("backward_lens_tl.editing.mend.mend.check_kind", lambda *_: None)
    return asked


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-xl", "openai-community/gpt2-xl"])
def test_the_published_numbers(name: str) -> None:
    """Settings of the released files that differ from the classes' defaults."""
    own = preset_settings(name, 48)
    assert list(own) == list(METHODS)
    shift = ForwardPassShift(**own["shift"])
    assert (shift.layer, shift.size, shift.key) == (35, 0.24, "paper")
    assert shift.skip_if_answered
    for label, layer, clamp in (("ft_first", 0, None), ("ft_late", 35, None),
                                ("ft_constrained", 0, 5e-4)):  # fmt: skip
        tuning = FineTuning(**own[label])
        assert (tuning.layers, tuning.norm_constraint) == ((layer,), clamp)
        assert (tuning.lr, tuning.steps, tuning.optimizer) == (5e-4, 25, "adam")
        assert (tuning.objective, tuning.stop_at, tuning.train_bias) == ("prompt_last", 0.01, True)
        assert tuning.matrices == ("W_out",)
    rome = ROME(**own["rome"], moments=facts_moments())
    assert (rome.layer, rome.key_mode, rome.fact_token) == (17, "rome", "subject_last")
    assert (rome.steps, rome.lr, rome.weight_decay, rome.kl_factor, rome.clamp) == (
        20, 0.5, 0.5, 0.0625, 4.0,
    )  # fmt: skip
    assert rome.prefixes == ((5, 10), (10, 10))
    memit = MEMIT(**own["memit"], moments=facts_moments())
    assert (memit.layers, memit.regularization) == ((13, 14, 15, 16, 17), 20000)
    assert (memit.steps, memit.lr, memit.weight_decay, memit.kl_factor, memit.clamp) == (
        20, 0.5, 0.5, 0.0625, 0.75,
    )  # fmt: skip
    assert (memit.fact_token, memit.prefix_length) == ("subject_last", 10)
    assert own["mend"] == {"layers": (45, 46, 47)}


def layers_of(settings: Any) -> tuple[int, ...]:
    layers = settings.get("layers", settings.get("layer", ()))
    return layers if isinstance(layers, tuple) else (layers,)


def test_other_models_use_layers_at_the_same_relative_depth() -> None:
    moments = facts_moments()
    for n_layers in (*range(1, 14), 24, 36, 47, 48, 60):
        check_layers(n_layers, moments)


def check_layers(n_layers: int, moments: Any) -> None:
    """Layers for a model with `n_layers`, against the published ones for 48."""
    published = preset_settings("gpt2-xl", 48)
    for name, own in preset_settings("other", n_layers).items():
        layers = layers_of(own)
        assert all(type(layer) is int and 0 <= layer < n_layers for layer in layers)
        assert list(layers) == sorted(set(layers))
        for layer in layers:
            middles = [each / 48 for each in layers_of(published[name])]
            assert min(abs(layer / n_layers - each) for each in middles) <= 1 / n_layers
        if METHODS[name] not in (MEND, NormalizedGradient, UltraEdit):
            has_moments = METHODS[name] in (ROME, MEMIT) or own.get("key") == "whitened"
            METHODS[name](**own, **({"moments": moments} if has_moments else {}))
    own = preset_settings("other", n_layers)
    # Sizes specific to GPT-2 xl are not copied.
    for name in ("shift", "shift_iterated", "shift_whitened"):
        assert own[name]["size"] == "auto"
        assert own[name]["key"] == published[name]["key"]
    assert own["memit"]["regularization"] is None


def test_models_as_deep_as_gpt2_xl_use_its_layers() -> None:
    published = preset_settings("gpt2-xl", 48)
    for name, own in preset_settings("other", 48).items():
        assert layers_of(own) == layers_of(published[name])
    assert published["shift"]["size"] == 0.24  # which the other model's preset did not change


@pytest.mark.usefixtures("as_for_a_user")
def test_presets_of_the_facts_model(facts_model: Any, training: Any, trained: Any, tmp_path: Path):
    given: Any = {"folder": tmp_path, "training": training, "progress": False}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(presets, "MEND", FakeMEND)
        patched.setitem(presets.METHODS, "mend", FakeMEND)  # type: ignore[misc]
        found = preset_methods(facts_model, **given)
    assert list(found) == list(METHODS)
    own = preset_settings("facts", 8)
    for name, method in found.items():
        assert method.prepend_bos is False
        if name == "mend":
            continue
        assert type(method) is METHODS[name]
        for setting, value in own[name].items():
            held = getattr(method, setting)
            assert held == (value if isinstance(value, type(held)) else (value,))
    assert found["rome"].moments.fingerprint == facts_moments().fingerprint  # type: ignore[attr-defined]
    assert found["shift_whitened"].key == "whitened"  # type: ignore[attr-defined]
    assert found["shift_whitened"].moments is found["memit"].moments  # type: ignore[attr-defined]
    assert found["shift_iterated"].moments is None  # type: ignore[attr-defined]
    [(args, more)] = trained
    assert args == (facts_model, training)
    assert more == {
        **own["mend"],
        "prepend_bos": False,
        "out": tmp_path / "mend.safetensors",
        "progress": False,
    }
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"pairs.safetensors", "pairs-answer.safetensors"}


class FakeMEND:
    """Replace the method, whose networks are checked."""

    def __init__(self, editor: Any, *, prepend_bos: Any) -> None:
        self.editor, self.prepend_bos = editor, prepend_bos


# --- stored statistics ----------------------------------------------------------------------------


def only_these(*names: str) -> dict[str, Any]:
    return {"names": names, "progress": False}


def test_statistics_are_saved_and_reused(
    facts_model: Any, training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tensors_checksum(host_of(facts_model).parameters())
    given: Any = {"folder": tmp_path, "training": training, "progress": False}
    names = ("ultraedit", "normalized_gradient")
    first = preset_methods(facts_model, names, **given)
    assert list(first) == ["normalized_gradient", "ultraedit"]  # in the order of tables
    positions = [each.statistics.positions for each in first.values()]  # type: ignore[attr-defined]
    assert positions == ["all", "answer"]
    assert len({each.statistics.requests for each in first.values()}) == 1  # type: ignore[attr-defined]
    monkeypatch.setattr(presets, "pair_statistics", None)
    again = preset_methods(facts_model, names, **given)
    for name, method in first.items():
        assert again[name].settings() == method.settings()
        old, new = (each[name].statistics for each in (first, again))  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(old.mean, new.mean, strict=True))
    # Statistics of records that are tested on now are not used.
    for other in (training[1:], training[:5], training[::-1]):
        with pytest.raises(EditError, match=r"pairs.*holds statistics of other records"):
            preset_methods(facts_model, names, **{**given, "training": other})
    with pytest.raises(EditError, match="holds statistics of other records"):
        preset_methods(facts_model, names, **{**given, "prepend_bos": True})
    # A fine-tuned model has the same inputs in the first layer, which identify the statistics.
    tuned = load_facts_model()
    with torch.no_grad():
        host_of(tuned).sites(7, ("W_out",))[0].weights[0].mul_(1.5)
    with pytest.raises(EditError, match="or of another model; choose another folder"):
        preset_methods(tuned, names, **given)
    assert tensors_checksum(host_of(facts_model).parameters()) == before


def test_editors_of_gradients_edit_the_last_layers(
    tiny: nn.Module, facts_model: Any, training: Any, tmp_path: Path
) -> None:
    given: Any = {"folder": tmp_path, "training": training, "progress": False}
    name = "normalized_gradient"
    own: Any = preset_methods(facts_model, name, **given)[name]
    assert (own.layers, own.prepend_bos) == ((5, 6, 7), False)
    # Others can be requested from the same statistics.
    first: Any = replace(own, layers=(0,))
    delta = first(facts_model, EditRequest("Lionel Messi plays for", " Paris"))
    assert {(each.matrix, each.layer) for each in delta} == {("W_in", 0), ("W_out", 0)}
    # A model of fewer layers has fewer.
    shallow = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2", n_layers=2).model
    rows = [row for row in read_records(ROWS).rows if isinstance(row, Record)]
    folder = tmp_path / "shallow"
    folder.mkdir()
    found: Any = preset_methods(
        shallow, "normalized_gradient", folder=folder, training=rows, progress=False
    )["normalized_gradient"]
    assert found.layers == (0, 1)
    assert found(shallow, EditRequest.of(rows[0])).norm > 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of second moments that no other test uses; few tokens are collected."""
    monkeypatch.setenv(CACHE_FOLDER, str(tmp_path / "cache" / "of mine"))
    monkeypatch.setattr(presets, "TOKENS_PER_INPUT", 3)
    return tmp_path / "cache" / "of mine"


def test_moments_of_another_model(
    tiny: nn.Module, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"folder": tmp_path, "progress": False}
    with pytest.raises(EditError, match=r"wikitext.*cannot be loaded from the hub.*--statistics"):
        preset_methods(tiny, "rome", **given)
    # Methods that need none do not access the hub.
    assert list(preset_methods(tiny, ["shift", "ft_late"], **given)) == ["ft_late", "shift"]

    pulled: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS * 40:
            pulled.append(text)
            yield text

    monkeypatch.setattr(moment_cache, "_wikitext", texts)
    found: Any = preset_methods(tiny, ["rome", "memit", "shift_whitened"], **given)
    moments = found["rome"].moments
    assert found["memit"].moments is moments is found["shift_whitened"].moments
    assert moments.n_tokens >= 3 * host_of(tiny).d_mlp
    assert moments.prepend_bos is False
    # The layers of all presets, so that one file serves them all.
    assert moments.layers == (1, 2)
    n_pulled = len(pulled)
    assert 0 < n_pulled < len(TEXTS) * 40
    [file] = cache.iterdir()
    assert re.fullmatch(r"second_moments-[0-9a-f]{16}\.safetensors", file.name)
    again: Any = preset_methods(tiny, "rome", **given)["rome"]
    assert len(pulled) == n_pulled  # nothing was recollected
    assert again.moments.fingerprint == moments.fingerprint


def test_moments_of_any_texts(
    tiny: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file per model, texts and BOS; a second call collects nothing."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 40))

    def moments(model: Any, texts: Any, **settings: Any) -> Any:
        own = {"folder": tmp_path, "progress": False, "texts": texts} | settings
        found: Any = preset_methods(model, "rome", **own)["rome"]
        return found.moments

    first = moments(tiny, file)
    expected = second_moments(
        tiny,
        TEXTS * 40,
        layers=(1, 2),
        max_tokens=3 * host_of(tiny).d_mlp,
        prepend_bos=False,
        progress=False,
    )
    assert first.fingerprint == expected.fingerprint
    [kept] = cache.iterdir()
    time = kept.stat().st_mtime_ns
    for same in (str(file), TEXTS * 40, tuple(TEXTS * 40)):
        assert moments(tiny, same).fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == time
    other = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2", seed=1).model
    found = [
        moments(tiny, TEXTS[::-1] * 40),
        moments(tiny, file, prepend_bos=True),
        moments(other, file),
    ]
    assert len({each.fingerprint for each in (first, *found)}) == 4
    assert len(list(cache.iterdir())) == 4
    # The model's own default is what it is at the time of the call.
    without, with_bos = [], []
    for own, default in ((without, False), (with_bos, True)):
        monkeypatch.setattr(tiny.cfg, "default_prepend_bos", default)
        own.append(moments(tiny, file, prepend_bos=None))
    assert torch.equal(without[0].of(1), first.of(1))
    assert torch.equal(with_bos[0].of(1), found[1].of(1))


def test_moments_of_a_model_with_hooks_are_not_kept(tiny: Any, tmp_path: Path, cache: Path) -> None:
    """The checksum of the weights does not know the hooks."""
    given: Any = {"folder": tmp_path, "progress": False, "texts": TEXTS * 40}
    plain: Any = preset_methods(tiny, "rome", **given)["rome"]
    [kept] = cache.iterdir()
    halved = [("blocks.1.hook_resid_pre", lambda values, hook: values * 0.5)]
    with tiny.hooks(fwd_hooks=halved):
        hooked: Any = preset_methods(tiny, "rome", **given)["rome"]
    assert hooked.moments.texts == plain.moments.texts
    assert relative_error(hooked.moments.of(1), plain.moments.of(1)) > 0.1
    kept.unlink()
    with tiny.hooks(fwd_hooks=halved):
        preset_methods(tiny, "rome", **given)
    assert list(cache.iterdir()) == []
    again: Any = preset_methods(tiny, "rome", **given)["rome"]
    assert again.moments.fingerprint == plain.moments.fingerprint


def test_own_texts_for_the_facts_model(facts_model: Any, tmp_path: Path, cache: Path) -> None:
    given: Any = {"folder": tmp_path, "progress": False}
    shipped: Any = preset_methods(facts_model, "rome", **given)["rome"]
    assert shipped.moments.fingerprint == facts_moments().fingerprint
    assert not cache.exists()
    own: Any = preset_methods(facts_model, "rome", texts=TEXTS * 150, **given)["rome"]
    assert own.moments.fingerprint != shipped.moments.fingerprint
    assert own.moments.n_tokens >= 3 * 512


def test_unfinished_moments_are_resumed(
    tiny: nn.Module, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state after `kill -9`: a file of the first texts only."""
    monkeypatch.setattr(presets, "TOKENS_PER_INPUT", 20)
    given: Any = {"folder": tmp_path, "progress": False, "texts": TEXTS * 200}
    whole: Any = preset_methods(tiny, "rome", **given)["rome"]
    [file] = cache.iterdir()
    file.unlink()
    settings: Any = {"layers": (1, 2), "prepend_bos": False, "progress": False}
    begun = second_moments(tiny, TEXTS * 200, max_tokens=1, out=file, **settings)
    assert begun.n_tokens < whole.moments.n_tokens
    found: Any = preset_methods(tiny, "rome", **given)["rome"]
    assert found.moments.fingerprint == whole.moments.fingerprint


def test_a_cache_that_cannot_be_written(
    tiny: nn.Module, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv(CACHE_FOLDER, str(file))
    with pytest.raises(EditError, match=rf"a file'.*{CACHE_FOLDER} to another folder"):
        preset_methods(tiny, "rome", folder=tmp_path, texts=TEXTS, progress=False)
    monkeypatch.setenv(CACHE_FOLDER, str(cache))
    with pytest.raises(EditError, match=r"nowhere\.txt' cannot be read"):
        preset_methods(tiny, "rome", folder=tmp_path, texts="nowhere.txt", progress=False)


# --- leaks of evaluation data ---------------------------------------------------------------------


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("rows", [FACTS_TEST, range(100), FACTS_TUNING])
def test_evaluated_records_are_not_trained_on(
    rows: range, facts_model: Any, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_records("facts")
    evaluated = [records.rows[row] for row in rows]
    left = unused_records(records, EvaluationConfig(rows=rows))
    requests: list[EditRequest] = []
    monkeypatch.setattr(
        presets, "pair_statistics", lambda model, asked, **_: requests.extend(asked) or 1 / 0
    )
    names = ("normalized_gradient", "ultraedit", "mend")
    for name in names:
        with nullcontext() if name == "mend" else pytest.raises(ZeroDivisionError):
            preset_methods(facts_model, name, folder=tmp_path, training=left, progress=False)
    [(args, _)] = trained
    subjects = {row.subject for row in evaluated if isinstance(row, Record)}
    assert len(requests) == 2 * min(300, len(left))
    for one in (*args[1], *requests):
        assert one.subject not in subjects
    assert args[1] == left[:1000]
    assert not {row.index for row in args[1]} & set(rows)
    assert not set(FACTS_TEST) & set(FACTS_TUNING)


def test_prompts_of_the_evaluation_are_not_trained_on():
    records = read_records("facts")
    rows = [row for row in records.rows[:100] if isinstance(row, Record)]
    subjects = {str(row.subject) for row in rows}
    asked = {text for row in rows for text in (*_prompts(row), *row.neighborhood_prompts)}

    def leaks(some: Any) -> int:
        prompts = [text for row in some for text in (*_prompts(row), *row.neighborhood_prompts)]
        return sum(text in asked or any(each in text for each in subjects) for text in prompts)

    left = unused_records(records, EvaluationConfig(records=100))
    assert len(left) > 100
    assert sum(len(row.neighborhood_prompts) for row in left) > 100
    assert leaks(left) == 0
    # Filtering by subject alone would have left many.
    others = [row for row in records.rows[100:] if getattr(row, "subject", "") not in subjects]
    assert leaks(others) > 100


def _prompts(row: Record) -> tuple[str, ...]:
    return (row.prompt, *row.paraphrase_prompts, *row.generation_prompts)


# --- errors ---------------------------------------------------------------------------------------


def test_errors(facts_model: Any, tmp_path: Path) -> None:
    given: Any = {"folder": tmp_path, "progress": False}
    with pytest.raises(
        EditError, match=r"unknown method 'ike'; allowed: ft_first, .*whitened, all\n"
    ):
        preset_methods(facts_model, ["shift", "ike"], **given)
    for name in ("mend", "normalized_gradient", "ultraedit", "all"):
        with pytest.raises(EditError, match=r"need records to learn from.*such as 'shift'"):
            preset_methods(facts_model, name, **given)
    assert list(preset_methods(facts_model, ["rome", "shift"], **given)) == ["rome", "shift"]
    assert list(tmp_path.iterdir()) == []


def test_the_candidates_of_a_search_have_their_settings_and_what_they_need(
    facts_model: Any, tmp_path: Path
) -> None:
    records = read_records("facts")
    for name in ("shift_whitened", "rome"):
        settings = dict(candidates(name))
        found: Any = candidate_methods(name, facts_model, records, tmp_path)
        assert list(found) == list(settings)
        for label, method in found.items():
            own = {key: getattr(method, key) for key in settings[label]}
            assert own == settings[label]
            assert method.moments.fingerprint == facts_moments().fingerprint


def test_settings_of_the_facts_model_are_those_chosen_on_the_tuning_split():
    tried = tuning_results("tuning.json")
    settings = preset_settings("facts", 8)
    assert {*tried, "shift_auto"} == set(METHODS) == set(settings)
    assert settings["shift_auto"] == {}
    for name, own in tried.items():
        assert own["rows"] == [FACTS_TUNING.start, FACTS_TUNING.stop]
        check_chosen(name, own, settings[name])


def test_settings_of_smollm2_are_those_chosen_on_the_tuning_split():
    tried = tuning_results("tuning-smollm2.json")
    traced = tried.pop("tracing")
    assert traced["facts"] == 13
    assert len(traced["effects"]["last subject token"]) == 30
    task = TASKS["smollm2"]
    settings = preset_settings("SmolLM2-135M-Instruct", 30)
    assert set(tried) == set(task.grids)
    for name, own in tried.items():
        assert own["rows"] == list(task.tuning)
        assert [each["name"] for each in own["tried"]] == [
            label for label, _ in candidates(name, "smollm2")
        ]
        check_chosen(name, own, settings[name])


def tuning_results(name: str) -> Any:
    return json.loads((Path(__file__).parents[2] / "docs" / "editing" / name).read_text())


def check_chosen(name: str, own: Any, settings: Any) -> None:
    """The best candidate is good enough, and the preset has its settings."""
    chosen = next(each for each in own["tried"] if each["name"] == own["best"])
    efficacies = [each["efficacy"] for each in own["tried"]]
    assert chosen["efficacy"] >= min(95, max(efficacies))
    for part in re.split(r", (?=\w+=)(?![^(]*\))", own["best"]):
        key, _, value = part.partition("=")
        assert repr(settings[key]) in (value, repr(value)), (name, part)


@pytest.mark.parametrize(
    ("name", "n_layers", "is_known"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 30, True),
        ("SmolLM2-135M-Instruct.Q4_1.gguf (210 Q4_1, 61 F32, 1 Q8_0)", 30, True),
        ("my-smollm2-135m-chat", 30, True),
        ("SmolLM2-360M-Instruct", 32, False),
        ("smollm2-135m", 12, False),  # cut
        ("SmolLM2-135M/another", 30, False),  # only the folder's name
    ],
)
def test_models_with_settings_of_smollm2(name: str, n_layers: int, is_known: bool) -> None:
    by_depth, own = preset_settings("other", n_layers), preset_settings(name, n_layers)
    tuned = set(TASKS["smollm2"].grids)
    assert list(own) == list(METHODS)
    assert {each for each in METHODS if own[each] != by_depth[each]} == (
        tuned if is_known else set()
    )
