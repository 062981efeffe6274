"""LoRA adapters that PEFT wrote, against the weights that PEFT itself merges."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, NotAvailable, build_model, hf_model
from models import relative_error
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backward_lens_tl.editing.checkpoint_names import named_layer
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable

EXACT = 1e-12
"""Float64 models and adapters; errors are relative to the norm of the change."""

SINGLE = 1e-6
"""The goal, in float32."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def adapted(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A small model with a random adapter, whose biases are random too."""
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "lora_dropout": 0.0}
    model = get_peft_model(hf_model(family, dtype), LoraConfig(**{**options, **settings}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B.default.bias" in name:
                tensor.normal_()
    return model


def merged_changes(model: Any) -> dict[tuple[str, int], Tensor]:
    """What merging adds to each matrix, from the weights of the TransformerLens layout."""
    before = {name: tensor.clone() for name, tensor in model.get_base_model().named_parameters()}
    merged = copy.deepcopy(model).merge_and_unload()
    after = dict(merged.named_parameters())
    found = {}
    for name, tensor in after.items():
        if not name.endswith(".weight"):
            continue
        old = before.get(name, before.get(name.replace(".weight", ".base_layer.weight")))
        assert old is not None
        change = (tensor - old).detach()
        place = named_layer(name.removesuffix(".weight"))
        if place is None or not change.any():
            continue
        conv1d = "c_" in place.rest
        change = change if conv1d else change.T
        columns = place.columns(*change.shape, is_in_out=conv1d)
        assert columns is not None
        for matrix, own in columns.items():
            found[matrix, place.layer] = change[:, own]
    return found


def assert_merged(delta: WeightDelta, model: Any, bound: float) -> None:
    expected = merged_changes(model)
    assert {(each.matrix, each.layer) for each in delta} == set(expected)
    for each in delta:
        assert relative_error(each.dense().double(), expected[each.matrix, each.layer]) <= bound


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"down_proj": 11, r"layers\.0\..*v_proj": 1},
    },
    "patterns and rsLoRA": {"use_rslora": True, "rank_pattern": {"o_proj": 6}},
    "one layer": {"layers_to_transform": [1]},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, tmp_path: Path) -> None:
    model = adapted("llama", **{"target_modules": LLAMA, **SETTINGS[name]})
    model.save_pretrained(tmp_path)
    delta = WeightDelta.from_lora(tmp_path)
    assert_merged(delta, model, EXACT)
    assert [each.layer for each in delta] == sorted(each.layer for each in delta)


def test_wrong_scales_would_be_noticed(tmp_path: Path) -> None:
    """With other settings in the file, the change is another one."""
    model = adapted("llama", target_modules=LLAMA, use_rslora=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    with pytest.raises(AssertionError):
        assert_merged(WeightDelta.from_lora(tmp_path), model, 0.1)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", GPT2),
        ("gpt_neo", ["q_proj", "out_proj", "c_fc", "c_proj"]),
        ("gptj", ["q_proj", "out_proj", "fc_in", "fc_out"]),
        ("opt", ["k_proj", "out_proj", "fc1", "fc2"]),
        ("phi", ["v_proj", "dense", "fc1", "fc2"]),
        ("phi3", ["o_proj", "gate_up_proj", "down_proj"]),
        ("gemma2", LLAMA),
        ("qwen3", LLAMA),
        ("stablelm", LLAMA),
    ],
)
def test_applied_to_the_model_it_gives_the_merged_model(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    try:
        model = build_model(family, "bridge", torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    adapter = adapted(family, target_modules=targets)
    adapter.save_pretrained(tmp_path)
    delta = WeightDelta.from_lora(tmp_path)
    tokens = torch.randint(3, 97, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapter.eval().merge_and_unload()(tokens).logits
        before = model(tokens)
        with delta.applied(model):
            after = model(tokens)
        # Some bridges compute parts of attention in float32, which Hugging Face does not.
        rounding = (before - hf_model(family, torch.float64).eval()(tokens).logits).abs().max()
    assert rounding < 1e-5
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=0, atol=max(1e-9, 10 * float(rounding)))


FAMILY_NAMES = [
    pytest.param(name, kind, marks=() if name in ("gpt2", "phi3", "falcon") else pytest.mark.slow)
    for name in FAMILIES
    for kind in ("hooked", "bridge")
]
UNKNOWN = {"gpt_neox", "bloom", "falcon", "falcon_new", "falcon_alibi"}
"""Families without any layer whose columns follow from its name."""


@pytest.mark.parametrize(("family", "kind"), FAMILY_NAMES)
def test_names_against_the_weights_of_transformer_lens(family: str, kind: str) -> None:
    """A name is either not known, or it is that of the matrix with these weights."""
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    compared = 0
    for name, module in hf_model(family, torch.float64).named_modules():
        weight = getattr(module, "weight", None)
        place = named_layer(name)
        if place is None or weight is None or weight.ndim != 2:
            continue
        conv1d = type(module).__name__ == "Conv1D"
        stored = weight.detach() if conv1d else weight.detach().T
        columns = place.columns(*stored.shape, is_in_out=conv1d)
        for matrix, own in ({} if columns is None else columns).items():
            [site] = find_editable(host_of(model), matrix, place.layer)
            found = site.joined(site.weight.in_out(site.weight.parameter.detach()))
            assert torch.equal(found, stored[:, own]), (name, matrix)
            compared += 1
    assert (compared == 0) == (family in UNKNOWN)


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.3.self_attn.q_proj",
        "vision_model.encoder.layers.3.mlp.fc1",
        "encoder.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.experts.2.up_proj",
        "gpt_neox.layers.0.attention.query_key_value",
        "model.layers.0.self_attn",
        "lm_head",
    ],
)
def test_names_that_are_not_known(name: str) -> None:
    assert named_layer(name) is None


