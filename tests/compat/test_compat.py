"""`compat.BackwardLens` reproduces TransformerLens's tool, and works where that one refuses.

The tool is in TransformerLens 3.9 to 4.2. In other versions only the tests against autograd run.
"""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import Case, build, nll, relative_error, small_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from backward_lens_tl import compat
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import BackwardLensError
from backward_lens_tl.models.loading import load_facts_model

theirs: ModuleType | None
try:
    from transformer_lens.tools import analysis
    from transformer_lens.tools.analysis import backward_lens as theirs
except ImportError:
    theirs = None

pytestmark = pytest.mark.versions
as_for_a_user = pytest.mark.usefixtures("as_for_a_user")
needs_theirs = pytest.mark.skipif(
    theirs is None, reason="transformer_lens.tools.analysis.BackwardLens is in 3.9 to 4.2 only"
)

PROMPT, TARGET = "Messi plays for", " Paris"

# Both results are float32; at most the order of float32 sums differs.
SINGLE = {"rtol": 1e-5, "atol": 3e-5}
TIE = 1e-5
# TransformerLens folds norms in float32.
FOLDED = 1e-5


def assert_same(ours: Any, expected: Any, where: str = "result") -> None:
    """Ours has every field of theirs, with its type, shape, dtype, device and value."""
    if isinstance(expected, Tensor):
        assert not ours.requires_grad, where
        torch.testing.assert_close(ours, expected, **SINGLE, msg=lambda text: f"{where}: {text}")
    elif type(expected).__name__ == "VocabularyRanking":
        assert_same(ours.values, expected.values, f"{where}.values")
        assert ours.indices.shape == expected.indices.shape
        # Tokens may swap places where float32 cannot separate their logits, and the last of
        # several may swap with one that is not kept.
        apart = expected.values.diff(dim=-1).abs() > TIE
        clear = torch.ones_like(expected.indices, dtype=torch.bool)
        clear[..., 1:] &= apart
        clear[..., :-1] &= apart
        clear[..., -1] &= expected.indices.shape[-1] == 1
        assert apart.sum() >= 0.9 * apart.numel()
        assert_same(ours.indices[clear], expected.indices[clear], f"{where}.indices")
    elif is_dataclass(expected):
        assert type(ours).__name__ == type(expected).__name__
        for name in (field.name for field in fields(expected) if field.repr):
            assert_same(getattr(ours, name), getattr(expected, name), f"{where}.{name}")
    elif isinstance(expected, tuple):
        assert isinstance(ours, tuple), where
        for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert type(ours) is type(expected), where
        wanted = pytest.approx(expected, 1e-5, 1e-5) if isinstance(expected, float) else expected
        assert ours == wanted, where


