"""Captures recorded pass by pass, and how to compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    HAS_BRIDGE,
    HAS_HOOKED,
)
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.result import BackwardLensResult

# With BOS 5, 17, 2 and 4 tokens: the first and the last share a padded pass.
PROMPTS = ["Messi plays for", "The capital of France is the dog of the king in", "Rome", "Paris is"]


TARGETS = [" Paris", " the", " is", " Paris"]


# 10, 9 and 10 tokens: one padded pass, with a different last position for each prompt.
ALIKE = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(3))


# Both runs compute the same sums in float64; attention adds different numbers of masked zeros.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


# HF's RMS norms round to float32, so a difference of one rounding there is 1e-7.
CLOSE_IN_FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def values(capture: GradientCapture) -> dict[str, Tensor]:
    """Every tensor of a capture, by a name; a prefix says which axes are positions."""
    found = {"pos tokens": capture.tokens, "pos mask": capture.mask, "loss": capture.loss}
    if capture.targets is not None:
        found["pos targets"] = capture.targets
    for name, value in vars(capture.predictions).items():
        found[name] = value
    found["prompt_lengths"] = capture.prompt_lengths
    for gradient in capture:
        at = f"pos {gradient.matrix} {gradient.layer}"
        for name in (
            "inputs",
            "vjps",
            "mask",
            "norms",
            "write_norms",
            "is_zero",
            "experts",
            "joined_vjps",
        ):
            if (value := getattr(gradient, name)) is not None:
                found[f"{at} {name}"] = value
        if not gradient.reads_residual:
            found[f"{at} resid_vjps"] = gradient.resid_vjps
    for layer, attention in capture.attention.items():
        found[f"query key {layer} scores"] = attention.scores_vjp
        found[f"query key {layer} reversed"] = attention.reversed_attention
    return found


def read_values(result: BackwardLensResult) -> dict[str, Tensor]:
    """Every tensor of a result other than its capture, `[batch, pos, ...]`."""
    found = {"pos positions": result.positions}
    for matrix in result.matrices:
        readout = result.readout(matrix)
        by_layer = {
            name: getattr(readout, name)
            for name in ("top_ids", "top_scores", "bottom_ids", "bottom_scores", "target_rank")
        } | {"norms": result.norms(matrix), "is_zero": result.is_zero(matrix)}
        for name, value in by_layer.items():
            found[f"pos {matrix} {name}"] = value.transpose(0, 1).transpose(1, 2)
    return found


def assert_equal(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], close: dict[str, Any]
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        if value.is_floating_point():
            torch.testing.assert_close(
                found[name], value, **close, equal_nan=True, msg=partial("{}: {}".format, name)
            )
        else:
            assert torch.equal(found[name], value), name


def noop(*_: object) -> None:
    return None


@contextmanager
def in_one_pass(model: Any) -> Iterator[None]:
    """Force a single pass with a no-op hook."""
    handle = model.blocks[0].register_forward_hook(noop)
    try:
        yield
    finally:
        handle.remove()


def model_classes() -> list[Any]:
    """Model classes of the installed TransformerLens."""
    found: list[Any] = []
    if HAS_BRIDGE:
        from transformer_lens.model_bridge import TransformerBridge

        found.append(TransformerBridge)
    if HAS_HOOKED:
        from transformer_lens import HookedTransformer

        found.append(HookedTransformer)
    return found


def record_forward(monkeypatch: pytest.MonkeyPatch, see: Callable[[Tensor], object]) -> None:
    """Pass the tokens of every forward pass of any model to a function, without a hook."""

    def watch(kind: Any) -> None:
        forward = kind.forward

        def watched(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            see(input)
            return forward(self, input, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", watched)

    for kind in model_classes():
        watch(kind)


def has_much_padding(lengths: list[int]) -> bool:
    return 5 * (len(lengths) * max(lengths) - sum(lengths)) > sum(lengths)