def test_shared_keys_and_values_are_not_divided() -> None:
    """GPT-BigCode's `c_attn` has one head of keys and of values, or interleaved heads."""
    place = named_layer("transformer.h.0.attn.c_attn")
    assert place is not None
    assert place.columns(24, 24 + 2 * 6, is_in_out=True) is None
    assert place.columns(24, 3 * 12, is_in_out=True) is None
    assert place.columns(24, 72, is_in_out=False) is None
    assert set(place.columns(24, 72, is_in_out=True) or ()) == {"W_Q", "W_K", "W_V"}


def test_biases(tmp_path: Path) -> None:
    model = adapted("opt", target_modules=["fc1", "v_proj"], lora_bias=True, use_rslora=True)
    model.save_pretrained(tmp_path)
    delta = WeightDelta.from_lora(tmp_path)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    base = dict(hf_model("opt", torch.float64).named_parameters())
    name = "model.decoder.layers.1.fc1.bias"
    bias = delta["W_in", 1].bias
    assert bias is not None
    torch.testing.assert_close(bias, (merged[name] - base[name]).detach())
    assert bias.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_single_and_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("llama", torch.float32, target_modules=LLAMA)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    if dtype == torch.bfloat16:  # PEFT would merge in half precision
        model = model.float()
    delta = WeightDelta.from_lora(tmp_path)
    assert all(each.dense().dtype == torch.float32 for each in delta)
    for key, expected in merged_changes(model).items():
        # The merged weight is rounded to float32 next to a weight of size 1.
        error = float((delta[key].dense() - expected).abs().max())
        assert error <= SINGLE * max(1.0, float(expected.abs().max()))


def test_pickled_weights(tmp_path: Path) -> None:
    model = adapted("llama", target_modules=LLAMA)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert_merged(WeightDelta.from_lora(tmp_path), model, EXACT)


def test_a_round_trip_through_to_lora(facts_model: Any, tmp_path: Path) -> None:
    from test_lora import EDITS, FACTS_FOLDER

    for kind in ("all of a layer", "bias", "every layer"):
        delta = EDITS[kind](facts_model)
        delta.to_lora(tmp_path / kind, facts_model, str(FACTS_FOLDER))
        found = WeightDelta.from_lora(tmp_path / kind)
        for each in delta:
            back = found[each.matrix, each.layer]
            torch.testing.assert_close(back.dense(), each.dense(), rtol=0, atol=1e-6)
            if each.bias is not None:
                torch.testing.assert_close(back.bias, each.bias)


# --------------------------------------------------------------------------------------- refusals


