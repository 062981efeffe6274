"""Factors taken during training against `.grad`, and training with and without the watch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from architecture_table import find_weight, matrices_of
from architectures import LLAMA_MODULES, N_LAYERS, NotAvailable, build_model, hf_model
from dense_gradients import joined
from models import HAS_BRIDGE, NO_BRIDGE, relative_error
from torch import Tensor, nn

from backward_lens_tl.capture.objectives import next_token_loss
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.training import StepGradient, watch

TOLERANCE = 1e-12
"""Rounding in float64: about 100 times the measured error."""

NAMES = {
    "llama": LLAMA_MODULES,
    "gpt2": {
        "W_Q": "attn.c_attn",
        "W_K": "attn.c_attn",
        "W_V": "attn.c_attn",
        "W_O": "attn.c_proj",
        "W_in": "mlp.c_fc",
        "W_out": "mlp.c_proj",
    },
    "gptj": {"W_Q": "attn.q_proj", "W_O": "attn.out_proj", "W_in": "mlp.fc_in"},
    "opt": {"W_K": "self_attn.k_proj", "W_O": "self_attn.out_proj", "W_out": "fc2"},
    "phi3": {"W_O": "self_attn.o_proj", "W_gate": "mlp.gate_up_proj", "W_in": "mlp.gate_up_proj"},
}


def batch(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Random sequences with padding; the first two tokens of each are a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, 2)
    labels = ids.masked_fill(~mask | (mask.cumsum(1) <= 2), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def blocks(model: Any) -> Any:
    body = model.base_model
    return getattr(body, "h", None) or getattr(getattr(body, "decoder", body), "layers", None)


def weight_gradient(model: Any, family: str, matrix: str, layer: int) -> Tensor:
    """`.grad` of one matrix, `[d_in, d_out]`."""
    name = NAMES[family][matrix]
    module = blocks(model)[layer].get_submodule(name)
    gradient = module.weight.grad
    gradient = gradient.T if isinstance(module, nn.Linear) else gradient
    sharing = [each for each, other in NAMES[family].items() if other == name]
    return gradient.chunk(len(sharing), dim=1)[sharing.index(matrix)]


def watched_step(
    model: nn.Module, run: Callable[[], object], matrices: Any = "all", **options: Any
) -> StepGradient:
    with watch(model, matrices, **options) as watched:
        run()
        step = watched.step()
    assert step is not None
    return step


def backward(model: Any, *batches: dict[str, Tensor]) -> None:
    for each in batches:
        (model(**each).loss / len(batches)).backward()


def dense(step: StepGradient, matrix: str, layer: int) -> Tensor:
    return joined(step[matrix, layer].dense(), matrix)


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("family", NAMES)
def test_factors_give_the_accumulated_gradient(family: str) -> None:
    model = hf_model(family, torch.float64)
    # Phi-3's own gradients are NaN where a window leaves padding with nothing to attend to.
    batches = [batch(9, 9)] if family == "phi3" else [batch(9, 6, 4), batch(7, 8, seed=1)]
    step = watched_step(model, lambda: backward(model, *batches), list(NAMES[family]))
    assert len(step) == len(NAMES[family]) * N_LAYERS
    for gradient in step:
        expected = weight_gradient(model, family, gradient.matrix, gradient.layer)
        found = dense(step, gradient.matrix, gradient.layer)
        assert relative_error(found, expected) < TOLERANCE, gradient


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_the_lens_in_the_loop_adds_nothing(kind: str) -> None:
    try:
        model: Any = build_model("gpt2", kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    tokens, other = batch(9, 9)["input_ids"], batch(7, seed=1)["input_ids"]

    def step(*, with_lens: bool) -> StepGradient:
        with watch(model, changes=True, reference=([5, 6], 7)) as watched:
            if with_lens:
                capture_gradients(model, other, next_token_loss())
                with torch.no_grad():  # a step begins with its own first pass
                    for parameter in model.parameters():
                        parameter.mul_(1.5)
            model(tokens, return_type="loss").backward()
            found = watched.step()
        assert found is not None
        return found

    found = step(with_lens=True)
    expected = step(with_lens=False)
    assert torch.equal(found.positions, expected.positions)
    for gradient in expected:
        key = gradient.matrix, gradient.layer
        assert torch.equal(found[key].vjps, gradient.vjps)
        assert torch.equal(found.references[key].vjps, expected.references[key].vjps)
        assert not found.changes[key].dense().any()


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformer_lens(family: str, kind: str) -> None:
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    tokens = batch(9, 9)["input_ids"]
    keys = [(matrix, layer) for layer in range(N_LAYERS) for matrix in matrices_of(family)]
    weights = [find_weight(model, family, *key) for key in keys]
    leaves = [tensor for weight in weights for tensor in weight.tensors]
    step = watched_step(model, lambda: model(tokens, return_type="loss").backward())
    assert list(step.gradients) == keys
    for key, weight in zip(keys, weights, strict=True):
        expected = weight.turn(*(tensor.grad for tensor in weight.tensors))
        assert relative_error(step[key].dense(), expected) < TOLERANCE, key
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.skipif(not HAS_BRIDGE, reason=NO_BRIDGE)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_same_factors_as_a_capture_of_the_batch(family: str) -> None:
    try:
        bridge = build_model(family, "bridge", torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    tokens = batch(9, 9, 9)["input_ids"]
    capture = capture_gradients(bridge, tokens, next_token_loss(), matrices="all")
    model = hf_model(family, torch.float64)
    step = watched_step(model, lambda: model(tokens, labels=tokens).loss.backward())
    assert step.sequences.tolist() == [row for row in range(3) for _ in range(8)]
    assert step.positions.tolist() == 3 * list(range(8))
    for gradient in step:
        expected = capture[gradient.matrix, gradient.layer]
        at = step.sequences, step.positions
        assert relative_error(gradient.inputs[0], expected.inputs[at]) < TOLERANCE
        # The loss is the mean over three prompts of equal length; transformers computes it in
        # float32, whose eps is 1.2e-7.
        assert relative_error(3 * gradient.vjps[0], expected.vjps[at]) < 1e-6


def test_rows_are_the_real_positions() -> None:
    model = hf_model("llama", torch.float64)
    step = watched_step(model, lambda: backward(model, batch(5, 3), batch(4, seed=1)), "mlp")
    # Without the last position, which predicts nothing.
    first = [(0, 0, at) for at in range(4)] + [(0, 1, at) for at in range(2)]
    labels = zip(step.backward_passes, step.sequences, step.positions, strict=True)
    found = [tuple(int(each) for each in label) for label in labels]
    assert found == first + [(1, 0, at) for at in range(3)]


def trained(every: int | None, **options: Any) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Losses, weights and the next random number of a short training with dropout."""
    torch.manual_seed(0)
    model = hf_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    model.train()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    none = contextlib.nullcontext()
    with none if every is None else watch(model, "all", every=every) as watched:
        for number in range(4):
            for part in range(2):
                loss = model(**batch(9, 5, seed=2 * number + part)).loss
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            if watched is not None:
                assert (watched.step() is not None) == (number % every == 0)
    return losses, model.state_dict(), torch.rand(3)


