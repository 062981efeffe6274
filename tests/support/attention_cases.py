"""Attention matrices of every kind of model, with autograd's own gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Case, build
from torch import Tensor, nn

MATRICES = ("W_Q", "W_K", "W_V", "W_O")


PAIR_NAMES = ("bridge-gpt2", "bridge-llama", "hooked-gpt2", "hooked-llama")


HEADS = {"gpt2": (3, 3, 8), "llama": (4, 2, 6)}  # n_heads, key-value heads, d_head


Loss = Callable[[Tensor, Tensor], Tensor]


Key = tuple[str, int]


@functools.cache
def shared_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A random model shared by several files; every test restores what it changes."""
    case = build(name, dtype)
    tokens = case.tokens(5)
    # A bridge registers its own hooks at the first forward pass of each kind.
    case.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return case


@dataclass(frozen=True)
class Weight:
    """An attention matrix as a model stores it.

    Attributes:
        parameter: The parameter.
        bias: The bias, if there is one.
        by_head: Convert a tensor laid out like the parameter to `[head, d_in, d_out]`.
        bias_by_head: The same for the bias: `[head, d_head]`, or `[d_model]` for `W_O`.
    """

    parameter: nn.Parameter
    bias: nn.Parameter | None
    by_head: Callable[[Tensor], Tensor]
    bias_by_head: Callable[[Tensor], Tensor]


def attention_weights(model: Any) -> dict[Key, Weight]:
    """Every attention matrix, found through its module, not through the package."""
    is_bridge = hasattr(model, "original_model")
    of_one = _bridge_weight if is_bridge else _hooked_weight
    return {
        (matrix, layer): of_one(block.attn, matrix, model.cfg.d_head)
        for layer, block in enumerate(model.blocks)
        for matrix in MATRICES
    }


def _hooked_weight(attn: Any, matrix: str, d_head: int) -> Weight:
    letter = matrix[-1]
    stored = "_" if hasattr(attn, f"_{matrix}") else ""  # keys and values of grouped queries
    parameter = getattr(attn, f"{stored}W_{letter}")
    bias = getattr(attn, f"{stored}b_{letter}")
    return Weight(parameter, bias, lambda tensor: tensor, lambda tensor: tensor)


def _bridge_weight(attn: Any, matrix: str, d_head: int) -> Weight:
    linear = getattr(attn, matrix[-1].lower()).original_component
    transposed = isinstance(linear, nn.Linear)

    def by_head(tensor: Tensor) -> Tensor:
        return divided(tensor.T if transposed else tensor, matrix, d_head)

    def bias_by_head(tensor: Tensor) -> Tensor:
        return tensor if matrix == "W_O" else torch.stack(tensor.split(d_head))

    return Weight(linear.weight, linear.bias, by_head, bias_by_head)


def divided(matrix: Tensor, name: str, d_head: int) -> Tensor:
    """Cut `[d_in, d_out]` into heads, `[head, d_in, d_out]`."""
    return torch.stack(matrix.split(d_head, dim=0 if name == "W_O" else 1))


def loss_of(model: Any, tokens: Tensor, loss: Loss) -> Tensor:
    """The sum of the prompts' losses; no token is masked."""
    logits = model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return loss(logits, tokens).sum()
