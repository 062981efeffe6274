"""Model states left by a notebook, with attention: correct numbers or a reasoned refusal.

`test_state.py` compares every value of a model; here every matrix is captured, and hooks are
also counted on the Hugging Face model inside a bridge.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import PAIR_NAMES, attention_weights, loss_of, shared_case
from models import Case, build, hooked_only, nll, relative_error
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError, ModelStateError, UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.validation import validate

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

EXACT = 1e-12  # in float64: 50 times the observed error
TARGET = 5


@pytest.fixture(scope="module", params=PAIR_NAMES)
def pair(request: pytest.FixtureRequest) -> Case:
    """Both model classes, with plain and with grouped-query attention, in float64."""
    return shared_case(request.param)


def warm(case: Case) -> Case:
    """A bridge registers its own hooks at the first forward pass of each kind."""
    tokens = case.tokens(5)
    case.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return case


def capture_all(model: Any, tokens: Any, **options: Any) -> GradientCapture:
    return capture_gradients(model, tokens, target_nll(TARGET), **({"matrices": "all"} | options))


def roots(model: Any) -> list[nn.Module]:
    """A bridge's modules do not include the Hugging Face model that it runs."""
    return [model, *([model.original_model] if hasattr(model, "original_model") else [])]


def modules(model: Any) -> list[tuple[str, nn.Module]]:
    return [
        (f"{index}.{name}", module)
        for index, root in enumerate(roots(model))
        for name, module in root.named_modules()
    ]


HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks(model: Any) -> list[tuple]:
    """Every hook, in execution order."""
    found: list[tuple] = []
    for name, module in modules(model):
        for attribute in HOOK_DICTS:
            listed = getattr(module, attribute)
            # Hooks by key and object; the other dictionaries only hold options of a key.
            found.append((name, attribute, *((key, id(hook)) for key, hook in listed.items())))
        for attribute in ("fwd_hooks", "bwd_hooks"):
            if (listed := getattr(module, attribute, None)) is not None:
                found.append((name, attribute, *(id(entry.hook) for entry in listed)))
    return found


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a caller could notice, comparable with `==`."""
    parameters = [
        (name, p) for index, root in enumerate(roots(model)) for name, p in root.named_parameters()
    ]
    return {
        "hooks": hooks(model),
        "parameters": [(name, id(p), p._version, p.requires_grad) for name, p in parameters],
        "grads": [
            (name, None if p.grad is None else (id(p.grad), p.grad._version))
            for name, p in parameters
        ],
        "sums": [(name, p.detach().double().sum().item()) for name, p in parameters],
        "training": [(name, module.training) for name, module in modules(model)],
        "random": (
            random.getstate(),
            str(np.random.get_state()),
            tuple(torch.get_rng_state().tolist()),
        ),
        "torch": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        assert after[key] == value, key


def assert_equal_captures(found: GradientCapture, expected: GradientCapture) -> None:
    """Equal up to the order in which autograd sums gradients of several readers of the stream."""
    assert list(found.gradients) == list(expected.gradients)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    for key, gradient in expected.gradients.items():
        assert gradient.vjps.any(), key
        assert torch.equal(found[key].inputs, gradient.inputs), key
        torch.testing.assert_close(found[key].vjps, gradient.vjps, rtol=1e-10, atol=1e-14)
    assert found.attention.keys() == expected.attention.keys()
    for layer in expected.attention:
        torch.testing.assert_close(
            found.reversed_attention(layer),
            expected.reversed_attention(layer),
            rtol=1e-10,
            atol=1e-14,
        )


# ---------------------------------------------------------------------------------- frozen, no_grad


@contextmanager
def frozen(model: Any, keep: Callable[[str], bool] = lambda name: False) -> Iterator[None]:
    """Freeze all parameters except those in `kept`."""
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not keep(name):
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


@contextmanager
def grad_disabled() -> Iterator[None]:
    """`torch.set_grad_enabled(False)` at the top of a notebook."""
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


STATES: dict[str, Callable[[Any], list[Any]]] = {
    "frozen": lambda model: [frozen(model)],
    "frozen but for attention": lambda model: [frozen(model, lambda name: ".attn." in name)],
    # The graph begins or ends in the middle of the model.
    "frozen but for layer 1": lambda model: [frozen(model, lambda name: "blocks.1." in name)],
    "frozen but for the unembedding": lambda model: [
        frozen(model, lambda name: "unembed" in name or "lm_head" in name)
    ],
    "set_grad_enabled(False)": lambda model: [grad_disabled()],
    "frozen, no_grad": lambda model: [frozen(model), torch.no_grad()],
}


@pytest.mark.parametrize("pair", [*PAIR_NAMES, "bridge-gemma2", "bridge-neox"], indirect=True)
@pytest.mark.parametrize("state", STATES)
def test_numbers_do_not_depend_on_what_needs_a_gradient(pair: Case, state: str) -> None:
    tokens = pair.tokens(6, 6)
    expected = capture_all(pair.model, tokens)
    with ExitStack() as stack:
        for context in STATES[state](pair.model):
            stack.enter_context(context)
        before = snapshot(pair.model)
        found = capture_all(pair.model, tokens)
        assert_same(before, snapshot(pair.model))
        alone = capture_all(pair.model, tokens, matrices=("W_K", "W_O"), layers=1)
    assert_equal_captures(found, expected)
    for key, gradient in alone.gradients.items():
        torch.testing.assert_close(gradient.vjps, expected[key].vjps, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        alone.reversed_attention(1), expected.reversed_attention(1), rtol=1e-10, atol=1e-14
    )


# ---------------------------------------------------------------------------- dropout in train mode


def test_dropout_in_train_mode_is_refused_with_the_reason() -> None:
    case = warm(build("bridge-gpt2"))
    tokens = case.tokens(5)
    expected = capture_all(case.model, tokens)
    case.model.train()
    before = snapshot(case.model)
    for call in (
        lambda: capture_all(case.model, tokens),
        lambda: backward_lens(case.model, tokens, TARGET, matrices="attn"),
        lambda: validate(case.model, tokens),
    ):
        with pytest.raises(ModelStateError, match=r"dropout is active in .*train mode.*eval\(\)"):
            call()
    assert_same(before, snapshot(case.model))
    case.model.eval()
    assert_equal_captures(capture_all(case.model, tokens), expected)


@pytest.mark.parametrize("where", ["attn", "ln1", "mlp"])
def test_one_submodule_in_train_mode_is_refused(where: str) -> None:
    """GPT-2's attention and MLP have dropout; its norms do not."""
    model = build("bridge-gpt2").model
    getattr(model.blocks[1], where).train()
    tokens = torch.tensor([[3, 4, 5]])[:, :2]
    if where == "ln1":
        assert capture_all(model, tokens).loss.isfinite()
        return
    with pytest.raises(ModelStateError, match=r"dropout is active"):
        capture_all(model, tokens)


