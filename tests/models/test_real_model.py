"""SmolLM2-135M-Instruct: a trained Llama with grouped queries, a chat template and no BOS.

The reference is the plain model in transformers, whose weights, if they come from a GGUF file, are
dequantized by the format's specification.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import LLAMA_MODULES
from attention_cases import divided
from gguf_files import plain_llama
from models import nll, readable, relative_error, require_kind
from torch import Tensor
from transformers import AutoModelForCausalLM

import backward_lens_tl as blt
from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.models import host_of
from backward_lens_tl.models.smollm2 import find_smollm2

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("as_for_a_user")]

PROMPT = "The Eiffel Tower is located in the city of"
LAYERS = (0, 14, 29)
TOLERANCE = 1e-3
"""For 30 layers in float32; the plain model's own autograd differs from float64 by as much."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder or file."""
    if (path := find_smollm2()) is None:
        pytest.skip("SmolLM2 is not installed: make real-model")
    return path if path.is_file() else readable(path, tmp_path_factory)


@pytest.fixture(scope="module")
def plain(source: Path) -> Any:
    """The model in transformers."""
    if source.is_file():
        return plain_llama(source)
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    """The model as users load it."""
    return blt.load_model("smollm2")


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def of_kind(request: pytest.FixtureRequest, source: Path) -> Any:
    """The model in each class."""
    require_kind(request.param)
    return blt.load_model("smollm2", request.param)


@pytest.mark.versions
def test_it_knows_where_the_eiffel_tower_is(model: Any, plain: Any) -> None:
    ids = model.to_tokens(PROMPT)
    with torch.no_grad():
        logits, expected = model(ids), plain(ids).logits
    assert relative_error(logits, expected) < 1e-4
    probabilities = expected[0, -1].softmax(-1)
    assert model.tokenizer.decode([int(probabilities.argmax())]) == " Paris"
    assert float(probabilities.max()) == pytest.approx(0.70, abs=0.02)


def test_no_bos_unless_requested(model: Any) -> None:
    host = host_of(model)
    bos = model.tokenizer.bos_token_id
    assert model.tokenizer.bos_token == "<|im_start|>"
    [usual] = tokenize_prompts(host, PROMPT)
    [with_bos] = tokenize_prompts(host, PROMPT, True)
    assert bos not in usual.ids
    assert usual.ids == tuple(model.to_tokens(PROMPT)[0].tolist())
    assert with_bos.ids == (bos, *usual.ids)


def test_a_chat_prompt_has_no_second_bos(model: Any) -> None:
    chat = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
    text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("Eiffel Tower?<|im_end|>\n<|im_start|>assistant\n")
    capture = blt.capture_gradients(model, chat, blt.target_nll(), matrices="W_out", layers=-1)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert capture.tokens[0].tolist() == ids
    assert ids.count(model.tokenizer.bos_token_id) == 3  # one for each turn


def test_numbers_are_split_into_digits(model: Any) -> None:
    """Also after two spaces or newlines, which transformers's own GGUF reader gets wrong."""
    pieces = {
        "in 1969": ["in", "Ġ", *"1969"],
        "list:\n\n1.": ["list", ":", "ĊĊ", "1", "."],
        "x =  12": ["x", "Ġ=", "ĠĠ", *"12"],
    }
    for text, expected in pieces.items():
        assert model.tokenizer.tokenize(text) == expected
    for text in (*pieces, "Zoë 🙂 日本 <|im_end|>\n", "  don't"):
        [prompt] = tokenize_prompts(host_of(model), text)
        assert model.tokenizer.decode(prompt.ids) == text


def test_validate_passes(model: Any) -> None:
    report = blt.validate(model, "The capital of France is", matrices="mlp")
    assert report.passed


def weight_gradients(plain: Any, ids: Tensor, target: int) -> dict[tuple[str, int], Tensor]:
    """Autograd's gradients of the plain model, `[d_in, d_out]`."""
    weights = {
        (name, layer): plain.model.layers[layer].get_submodule(path).weight
        for name, path in LLAMA_MODULES.items()
        for layer in LAYERS
    }
    loss = nll(target)(plain(ids).logits, ids).sum()
    found = torch.autograd.grad(loss, list(weights.values()))
    return {key: gradient.T for key, gradient in zip(weights, found, strict=True)}


