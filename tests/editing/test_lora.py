"""Edits as LoRA adapters: what transformers and peft load without this package."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import FAMILIES, NotAvailable, build_model, hf_model
from models import (
    Case,
    _hf_model,
    bridge_case,
    bridge_only,
    hooked_only,
    randomise,
    small_tokenizer,
)
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from backward_lens_tl import load_facts_model, load_model
from backward_lens_tl.editing.lora import _columns
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError, ResultFileError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from conftest import FACTS_FOLDER

ROUND_TRIP = 1e-5  # the promised accuracy of logits, in nats; float32 rounds them to about 3e-6
MOVES = 1e-2  # and the least change of logits for a meaningful round trip
ATTENTION = ("W_Q", "W_K", "W_V", "W_O")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def through_peft(base: nn.Module, folder: Path, tokens: Tensor) -> Tensor:
    return logits_of(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval(), tokens)


def change(
    model: Any,
    matrix: str,
    layer: int,
    *,
    rank: int = 2,
    size: float = 0.1,
    seed: int = 0,
    dense: bool = False,
    bias: bool = False,
) -> MatrixDelta:
    """A random edit with about `size` times the norm of the matrix."""
    [site] = find_editable(host_of(model), matrix, layer)
    weight = site.joined(site.weight.in_out(site.weight.parameter.detach()))
    generator = torch.Generator().manual_seed(1000 * layer + 10 * seed + len(matrix))
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
    )
    right = right * (size * float(weight.norm()) / float((left @ right).norm()))
    own = torch.randn(weight.shape[1], generator=generator, dtype=torch.float64) * 0.1
    parts = {"values": left @ right} if dense else {"left": left, "right": right}
    if bias:
        parts["bias"] = own
    return MatrixDelta(matrix, layer, **{k: v.to(weight.dtype) for k, v in parts.items()})


def edit(*matrices: MatrixDelta) -> WeightDelta:
    return WeightDelta(matrices, {})


EDITS: dict[str, Callable[[Any], WeightDelta]] = {
    "W_out": lambda m: edit(change(m, "W_out", 1)),
    "W_K": lambda m: edit(change(m, "W_K", 1, size=0.5)),
    "all of a layer": lambda m: edit(
        *(change(m, name, 2, rank=2 + place) for place, name in enumerate(_all_names(m)))
    ),
    "every layer": lambda m: edit(
        *(
            change(m, name, layer, rank=1 + layer, size=0.05)
            for layer in range(host_of(m).n_layers)
            for name in ("W_Q", "W_out")
        )
    ),
    "dense": lambda m: edit(change(m, "W_out", 0, rank=40, dense=True), change(m, "W_V", 1)),
    "bias": lambda m: edit(change(m, "W_out", 1, bias=True), change(m, "W_in", 2)),
}


def _all_names(model: Any) -> tuple[str, ...]:
    host = host_of(model)
    return (*host.matrices("attn"), *host.matrices("mlp"))


def check_round_trip(
    delta: WeightDelta, model: Any, base: nn.Module, folder: Path, tokens: Tensor
) -> Tensor:
    """Base and adapter give the edited model's logits; the base alone does not."""
    delta.to_lora(folder, model, base)
    before = logits_of(model, tokens)
    with delta.applied(model):
        edited = logits_of(model, tokens)
    found = through_peft(base, folder, tokens)
    assert float((edited - before).abs().max()) > MOVES
    assert float((found - edited).abs().max()) <= ROUND_TRIP
    return found


def of_prompt(model: Any) -> Tensor:
    """A prompt like the training data: on random tokens rounding errors are larger."""
    tokens: Tensor = model.to_tokens("Lionel Messi plays for", prepend_bos=False)
    return tokens


@pytest.fixture(scope="session")
def facts_base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(FACTS_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="session", params=["llama", "neox"])
def random_pair(request: pytest.FixtureRequest) -> tuple[Case, nn.Module]:
    """A random bridge in float64, and the Hugging Face model that it wraps."""
    architecture = request.param
    wrapped = _hf_model(architecture, 64, 3).double()
    randomise(wrapped)
    raw = copy.deepcopy(wrapped).eval()
    return bridge_case(wrapped, small_tokenizer(), name=architecture), raw


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", EDITS)
def test_facts_round_trip(facts: Case, facts_base: nn.Module, kind: str, tmp_path: Path) -> None:
    delta = EDITS[kind](facts.model)
    check_round_trip(delta, facts.model, facts_base, tmp_path / "a", of_prompt(facts.model))


