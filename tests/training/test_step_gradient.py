"""What a step's gradients share and keep."""

from __future__ import annotations

from typing import Any

import torch
from architectures import LLAMA_MODULES, hf_model
from models import relative_error

from backward_lens_tl.training import StepGradient, watch

TOLERANCE = 1e-12
"""Rounding in float64, as in test_watching.py."""

IDS = torch.arange(3, 15).reshape(2, 6)
READERS = {matrix: LLAMA_MODULES[matrix] for matrix in ("W_Q", "W_in", "W_gate")}


def watched_step(model: Any, matrices: Any, n_passes: int = 1) -> StepGradient:
    with watch(model, matrices) as watched:
        for _ in range(n_passes):
            model(IDS, labels=IDS).loss.backward()
        step = watched.step()
    assert step is not None
    return step


def check(model: Any, step: StepGradient, matrices: dict[str, str]) -> None:
    for layer, block in enumerate(model.model.layers):
        for matrix, name in matrices.items():
            expected = block.get_submodule(name).weight.grad.T
            found = step[matrix, layer]
            inputs, vjps = found.inputs[0], found.vjps[0].flatten(1)
            assert relative_error(inputs.T @ vjps, expected) < TOLERANCE


def test_matrices_with_the_same_input_share_it() -> None:
    """One copy in memory, for one pass and for several."""
    for n_passes in (1, 2):
        model = hf_model("llama", torch.float64)
        step = watched_step(model, list(READERS), n_passes)
        check(model, step, READERS)
        for layer in range(2):
            own, shared = step["W_in", layer].inputs, step["W_gate", layer].inputs
            assert own is shared
            assert step["W_Q", layer].inputs is not own


def test_under_autocast_an_input_is_rounded_once() -> None:
    model = hf_model("llama")
    with watch(model, list(READERS)) as watched:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        step = watched.step()
    assert step is not None
    for layer in range(2):
        assert step["W_in", layer].inputs is step["W_gate", layer].inputs


def test_an_input_that_a_hook_replaces_is_not_shared() -> None:
    model = hf_model("llama", torch.float64)
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: 2 * args[0])
    step = watched_step(model, ["W_in", "W_gate"])
    check(model, step, {"W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj"})
    own, doubled = (step[matrix, 0].inputs for matrix in ("W_in", "W_gate"))
    assert relative_error(doubled, 2 * own) < TOLERANCE


def test_factors_are_not_views_of_the_tensors_of_training() -> None:
    """A gradient of few rows would otherwise keep those of the whole batch."""
    model = hf_model("llama", torch.float64)
    step = watched_step(model, "mlp")
    for gradient in step:
        for factor in (gradient.inputs, gradient.vjps):
            assert factor.untyped_storage().nbytes() == factor.numel() * 8
            assert factor.shape[1] == 10  # without the last position of each sequence
