"""Mixtures of experts under edits of their routing, and the check of derived factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model
from models import relative_error
from torch import Tensor

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.validation import validate

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

TOKENS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
MATRICES = ("W_in", "W_gate", "W_out")


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return -chosen.mean((1, 2))


def mixture(kind: str, dtype: torch.dtype = torch.float64, family: str = "mixtral") -> Any:
    try:
        return build_model(family, kind, dtype)
    except NotAvailable as reason:
        pytest.skip(str(reason))


def stack_of(model: Any, layer: int) -> Any:
    """The module that holds all experts of a bridge's layer."""
    module = model.blocks[layer].mlp
    while hasattr(module, "original_component"):
        module = module.original_component
    return module.experts


@contextmanager
def all_to_expert_0(model: Any, kind: str) -> Iterator[None]:
    """Route both slots of every token of layer 0 to expert 0."""
    if kind == "hooked":
        point = "blocks.0.mlp.hook_expert_indices"
        with model.hooks(fwd_hooks=[(point, lambda chosen, hook: torch.zeros_like(chosen))]):
            yield
        return

    def rerouted(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], torch.zeros_like(args[1]), *args[2:])

    handle = stack_of(model, 0).register_forward_pre_hook(rerouted)
    try:
        yield
    finally:
        handle.remove()


def expert_weights(model: Any, kind: str, matrix: str) -> tuple[list[Tensor], Any]:
    """Return parameters of a matrix in layer 0, and a function that groups gradients by expert."""
    if kind == "hooked":
        experts = model.blocks[0].mlp.experts
        weights = [getattr(expert, matrix).weight for expert in experts]
        return weights, lambda gradients: torch.stack([gradient.T for gradient in gradients])
    stack = stack_of(model, 0)
    if matrix == "W_out":
        return [stack.down_proj], lambda gradients: gradients[0].transpose(1, 2)
    half = slice(52, None) if matrix == "W_in" else slice(0, 52)
    return [stack.gate_up_proj], lambda gradients: gradients[0][:, half].transpose(1, 2)


def captured(model: Any) -> GradientCapture:
    return capture_gradients(model, TOKENS, loss, matrices="mlp", layers=0)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_an_expert_in_both_slots_of_a_token(kind: str) -> None:
    model = mixture(kind)
    with all_to_expert_0(model, kind):
        capture = captured(model)
        value = loss(model(TOKENS), TOKENS).sum()
    for matrix in MATRICES:
        weights, laid_out = expert_weights(model, kind, matrix)
        own = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
        gradient = capture[matrix, 0]
        found = gradient.dense(0) + gradient.dense(1)
        assert relative_error(found, laid_out(own)) <= 1e-12
        assert not found[1:].any()
        assert gradient.expert(0).mask.all()


# Stacks are stored as [expert, d_out, d_in] in Mixtral and as [expert, d_in, d_out] in gpt-oss.
@pytest.mark.parametrize(
    ("family", "kind"), [("mixtral", "hooked"), ("mixtral", "bridge"), ("gpt_oss", "bridge")]
)
def test_validate_groups_autograds_gradients_by_expert(family: str, kind: str) -> None:
    report = validate(mixture(kind, family=family), TOKENS, objective=loss, matrices="mlp")
    assert report.passed
    assert {error.matrix for error in report.errors} == set(MATRICES)
    assert max(error.relative_error for error in report.errors) < 1e-12


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_an_experts_vjps_at_the_residual_stream_equal_the_layers(kind: str) -> None:
    """The routing weight is in `vjps`, not in `resid_vjps`, for one expert as for all."""
    gradient = captured(mixture(kind))["W_out", 0]
    for index in range(4):
        expert = gradient.expert(index)
        expected = gradient.resid_vjps.masked_fill(~expert.mask[..., None], 0)
        torch.testing.assert_close(expert.resid_vjps, expected, rtol=0, atol=0)
        if expert.mask.any():
            assert not torch.allclose(expert.vjps, expert.resid_vjps)


def test_one_expert_with_vjps_that_its_slots_share() -> None:
    """Against a loop over positions and slots; one token is routed twice to the same expert."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([[[0, 2], [1, 1], [1, 0]]])
    inputs = torch.randn(1, 3, 2, 5, generator=generator, dtype=torch.float64)
    inputs[0, 1, 1] = inputs[0, 1, 0]
    vjps = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    gradient = MatrixGradient("W_out", 0, inputs, vjps, mask, experts=experts, n_experts=3)
    for index in range(3):
        expected = torch.zeros(5, 4, dtype=torch.float64)
        for position in range(3):
            for slot in range(2):
                if experts[0, position, slot] == index:
                    expected += torch.outer(inputs[0, position, slot], vjps[0, position])
        expert = gradient.expert(index)
        assert expert.vjps.shape == vjps.shape
        torch.testing.assert_close(expert.dense(0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_stack_that_computes_something_else_is_refused(dtype: torch.dtype) -> None:
    model = mixture("bridge", dtype)
    for layer in range(2):
        # The fused kernel does not support half precision at these sizes.
        stack_of(model, layer).config._experts_implementation = "eager"
    assert captured(model)["W_in", 0].n_experts == 4
    stack = stack_of(model, 0)
    forward = stack.forward
    stack.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="do not compute a gated MLP"):
        captured(model)


def test_a_stack_with_zero_output_is_accepted() -> None:
    model = mixture("bridge", torch.float32)
    with torch.no_grad():
        stack_of(model, 0).down_proj.zero_()
    gradient = captured(model)["W_in", 0]
    assert gradient.is_zero.all()


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_write_norms_of_experts(kind: str) -> None:
    """Each expert has a block of its own: the norm of a position's term in all of them."""
    capture = capture_gradients(mixture(kind), TOKENS, loss, matrices="mlp")
    for gradient in capture:
        for position in range(TOKENS.shape[1]):
            alone = torch.zeros_like(gradient.vjps)
            alone[:, position] = gradient.vjps[:, position]
            term = replace(gradient, vjps=alone).dense(1)
            found = float(gradient.write_norms[1, position])
            assert found == pytest.approx(float(term.norm()), rel=1e-9)
