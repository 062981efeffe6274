"""Gradients of all weights of small models in float64, from autograd, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from architecture_table import find_weight, loss, matrices_of, weight_gradients
from architectures import N_LAYERS, NotAvailable, build_model
from torch import Tensor

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import next_token_loss
from backward_lens_tl.capture.plan import capture_gradients

FAMILIES = [
    ("gpt2", "hooked"),
    ("gpt2", "bridge"),
    ("llama", "hooked"),  # grouped queries, wide heads
    ("llama", "bridge"),
    ("mixtral", "hooked"),  # experts, each a module
    ("mixtral", "bridge"),  # experts in one parameter
]
TEXTS = ["Rome is in Italy and Paris is not.", "Messi plays the ball.", "The king of France"]
"""Prompts of three lengths."""


@dataclass(frozen=True)
class Dense:
    """A model, its capture, and the dense gradients.

    Attributes:
        model: The model.
        capture: The gradients of `TEXTS`.
        gradients: By matrix and layer: one tensor `[*head_or_expert, d_in, d_out]` per prompt.
    """

    model: Any
    capture: GradientCapture
    gradients: dict[tuple[str, int], list[Tensor]]


@cache
def dense(family: str, kind: str) -> Dense:
    """The gradients of the mean next-token loss of `TEXTS`; skips where there is no such model."""
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    capture = capture_gradients(model, TEXTS, next_token_loss(), matrices="all")
    keys = [(matrix, layer) for layer in range(N_LAYERS) for matrix in matrices_of(family)]
    weights = [find_weight(model, family, *key) for key in keys]
    by_prompt = [
        weight_gradients(model, weights, row[real][None], loss)
        for row, real in zip(capture.tokens, capture.mask, strict=True)
    ]
    gradients = {key: [each[place] for each in by_prompt] for place, key in enumerate(keys)}
    return Dense(model, capture, gradients)


def joined(gradient: Tensor, matrix: str) -> Tensor:
    """`[d_in, d_out]` of a gradient `[head, d_in, d_out]`, heads concatenated."""
    if gradient.ndim == 2:
        return gradient
    return torch.cat(list(gradient), dim=0 if matrix == "W_O" else 1)
