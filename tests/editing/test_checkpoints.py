"""Differences of checkpoints against dense differences and their dense decompositions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_model, hf_model
from models import bridge_only, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

import backward_lens_tl as blt
from backward_lens_tl.editing import checkpoints
from backward_lens_tl.editing import truncated_svd as decomposition
from backward_lens_tl.editing.checkpoint_names import named_layer
from backward_lens_tl.editing.truncated_svd import truncated_svd
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError
from conftest import FACTS_FOLDER

EXACT = 1e-6
"""The goal. Factors are float32, and the decomposition is float64."""

FAMILIES = ("llama", "gpt2", "gpt_neo", "opt", "phi3")


def tuned(model: nn.Module, size: float = 0.1, only: str = "") -> nn.Module:
    """Add noise to all weights whose name contains a text."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Folders of a small model before and after noise."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def folders(family: str, only: str = "") -> tuple[Path, Path]:
        if (family, only) not in made:
            out = tmp_path_factory.mktemp(family)
            hf_model(family, torch.float32).save_pretrained(out / "base")
            tuned(hf_model(family, torch.float32), only=only).save_pretrained(out / "tuned")
            made[family, only] = out / "base", out / "tuned"
        return made[family, only]

    return folders


def dense_changes(family: str, only: str = "") -> dict[tuple[str, int], Tensor]:
    before = hf_model(family, torch.float32)
    after = dict(tuned(hf_model(family, torch.float32), only=only).named_modules())
    found = {}
    for name, module in before.named_modules():
        place = named_layer(name)
        if place is None:
            continue
        change = (after[name].weight.double() - module.weight.double()).detach()
        conv1d = type(module).__name__ == "Conv1D"
        if not conv1d:
            change = change.T
        for matrix, own in (place.columns(*change.shape, is_in_out=conv1d) or {}).items():
            found[matrix, place.layer] = change[:, own]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_dense_decomposition(pair: Any, family: str) -> None:
    delta, expected = WeightDelta.between(*pair(family), rank=3), dense_changes(family)
    assert {(each.matrix, each.layer) for each in delta} == set(expected)
    for each in delta:
        u, s, vh = torch.linalg.svd(expected[each.matrix, each.layer], full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        assert relative_error(each.dense().double(), best) <= EXACT
        share = float(s[3:].square().sum() / s.square().sum())
        assert delta.about["discarded"][each.name] == pytest.approx(share, abs=EXACT)
        assert share > 0.1


@bridge_only
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_full_rank_change_gives_the_tuned_model(pair: Any, family: str) -> None:
    """Matrices and their biases; norms and embeddings are the base's."""
    only = "layers" if family != "gpt2" else ".h."
    base, after = pair(family, only)
    with_norms = WeightDelta.between(base, after, rank=1000)
    assert any("norm" in name or "ln_" in name for name in with_norms.about["left_out"])
    expected = tuned(hf_model(family, torch.float32), only=only).eval()
    for name, parameter in hf_model(family, torch.float32).named_parameters():
        if (
            name in with_norms.about["left_out"]
            or name.removeprefix("transformer.") in (with_norms.about["left_out"])
        ):
            expected.get_parameter(name).data = parameter.data
    model = build_model(family, "bridge", torch.float32)
    tokens = torch.randint(3, 97, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), with_norms.applied(model):
        torch.testing.assert_close(model(tokens), expected(tokens).logits, rtol=0, atol=1e-4)
    assert max(with_norms.about["discarded"].values()) < 1e-12


def test_only_what_differs(pair: Any) -> None:
    base, after = pair("llama", "layers.1.mlp.down_proj")
    delta = WeightDelta.between(base, after)
    assert [(each.matrix, each.layer) for each in delta] == [("W_out", 1)]
    assert delta.about["left_out"] == ()
    with pytest.raises(
        EditError, match=r"no matrix of .* differs between .*; what differs: nothing"
    ):
        WeightDelta.between(base, base)
    base, after = pair("llama", "model.norm")
    with pytest.raises(EditError, match=r"what differs: model\.norm\.weight"):
        WeightDelta.between(base, after)


def test_a_merged_adapter_is_found_again(tmp_path: Path) -> None:
    from test_lora_reading import LLAMA, adapted

    model = adapted("llama", torch.float32, target_modules=LLAMA, use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    hf_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    adapter = WeightDelta.from_lora(tmp_path / "adapter")
    merged = WeightDelta.between(tmp_path / "base", tmp_path / "merged", rank=3)
    for each in adapter:
        found = merged[each.matrix, each.layer]
        assert relative_error(found.dense(), each.dense()) < 1e-5  # merged weights are rounded
        assert merged.about["discarded"][each.name] < 1e-9


def test_shards_and_names_without_a_prefix(pair: Any, tmp_path: Path) -> None:
    base, after = pair("gpt2")
    whole = WeightDelta.between(base, after, rank=2)
    hf_model("gpt2", torch.float32).save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    # As the published GPT-2, which stores masks too.
    tensors = load_file(after / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    short["lm_head.weight"] = short["wte.weight"].clone()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text((after / "config.json").read_text())
    save_file(short, tmp_path / "short" / "model.safetensors")
    found = WeightDelta.between(tmp_path / "sharded", tmp_path / "short", rank=2)
    for each in whole:
        assert torch.equal(found[each.matrix, each.layer].dense(), each.dense())
    assert found.about["left_out"] == whole.about["left_out"]
    # An unembedding of its own is a difference.
    save_file(
        short | {"lm_head.weight": short["wte.weight"] + 1}, tmp_path / "short/model.safetensors"
    )
    found = WeightDelta.between(tmp_path / "sharded", tmp_path / "short", rank=2)
    assert "lm_head.weight" in found.about["left_out"]


@pytest.mark.parametrize("own", [False, True])
def test_an_unembedding_that_one_checkpoint_stores(pair: Any, tmp_path: Path, own: bool) -> None:
    """A copy of the embedding is no difference; another matrix is one."""
    for source in pair("gpt2"):
        tensors = load_file(source / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        if source.name == "tuned":
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + float(own)
        (tmp_path / source.name).mkdir()
        (tmp_path / source.name / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(tensors, tmp_path / source.name / "model.safetensors")
    for folders in (("base", "tuned"), ("tuned", "base")):
        found = WeightDelta.between(*(tmp_path / name for name in folders), rank=1)
        assert ("lm_head.weight" in found.about["left_out"]) == own


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_model_saved_without_its_unembedding(pair: Any, family: str, tmp_path: Path) -> None:
    """It has `layers.0...` for `model.layers.0...`, as a base or as a tuned model."""
    base, after = pair(family)
    hf_model(family, torch.float32).base_model.save_pretrained(tmp_path / "base")
    tuned(hf_model(family, torch.float32)).base_model.save_pretrained(tmp_path / "tuned")
    whole = WeightDelta.between(base, after, rank=2)
    for folders in ((tmp_path / "base", after), (base, tmp_path / "tuned")):
        found = WeightDelta.between(*folders, rank=2)
        assert [each.name for each in found] == [each.name for each in whole]
        for each in whole:
            assert torch.equal(found[each.matrix, each.layer].dense(), each.dense())
        assert set(found.about["left_out"]) >= set(whole.about["left_out"]) - {"lm_head.weight"}


MATRIX = "model.layers.1.mlp.down_proj.weight"


def in_precision(folder: Path, dtype: torch.dtype, change: float = 0.0) -> Path:
    """A small Llama whose weights are rounded before one matrix is changed."""
    model = hf_model("llama", torch.float32).to(dtype)
    with torch.no_grad():
        model.get_parameter(MATRIX)[3] += change
    model.save_pretrained(folder)
    return folder


def test_training_in_half_precision_starts_from_the_rounded_base(pair: Any, tmp_path: Path) -> None:
    """Else, rounding would be a change of all matrices."""
    base, half = pair("llama")[0], torch.bfloat16
    after = in_precision(tmp_path / "tuned", half, change=1.0)
    delta = WeightDelta.between(base, after)
    assert [(each.matrix, each.layer) for each in delta] == [("W_out", 1)]
    start, end = (load_file(each / "model.safetensors")[MATRIX] for each in (base, after))
    expected = (end.double() - start.to(half).double()).T
    assert relative_error(delta["W_out", 1].dense().double(), expected) <= EXACT
    assert relative_error(delta["W_out", 1].dense().double(), end.T - start.T.double()) > 1e-3
    assert delta.about["rounded"] == ("float32", "bfloat16")
    assert delta.about["rounding"] == {}
    assert delta.about["left_out"] == ()
    nothing = in_precision(tmp_path / "same", half)
    with pytest.raises(
        EditError, match=r"\(rounded from float32 to bfloat16\) and .*; what differs: nothing"
    ):
        WeightDelta.between(base, nothing)


def test_a_base_that_may_be_a_rounded_copy(pair: Any, tmp_path: Path) -> None:
    """The change is kept, with the share that is rounding if the base was rounded later."""
    base = in_precision(tmp_path / "base", torch.bfloat16)
    after = in_precision(tmp_path / "tuned", torch.float32, change=1.0)
    delta = WeightDelta.between(base, after)
    assert len(delta) == 14
    assert delta.about["rounded"] is None
    shares = delta.about["rounding"]
    tuned = shares.pop("W_out of layer 1")
    assert set(shares.values()) == {1.0}
    start, end = (load_file(each / "model.safetensors")[MATRIX] for each in (base, after))
    rounding = (end - end.bfloat16().float()).double()
    assert tuned == pytest.approx(float(rounding.norm() / (end - start).double().norm()) ** 2)
    assert 0 < tuned < 0.01
    exact = in_precision(tmp_path / "exact", torch.float32)
    assert WeightDelta.between(exact, after).about["rounding"] == {}


def test_rounding_is_that_of_each_matrix_of_a_joined_layer(tmp_path: Path) -> None:
    """Values of one matrix that were trained do not hide that the others are rounding."""
    tuned = hf_model("gpt2", torch.float32)
    base = copy.deepcopy(tuned).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    joined = tuned.get_parameter("transformer.h.0.attn.c_attn.weight")
    with torch.no_grad():
        joined[:, 2 * len(joined) :] += 1.0
    tuned.save_pretrained(tmp_path / "tuned")
    shares = WeightDelta.between(tmp_path / "base", tmp_path / "tuned").about["rounding"]
    assert shares["W_Q of layer 0"] == shares["W_K of layer 0"] == 1.0
    assert shares["W_V of layer 0"] < 0.01


def test_a_bias_that_only_one_checkpoint_has(pair: Any, tmp_path: Path) -> None:
    """Added biases are named: without a bias before, it is not known how a model would add one."""
    base, after = pair("llama", "layers.1.mlp.down_proj")
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(after / "model.safetensors")
    (tmp_path / "config.json").write_bytes((after / "config.json").read_bytes())
    save_file(tensors | {f"{name}.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    assert WeightDelta.between(base, tmp_path).about["left_out"] == (f"{name}.bias",)
    with pytest.raises(EditError, match=rf"has no {name}\.bias, which"):
        WeightDelta.between(tmp_path, base)


def test_the_interleaved_heads_of_gpt_bigcode_are_not_divided(tmp_path: Path) -> None:
    """There, the queries, keys and values of one head are next to each other."""
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 8, "vocab_size": 11}
    model = AutoModelForCausalLM.from_config(GPTBigCodeConfig(**sizes, multi_query=False))
    model.save_pretrained(tmp_path / "base")
    attention, mlp = model.transformer.h[0].attn.c_attn, model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        attention.weight[4:8] += 1  # the keys of head 0
        mlp.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    delta = WeightDelta.between(tmp_path / "base", tmp_path / "tuned")
    assert [each.matrix for each in delta] == ["W_in"]
    assert delta.about["left_out"] == ("h.0.attn.c_attn.weight",)


def test_one_tensor_at_a_time(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the two versions of one tensor are read before they are compared."""
    base, after = pair("llama")
    read: list[str] = []
    real = checkpoints.Checkpoint.tensor

    def tensor(self: Any, name: str) -> Tensor:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(checkpoints.Checkpoint, "tensor", tensor)
    WeightDelta.between(base, after)
    assert len(read) == 2 * len(set(read))
    assert all(one == other for one, other in zip(read[::2], read[1::2], strict=True))


def test_it_is_saved_and_read_as_tokens(tmp_path: Path) -> None:
    changed = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    model = blt.load_facts_model()
    paris = model.W_U[:, model.to_single_token(" Paris")].detach()
    with torch.no_grad():
        changed.transformer.h[6].mlp.c_proj.weight[17] += paris
    changed.save_pretrained(tmp_path / "tuned")
    delta = WeightDelta.between("facts", tmp_path / "tuned", rank=1)
    delta.save(tmp_path / "delta.safetensors")
    again = WeightDelta.load(tmp_path / "delta.safetensors")
    assert again.about == delta.about
    table = blt.editing.delta_tokens(model, again, k=1, components="singular")
    assert table[["matrix", "layer", "top_tokens"]].values.tolist() == [["W_out", 6, [" Paris"]]]
    assert int(again["W_out", 6].factors[0][:, 0].abs().argmax()) == 17


# ------------------------------------------------------------------------------ the decomposition


def spectrum(values: Tensor, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator).double()).Q
        for side in shape
    )
    return (u * values) @ v.T


SPECTRA: dict[str, Tensor] = {
    "fast": 0.5 ** torch.arange(600.0).double(),
    "slow": 1 / (1 + torch.arange(600.0).double()),
    "low rank": torch.cat([torch.ones(4), torch.zeros(596)]).double(),
    "flat": torch.ones(600).double() + 1e-3 * torch.arange(600.0, 0, -1).double(),
}


WAYS: dict[str, dict[str, int]] = {
    "iterated": {"_SMALL": 512},
    "squared": {},
    "dense": {"_TINY": 1024},
}
"""Limits with which a matrix of this size is decomposed in each way, if it can be."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SPECTRA)
def test_large_matrices(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, side in WAYS[way].items():
        monkeypatch.setattr(decomposition, limit, side)
    matrix, k = spectrum(SPECTRA[name], (650, 700)), 8
    if way == "squared":  # also with more rows than columns
        matrix = matrix.T
    found = truncated_svd(matrix, k)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    n = 4 if name == "low rank" else k
    assert len(found.s) == n
    torch.testing.assert_close(found.s, s[:n], rtol=1e-9, atol=0)
    best = (u[:, :n] * s[:n]) @ vh[:n]
    if name != "low rank":  # with equal values, any basis is one
        assert relative_error((found.u * found.s) @ found.vh, best) <= 1e-8
    for vectors in (found.u.T, found.vh):
        assert float((vectors @ vectors.T - torch.eye(n)).abs().max()) < 1e-9
    assert found.discarded == pytest.approx(
        float(s[n:].square().sum() / s.square().sum()), abs=1e-9
    )


def test_squares_are_not_used_where_they_lose_digits() -> None:
    """The second value is below the rounding of the square of the first."""
    matrix = spectrum(torch.tensor([1.0, 1e-9, 1e-10]).double(), (300, 320))
    found = truncated_svd(matrix, 3)
    torch.testing.assert_close(found.s[1:], torch.tensor([1e-9, 1e-10]).double(), rtol=1e-5, atol=0)
    assert decomposition._squared(matrix, 3) is None


def test_iterations_that_will_not_converge_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on noise cost a few products; those on a spectrum that decreases go on."""
    done: list[int] = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda each: (done.append(1), real(each))[1])
    noise = torch.randn(650, 700, generator=torch.Generator().manual_seed(0)).double()
    assert decomposition._iterated(noise, 8) is None
    assert len(done) <= decomposition._SETTLED + 2
    assert decomposition._iterated(spectrum(SPECTRA["slow"], (650, 700)), 8) is not None


def test_the_random_subspace_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    truncated_svd(spectrum(SPECTRA["fast"], (650, 700)), 4)
    assert torch.equal(torch.random.get_rng_state(), state)


# --------------------------------------------------------------------------------------- refusals


def test_smollm2_is_where_load_model_finds_it(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, after = pair("llama")
    monkeypatch.setenv("BACKWARD_LENS_SMOLLM2", str(base))
    found = WeightDelta.between("smollm2", after, rank=1)
    assert len(found) == 14
    assert found.about["base"] == "smollm2"
    (tmp_path / "model.gguf").touch()
    monkeypatch.setenv("BACKWARD_LENS_SMOLLM2", str(tmp_path))
    with pytest.raises(EditError, match=r"model\.gguf' is a file; pass a folder with safetensors"):
        WeightDelta.between("smollm2", after)


@pytest.mark.usefixtures("as_for_a_user")
def test_checkpoints_that_cannot_be_compared(pair: Any, tmp_path: Path) -> None:
    base, after = pair("llama")
    other = pair("gpt2")[0]
    refused: list[tuple[str, tuple[Any, Any, Any]]] = [
        (r"has no model\.layers\.0\.\S+\.weight, which .* has; pass", (base, other, 2)),
        ("rank is 0", (base, after, 0)),
        (r"pass a text or a pathlib\.Path", (base, 3, 2)),
        (r"is a file; pass a folder with safetensors", (base, after / "model.safetensors", 2)),
        ("has neither model.safetensors nor .* use WeightDelta.from_lora", (base, tmp_path, 2)),
    ]
    for message, arguments in refused:
        with pytest.raises(EditError, match=message):
            WeightDelta.between(*arguments)
    odd = tmp_path / "odd"
    odd.mkdir()
    tensors = load_file(after / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for tensor, message in [
        (tensors[name][:3].clone(), r"is \[24, 52\] in .* and \[3, 52\]"),
        (tensors[name].to(torch.int8), r"is quantised \(float32 and int8\)"),
        (tensors[name].to(torch.float8_e4m3fn), r"is quantised .*at least 16 bits"),
        (tensors[name] * torch.inf, "infinite or NaN entries"),
    ]:
        save_file(tensors | {name: tensor}, odd / "model.safetensors")
        with pytest.raises(EditError, match=f"{name}.*{message}"):
            WeightDelta.between(base, odd)
    (odd / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(EditError, match=r"model\.safetensors of .* cannot be read"):
        WeightDelta.between(base, odd)


def test_an_unknown_way_to_store_is_refused(pair: Any, tmp_path: Path) -> None:
    base, after = pair("gpt2")
    for source in (base, after):
        folder = tmp_path / source.name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "new"}))
    with pytest.raises(EditError, match=r"not known how a 'new' model stores attn.c_attn"):
        WeightDelta.between(tmp_path / "base", tmp_path / "tuned")


def test_files_with_odd_contents(pair: Any, tmp_path: Path) -> None:
    base, _ = pair("gpt2")
    hf_model("gpt2", torch.float32).save_pretrained(tmp_path, max_shard_size="20kB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    stored = json.loads(whole)
    name = "transformer.h.0.mlp.c_fc.weight"
    other = next(
        file for file in stored["weight_map"].values() if file != stored["weight_map"][name]
    )
    wrong = {**stored, "weight_map": stored["weight_map"] | {name: other}}
    for file, contents, message in (
        (index, json.dumps(wrong), rf"h\.0\.mlp\.c_fc\.weight of .* be read from {other}: .*save"),
        (index, "{}", r"has no weight_map, .*; save the model"),
        (index, "[]", r"model\.safetensors\.index\.json of .* is a list, not an object .*; save"),
        (tmp_path / "config.json", "[]", r"config\.json of .* is a list, not an object"),
    ):
        index.write_text(whole)
        file.write_text(contents)
        with pytest.raises(EditError, match=message):
            WeightDelta.between(tmp_path, base)


def test_paths_in_a_message(pair: Any) -> None:
    base, _ = pair("llama")
    with pytest.raises(EditError, match=rf"differs between '{base}' and '{base}'"):
        WeightDelta.between(base, base)
