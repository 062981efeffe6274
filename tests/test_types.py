"""Shapes and dtypes in the signatures are checked while the tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Case

from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.readout.projections import LogitLens
from backward_lens_tl.readout.readout import Readout


def hook_is_active() -> bool:
    """Whether jaxtyping's import hook wrapped the package."""
    return hasattr(LogitLens.project, "__wrapped__")


@pytest.fixture(scope="module", autouse=True)
def _hook(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("run pytest with --jaxtyping-packages=backward_lens_tl,beartype.beartype")
    assert hook_is_active(), "the option is given, and nothing is checked"


X, DELTA = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
MASK = torch.ones(2, 3, dtype=torch.bool)

WRONG: dict[str, Callable[[], Any]] = {
    "inputs of two axes": lambda: MatrixGradient("W_in", 0, X[0], DELTA, MASK),
    "VJPs of two axes": lambda: MatrixGradient("W_in", 0, X, DELTA[0], MASK),
    "other positions": lambda: MatrixGradient("W_in", 0, X[:, :2], DELTA, MASK),
    "other prompts": lambda: MatrixGradient("W_in", 0, X, DELTA[:1], MASK),
    "mask of numbers": lambda: MatrixGradient("W_in", 0, X, DELTA, MASK.long()),
    "mask of another shape": lambda: MatrixGradient("W_in", 0, X, DELTA, MASK[:, :2]),
    "inputs of integers": lambda: MatrixGradient("W_in", 0, X.long(), DELTA, MASK),
    "inputs that are not a tensor": lambda: MatrixGradient("W_in", 0, X.numpy(), DELTA, MASK),
    "unknown matrix": lambda: MatrixGradient("FF1", 0, X, DELTA, MASK),
    "layer of text": lambda: MatrixGradient("W_in", "0", X, DELTA, MASK),
    "ids and scores of other lengths": lambda: Readout(
        top_ids=torch.zeros(2, 3, dtype=torch.long),
        top_scores=torch.zeros(2, 4),
        bottom_ids=torch.zeros(2, 3, dtype=torch.long),
        bottom_scores=torch.zeros(2, 3),
        target_rank=torch.zeros(2, dtype=torch.long),
        answer_rank=torch.zeros(2, dtype=torch.long),
        entropy=torch.zeros(2),
        is_faint=torch.zeros(2, dtype=torch.bool),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_and_types_are_rejected(wrong: str) -> None:
    with pytest.raises(Exception, match=r"type|Type") as raised:
        WRONG[wrong]()
    module = type(raised.value).__module__
    assert module.startswith(("jaxtyping", "beartype")) or isinstance(raised.value, TypeError)


def test_right_shapes_are_accepted() -> None:
    """Negative control: only the shape is wrong above."""
    gradient = MatrixGradient("W_in", 0, X, DELTA, MASK)
    assert gradient.norms.shape == (2, 3)


def test_public_functions_are_checked() -> None:
    for function in (capture_gradients, backward_lens, target_nll):
        assert hasattr(function, "__wrapped__"), function


def test_result_has_the_promised_dtypes_and_axes(gpt2: Case) -> None:
    result = backward_lens(gpt2.model, ["Messi plays", "Rome"], " Paris", k=3)
    n = result.capture.tokens.shape[1]
    ranks, norms = result.target_rank("W_out"), result.norms("W_out")
    assert ranks.shape == norms.shape == (3, 2, n)
    assert ranks.dtype == torch.int64
    assert norms.dtype == torch.float64
    assert result.capture.mask.dtype == torch.bool
    assert result.capture.loss.shape == (2,)
    assert result.readout("W_in").top_ids.shape == (3, 2, n, 3)