def both(model: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Our analysis and theirs."""
    assert theirs is not None
    ours = compat.BackwardLens(model).analyze(*args, **options)
    return ours, theirs.BackwardLens(model).analyze(*args, **options)


def matrices(result: Any) -> Iterator[Any]:
    """Every matrix of a result, without those of the gates."""
    for layer in result.layers:
        yield from (layer.input_projection, layer.output_projection)


# ----------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def random_gpt2() -> Any:
    """A random model that theirs accepts, in float64; both compute in float32."""
    return build("bridge-gpt2").model


@pytest.fixture(scope="module", params=["random", "facts"])
def raw_gpt2(request: pytest.FixtureRequest, random_gpt2: Any) -> Any:
    """Models that theirs accepts: a random and a trained one."""
    return load_facts_model("bridge") if request.param == "facts" else random_gpt2


EVERYTHING: dict[str, Any] = {"normalized": True, "top_k": 97, "return_full_logits": True}


@needs_theirs
@pytest.mark.parametrize(
    ("prompt", "target", "layers"),
    [
        (PROMPT, TARGET, [0, 1, 2]),
        ("Rome is in", " Rome", (2, 0)),
        ("A river runs through Rome.", " the", range(1, 2)),
        ("Paris", ".", [1]),
    ],
)
def test_every_field_matches_theirs(
    random_gpt2: Any, prompt: str, target: str, layers: Any
) -> None:
    ours, expected = both(random_gpt2, prompt, target, layers, **EVERYTHING)
    assert_same(ours, expected)
    assert [layer.gate_projection for layer in ours.layers] == [None] * len(layers)


@needs_theirs
@pytest.mark.parametrize(
    "options", [{}, {"normalized": True}, {"top_k": 1}, {"return_full_logits": True}], ids=str
)
def test_every_option_matches_theirs(random_gpt2: Any, options: dict[str, Any]) -> None:
    assert_same(*both(random_gpt2, PROMPT, TARGET, [0, 2], **options))


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "logits": lambda matrix, tokenizer: matrix.logits(),
    "normalized logits": lambda matrix, tokenizer: matrix.logits(normalized=True),
    "top": lambda matrix, tokenizer: matrix.top(k=4),
    "normalized top": lambda matrix, tokenizer: matrix.top(k=1, normalized=True),
    "bottom": lambda matrix, tokenizer: matrix.bottom(k=5),
    "normalized bottom": lambda matrix, tokenizer: matrix.bottom(k=2, normalized=True),
    "top tokens": lambda matrix, tokenizer: matrix.top_tokens(tokenizer, k=3),
    "bottom tokens": lambda matrix, tokenizer: matrix.bottom_tokens(
        tokenizer, k=3, normalized=True
    ),
    "largest rank of another token": lambda matrix, tokenizer: matrix.target_ranks(7, largest=True),
    "smallest rank of another token": lambda matrix, tokenizer: matrix.target_ranks(
        8, largest=False, normalized=True
    ),
    "descent rank of another token": lambda matrix, tokenizer: matrix.gradient_descent_target_ranks(
        9, normalized=True
    ),
    "largest rank of the target": lambda matrix, tokenizer: matrix.target_ranks(
        matrix.target_token_id, largest=True, normalized=True
    ),
    "smallest rank of the target": lambda matrix, tokenizer: matrix.target_ranks(
        matrix.target_token_id, largest=False
    ),
    "descent rank of the target": lambda matrix, tokenizer: matrix.gradient_descent_target_ranks(
        matrix.target_token_id
    ),
}


@needs_theirs
def test_every_call_matches_theirs(raw_gpt2: Any) -> None:
    ours, expected = both(raw_gpt2, PROMPT, TARGET, [2, 0, 1], **EVERYTHING)
    assert_same(ours, expected)
    for layer in (0, 1, 2):
        assert_same(ours.layer(layer), expected.layer(layer))
    for one, other in zip(matrices(ours), matrices(expected), strict=True):
        for name, call in CALLS.items():
            found, wanted = (call(matrix, raw_gpt2.tokenizer) for matrix in (one, other))
            assert_same(found, wanted, name)


@needs_theirs
def test_hooks_act_as_they_do_on_theirs(random_gpt2: Any) -> None:
    def halved(activation: Tensor, hook: Any) -> Tensor:
        return activation * 0.5

    plain = compat.BackwardLens(random_gpt2).analyze(PROMPT, TARGET, [0])
    with random_gpt2.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", halved)]):
        ours, expected = both(random_gpt2, PROMPT, TARGET, [0, 1, 2])
        assert_same(ours, expected)  # under the hooks, since ours computes gradients on request
    assert ours.loss != pytest.approx(plain.loss)


@needs_theirs
def test_names_and_signatures_match_theirs() -> None:
    public = [n for n in analysis.__all__ if hasattr(theirs, n)]
    assert "BackwardLens" in public
    assert set(public) <= set(compat.__all__)
    for cls in (getattr(theirs, name) for name in public):
        if not inspect.isclass(cls):
            continue
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if not name.startswith("_") or cls.__name__ == "BackwardLens":
                ours = getattr(getattr(compat, cls.__name__), name)
                assert parameters(ours) == parameters(method), (cls, name)


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    listed = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in listed]


def test_names_that_are_exported_exist() -> None:
    assert all(hasattr(compat, name) for name in compat.__all__)


# ----------------------------------------------------------------------------------- wrong inputs

WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "prompt of bytes": ({"prompt": b"Rome"}, TypeError, ["prompt", "b'Rome'", "str"]),
    "several prompts": ({"prompt": ["Rome"]}, TypeError, ["prompt", "list", "str"]),
    "token ids": ({"prompt": torch.tensor([[3]])}, TypeError, ["prompt", "Tensor", "str"]),
    "empty prompt": ({"prompt": ""}, ValueError, ["empty"]),
    "prompt too long": ({"prompt": "Paris is " * 60}, ValueError, ["64"]),
    "target id": ({"target_token": 5}, TypeError, ["target_token", "5", "int", "str"]),
    "no target": ({"target_token": None}, TypeError, ["target_token", "None", "str"]),
    "target of two tokens": ({"target_token": " Paris is"}, ValueError, ["' Paris is'", "2"]),
    "empty target": ({"target_token": ""}, ValueError, ["''"]),
    "layers as a number": ({"layers": 0}, TypeError, ["layers", "0", "[0, 1]"]),
    "layers as text": ({"layers": "0"}, TypeError, ["layers", "'0'"]),
    "layers as bytes": ({"layers": b"0"}, TypeError, ["layers", "b'0'"]),
    "layers as a set": ({"layers": {0}}, TypeError, ["layers", "{0}", "set"]),
    "layers as a tensor": ({"layers": torch.tensor([0])}, TypeError, ["layers", "Tensor"]),
    "layers as an iterator": ({"layers": iter([0])}, TypeError, ["layers", "iterator"]),
    "every layer": ({"layers": None}, TypeError, ["layers", "None"]),
    "no layer": ({"layers": []}, ValueError, ["()", "0 to 2"]),
    "a layer twice": ({"layers": [1, 1]}, ValueError, ["(1, 1)", "without repeats"]),
    "layer from the end": ({"layers": [-1]}, ValueError, ["-1", "0 to 2"]),
    "layer too high": ({"layers": [0, 3]}, ValueError, ["3", "0 to 2"]),
    "layer of text": ({"layers": ["0"]}, TypeError, ["'0'", "int"]),
    "layer of a fraction": ({"layers": [0.0]}, TypeError, ["0.0", "int"]),
    "layer of a boolean": ({"layers": [True]}, TypeError, ["True", "int"]),
    "layer of numpy": ({"layers": [np.int64(0)]}, TypeError, ["int64", "int"]),
    "normalized as a number": ({"normalized": 1}, TypeError, ["normalized", "1", "bool"]),
    "top_k as a boolean": ({"top_k": True}, TypeError, ["top_k", "True", "int"]),
    "top_k as a fraction": ({"top_k": 3.0}, TypeError, ["top_k", "3.0", "int"]),
    "top_k as nothing": ({"top_k": None}, TypeError, ["top_k", "None", "int"]),
    "top_k of zero": ({"top_k": 0}, ValueError, ["top_k", "0", "1 to 97"]),
    "top_k too large": ({"top_k": 98}, ValueError, ["top_k", "98", "1 to 97"]),
    "full logits as a number": ({"return_full_logits": 0}, TypeError, ["return_full_logits", "0"]),
}

WRONG_CALLS: dict[str, tuple[Callable[[Any], object], type[Exception], list[str]]] = {
    "layer not analysed": (lambda result: result.layer(0), KeyError, ["layer 0", "available: 1"]),
    "k of zero": (lambda result: first(result).top(k=0), ValueError, ["0", "1 to 2"]),
    "k too large": (lambda result: first(result).bottom(k=3), ValueError, ["3", "1 to 2", "top_k"]),
    "k as a boolean": (lambda result: first(result).top(k=True), ValueError, ["True"]),
    "k as a fraction": (lambda result: first(result).bottom(k=1.0), ValueError, ["1.0"]),
    "k of tokens": (
        lambda result: first(result).top_tokens(small_tokenizer(), k=3),
        ValueError,
        ["3"],
    ),
    "no tokenizer": (
        lambda result: first(result).top_tokens(None, k=1),
        TypeError,
        ["NoneType", "decode"],
    ),
    "no function to decode": (
        lambda result: first(result).bottom_tokens(SimpleNamespace(decode=3), k=1),
        TypeError,
        ["SimpleNamespace", "decode"],
    ),
    "directions not read": (
        lambda result: first(result).top(k=1, normalized=True),
        ValueError,
        ["normalized=True"],
    ),
    "directions not read, logits": (
        lambda result: first(result).logits(normalized=True),
        ValueError,
        ["normalized=True"],
    ),
    "directions not read, rank": (
        lambda result: first(result).target_ranks(5, largest=True, normalized=True),
        ValueError,
        ["normalized=True"],
    ),
    "normalized as text": (
        lambda result: first(result).bottom(k=1, normalized="no"),
        TypeError,
        ["normalized", "'no'", "bool"],
    ),
    "logits not kept": (
        lambda result: first(result).logits(),
        ValueError,
        ["return_full_logits=True"],
    ),
    "rank of a token without logits": (
        lambda result: first(result).target_ranks(5, largest=True),
        ValueError,
        ["return_full_logits=True"],
    ),
    "token of text": (
        lambda result: first(result).target_ranks(" Paris", largest=True),
        TypeError,
        ["target_token_id", "' Paris'", "int"],
    ),
    "token outside the vocabulary": (
        lambda result: first(result).gradient_descent_target_ranks(97),
        ValueError,
        ["97", "0 to 96"],
    ),
    "token below zero": (
        lambda result: first(result).target_ranks(-1, largest=False),
        ValueError,
        ["-1", "0 to 96"],
    ),
    "end as a number": (
        lambda result: first(result).target_ranks(5, largest=1),
        TypeError,
        ["largest", "1", "bool"],
    ),
    "unspecified end": (
        lambda result: first(result).target_ranks(5),
        TypeError,
        ["largest"],
    ),
}


def first(result: Any) -> Any:
    return result.layers[0].input_projection


def analyze_wrongly(module: Any, model: Any, wrong: dict[str, Any]) -> object:
    usual = {"prompt": PROMPT, "target_token": TARGET, "layers": [0]}
    return module.BackwardLens(model).analyze(**(usual | wrong))


def result_of(module: Any, model: Any) -> Any:
    return module.BackwardLens(model).analyze(PROMPT, TARGET, [1], top_k=2)


def assert_refusal(call: Callable[[], object], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert isinstance(raised.value, BackwardLensError) or "argument" in message  # raised by Python
    assert all(part in message for part in parts), message


@as_for_a_user
@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_wrong_argument(gpt2: Case, wrong: str) -> None:
    arguments, kind, parts = WRONG_ARGUMENTS[wrong]
    assert_refusal(lambda: analyze_wrongly(compat, gpt2.model, arguments), kind, parts)


@as_for_a_user
def test_wrong_call_of_a_result(gpt2: Case) -> None:
    result = result_of(compat, gpt2.model)
    for call, kind, parts in WRONG_CALLS.values():
        assert_refusal(lambda call=call: call(result), kind, parts)


@needs_theirs
def test_theirs_raises_the_same_exceptions() -> None:
    model = build("bridge-gpt2").model
    result = result_of(theirs, model)
    for arguments, kind, _ in WRONG_ARGUMENTS.values():
        with pytest.raises(kind):
            analyze_wrongly(theirs, model, arguments)
    for call, kind, _ in WRONG_CALLS.values():
        with pytest.raises(kind):
            call(result)


def tools(kind: str = "bridge") -> list[Any]:
    """Ours, and theirs where it exists and accepts the class."""
    return [compat] if theirs is None or kind == "hooked" else [compat, theirs]


@as_for_a_user
@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear(2, 2)], ids=["nothing", "name", "torch"])
def test_other_models_are_refused(model: Any) -> None:
    for tool in tools():
        with pytest.raises(TypeError, match="TransformerBridge"):
            tool.BackwardLens(model)


def test_encoder_and_decoder_are_not_analysed() -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    config = T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    model = bridges.TransformerBridge.boot_transformers(
        "t5-small",
        hf_model=T5ForConditionalGeneration(config).eval(),
        tokenizer=small_tokenizer(),
        device="cpu",
    )
    for tool in tools():
        with pytest.raises(NotImplementedError):
            tool.BackwardLens(model)


@pytest.fixture(params=["bridge", "hooked"])
def fresh(request: pytest.FixtureRequest) -> tuple[Any, list[Any]]:
    """A GPT-2 that a test may change, and the tools that accept it."""
    return build(f"{request.param}-gpt2").model, tools(request.param)


def test_no_tokenizer(fresh: tuple[Any, list[Any]]) -> None:
    model, accepting = fresh
    model.tokenizer = None
    for tool in accepting:
        with pytest.raises(ValueError, match="tokenizer"):
            tool.BackwardLens(model)


def test_inference_mode_is_refused_by_the_analysis_only(fresh: tuple[Any, list[Any]]) -> None:
    model, accepting = fresh
    for tool in accepting:
        with torch.inference_mode():
            lens = tool.BackwardLens(model)
            with pytest.raises(ValueError, match="inference_mode"):
                lens.analyze(PROMPT, TARGET, [0])
        assert lens.analyze(PROMPT, TARGET, [0]).loss > 0
        with torch.no_grad():
            assert lens.analyze(PROMPT, TARGET, [0]).loss > 0


def test_loss_that_is_not_finite(fresh: tuple[Any, list[Any]]) -> None:
    model, accepting = fresh
    with torch.no_grad():
        model.W_U.fill_(torch.nan)
    for tool in accepting:
        with pytest.raises(ValueError, match="loss"):
            analyze_wrongly(tool, model, {})


def test_gradient_too_large_for_float32() -> None:
    """The float64 model stays finite, but results are float32."""
    case = build("bridge-gpt2")
    with torch.no_grad():
        # The input of W_out is large, its output unchanged.
        case.own["W_in", 1].tensor.mul_(1e60)
        case.own["W_out", 1].tensor.mul_(1e-60)
    for tool in tools():
        with pytest.raises(ValueError, match="float32"):
            analyze_wrongly(tool, case.model, {"layers": [1]})
        assert analyze_wrongly(tool, case.model, {"layers": [2]})


@as_for_a_user
def test_several_matrices_in_one_are_refused() -> None:
    factors = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 5)  # as with two experts per token
    gradient = MatrixGradient("W_in", 1, *factors, torch.ones(1, 3, dtype=torch.bool))
    reader = compat.lens._Reader(
        host=None, target=0, top_k=1, normalized=False, keeps_logits=False, by_autograd=None
    )
    with pytest.raises(NotImplementedError, match="W_in of layer 1"):
        reader.read([gradient])


def test_dropout_is_refused_until_the_model_is_in_eval_mode() -> None:
    """Intentionally unlike theirs, which returns a random gradient."""
    model = build("bridge-gpt2").model.train()
    model.original_model.train()
    lens = compat.BackwardLens(model)
    with pytest.raises(compat.AnalysisError, match=r"model\.eval\(\)"):
        lens.analyze(PROMPT, TARGET, [0])
    model.original_model.eval()
    assert lens.analyze(PROMPT, TARGET, [0]).loss > 0


# ------------------------------------------------------ against autograd, also where theirs refuses


@pytest.fixture(scope="module")
def analysed(case: Case) -> Any:
    """Everything about two layers of every random model."""
    return compat.BackwardLens(case.model).analyze(
        PROMPT, TARGET, [2, 0], normalized=True, top_k=4, return_full_logits=True
    )


def by_matrix(result: Any) -> dict[tuple[str, int], Any]:
    names = {"W_in": "input", "W_gate": "gate", "W_out": "output"}
    found = {
        (matrix, layer.layer): getattr(layer, f"{name}_projection")
        for layer in result.layers
        for matrix, name in names.items()
    }
    return {key: matrix for key, matrix in found.items() if matrix is not None}


def test_gradients_match_autograd(case: Case, analysed: Any) -> None:
    tokens = analysed.prompt_token_ids[None]
    assert tokens.tolist() == case.model.to_tokens(PROMPT).tolist()
    assert (analysed.prompt, analysed.target_token) == (PROMPT, TARGET)
    assert [layer.layer for layer in analysed.layers] == [2, 0]
    assert [analysed.target_token_id] == case.model.tokenizer.encode(
        TARGET, add_special_tokens=False
    )
    loss = nll(analysed.target_token_id)
    wanted = loss(case.logits(tokens), tokens).item()
    assert analysed.loss == pytest.approx(wanted, rel=1e-6)
    expected = case.weight_gradients(tokens, loss)
    found = by_matrix(analysed)
    assert found.keys() == {key for key in expected if key[1] in (0, 2)}
    for key, matrix in found.items():
        factors = matrix.factors
        for gradient in (factors.weight_gradient, factors.reconstructed_gradient):
            assert (gradient.dtype, factors.weight_layout) == (torch.float32, "in_out")
            # Factors and product are rounded to float32.
            assert relative_error(gradient, expected[key]) <= 1e-6


def test_decoding_matches_the_reference(case: Case, analysed: Any) -> None:
    target = analysed.target_token_id
    for (name, _), matrix in by_matrix(analysed).items():
        factors = matrix.factors
        vectors = factors.output_gradients if name == "W_out" else factors.forward_inputs
        assert matrix.projected_factor == (
            "output_gradients" if name == "W_out" else "forward_inputs"
        )
        norms = torch.tensor([sum(float(x) ** 2 for x in vector) ** 0.5 for vector in vectors])
        torch.testing.assert_close(matrix.factor_norms, norms)
        assert matrix.zero_norm_mask.tolist() == [norm == 0 for norm in norms]
        lengths = torch.where(norms == 0, 1, norms)[:, None]
        for normalized, read in ((False, vectors), (True, vectors / lengths)):
            scores = case.lens(read.to(case.dtype)).float()
            torch.testing.assert_close(matrix.logits(normalized=normalized), scores, **SINGLE)
            shown = norms > 0  # without a bias a zero vector's logits are all equal
            order = scores[shown].argsort(dim=-1, descending=True)
            place = (order == target).int().argmax(-1)
            for largest, found in ((True, matrix.top), (False, matrix.bottom)):
                wanted = (order if largest else order.flip(-1))[:, :4]
                assert torch.equal(found(k=4, normalized=normalized).indices[shown], wanted)
                ranks = matrix.target_ranks(target, largest=largest, normalized=normalized)
                assert torch.equal(ranks[shown], place if largest else scores.shape[1] - 1 - place)


def test_equal_logits_have_equal_ranks() -> None:
    """Competition ranks: the number of logits strictly beyond."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 1.0]])
    ranks = {
        largest: [
            int(compat.results.ranks_beyond(logits, token, largest=largest)) for token in range(5)
        ]
        for largest in (True, False)
    }
    assert ranks == {True: [2, 0, 0, 4, 2], False: [1, 3, 3, 0, 1]}


def test_processed_weights() -> None:
    """A folded norm changes W_in's input, by autograd `dL/dW' = (dL/dW - b dL/db) / g`."""
    raw, folded = build("bridge-gpt2"), build("bridge-gpt2")
    folded.model.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    if theirs is not None:
        with pytest.raises(ValueError, match="compatibility mode"):
            theirs.BackwardLens(folded.model)
    result = compat.BackwardLens(folded.model).analyze(PROMPT, TARGET, [1], return_full_logits=True)
    tokens, loss = result.prompt_token_ids[None], nll(result.target_token_id)
    weights = raw.weight_gradients(tokens, loss)
    b_in: Any = raw.outputs["W_in", 1].bias
    (bias,) = torch.autograd.grad(loss(raw.logits(tokens), tokens).sum(), b_in)
    norm = raw.model.blocks[1].ln2
    expected = {
        "W_in": (weights["W_in", 1] - torch.outer(norm.bias, bias)) / norm.weight[:, None],
        "W_out": weights["W_out", 1],
    }
    for (name, _), matrix in by_matrix(result).items():
        assert relative_error(matrix.factors.weight_gradient, expected[name].detach()) <= FOLDED
    # The final norm is folded too, and decodes the same.
    vectors = result.layers[0].output_projection.factors.output_gradients
    scores = raw.lens(vectors.double()).float()
    torch.testing.assert_close(result.layers[0].output_projection.logits(), scores, **SINGLE)


def test_frozen_model(fresh: tuple[Any, list[Any]]) -> None:
    model, accepting = fresh
    before = compat.BackwardLens(model).analyze(PROMPT, TARGET, [1])
    for parameter in [*model.parameters(), *getattr(model, "original_model", model).parameters()]:
        parameter.requires_grad_(False)
    for tool in accepting[1:]:
        with pytest.raises(ValueError, match="trainable"):
            tool.BackwardLens(model).analyze(PROMPT, TARGET, [1])
    after = compat.BackwardLens(model).analyze(PROMPT, TARGET, [1])
    assert_same(after, before)


@pytest.mark.parametrize("name", ["bridge-llama", "bridge-gemma2", "hooked-gpt2"])
@needs_theirs
def test_theirs_refuses_what_ours_analyses(name: str) -> None:
    """So the tests above go beyond theirs; if this fails, compare the two."""
    with pytest.raises((TypeError, NotImplementedError)):
        theirs.BackwardLens(build(name).model)


def test_half_precision_results_are_float32(fresh: tuple[Any, list[Any]]) -> None:
    model, _ = fresh
    result = compat.BackwardLens(model.to(torch.bfloat16)).analyze(PROMPT, TARGET, [1], top_k=2)
    for matrix in matrices(result):
        factors = matrix.factors
        for tensor in (factors.forward_inputs, matrix.factor_norms, matrix.top_ranking.values):
            assert tensor.dtype == torch.float32


# ------------------------------------------------------------------------------------------- cost


class Allocated(TorchDispatchMode):
    """The shapes of all tensors that torch allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(tensor.shape))
        return result


def test_no_matrix_is_built_before_it_is_requested(gpt2: Case) -> None:
    sides = set(gpt2.weights["W_in", 0].tensor.shape)
    with Allocated() as allocated:
        result = compat.BackwardLens(gpt2.model).analyze(PROMPT, TARGET, [0, 1, 2])
    assert len(allocated.shapes) > 100
    assert not [shape for shape in allocated.shapes if sides <= set(shape)]
    with allocated:
        factors = first(result).factors
        assert factors.reconstructed_gradient is factors.reconstructed_gradient
    assert len([shape for shape in allocated.shapes if sides <= set(shape)]) == 1


def test_reconstruction_errors_are_measured(gpt2: Case) -> None:
    """They compare with autograd on the current model: exact now, but not after an edit."""
    result = compat.BackwardLens(gpt2.model).analyze(PROMPT, TARGET, [0, 2])
    assert 0 <= result.max_relative_reconstruction_error <= 1e-6
    stale = compat.BackwardLens(gpt2.model).analyze(PROMPT, TARGET, [0, 2])
    weight = next(gpt2.model.parameters())
    before = weight.detach().clone()
    try:
        weight.data.mul_(1.5)
        assert stale.max_relative_reconstruction_error > 1e-3
    finally:
        weight.data.copy_(before)
    copied = copy.deepcopy(compat.BackwardLens(gpt2.model).analyze(PROMPT, TARGET, [0]))
    with pytest.raises(ValueError, match="no longer exists"):
        _ = copied.max_absolute_reconstruction_error


def test_result_owns_its_tensors_and_holds_no_model() -> None:
    case = any_gpt2()
    model, tokenizer = (weakref.ref(thing) for thing in (case.model, case.model.tokenizer))
    result = compat.BackwardLens(case.model).analyze(
        PROMPT, TARGET, [0], normalized=True, return_full_logits=True
    )
    del case
    gc.collect()
    assert (model(), tokenizer()) == (None, None)
    for tensor in tensors(result):
        assert (tensor.grad_fn, tensor.requires_grad, tensor.device.type) == (None, False, "cpu")
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def any_gpt2() -> Case:
    """A GPT-2 of the class that the installed TransformerLens prefers."""
    return build(f"{'bridge' if find_spec('transformer_lens.model_bridge') else 'hooked'}-gpt2")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