@bridge_only
@pytest.mark.parametrize("kind", ["W_K", "all of a layer", "bias"])
def test_random_round_trip(random_pair: tuple[Case, nn.Module], kind: str, tmp_path: Path) -> None:
    """Grouped queries with gates, and heads whose q, k and v are interleaved in one layer."""
    case, raw = random_pair
    check_round_trip(EDITS[kind](case.model), case.model, raw, tmp_path / "a", case.tokens(7, 7))


COMMON = ("gpt_neox", "bloom", "falcon_new", "phi3")  # each fuses its layers differently
QUICK = {("gpt_neox", "hooked"), *((name, "bridge") for name in COMMON)}
FAMILY_NAMES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for kind in ("hooked", "bridge")
]


@pytest.mark.parametrize(("family", "kind"), FAMILY_NAMES)
def test_families(family: str, kind: str, tmp_path: Path) -> None:
    """Every matrix of a layer stored as one weight, without knowledge of the architecture."""
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    names = [name for name in _all_names(model) if not _is_mixture(model, name)]
    assert len(names) >= 4
    delta = edit(*(change(model, name, 1, rank=2 + i) for i, name in enumerate(names)))
    tokens = torch.randint(3, 97, (1, 8), generator=torch.Generator().manual_seed(0))
    base = hf_model(family, torch.float64).eval()
    check_round_trip(delta, model, base, tmp_path, tokens)


def _is_mixture(model: Any, matrix: str) -> bool:
    try:
        find_editable(host_of(model), matrix, 1)
    except UnsupportedModelError:
        return True
    return False


def test_trained_llama_round_trip(stories: Case, stories_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float32).eval()
    delta = EDITS["every layer"](stories.model)
    check_round_trip(delta, stories.model, base, tmp_path / "a", stories.tokens(7, 7))


def test_base_by_its_folder(facts_model: Any, tmp_path: Path) -> None:
    """The adapter names its base, and peft's class loads both."""
    delta, tokens = EDITS["W_out"](facts_model), of_prompt(facts_model)
    delta.to_lora(tmp_path, facts_model, str(FACTS_FOLDER))
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    with delta.applied(facts_model):
        expected = logits_of(facts_model, tokens)
    assert float((logits_of(loaded, tokens) - expected).abs().max()) <= ROUND_TRIP


@pytest.mark.parametrize("kind", ["all of a layer", "bias"])
def test_merged_into_the_weights(
    facts_model: Any, facts_base: nn.Module, kind: str, tmp_path: Path
) -> None:
    delta, tokens = EDITS[kind](facts_model), of_prompt(facts_model)
    found = check_round_trip(delta, facts_model, facts_base, tmp_path, tokens)
    adapted = PeftModel.from_pretrained(copy.deepcopy(facts_base), str(tmp_path))
    merged = adapted.merge_and_unload().eval()
    assert float((logits_of(merged, tokens) - found).abs().max()) <= ROUND_TRIP