@pytest.mark.slow
def test_factors_are_autograds_gradients_of_all_matrices(of_kind: Any, plain: Any) -> None:
    ids, rome = of_kind.to_tokens(PROMPT), of_kind.to_single_token(" Rome")
    capture = blt.capture_gradients(
        of_kind, ids, blt.target_nll(rome), matrices="all", layers=LAYERS
    )
    expected = weight_gradients(plain, ids, rome)
    assert {(each.matrix, each.layer) for each in capture} == set(expected)
    for (name, layer), gradient in expected.items():
        if name in ("W_Q", "W_K", "W_V", "W_O"):
            gradient = divided(gradient, name, plain.config.head_dim)
        assert relative_error(capture[name, layer].dense(), gradient) < TOLERANCE, (name, layer)


@pytest.mark.slow
def test_both_lenses_are_the_plain_models_readout(of_kind: Any, plain: Any) -> None:
    result = blt.backward_lens(of_kind, PROMPT, " Rome", matrices="W_out", layers=LAYERS)
    rome = of_kind.to_single_token(" Rome")
    for lens in ("logit_lens", "normalized"):
        found = result.under(lens)
        for row, layer in enumerate(LAYERS):
            vectors = -result.capture["W_out", layer].vjps[0]
            if lens == "normalized":
                vectors = torch.nn.functional.normalize(vectors, dim=-1, eps=1e-30)
            with torch.no_grad():
                scores = plain.lm_head(plain.model.norm(vectors))
            tops = scores.max(-1).values
            own = scores.gather(-1, found.readout("W_out").top_ids[row, 0, :, :1])[:, 0]
            assert (tops - own).abs().max() < 1e-4 * scores.abs().max()  # up to ties
            ranks = (scores > scores[:, rome : rome + 1]).sum(-1)
            difference = (found.target_rank("W_out")[row, 0] - ranks).abs()
            assert int(difference.max()) <= 0.001 * scores.shape[-1]  # rounding of close scores


@pytest.mark.slow
def test_reversed_attention_under_grouped_queries(of_kind: Any, plain: Any) -> None:
    """Autograd's gradient at the pattern, through the Jacobian of the softmax by hand."""
    ids, rome = of_kind.to_tokens(PROMPT), of_kind.to_single_token(" Rome")
    capture = blt.capture_gradients(
        of_kind, ids, blt.target_nll(rome), matrices="attn", layers=LAYERS
    )
    output = plain(ids, output_attentions=True)
    patterns = [output.attentions[layer] for layer in LAYERS]
    gradients = torch.autograd.grad(nll(rome)(output.logits, ids).sum(), patterns)
    for layer, pattern, gradient in zip(LAYERS, patterns, gradients, strict=True):
        weighted = pattern * gradient
        scores = weighted - pattern * weighted.sum(-1, keepdim=True)
        expected = scores / plain.config.head_dim**0.5
        found = capture.reversed_attention(layer)
        assert found.shape == (1, 9, ids.shape[1], ids.shape[1])
        assert relative_error(found, expected.detach()) < TOLERANCE


@pytest.mark.slow
def test_a_batch_is_its_single_prompts(model: Any) -> None:
    prompts = [PROMPT, "The capital of France is", "Two plus two equals"]
    targets = [" Rome", " Lyon", " five"]
    batch = blt.backward_lens(model, prompts, targets, layers=LAYERS)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        single = blt.backward_lens(model, prompt, target, layers=LAYERS)
        for layer in LAYERS:
            own, other = batch.capture["W_out", layer], single.capture["W_out", layer]
            assert relative_error(own.dense(row), other.dense()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["training", "own answer"])
def test_no_false_alarm(objective: str, model: Any) -> None:
    chosen = blt.target_nll() if objective == "own answer" else blt.next_token_loss()
    for record in blt.read_records("facts").rows[:6]:
        assert blt.validate(model, record.prompt, objective=chosen, matrices="mlp").passed
