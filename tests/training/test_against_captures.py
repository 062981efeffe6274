"""The same factors as a capture of the batch, however the training runs its passes.

The capture runs another model with the same weights, in passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import build_model, hf_model
from models import HAS_BRIDGE, NO_BRIDGE, relative_error, small_tokenizer
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.training import StepGradient, watch

pytestmark = pytest.mark.skipif(not HAS_BRIDGE, reason=NO_BRIDGE)

TOLERANCE = 1e-12
"""Rounding in float64, as in test_watching.py."""

IDS = 3 + torch.arange(4 * 7).reshape(4, 7) * 5 % 80
N_MASKED = 3
"""The first tokens are a prompt, whose labels are masked."""


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over the tokens that are not masked, for each sequence."""
    logs = logits[:, N_MASKED - 1 : -1].log_softmax(-1)
    return -logs.gather(-1, tokens[:, N_MASKED:, None])[..., 0].sum(1)


def backward(model: Any, *batches: Tensor) -> None:
    for ids in batches:
        losses(model(ids).logits, ids).sum().backward()


def watched_step(model: nn.Module, run: Callable[[], object]) -> StepGradient:
    with watch(model, "all") as watched:
        run()
        step = watched.step()
    assert step is not None
    return step


def factor_errors(
    step: StepGradient, capture: GradientCapture, first: Sequence[int] = (0,)
) -> list[float]:
    """Of both factors of every matrix; `first` is the first prompt of each backward pass."""
    prompts = torch.tensor(first)[step.backward_passes] + step.sequences
    found = []
    for gradient in step:
        expected = capture[gradient.matrix, gradient.layer]
        at = prompts, step.positions
        found.append(relative_error(gradient.inputs[0], expected.inputs[at]))
        vjps = torch.zeros_like(expected.vjps, dtype=gradient.vjps.dtype)
        vjps[at] = gradient.vjps[0]  # the rows that were left out add nothing
        found.append(relative_error(vjps, expected.vjps))
    return found


def captured(model: Any) -> GradientCapture:
    return capture_gradients(model, IDS, losses, matrices="all")


@pytest.fixture(scope="module")
def capture() -> GradientCapture:
    return captured(build_model("llama", "bridge", torch.float64))


def test_masked_labels(capture: GradientCapture) -> None:
    model = hf_model("llama", torch.float64)
    step = watched_step(model, lambda: backward(model, IDS))
    assert len(step.positions) == 4 * 6
    assert max(factor_errors(step, capture)) < TOLERANCE


def test_accumulation(capture: GradientCapture) -> None:
    model = hf_model("llama", torch.float64)
    step = watched_step(model, lambda: backward(model, IDS[:1], IDS[1:]))
    assert max(factor_errors(step, capture, (0, 1))) < TOLERANCE
    assert max(factor_errors(step, capture, (0, 0))) > 0.1  # other prompts


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(capture: GradientCapture, use_reentrant: bool) -> None:
    model = hf_model("llama", torch.float64).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    step = watched_step(model, lambda: backward(model, IDS[:3], IDS[3:]))
    assert max(factor_errors(step, capture, (0, 3))) < TOLERANCE


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_autocast(capture: GradientCapture, is_checkpointed: bool) -> None:
    model = hf_model("llama").train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            total = losses(model(IDS).logits, IDS).sum()
        total.backward()

    found = factor_errors(watched_step(model, run), capture)
    # A capture switches autocast off. bfloat16 has a relative precision of 2 ** -8; two layers of
    # about five products each add up.
    assert max(found) < 10 * 2**-8
    assert max(found) > 2**-10


def with_adapter(raw: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(raw, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_" in name:
                each.copy_(0.3 * torch.randn(each.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_adapters(capture: GradientCapture, is_checkpointed: bool) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "random-llama",
        hf_model=with_adapter(hf_model("llama", torch.float64)).get_base_model(),
        tokenizer=small_tokenizer(),
        device="cpu",
        dtype=torch.float64,
    )
    model = with_adapter(hf_model("llama", torch.float64))
    if is_checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    step = watched_step(model, lambda: backward(model, IDS))
    assert max(factor_errors(step, captured(bridge.eval()))) < TOLERANCE
    assert max(factor_errors(step, capture)) > 0.01  # of the model without the adapter