def test_written_files(facts_model: Any, facts_base: nn.Module, tmp_path: Path) -> None:
    delta = edit(*(change(facts_model, name, 1, rank=2 + i) for i, name in enumerate(ATTENTION)))
    delta.to_lora(tmp_path, facts_model, facts_base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    joint, out = "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"
    assert sorted(config["target_modules"]) == [joint, out]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is True  # Conv1D
    assert config["lora_bias"] is False
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model."): t.shape for name, t in tensors.items()}
    assert shapes == {
        f"{joint}.lora_A.weight": (2 + 3 + 4, 128),
        f"{joint}.lora_B.weight": (3 * 128, 2 + 3 + 4),
        f"{out}.lora_A.weight": (5, 128),
        f"{out}.lora_B.weight": (128, 5),
    }
    adapted = PeftModel.from_pretrained(copy.deepcopy(facts_base), str(tmp_path))
    layers = [m for m in adapted.modules() if hasattr(m, "lora_A")]
    assert [layer.scaling for layer in layers] == [{"default": 1.0}] * 2
    # A second adapter replaces the first.
    edit(change(facts_model, "W_out", 0)).to_lora(tmp_path, facts_model, facts_base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".h.0.mlp.c_proj." in name for name in tensors)


def test_a_rank_is_never_larger_than_the_matrix(
    facts_model: Any, facts_base: nn.Module, tmp_path: Path
) -> None:
    delta = edit(change(facts_model, "W_out", 1, rank=200))
    check_round_trip(delta, facts_model, facts_base, tmp_path, of_prompt(facts_model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 128


def test_a_zero_change(facts_model: Any, facts_base: nn.Module, tmp_path: Path) -> None:
    tokens = of_prompt(facts_model)
    for delta in (
        edit(change(facts_model, "W_out", 1).scale(0)),
        edit(MatrixDelta("W_out", 1, values=torch.zeros(512, 128))),
        edit(MatrixDelta("W_out", 1, left=torch.zeros(512, 0), right=torch.zeros(0, 128))),
    ):
        delta.to_lora(tmp_path, facts_model, facts_base)
        found = through_peft(facts_base, tmp_path, tokens)
        assert float((found - logits_of(facts_base, tokens)).abs().max()) == 0
    with pytest.raises(EditError, match="the edit changes nothing"):
        edit().to_lora(tmp_path, facts_model, facts_base)


# -------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("fault", ["transposed", "twice", "another layer", "no joint columns"])
def test_the_round_trip_detects_errors(
    facts_model: Any, facts_base: nn.Module, fault: str, tmp_path: Path
) -> None:
    """Negative controls: errors in an adapter that the round trip must detect."""
    matrix = "W_V" if fault == "no joint columns" else "W_O"
    delta, tokens = edit(change(facts_model, matrix, 1)), of_prompt(facts_model)
    delta.to_lora(tmp_path, facts_model, facts_base)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (a, one), (b, other) = sorted(tensors.items())
    assert "lora_A" in a
    assert "lora_B" in b
    if fault == "transposed":
        broken = {a: other.T.contiguous(), b: one.T.contiguous()}
    elif fault == "twice":
        broken = {a: 2 * one, b: other}
    elif fault == "no joint columns":
        broken = {a: one, b: other.roll(-128, 0)}
    else:
        broken = {name.replace(".h.1.", ".h.2."): tensor for name, tensor in tensors.items()}
        config = tmp_path / "adapter_config.json"
        config.write_text(config.read_text().replace("h.1.", "h.2.").replace("h\\\\.1", "h\\\\.2"))
    save_file(broken, path, metadata={"format": "pt"})
    with delta.applied(facts_model):
        expected = logits_of(facts_model, tokens)
    error = float((through_peft(facts_base, tmp_path, tokens) - expected).abs().max())
    assert error > 100 * ROUND_TRIP


def test_another_base_is_refused(facts_model: Any, facts_base: nn.Module, tmp_path: Path) -> None:
    delta = EDITS["W_out"](facts_model)
    other = copy.deepcopy(facts_base)
    with torch.no_grad():
        # Change one entry of the matrix by a thousandth of a typical weight.
        weight = other.transformer.h[1].mlp.c_proj.weight
        weight[3, 4] += 1e-3 * weight.std()
    with pytest.raises(EditError, match=r"has the weights of W_out of layer 1\. Either"):
        delta.to_lora(tmp_path / "a", facts_model, other)
    assert not (tmp_path / "a").exists()
    delta.to_lora(tmp_path / "a", facts_model, facts_base)


def test_an_edited_model_is_refused(
    facts_model: Any, facts_base: nn.Module, tmp_path: Path
) -> None:
    delta, other = EDITS["W_out"](facts_model), edit(change(facts_model, "W_out", 1, seed=3))
    delta.apply_(facts_model)
    try:
        with pytest.raises(EditError, match="revert_ it first"):
            delta.to_lora(tmp_path, facts_model, facts_base)
        with pytest.raises(EditError, match="an edit is applied"):
            other.to_lora(tmp_path, facts_model, facts_base)
    finally:
        delta.revert_(facts_model)


def test_the_same_weights_in_two_layers(
    facts_model: Any, facts_base: nn.Module, tmp_path: Path
) -> None:
    twins = copy.deepcopy(facts_base)
    twins.transformer.h[5].mlp.load_state_dict(twins.transformer.h[1].mlp.state_dict())
    with pytest.raises(EditError, match=r"h\.1\.mlp\.c_proj.*h\.5\.mlp\.c_proj.*cannot be told"):
        EDITS["W_out"](facts_model).to_lora(tmp_path, facts_model, twins)


@pytest.mark.versions
@bridge_only
def test_a_base_inside_a_bridge_is_refused(facts_base: nn.Module, tmp_path: Path) -> None:
    model = load_facts_model("bridge")
    with pytest.raises(EditError, match="freshly loaded"):
        EDITS["W_out"](model).to_lora(tmp_path, model, model.original_model)


@pytest.mark.usefixtures("as_for_a_user")
def test_missing_bases_and_folders(facts_model: Any, facts_base: nn.Module, tmp_path: Path) -> None:
    delta = EDITS["W_out"](facts_model)
    with pytest.raises(EditError, match="transformers cannot load the base"):
        delta.to_lora(tmp_path / "a", facts_model, str(tmp_path / "nowhere"))
    with pytest.raises(EditError, match=r"pass a text or a pathlib\.Path"):
        delta.to_lora(tmp_path / "a", facts_model, 3)
    with pytest.raises(ResultFileError, match=r"pass a text or a pathlib\.Path"):
        delta.to_lora(3, facts_model, facts_base)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match="cannot be written"):
        delta.to_lora(tmp_path / "file", facts_model, facts_base)


def test_without_peft(
    facts_model: Any, facts_base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EditError, match=r'pip install "backward-lens-tl\[lora\]"'):
        EDITS["W_out"](facts_model).to_lora(tmp_path, facts_model, facts_base)


def test_biases_need_a_newer_peft(
    facts_model: Any, facts_base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [
        (field.name, field.type, field)
        for field in dataclasses.fields(peft.LoraConfig)
        if field.name != "lora_bias"
    ]
    older = dataclasses.make_dataclass("LoraConfig", own)
    monkeypatch.setattr(peft, "LoraConfig", older)
    with pytest.raises(EditError, match=r"peft 0\.14 or newer"):
        EDITS["bias"](facts_model).to_lora(tmp_path, facts_model, facts_base)


# ------------------------------------------------------------------------------ processed weights


def processed(**options: bool) -> Any:
    """The facts model as a HookedTransformer, with some of TransformerLens's processing."""
    model = load_facts_model("hooked")
    chosen = {
        "fold_ln": False,
        "center_writing_weights": False,
        "center_unembed": False,
        "fold_value_biases": False,
    }
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if options.get("fold_ln"):
        from transformer_lens import HookedTransformer

        cfg = copy.deepcopy(model.cfg)
        folded = HookedTransformer(cfg, model.tokenizer)
        folded.load_and_process_state_dict(weights, **(chosen | options))
        return folded.eval()
    model.load_and_process_state_dict(weights, **(chosen | options))
    return model.eval()


def check_as_probabilities(
    delta: WeightDelta, model: Any, base: nn.Module, folder: Path, tokens: Tensor
) -> None:
    """Like the round trip, up to a constant added to all logits of a position."""
    delta.to_lora(folder, model, base)
    with delta.applied(model):
        edited = logits_of(model, tokens).log_softmax(-1)
    found = through_peft(base, folder, tokens).log_softmax(-1)
    assert float((edited - logits_of(model, tokens).log_softmax(-1)).abs().max()) > MOVES
    assert float((found - edited).abs().max()) <= 3 * ROUND_TRIP  # different rounding


@pytest.fixture(scope="module")
def centered() -> Any:
    return processed(center_writing_weights=True)


@hooked_only
@pytest.mark.parametrize("matrix", ["W_out", "W_O", "W_in"])
def test_centered_writing_weights(
    facts_base: nn.Module, centered: Any, matrix: str, tmp_path: Path
) -> None:
    delta = edit(change(centered, matrix, 1))
    check_as_probabilities(delta, centered, facts_base, tmp_path, of_prompt(centered))


@pytest.mark.versions
@hooked_only
def test_folded_norms(facts_base: nn.Module, tmp_path: Path) -> None:
    model = processed(fold_ln=True, center_writing_weights=True, center_unembed=True)
    delta = edit(change(model, "W_out", 1))
    check_as_probabilities(delta, model, facts_base, tmp_path, of_prompt(model))
    for matrix in ("W_in", "W_Q"):
        with pytest.raises(EditError, match=r"fold_ln.*load it without processing"):
            edit(change(model, matrix, 1)).to_lora(tmp_path, model, facts_base)


@pytest.mark.versions
@bridge_only
def test_a_bridge_in_compatibility_mode(facts_base: nn.Module, tmp_path: Path) -> None:
    model = load_facts_model("bridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode()
    delta = edit(change(model, "W_out", 1))
    check_as_probabilities(delta, model, facts_base, tmp_path, of_prompt(model))
    with pytest.raises(EditError, match="fold_ln"):
        edit(change(model, "W_in", 1)).to_lora(tmp_path, model, facts_base)


@pytest.mark.versions
@hooked_only
def test_without_layer_norm_the_mean_matters(stories_folder: Path, tmp_path: Path) -> None:
    """After an RMS norm a centered matrix is not equivalent, and is not found."""
    base = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float32)
    model: Any = load_model(str(stories_folder), "hooked")
    edit(change(model, "W_out", 1)).to_lora(tmp_path, model, base)
    with torch.no_grad():
        model.blocks[1].mlp.W_out -= model.blocks[1].mlp.W_out.mean(-1, keepdim=True)
    with pytest.raises(EditError, match="no linear layer of the base"):
        edit(change(model, "W_out", 1)).to_lora(tmp_path, model, base)


# ----------------------------------------------------------------------------- finding columns


def found(weight: Tensor, layer: Tensor, n_parts: int = 1) -> list[list[int]]:
    return [columns.tolist() for columns in _columns(weight, layer, n_parts)]


def test_columns_in_any_arrangement() -> None:
    layer = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(60)[:12]
    assert found(layer[:, 24:36], layer) == [list(range(24, 36))]
    heads = torch.cat([layer[:, start : start + 4] for start in (8, 0, 52)], dim=1)
    expected = [*range(8, 12), *range(4), *range(52, 56)]
    assert found(heads, layer) == []
    assert found(heads, layer, n_parts=3) == [expected]
    assert found(layer[:, order], layer, n_parts=12) == [order.tolist()]
    assert found(layer[:, order] + 1e-3, layer, n_parts=12) == []
    assert found(layer[:19, :4], layer) == []
    assert found(layer, layer[:, :59]) == []


def test_columns_that_cannot_be_distinguished() -> None:
    layer = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([layer, layer], dim=1)
    assert found(layer, twice) == [list(range(12)), list(range(12, 24))]
    with_zeros = torch.cat([torch.zeros(20, 4), layer, torch.zeros(20, 4)], dim=1)
    # Zero columns in a block with nonzero columns are allowed.
    assert found(with_zeros[:, :8], with_zeros) == [list(range(8))]
    shuffled = with_zeros[:, [0, 1, 8, 9]]
    assert found(shuffled, with_zeros, n_parts=4) == []


def test_columns_of_another_precision() -> None:
    layer = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        assert found(layer[:, 6:12].to(dtype), layer) == [list(range(6, 12))]
        assert found(layer[:, 6:12], layer.to(dtype)) == [list(range(6, 12))]
    assert found(layer[:, 6:12] * (1 + math.sqrt(2) * 1e-5), layer) == []


def test_an_edit_in_half_precision(facts_model: Any, facts_base: nn.Module, tmp_path: Path) -> None:
    made = change(facts_model, "W_out", 1)
    assert made.left is not None
    assert made.right is not None
    delta = edit(replace(made, left=made.left.bfloat16(), right=made.right.bfloat16()))
    delta.to_lora(tmp_path, facts_model, facts_base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