def test_dropout_inside_an_attention_function_is_refused() -> None:
    """Llama's attention dropout has no module: it is an attribute, read in train mode."""
    model = build("bridge-llama").model
    model.train()
    tokens = torch.tensor([[3, 4, 5]])
    plain = capture_all(model, tokens)  # its dropout is 0
    for module in model.original_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with pytest.raises(ModelStateError, match=r"dropout is active in .*attn"):
        capture_all(model, tokens)
    model.eval()
    assert_equal_captures(capture_all(model, tokens), plain)


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_train_mode_without_dropout_changes_nothing(name: str) -> None:
    case = warm(build(name))
    for _, module in modules(case.model):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = capture_all(case.model, case.tokens(5))
    for root in roots(case.model):
        root.train()
    before = snapshot(case.model)
    assert_equal_captures(capture_all(case.model, case.tokens(5)), expected)
    assert_same(before, snapshot(case.model))


# ------------------------------------------------------------------------- autocast, half precision


@pytest.fixture(scope="module", params=["bridge-llama", "hooked-gpt2"])
def single(request: pytest.FixtureRequest) -> Case:
    """Models in float32, which autocast acts on."""
    return shared_case(request.param, torch.float32)


def test_autocast_changes_no_factor(single: Case) -> None:
    tokens = single.tokens(6)
    expected = capture_all(single.model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            rounded = single.model(tokens, return_type="logits").float()
        before = snapshot(single.model)
        found = capture_all(single.model, tokens)
        assert_same(before, snapshot(single.model))
        assert torch.is_autocast_enabled("cpu")
    for gradient, plain in zip(found, expected, strict=True):
        assert torch.equal(gradient.inputs, plain.inputs)
        assert torch.equal(gradient.vjps, plain.vjps)
    for layer in expected.attention:
        assert torch.equal(found.reversed_attention(layer), expected.reversed_attention(layer))
    # Negative control: it does round the model's own outputs.
    with torch.no_grad():
        plain_logits = single.model(tokens, return_type="logits")
    assert relative_error(rounded, plain_logits) > 1e-3


def test_autocast_does_not_fail_the_validation(single: Case) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert validate(single.model, single.tokens(6)).max_error < 1e-5


def test_autocast_does_not_round_values_computed_from_factors(single: Case) -> None:
    gradient = capture_all(single.model, single.tokens(6))["W_O", 1]

    def read() -> list[Tensor]:
        values = gradient.singular_values()
        return [gradient.dense(), gradient.neuron(3), gradient.bias(), gradient.norms, values]

    expected = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read()
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_autocast_does_not_round_the_readout(single: Case) -> None:
    tokens = single.tokens(6)
    expected = backward_lens(single.model, tokens, TARGET, matrices=("W_Q", "W_O"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backward_lens(single.model, tokens, TARGET, matrices=("W_Q", "W_O"))
    for matrix in ("W_Q", "W_O"):
        ours, plain = found.readout(matrix), expected.readout(matrix)
        torch.testing.assert_close(ours.top_scores, plain.top_scores)
        assert torch.equal(ours.top_ids, plain.top_ids)
        assert torch.equal(ours.target_rank, plain.target_rank)


def mlp_weights(case: Case) -> dict:
    return {key: (weight.tensor, weight.in_out) for key, weight in case.own.items()}


def all_gradients(case: Case, tokens: Tensor) -> dict[tuple[str, int], Tensor]:
    """Autograd's gradients of every matrix of the model, laid out as `dense` is."""
    weights = mlp_weights(case) | {
        key: (weight.parameter, weight.by_head)
        for key, weight in attention_weights(case.model).items()
    }
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            loss_of(case.model, tokens, nll(TARGET)), [tensor for tensor, _ in weights.values()]
        )
    pairs = zip(weights.items(), gradients, strict=True)
    return {key: laid_out(gradient) for (key, (_, laid_out)), gradient in pairs}


def in_float32(name: str, half: Case) -> Case:
    """A float32 model with the weights and buffers of a half-precision model."""
    case = build(name, torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(roots(case.model), roots(half.model), strict=True):
            for kind in ("named_parameters", "named_buffers"):
                given = dict(getattr(theirs, kind)())
                for tensor_name, tensor in getattr(ours, kind)():
                    tensor.copy_(given[tensor_name])
    return case


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bridge-gpt2", torch.bfloat16),
        ("bridge-llama", torch.float16),
        ("hooked-gpt2", torch.float16),
        ("hooked-llama", torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_gives_float32_factors_and_reports_its_error(
    name: str, dtype: torch.dtype
) -> None:
    """`float32_error` is the distance from autograd on a float32 copy, recomputed here."""
    case = build(name, dtype)
    tokens = case.tokens(6, 6)
    capture = capture_all(case.model, tokens)
    for gradient in capture:
        assert {gradient.inputs.dtype, gradient.vjps.dtype} == {torch.float32}
        assert gradient.vjps.isfinite().all()
    before = snapshot(case.model)
    report = validate(case.model, tokens, objective=target_nll(TARGET), matrices="all")
    assert_same(before, snapshot(case.model))
    assert {p.dtype for p in case.model.parameters()} == {dtype}
    expected = all_gradients(in_float32(name, case), tokens)
    assert {(error.matrix, error.layer) for error in report.errors} == expected.keys()
    for error in report.errors:
        key = (error.matrix, error.layer)
        dense = capture[key].dense(0) + capture[key].dense(1)
        ours = relative_error(dense, expected[key])
        assert error.float32_error is not None
        # The float32 reference is rounded, too.
        assert error.float32_error == pytest.approx(ours, rel=1e-2, abs=1e-6), key
        assert 1e-5 < error.float32_error < 0.1, key
        assert error.relative_error <= report.tolerance
    table = report.to_df("float32_error")
    assert table.shape == (case.n_layers, len(expected) // case.n_layers)
    assert table.loc[1, "W_Q"] == next(
        error.float32_error for error in report.errors if (error.matrix, error.layer) == ("W_Q", 1)
    )
    assert "against a float32 copy of the model" in repr(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_have_no_float32_error(dtype: torch.dtype) -> None:
    report = validate(shared_case("bridge-llama", dtype).model)
    assert {error.float32_error for error in report.errors} == {None}
    assert "float32 copy" not in repr(report)


# ------------------------------------------------------------------------------------------- Ctrl-C


def interrupt(value: Tensor, hook: Any) -> Tensor:
    raise KeyboardInterrupt


def interrupted_objective(logits: Tensor, tokens: Tensor) -> Tensor:
    raise KeyboardInterrupt


def make_busy(case: Case) -> Case:
    """Add gradients, frozen parameters, caller's hooks, and a submodule in train mode."""
    model = case.model
    tokens = case.tokens(5)
    model(tokens, return_type="logits").sum().backward()
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.requires_grad_(False)
    model.blocks[1].ln1.train()
    model.add_hook("blocks.1.attn.hook_z", lambda value, hook: value * 1.01)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: None)
    model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return case


@pytest.fixture(scope="module", params=PAIR_NAMES)
def busy(request: pytest.FixtureRequest) -> Case:
    return make_busy(build(request.param))


CALLS: dict[str, Callable[[Case], object]] = {
    "capture": lambda case: capture_all(
        case.model, case.tokens(5), hook_points=["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]
    ),
    "lens": lambda case: backward_lens(case.model, case.tokens(5), TARGET, matrices="all"),
    "validate": lambda case: validate(case.model, case.tokens(5)),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_changes_after_a_successful_run(busy: Case, call: str) -> None:
    before = snapshot(busy.model)
    assert any(grad is not None for _, grad in before["grads"])
    CALLS[call](busy)
    assert_same(before, snapshot(busy.model))


@pytest.mark.parametrize("point", ["blocks.1.attn.hook_pattern", "unembed.hook_in"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_after_ctrl_c_in_the_forward_pass(
    busy: Case, call: str, point: str
) -> None:
    if point not in busy.model.hook_dict:
        point = "ln_final.hook_normalized"
    before = snapshot(busy.model)
    with busy.model.hooks(fwd_hooks=[(point, interrupt)]), pytest.raises(KeyboardInterrupt):
        CALLS[call](busy)
    assert_same(before, snapshot(busy.model))


def test_nothing_is_left_after_ctrl_c_in_the_objective(busy: Case) -> None:
    before = snapshot(busy.model)
    for call in (
        lambda: capture_gradients(
            busy.model, busy.tokens(5), interrupted_objective, matrices="all"
        ),
        lambda: backward_lens(
            busy.model, busy.tokens(5), objective=interrupted_objective, matrices="attn"
        ),
        lambda: validate(busy.model, busy.tokens(5), objective=interrupted_objective),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert_same(before, snapshot(busy.model))


def test_nothing_is_left_after_ctrl_c_in_the_backward_pass(busy: Case) -> None:
    def stop(gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt

    def in_backward(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        if value.requires_grad:
            value.register_hook(stop)
        return value

    before = snapshot(busy.model)
    hook = ("blocks.1.attn.hook_z", in_backward)
    with busy.model.hooks(fwd_hooks=[hook]), pytest.raises(KeyboardInterrupt):
        CALLS["capture"](busy)
    assert_same(before, snapshot(busy.model))


def test_nothing_is_left_when_a_hook_cannot_be_registered(
    busy: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registration fails half way, as on Ctrl-C at that moment."""
    calls = {"left": 7}
    register = nn.Module.register_forward_hook

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return register(self, *args, **kwargs)

    before = snapshot(busy.model)
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_forward_hook", failing)
        with pytest.raises(KeyboardInterrupt):
            CALLS["capture"](busy)
    assert calls["left"] == 0
    assert_same(before, snapshot(busy.model))


def test_the_snapshot_sees_hooks_inside_hugging_faces_model(busy: Case) -> None:
    """Negative control of this section."""
    before = snapshot(busy.model)
    target = modules(busy.model)[-1][1]
    handle = target.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="hooks"):
        assert_same(before, snapshot(busy.model))
    handle.remove()
    assert_same(before, snapshot(busy.model))
    if hasattr(busy.model, "original_model"):
        handle = busy.model.original_model.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(AssertionError, match="hooks"):
            assert_same(before, snapshot(busy.model))
        handle.remove()


# --------------------------------------------------------------------------------- a caller's hooks


@pytest.mark.parametrize("pair", ["bridge-llama", "hooked-gpt2"], indirect=True)
@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_pattern", "hook_attn_out"])
def test_hooks_of_a_caller_run_once_and_in_their_order(pair: Case, point: str) -> None:
    """Two that do not commute, at a hook point that the package uses as well."""
    tokens, name = pair.tokens(6), f"blocks.1.{point}"
    log: list[str] = []

    def doubled(value: Tensor, hook: Any) -> Tensor:
        log.append("doubled")
        return 2 * value

    def shifted(value: Tensor, hook: Any) -> Tensor:
        log.append("shifted")
        # Not by a constant, which the next LayerNorm would remove.
        return value + torch.linspace(0, 0.3, value.shape[-1], dtype=value.dtype)

    losses, captures = [], []
    for order in ([doubled, shifted], [shifted, doubled]):
        with pair.model.hooks(fwd_hooks=[(name, hook) for hook in order]):
            before = hooks(pair.model)
            losses.append(loss_of(pair.model, tokens, nll(TARGET)).item())
            log.clear()
            captures.append(capture_all(pair.model, tokens))
            assert log == [hook.__name__ for hook in order]
            assert hooks(pair.model) == before
            assert loss_of(pair.model, tokens, nll(TARGET)).item() == losses[-1]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    for capture, loss in zip(captures, losses, strict=True):
        assert float(capture.loss) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_permanent_hooks_stay_in_place(name: str) -> None:
    """`add_hook`, and torch's own hooks on modules whose hooks the package uses."""
    case = warm(build(name))
    model, tokens = case.model, case.tokens(5)
    order: list[int] = []

    def numbered(number: int) -> Callable:
        def hook(*args: Any, **kwargs: Any) -> None:
            order.append(number)

        return hook

    for number in range(3):
        model.add_hook("blocks.1.attn.hook_z", numbered(number))
    for number in range(3, 6):
        model.blocks[1].attn.register_forward_hook(numbered(number), prepend=number == 4)
    model(tokens)
    expected = list(order)
    assert sorted(expected) == list(range(6))
    before = hooks(model)
    order.clear()
    capture_all(model, tokens)
    assert order == expected
    assert hooks(model) == before
    order.clear()
    model(tokens)
    assert order == expected


# ---------------------------------------------------------------------- weights used more than once


MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")


def holder(model: Any, matrix: str, layer: int) -> tuple[nn.Module, str]:
    """The module that holds a matrix, and the attribute's name."""
    block = model.blocks[layer]
    if hasattr(model, "original_model"):
        names = {"W_in": "in", "W_out": "out"}
        attention = matrix not in names
        parent = block.attn if attention else block.mlp
        name = matrix[-1].lower() if attention else names[matrix]
        return getattr(parent, name).original_component, "weight"
    if matrix in ("W_in", "W_out"):
        return block.mlp, matrix
    return block.attn, f"_{matrix}" if hasattr(block.attn, f"_{matrix}") else matrix


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_a_weight_tied_between_layers_is_refused(name: str) -> None:
    case = build(name)
    model, tokens = case.model, case.tokens(5)
    expected = capture_all(model, tokens)  # the model has already been analysed untied
    for matrix in MATRICES:
        (first, attribute), (third, _) = holder(model, matrix, 0), holder(model, matrix, 2)
        own = getattr(third, attribute)
        setattr(third, attribute, getattr(first, attribute))
        reason = rf"{matrix} of layer \d is one weight with 2 uses.*untie"
        for layers in (0, 2):
            with pytest.raises(UnsupportedModelError, match=reason):
                capture_all(model, tokens, matrices=matrix, layers=layers)
        # The layer between and the other matrices are unaffected.
        assert capture_all(model, tokens, matrices=matrix, layers=1)[matrix, 1].vjps.any()
        others = [other for other in MATRICES if other != matrix]
        assert len(capture_all(model, tokens, matrices=others)) == 15
        # The message recommends a separate copy.
        setattr(third, attribute, nn.Parameter(own.detach().clone()))
        found = capture_all(model, tokens, matrices=matrix, layers=2)[matrix, 2]
        torch.testing.assert_close(found.vjps, expected[matrix, 2].vjps, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_a_weight_tied_within_a_layer_is_refused(name: str) -> None:
    """HookedTransformer has both in one module, so one module uses the weight twice."""
    case = build(name)
    tie_within_a_layer(case.model)
    for matrix in ("W_Q", "W_K"):
        with pytest.raises(
            BackwardLensError, match=rf"{matrix} of layer 1 .*2 (uses|times)|used 2"
        ):
            capture_all(case.model, case.tokens(5), matrices=matrix)


def tie_within_a_layer(model: Any) -> None:
    (queries, attribute), (keys, other) = holder(model, "W_Q", 1), holder(model, "W_K", 1)
    setattr(keys, other, getattr(queries, attribute))


# The autograd graph does not show uses of a frozen weight.
@hooked_only
def test_a_weight_tied_within_a_layer_of_a_frozen_model_is_refused() -> None:
    case = build("hooked-gpt2")
    tie_within_a_layer(case.model)
    case.model.requires_grad_(False)
    for matrix in ("W_Q", "W_K"):
        with pytest.raises(BackwardLensError, match=rf"{matrix} of layer 1"):
            capture_all(case.model, case.tokens(5), matrices=matrix)


@pytest.mark.parametrize("matrix", ["W_out", "W_O"])
def test_a_second_use_of_a_frozen_weight_is_refused(pair: Case, matrix: str) -> None:
    with (
        frozen(pair.model),
        pair.model.hooks(fwd_hooks=second_use(pair, matrix, lambda weight: weight)),
        pytest.raises(ModelStateError, match=rf"{matrix} of layer 1 was used 2 times"),
    ):
        capture_all(pair.model, pair.tokens(5), matrices=matrix)


def second_use(case: Case, matrix: str, transform: Callable[[Tensor], Tensor]) -> list[tuple]:
    """Hooks that multiply by `W_out` or `W_O` of layer 1 once more, and add the result."""
    module, attribute = holder(case.model, matrix, 1)
    point = "mlp.hook_post" if matrix == "W_out" else "attn.hook_z"
    out = "hook_mlp_out" if matrix == "W_out" else "hook_attn_out"
    is_bridge = hasattr(case.model, "original_model")
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        kept[:] = [value.flatten(2)]

    def add(value: Tensor, hook: Any) -> Tensor:
        weight = transform(getattr(module, attribute))
        transposed = is_bridge and isinstance(module, nn.Linear)
        matrix_again = weight.T if transposed else weight.reshape(-1, weight.shape[-1])
        return value + 0.5 * kept[0] @ matrix_again

    return [(f"blocks.1.{point}", keep), (f"blocks.1.{out}", add)]


@pytest.mark.parametrize("matrix", ["W_out", "W_O"])
def test_a_second_use_of_a_weight_is_refused(pair: Case, matrix: str) -> None:
    tokens = pair.tokens(5)
    with pair.model.hooks(fwd_hooks=second_use(pair, matrix, lambda weight: weight)):
        with pytest.raises(ModelStateError, match=rf"{matrix} of layer 1 was used 2 times"):
            capture_all(pair.model, tokens, matrices=matrix)
        # Its gradient would have been too small.
        expected = all_gradients(pair, tokens)[matrix, 1]
        others = capture_all(pair.model, tokens, matrices=[m for m in MATRICES if m != matrix])
    assert len(others) == 15
    found = capture_all(pair.model, tokens, matrices=matrix)[matrix, 1].dense()
    assert relative_error(found, expected) > 0.05


@pytest.mark.parametrize("matrix", ["W_out", "W_O"])
def test_a_second_use_that_autograd_does_not_see_is_ignored(pair: Case, matrix: str) -> None:
    """Negative control: after `detach` the weight is a constant."""
    tokens = pair.tokens(5)
    with pair.model.hooks(fwd_hooks=second_use(pair, matrix, torch.Tensor.detach)):
        capture = capture_all(pair.model, tokens)
        expected = all_gradients(pair, tokens)
    for key, gradient in expected.items():
        assert relative_error(capture[key].dense(), gradient) <= EXACT, key


def test_a_weight_that_a_hook_only_reads_is_accepted(pair: Case) -> None:
    """Values that a caller's hook computes do not reach the logits."""
    tokens, log = pair.tokens(5), []
    module, attribute = holder(pair.model, "W_O", 1)

    def look(value: Tensor, hook: Any) -> None:
        log.append((getattr(module, attribute) * 2).sum())

    with pair.model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", look)]):
        found = capture_all(pair.model, tokens)
    assert len(log) == 1
    assert_equal_captures(found, capture_all(pair.model, tokens))
