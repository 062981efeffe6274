"""Every refusal names the value and the allowed ones, and changes nothing."""

from __future__ import annotations

import pickle
import shutil
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    Case,
    attention_only_model,
    bridge_only,
    build,
    hooked_only,
    require_kind,
    small_tokenizer,
)
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import T5Config, T5ForConditionalGeneration

from backward_lens_tl import errors
from backward_lens_tl.capture.objectives import (
    logit_difference,
    next_token_loss,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import (
    BackwardLensError,
    InputError,
    ModelNotFoundError,
    ModelStateError,
    ObjectiveError,
    TargetError,
    UnsupportedModelError,
)
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.validation import validate

IDS = torch.tensor([[3, 4, 5]])


pytestmark = pytest.mark.usefixtures("as_for_a_user")


class Constant:
    """A projection that returns a fixed object."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def project(self, vectors: Tensor, layer: int) -> Any:
        return self.scores


def lens(*args: Any, **options: Any) -> Callable[[Any], object]:
    return lambda model: backward_lens(model, *args, **options)


def capture(*args: Any, **options: Any) -> Callable[[Any], object]:
    return lambda model: capture_gradients(model, *args, **options)


REFUSALS: dict[str, tuple[Callable[[Any], object], type[Exception], list[str]]] = {
    # --- prompts
    "empty prompt": (lens(""), InputError, ["empty"]),
    "one empty prompt": (lens(["Rome", ""]), InputError, ["prompt 1", "empty"]),
    "no prompt": (lens([]), InputError, ["list of prompts is empty"]),
    "prompt is a number": (lens(["Rome", 7]), InputError, ["prompt 1", "int"]),
    "text too long": (lens("Paris is " * 60), InputError, ["64"]),
    "ids too long": (lens(torch.ones(1, 65, dtype=torch.long)), InputError, ["65", "64"]),
    "answer too long": (
        capture(torch.ones(1, 64, dtype=torch.long), sequence_nll(" Paris is in Rome")),
        InputError,
        ["64"],
    ),
    "ids of one dimension": (lens(IDS[0]), InputError, ["(3,)", "[batch, pos]"]),
    "ids of three dimensions": (lens(IDS[None]), InputError, ["(1, 1, 3)", "[batch, pos]"]),
    "ids as floats": (lens(IDS.float()), InputError, ["float32", "integers"]),
    "ids as booleans": (lens(IDS > 3), InputError, ["bool"]),
    "no position": (lens(IDS[:, :0]), InputError, ["(1, 0)"]),
    "no row": (lens(IDS[:0]), InputError, ["(0, 3)"]),
    "id outside the vocabulary": (lens(torch.tensor([[3, 97]])), InputError, ["97", "0 to 96"]),
    "negative id": (lens(torch.tensor([[3, -1]])), InputError, ["-1", "0 to 96"]),
    "BOS requested with ids": (lens(IDS, prepend_bos=True), InputError, ["prepend_bos"]),
    # --- targets
    "target of several tokens": (
        lens("Rome", " river of"),
        TargetError,
        ["' river of'", "' of'", "multi_token", "sequence_nll"],
    ),
    "target without its space": (lens("Rome", "the"), TargetError, ["'the'", "' the'", "leading"]),
    "empty target": (lens("Rome", ""), TargetError, ["''"]),
    "target id too large": (lens("Rome", 97), TargetError, ["97", "0 to 96"]),
    "target id negative": (lens("Rome", -1), TargetError, ["-1", "0 to 96"]),
    "target is a float": (lens("Rome", 3.0), TargetError, ["3.0", "float"]),
    "target is a boolean": (lens("Rome", True), TargetError, ["True", "bool"]),
    "too many targets": (lens("Rome", [" Paris", " is"]), TargetError, ["2 targets", "1 prompt"]),
    "too few targets": (lens(["Rome", "Paris"], [" is"]), TargetError, ["1 target", "2 prompts"]),
    "too few answers": (
        capture(["Rome", "Paris"], sequence_nll([" is"])),
        TargetError,
        ["1 target", "2 prompts"],
    ),
    "empty answer": (capture("Rome", sequence_nll("")), TargetError, ["''"]),
    "unknown target position": (
        lens("Rome", " river of", multi_token="middle"),
        TargetError,
        ["'middle'", "'first'", "'last'"],
    ),
    "difference of an unknown id": (
        capture("Rome", logit_difference(3, 1000)),
        TargetError,
        ["1000", "0 to 96"],
    ),
    # --- matrices, layers, positions
    "unknown matrix": (lens("Rome", matrices="W_up"), InputError, ["'W_up'", "W_in", "W_out"]),
    "unknown matrix in a list": (lens("Rome", matrices=["W_in", "FF2"]), InputError, ["'FF2'"]),
    "no matrix": (lens("Rome", matrices=()), InputError, ["matri"]),
    "gate of a dense model": (
        lens("Rome", matrices="W_gate"),
        InputError,
        ["W_gate", "W_in, W_out"],
    ),
    "layer too large": (lens("Rome", layers=3), InputError, ["3", "-3 to 2"]),
    "layer too small": (lens("Rome", layers=[0, -4]), InputError, ["-4", "-3 to 2"]),
    "layer is a text": (lens("Rome", layers=["0"]), InputError, ["'0'", "-3 to 2"]),
    "layer is a boolean": (lens("Rome", layers=True), InputError, ["True"]),
    "no layer": (lens("Rome", layers=[]), InputError, ["layer"]),
    "position too large": (lens(IDS, positions=3), InputError, ["3", "-3 to 2"]),
    "position too small": (lens(IDS, positions=[0, -4]), InputError, ["-4", "-3 to 2"]),
    "position of the shorter prompt": (
        lens(["The capital of France", "Rome"], positions=3),
        InputError,
        ["position 3", "prompt 1"],
    ),
    "no position requested": (lens(IDS, positions=[]), InputError, ["position"]),
    # --- readout
    "unknown direction": (
        lens(IDS, direction="down"),
        InputError,
        ["'down'", "update", "gradient"],
    ),
    "unknown projection": (
        lens(IDS, projection="tuned"),
        InputError,
        ["'tuned'", "logit_lens", "normalized", "project"],
    ),
    "projection without project": (lens(IDS, projection=object()), InputError, ["project"]),
    "projection of wrong width": (
        lens(IDS, projection=Constant(torch.zeros(6, 96))),
        InputError,
        ["(6, 96)", "(6, 97)"],
    ),
    "projection gives no tensor": (
        lens(IDS, projection=Constant([0.0] * 97)),
        InputError,
        ["list", "(6, 97)"],
    ),
    "k is zero": (lens(IDS, k=0), InputError, ["0", "at least 1"]),
    "k is a float": (lens(IDS, k=3.0), InputError, ["3.0", "at least 1"]),
    "k is a boolean": (lens(IDS, k=True), InputError, ["True", "at least 1"]),
    # --- objectives
    "objective is a text": (capture(IDS, "nll"), ObjectiveError, ["str", "target_nll"]),
    "objective gives a scalar": (
        capture(IDS, lambda logits, tokens: logits.sum()),
        ObjectiveError,
        ["()", "[batch]"],
    ),
    "objective gives one per position": (
        capture(IDS, lambda logits, tokens: logits[..., 0]),
        ObjectiveError,
        ["(1, 3)", "[batch]"],
    ),
    "objective gives a number": (
        capture(IDS, lambda logits, tokens: 1.0),
        ObjectiveError,
        ["float", "[batch]"],
    ),
    "objective without a gradient": (
        capture(IDS, lambda logits, tokens: logits.detach()[:, 0, 0]),
        ObjectiveError,
        ["autograd"],
    ),
    "objective gives integers": (
        capture(IDS, lambda logits, tokens: tokens[:, 0]),
        ObjectiveError,
        ["autograd"],
    ),
    "objective is infinite": (
        capture(IDS, lambda logits, tokens: logits[:, 0, 0] * torch.inf),
        ObjectiveError,
        ["prompt 0"],
    ),
    "gradient is not a number": (
        capture(IDS, lambda logits, tokens: (logits[:, -1, 0] - logits[:, -1, 0].detach()) ** 0.5),
        ModelStateError,
        ["VJP", "W_in", "layer 0", "prompt 0"],
    ),
    "loss from nowhere": (
        capture(IDS, lambda logits, tokens: torch.ones(1, requires_grad=True)),
        ObjectiveError,
        ["do not depend on the logits"],
    ),
    "projection gives NaN": (
        lens(IDS, 5, projection=Constant(torch.full((6, 97), torch.nan))),
        InputError,
        ["NaN"],
    ),
    "projection gives integers": (
        lens(IDS, 5, projection=Constant(torch.ones(6, 97, dtype=torch.long))),
        InputError,
        ["int64"],
    ),
    "projection is a class": (lens(IDS, 5, projection=Constant), InputError, ["'logit_lens'"]),
    "sequence is a number": (
        lambda model: capture_gradients(model, IDS, sequence_nll([5])),
        TargetError,
        ["5", "int"],
    ),
    "set of targets": (lens(IDS, {5}), TargetError, ["{5}", "set"]),
    "no such matrix": (lens(IDS, 5, matrices="W_E"), InputError, ["'W_E'", "W_Q", "'attn'"]),
    "matrices is a number": (lens(IDS, 5, matrices=5), InputError, ["5", "W_out"]),
    "layer is not an integer": (lens(IDS, 5, layers=1.5), InputError, ["1.5"]),
    "position is not an integer": (lens(IDS, 5, positions=2.0), InputError, ["2.0"]),
    "prompt is nothing": (lens(None), InputError, ["NoneType"]),
    "BOS is a word": (lens("Rome", prepend_bos="no"), InputError, ["'no'"]),
    "next token of one token": (capture(IDS[:, :1], next_token_loss()), ObjectiveError, ["two"]),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_name_the_value_and_the_allowed_ones(gpt2: Case, refusal: str) -> None:
    call, error, words = REFUSALS[refusal]
    before = {name: p.clone() for name, p in gpt2.model.named_parameters()}
    with pytest.raises(error) as raised:
        call(gpt2.model)
    assert isinstance(raised.value, BackwardLensError)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in {raised.value}"
    assert all(torch.equal(before[name], p) for name, p in gpt2.model.named_parameters())
    assert not any(module._forward_hooks for module in gpt2.model.blocks[0].mlp.modules())


def test_hint_of_a_leading_space_only_where_it_helps(gpt2: Case) -> None:
    for target in (" river of", "river of", " xylophone"):
        with pytest.raises(TargetError) as raised:
            backward_lens(gpt2.model, "Rome", target)
        assert "leading space" not in str(raised.value)


def test_all_tokens_of_a_refused_target_are_named(gpt2: Case) -> None:
    tokenizer = gpt2.model.tokenizer
    pieces = [
        tokenizer.decode([i]) for i in tokenizer(" river of", add_special_tokens=False).input_ids
    ]
    with pytest.raises(TargetError) as raised:
        backward_lens(gpt2.model, "Rome", " river of")
    assert all(repr(piece) in str(raised.value) for piece in pieces)
    assert str(len(pieces)) in str(raised.value)


def test_a_gated_model_accepts_its_gate(llama: Case) -> None:
    assert backward_lens(llama.model, IDS, 5, matrices="W_gate").matrices == ("W_gate",)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_without_a_tokenizer_ids_work_and_texts_are_refused(name: str) -> None:
    case = build(name)
    case.model.tokenizer = None
    result = backward_lens(case.model, IDS, 5)
    assert result.capture.str_tokens == (("<3>", "<4>", "<5>"),)
    with pytest.raises(InputError, match=r"'Rome'.*tokenizer"):
        backward_lens(case.model, "Rome", 5)
    with pytest.raises(TargetError, match=r"' Paris'.*tokenizer"):
        backward_lens(case.model, IDS, " Paris")


@pytest.mark.parametrize("model", [nn.Linear(3, 3), "gpt2", None], ids=["module", "name", "None"])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(BackwardLensError) as raised:
        backward_lens(model, IDS, 5)
    assert type(model).__name__ in str(raised.value)
    assert "TransformerBridge" in str(raised.value)


def test_a_raw_hugging_face_model_is_refused_with_the_way_to_wrap_it() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_embd=24, n_layer=1, n_head=3, n_positions=8)
    with pytest.raises(InputError, match=r"GPT2LMHeadModel.*boot_transformers"):
        backward_lens(GPT2LMHeadModel(config), IDS, 5)


@hooked_only
def test_attention_only_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*attention"):
        backward_lens(attention_only_model(), IDS, 5)


@pytest.mark.versions
def test_models_that_cannot_be_found(tmp_path: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="Hugging Face format") as raised:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(ModelNotFoundError, match=r"'nobody/nothing'.*facts"):
        load_model("nobody/nothing")
    with pytest.raises(InputError, match=r"'both'.*bridge"):
        load_model("facts", "both")


@pytest.mark.versions
@pytest.mark.skipif(
    not version("transformers").startswith("4."), reason="transformers 5 reads its own files"
)
def test_rotary_angles_that_would_be_ignored_are_refused(
    stories_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stories_folder, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("10000.0", "500000.0"))
    with pytest.raises(UnsupportedModelError, match=r"500000\.0.*10000\.0.*transformers 5"):
        load_model(str(folder))


def test_bridges_before_transformerlens_3_6_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kind("bridge")
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    model = build("bridge-gpt2").model
    lens(IDS)(model)
    monkeypatch.delattr(ArchitectureAdapter, "apply_output_logits_transform")
    with pytest.raises(UnsupportedModelError, match=r"from 3\.6 on.*kind='hooked'"):
        lens(IDS)(model)


def test_a_traceback_ends_with_the_page_on_the_fix() -> None:
    error = pickle.loads(pickle.dumps(TargetError("no token")))
    page = "https://backward-lens-tl.readthedocs.io/en/latest/errors/#targeterror"
    assert str(error) == "no token"  # tables keep the message as the reason
    shown = "".join(traceback.format_exception(error)).rstrip()
    assert shown.endswith(f"TargetError: no token\nSee {page}")
    assert errors.one_line(TargetError("no\ntoken")) == f"no token (see {page})"
    assert errors.one_line(OSError("no\nfile")) == "no file"
    assert errors.first_line(OSError("no\nfile")) == "no"
    assert errors.first_line(OSError()) == "OSError"


def test_an_error_defined_elsewhere_links_to_its_base_class() -> None:
    class Own(TargetError):
        def __init__(self, number: int) -> None:
            self.number = number

    assert Own(3).documentation == TargetError().documentation
    assert Own(3).__notes__ == TargetError().__notes__


def test_every_error_derives_from_the_packages_base_class() -> None:
    own = [value for value in vars(errors).values() if isinstance(value, type)]
    found = [kind for kind in own if kind.__module__ == errors.__name__]
    found.remove(errors.BackwardLensWarning)
    assert len(found) >= 8
    assert all(issubclass(error, BackwardLensError) for error in found)
    assert issubclass(InputError, ValueError)
    assert issubclass(errors.ModelStateError, RuntimeError)


def test_targets_of_a_batch_are_checked_one_by_one(gpt2: Case) -> None:
    with pytest.raises(TargetError, match="river"):
        capture_gradients(gpt2.model, ["Rome", "Rome"], target_nll([" Paris", " river of"]))
    with pytest.raises(TargetError, match="97"):
        capture_gradients(gpt2.model, ["Rome", "Rome"], target_nll(torch.tensor([5, 97])))


def test_numpy_integers_are_indices(gpt2: Case) -> None:
    found = backward_lens(gpt2.model, IDS, 5, layers=np.int64(1), positions=[np.int64(-1)])
    assert found.layers == (1,)
    assert found.positions.tolist() == [[2]]


def test_a_text_without_tokens_is_refused_in_a_batch(gpt2: Case) -> None:
    """Some tokenizers strip white space; such a row would be read at padding."""
    gpt2.model.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    try:
        with pytest.raises(InputError, match="prompt 1, '  ', is empty"):
            capture_gradients(gpt2.model, ["Rome", "  "], target_nll(5), prepend_bos=False)
    finally:
        gpt2.model.tokenizer.backend_tokenizer.normalizer = None


def test_a_model_that_attends_to_later_tokens_is_refused() -> None:
    require_kind("hooked")
    case = build("hooked-gpt2")
    case.model.cfg.attention_dir = "bidirectional"
    with pytest.raises(UnsupportedModelError, match="causal"):
        capture_gradients(case.model, IDS, target_nll(5))


@bridge_only
def test_an_encoder_decoder_is_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    raw = T5ForConditionalGeneration(T5Config(vocab_size=97, decoder_start_token_id=0, **sizes))
    model = TransformerBridge.boot_transformers(
        "t5", hf_model=raw.eval(), tokenizer=small_tokenizer()
    )
    for call in (lens(IDS, 5), capture(IDS, target_nll(5)), validate):
        with pytest.raises(UnsupportedModelError, match="causal"):
            call(model)


def test_one_weight_in_two_layers_is_refused() -> None:
    require_kind("hooked")
    case = build("hooked-gpt2")
    case.model.blocks[1].mlp.W_in = case.model.blocks[0].mlp.W_in
    with pytest.raises(
        UnsupportedModelError,
        match=r"W_in of layer 0 is one weight with 2 uses.*blocks.0.mlp.W_in, blocks.1.mlp.W_in",
    ):
        capture_gradients(case.model, IDS, target_nll(5))


def test_a_parametrised_weight_is_refused() -> None:
    case = build("bridge-llama")
    linear = case.model.blocks[0].mlp.out.original_component
    register_parametrization(linear, "weight", torch.nn.Softplus())
    with pytest.raises(UnsupportedModelError, match="parametrizations"):
        capture_gradients(case.model, IDS, target_nll(5))


def test_weights_without_values_are_refused() -> None:
    case = build("bridge-gpt2")
    case.model.blocks[0].mlp.out.original_component.to("meta")
    with pytest.raises(ModelStateError, match="meta"):
        capture_gradients(case.model, IDS, target_nll(5))