def test_what_is_not_a_matrix_is_named_or_left_out(tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(EditError, match=r"also changes lm_head.*pass partial=True"):
        WeightDelta.from_lora(tmp_path)
    delta = WeightDelta.from_lora(tmp_path, partial=True)
    assert {each.matrix for each in delta} == {"W_Q"}
    assert delta.about["left_out"] == ("lm_head",)
    whole = adapted("llama", target_modules=["v_proj"], modules_to_save=["lm_head"])
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(EditError, match=r"also changes .*lm_head.*weight"):
        WeightDelta.from_lora(tmp_path / "whole")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "has use_dora: DoRA rescales .* WeightDelta.between"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "initialised with 'pissa', which changes the"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "acts on some of the tokens only"),
    "another kind": ({"peft_type": "LOHA"}, "is of type 'LOHA'; only LORA can be read"),
    "no rank": ({"r": None}, "has no r"),
    "another rank": ({"r": 6}, r"have rank 3, but adapter_config\.json says 6, so the scale"),
    "another rank of a layer": (
        {"rank_pattern": {"v_proj": 2}},
        "v_proj have rank 3, but .*says 2",
    ),
    "rank 0": ({"r": 0}, r"r in adapter_config\.json is 0; pass an integer of at least 1"),
    "rank 0 of a layer": ({"rank_pattern": {"v_proj": 0}}, r"rank_pattern\['v_proj'\] in .* is 0"),
    "alpha": ({"lora_alpha": "8"}, r"lora_alpha in adapter_config\.json is '8'; pass a finite"),
    "a pattern": (
        {"rank_pattern": {"(": 3}},
        r"rank_pattern in .* has '\(', which is not a regular",
    ),
    "patterns": ({"rank_pattern": [3]}, r"rank_pattern in .* is \[3\]; pass an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_more_than_their_factors(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    adapted("llama", target_modules=LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(EditError, match=message):
        WeightDelta.from_lora(tmp_path)


def test_no_alpha(tmp_path: Path) -> None:
    adapted("llama", target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": None}))
    with pytest.raises(EditError, match=r"lora_alpha in .* is None; pass a finite number"):
        WeightDelta.from_lora(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite(value: float, part: str, tmp_path: Path) -> None:
    adapted("llama", target_modules=["q_proj"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name][0, 1] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(EditError, match=r"q_proj have infinite or NaN entries"):
        WeightDelta.from_lora(tmp_path)


WHOLE: dict[str, dict[str, Any]] = {
    "a matrix": {"modules_to_save": ["up_proj"]},
    "adapted layers' biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_tensors_of_known_layers(name: str, tmp_path: Path) -> None:
    """They are not changes, so the base is needed to read them."""
    family, targets = ("llama", ["q_proj"]) if name == "a matrix" else ("opt", ["q_proj", "fc1"])
    adapted(family, target_modules=targets, **WHOLE[name]).save_pretrained(tmp_path)
    with pytest.raises(
        EditError,
        match=r"stores as a whole, not as a change; merge .* WeightDelta\.between, or pass",
    ):
        WeightDelta.from_lora(tmp_path)
    left_out = WeightDelta.from_lora(tmp_path, partial=True).about["left_out"]
    assert any("up_proj.weight" in each or "q_proj.base_layer.bias" in each for each in left_out)


def test_a_linear_joined_layer_is_not_divided(tmp_path: Path) -> None:
    """As in GPT-BigCode. PEFT sets `fan_in_fan_out` for GPT-2's."""
    adapted("gpt2", target_modules=["c_attn", "c_fc"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["fan_in_fan_out"] is True
    path.write_text(json.dumps(config | {"fan_in_fan_out": False}))
    delta = WeightDelta.from_lora(tmp_path, partial=True)
    assert {each.matrix for each in delta} == {"W_in"}
    assert delta.about["left_out"][0] == "transformer.h.0.attn.c_attn"


def test_dora_as_peft_writes_it_is_refused(tmp_path: Path) -> None:
    adapted("llama", target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(EditError, match=r"DoRA"):
        WeightDelta.from_lora(tmp_path)


@pytest.mark.usefixtures("as_for_a_user")
def test_folders_that_are_not_adapters(tmp_path: Path) -> None:
    with pytest.raises(
        EditError, match=r"is not the folder of an adapter: adapter_config.json can"
    ):
        WeightDelta.from_lora(tmp_path / "nowhere")
    hf_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(EditError, match=r"It holds a whole model: .* WeightDelta.between"):
        WeightDelta.from_lora(tmp_path / "model")
    model = adapted("llama", target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "named", selected_adapters=["other"])
    with pytest.raises(EditError, match=r"There are adapters in its subfolders other; pass one"):
        WeightDelta.from_lora(tmp_path / "named")
    with pytest.raises(EditError, match=r"pass a text or a pathlib\.Path"):
        WeightDelta.from_lora(3)  # type: ignore[arg-type]
    adapted("llama", target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "lora_A" in k}, weights)
    with pytest.raises(EditError, match=r"only one of the two factors of model\.layers\.0"):
        WeightDelta.from_lora(tmp_path / "a")
    weights.write_bytes(b"damaged")
    with pytest.raises(EditError, match=r"the weights of the adapter .* cannot be read"):
        WeightDelta.from_lora(tmp_path / "a")
    adapted("gpt_neox", target_modules=["query_key_value"]).save_pretrained(tmp_path / "b")
    with pytest.raises(
        EditError, match=r"also changes gpt_neox.layers.0.attention.query_key_value"
    ):
        WeightDelta.from_lora(tmp_path / "b")
    with pytest.raises(EditError, match=r"changes no matrix of attention or the MLP whose name"):
        WeightDelta.from_lora(tmp_path / "b", partial=True)


def test_a_processed_model_is_refused(tmp_path: Path) -> None:
    """There, `W_in` is multiplied by the norm's gain, so the change would be another one."""
    adapted("llama", target_modules=LLAMA).save_pretrained(tmp_path)
    delta = WeightDelta.from_lora(tmp_path)
    try:
        model: nn.Module = build_model("llama", "hooked-processed", torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    for edit in (delta, delta.scale(2), delta + delta):
        message = r"processed W_K, .* load the model without processing"
        with pytest.raises(EditError, match=message), edit.applied(model):
            pass