@pytest.mark.parametrize("every", [1, 2])
def test_training_is_bit_identical(every: int) -> None:
    losses, weights, random = trained(None)
    same_losses, same_weights, same_random = trained(every)
    assert all(map(torch.equal, losses, same_losses))
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert torch.equal(random, same_random)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = hf_model("llama", torch.float64).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    step = watched_step(model, lambda: backward(model, batch(9, 6), batch(7, 8, seed=1)))
    assert step.backward_passes.max() == 1
    for gradient in step:
        expected = weight_gradient(model, "llama", gradient.matrix, gradient.layer)
        found = dense(step, gradient.matrix, gradient.layer)
        assert relative_error(found, expected) < TOLERANCE, gradient


def test_autocast_in_bfloat16() -> None:
    model = hf_model("llama")

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(9, 6)).loss
        loss.backward()

    step = watched_step(model, run)
    for gradient in step:
        assert gradient.vjps.dtype == torch.float32
        assert torch.equal(gradient.inputs, gradient.inputs.bfloat16().float())
        expected = weight_gradient(model, "llama", gradient.matrix, gradient.layer)
        # autograd rounds its product to bfloat16, with a relative precision of 2 ** -8
        assert relative_error(dense(step, gradient.matrix, gradient.layer), expected) < 2**-8


def adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(hf_model("llama", torch.float64), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters_of_peft() -> None:
    """The adapter's own gradients follow from that of the effective weight."""
    model = adapted()
    step = watched_step(model, lambda: backward(model, batch(9, 6)))
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        for matrix, module in (("W_V", layer.self_attn.v_proj), ("W_in", layer.mlp.up_proj)):
            gradient = dense(step, matrix, index)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert relative_error(5 / 3 * gradient.T @ a.T, b.grad) < TOLERANCE
            assert relative_error(5 / 3 * b.T @ gradient.T, a.grad) < TOLERANCE
    assert set(step.unavailable) == {("W_Q", 0), ("W_K", 0)}  # nothing before them is trained
    with pytest.raises(InputError, match="step 1 has no gradient of W_Q in layer 0: every param"):
        step["W_Q", 0]


def test_hooks_exist_only_in_watched_steps() -> None:
    model = hf_model("llama")
    assert n_hooks(model) == 0
    with watch(model, "W_out", every=3) as watched:
        counts = []
        for _ in range(4):
            counts.append(n_hooks(model))
            backward(model, batch(5))
            watched.step()
        assert watched.n_steps == 4
        assert not watched.is_watching
    assert counts == [2 * N_LAYERS + 1, 0, 0, 2 * N_LAYERS + 1]  # one on the model itself
    assert n_hooks(model) == 0


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(kind: type[BaseException]) -> None:
    model = hf_model("llama")
    counts = []

    def interrupted() -> None:
        counts.append(n_hooks(model))
        raise kind

    with pytest.raises(kind):
        watched_step(model, interrupted)
    assert counts == [2 * 7 * N_LAYERS + 1]
    assert n_hooks(model) == 0


def test_evaluation_inside_a_step_adds_nothing() -> None:
    model = hf_model("llama", torch.float64)

    def run() -> None:
        backward(model, batch(9, 6))
        with torch.no_grad():
            model(**batch(7))
        model(**batch(4))  # never differentiated

    step = watched_step(model, run)
    assert len(step.positions) == 8 + 5


def test_a_graph_of_an_earlier_step_adds_nothing() -> None:
    model = hf_model("llama", torch.float64)
    with watch(model, "mlp", every=1) as watched:
        loss = model(**batch(9)).loss
        loss.backward(retain_graph=True)
        watched.step()
        loss.backward()
        backward(model, batch(5))
        second = watched.step()
    assert second is not None
    assert len(second.positions) == 4


def test_steps_of_an_earlier_run() -> None:
    model = hf_model("llama")
    with watch(model, "W_out", every=4) as watched:
        watched.resume(7)
        assert not watched.is_watching
        assert n_hooks(model) == 0
        assert watched.step() is None
        backward(model, batch(5))
        step = watched.step()
    assert step is not None
    assert step.step == 9


def test_written_inputs_are_not_used() -> None:
    model = hf_model("llama")
    down = blocks(model)[1].mlp.down_proj
    kept: list[Tensor] = []
    down.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))

    def run() -> None:
        backward(model, batch(5))
        kept[0].zero_()

    step = watched_step(model, run, "W_out")
    assert step.unavailable["W_out", 1].startswith("its inputs or their gradients were written")
    assert ("W_out", 0) in step.gradients


def test_a_layer_that_is_used_twice_as_often() -> None:
    model = hf_model("llama")
    again = blocks(model)[0].mlp.down_proj

    def run() -> None:
        backward(model, batch(5))
        again(torch.ones(1, 2, 52)).sum().backward()

    step = watched_step(model, run, "mlp")
    assert step.unavailable == {("W_out", 0): "it saw 7 positions, and most matrices 5"}


def test_scaled_losses_in_float16() -> None:
    linear = hf_model("llama").half()
    x = torch.ones(1, 3, 52, dtype=torch.float16)

    def run() -> None:
        (blocks(linear)[0].mlp.down_proj(x).sum() * 64).backward()

    with watch(linear, "W_out", layers=0) as watched:
        run()
        with pytest.raises(InputError, match=r"float16, .* pass the scale of the step"):
            watched.step()
    with watch(linear, "W_out", layers=0) as watched:
        run()
        step = watched.step(loss_scale=64.0)
    assert step is not None
    assert bool((step["W_out", 0].vjps == 1).all())


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (lambda: "gpt2", {}, InputError, "model is 'gpt2'; pass the model that is trained"),
        (Alone, {}, UnsupportedModelError, "an? Alone, has no module .* without Distributed"),
        (lambda: hf_model("llama"), {"matrices": "W_up"}, InputError, "unknown matrix 'W_up'"),
        (lambda: hf_model("llama"), {"layers": 7}, InputError, "layer 7 does not exist"),
        (lambda: hf_model("llama"), {"every": 0}, InputError, "every is 0; pass an integer"),
        (lambda: hf_model("gpt2"), {"matrices": "W_gate"}, UnsupportedModelError, "no W_gate in"),
        (lambda: hf_model("phi3"), {"matrices": "W_Q"}, UnsupportedModelError, "no W_Q in layer 0"),
        (lambda: hf_model("mixtral"), {}, UnsupportedModelError, "no matrix for 'mlp'.*experts"),
    ],
)
def test_refusals(make: Any, options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), watch(make(), **options):
        pass


