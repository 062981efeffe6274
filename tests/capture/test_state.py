"""A caller's state is unchanged after a run and after an error half way.

`test_notebook_states.py` tests Ctrl-C at every stage.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from model_state import assert_same, make_busy, snapshot
from models import Case, build
from torch import Tensor

from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.validation import validate

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]


NAMES = ["bridge-gpt2", "bridge-llama", "hooked-gpt2", "hooked-llama"]


@pytest.fixture(scope="module", params=NAMES)
def busy(request: pytest.FixtureRequest) -> Case:
    """A model in use by a caller: gradients, frozen parameters, hooks, mixed modes."""
    return make_busy(build(request.param))


CALLS: dict[str, Callable[[Case], object]] = {
    "capture": lambda case: capture_gradients(case.model, case.tokens(4), target_nll(5)),
    "lens": lambda case: backward_lens(
        case.model, ["Messi plays for", "Rome"], " Paris", prepend_bos=True
    ),
    "own answer": lambda case: backward_lens(case.model, "Rome is", projection="normalized"),
    "validate": lambda case: validate(case.model),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_changes(busy: Case, call: str) -> None:
    before = snapshot(busy.model)
    assert any(grad is not None for grad in before["grads"].values())
    CALLS[call](busy)
    assert_same(before, snapshot(busy.model))


def test_nothing_changes_without_grad(busy: Case) -> None:
    with torch.no_grad():
        before = snapshot(busy.model)
        for call in CALLS.values():
            call(busy)
            assert not torch.is_grad_enabled()
        assert_same(before, snapshot(busy.model))


def test_two_runs_are_equal_bit_for_bit(busy: Case) -> None:
    first = backward_lens(busy.model, "Messi plays for", " Paris")
    second = backward_lens(busy.model, "Messi plays for", " Paris")
    for gradient in first.capture:
        again = second.capture[gradient.matrix, gradient.layer]
        assert torch.equal(again.vjps, gradient.vjps)
        assert torch.equal(again.inputs, gradient.inputs)
    assert torch.equal(first.readout("W_out").top_ids, second.readout("W_out").top_ids)


class Stop(Exception):
    """Raised by a caller's code."""


def raises_stop(logits: Tensor, tokens: Tensor) -> Tensor:
    raise Stop


class BadProjection:
    def project(self, vectors: Tensor, layer: int) -> Tensor:
        raise Stop


class ShapelessProjection:
    def project(self, vectors: Tensor, layer: int) -> Tensor:
        return vectors


FAILING: dict[str, tuple[type[BaseException], Callable[[Any], object]]] = {
    "objective raises": (Stop, lambda m: capture_gradients(m, "Rome", raises_stop)),
    "objective raises in validate": (Stop, lambda m: validate(m, "Rome", objective=raises_stop)),
    "objective of a wrong shape": (
        BackwardLensError,
        lambda m: capture_gradients(m, "Rome", lambda logits, tokens: logits.sum()),
    ),
    "objective without a gradient": (
        BackwardLensError,
        lambda m: capture_gradients(m, "Rome", lambda logits, tokens: logits.detach()[:, 0, 0]),
    ),
    "projection raises": (Stop, lambda m: backward_lens(m, "Rome", 5, projection=BadProjection())),
    "projection of a wrong shape": (
        BackwardLensError,
        lambda m: backward_lens(m, "Rome", 5, projection=ShapelessProjection()),
    ),
    "position that is not there": (
        BackwardLensError,
        lambda m: backward_lens(m, "Rome", 5, positions=50),
    ),
    "k is zero": (BackwardLensError, lambda m: backward_lens(m, "Rome", 5, k=0)),
    "target of several tokens": (
        BackwardLensError,
        lambda m: backward_lens(m, "Rome", " river of Rome"),
    ),
    "layer that is not there": (BackwardLensError, lambda m: backward_lens(m, "Rome", layers=9)),
}


@pytest.mark.parametrize("how", FAILING)
def test_nothing_changes_when_it_fails(busy: Case, how: str) -> None:
    error, call = FAILING[how]
    before = snapshot(busy.model)
    with pytest.raises(error):
        call(busy.model)
    assert_same(before, snapshot(busy.model))


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_the_snapshot_sees_every_kind_of_change(name: str) -> None:
    """Negative control of this file."""
    model = make_busy(build(name)).model
    parameter = next(p for p in model.parameters() if p.grad is not None and p.requires_grad)

    def change_value() -> None:
        with torch.no_grad():
            parameter.flatten()[0].add_(1e-15)

    changes: list[Callable[[], object]] = [
        change_value,
        lambda: parameter.requires_grad_(False),
        lambda: model.blocks[0].mlp.train(),
        lambda: torch.rand(1),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: model.blocks[0].register_forward_hook(lambda *_: None),
        lambda: model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value),
        lambda: setattr(parameter, "grad", None),
        lambda: setattr(model.blocks[0], "_captured", 1),
    ]
    for change in changes:
        before = snapshot(model)
        change()
        with pytest.raises(AssertionError):
            assert_same(before, snapshot(model))


def test_no_tensor_is_kept_alive_by_the_model(gpt2: Case) -> None:
    """Tensors of a capture are freed with it."""
    capture = capture_gradients(gpt2.model, gpt2.tokens(4), target_nll(5))
    held = weakref.ref(capture["W_in", 0].inputs), weakref.ref(capture["W_out", 0].vjps)
    del capture
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_an_error_leaves_hooks_that_a_later_run_can_use(busy: Case) -> None:
    expected = capture_gradients(busy.model, busy.tokens(4), target_nll(5))
    with suppress(Stop):
        capture_gradients(busy.model, busy.tokens(4), raises_stop)
    found = capture_gradients(busy.model, busy.tokens(4), target_nll(5))
    assert torch.equal(found["W_in", 0].vjps, expected["W_in", 0].vjps)