def test_shared_weights_are_refused() -> None:
    model = hf_model("llama")
    first, second = (layer.mlp.down_proj for layer in blocks(model))
    second.weight = first.weight
    message = (
        r"layer 0 is one weight with 2 uses \(model.layers.0.mlp.down_proj.weight, model.layers.1"
    )
    for layers in (None, 0):  # the other module holds it whether it is watched or not
        with pytest.raises(UnsupportedModelError, match=message):
            watch(model, "W_out", layers=layers).__enter__()
    with watch(model, "W_in"):
        pass


def test_steps_without_a_gradient() -> None:
    model = hf_model("llama")
    with watch(model) as watched, pytest.raises(ModelStateError, match="no backward pass went"):
        watched.step()
    with pytest.raises(InputError, match="outside of the context"):
        watched.step()
    model.requires_grad_(False)
    with pytest.raises(ModelStateError, match="depends on is frozen"):
        watched_step(model, lambda: model(**batch(5)))


def test_residual_stream_is_not_guessed() -> None:
    model = hf_model("gemma2")  # a norm follows W_out
    step = watched_step(model, lambda: backward(model, batch(5)), "W_out")
    assert step["W_out", 0].spanning_set.shape == (1, 4, 24)
    with pytest.raises(InputError, match="resid_vjps of W_out in layer 0 is not taken"):
        _ = step["W_out", 0].resid_vjps


def test_model_is_not_changed() -> None:
    model = hf_model("llama")
    before, names = copy.deepcopy(model.state_dict()), list(dict(model.named_modules()))
    watched_step(model, lambda: backward(model, batch(5)))
    assert list(dict(model.named_modules())) == names
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_one_backward_pass_for_several_microbatches() -> None:
    """Backward passes go through them in reverse; they are numbered as they ran forwards."""
    model = hf_model("llama", torch.float64)
    first, second = batch(6, 6), batch(4, 4, seed=1)

    def run() -> None:
        (model(**first).loss + model(**second).loss).backward()

    step = watched_step(model, run, ["W_in", "W_out"])
    counts = [int((step.backward_passes == number).sum()) for number in range(2)]
    assert counts == [2 * 5, 2 * 3]  # the last token predicts nothing
    expected = weight_gradient(model, "llama", "W_in", 1)
    assert relative_error(dense(step, "W_in", 1), expected) < TOLERANCE


def test_passes_in_other_threads_keep_their_own_inputs() -> None:
    """A pass that runs between the hooks of another one, in another thread."""
    model = hf_model("llama", torch.float64)
    up = blocks(model)[0].mlp.up_proj
    losses: list[Tensor] = []
    original = up.forward

    def interrupted(x: Tensor) -> Tensor:
        up.forward = original
        thread = Thread(target=lambda: losses.append(model(**batch(6, seed=1)).loss))
        thread.start()
        thread.join()
        return original(x)

    up.forward = interrupted

    def run() -> None:
        losses.append(model(**batch(6)).loss)
        sum(losses).backward()

    step = watched_step(model, run, ["W_in", "W_out"])
    for matrix in ("W_in", "W_out"):
        expected = weight_gradient(model, "llama", matrix, 0)
        assert relative_error(dense(step, matrix, 0), expected) < TOLERANCE


def test_replicas_are_refused() -> None:
    model = hf_model("llama")
    replica: Any = model._replicate_for_data_parallel()
    with (
        watch(model),
        pytest.raises(UnsupportedModelError, match=r"replica of the watched .*DataParallel"),
    ):
        replica(**batch(5))
