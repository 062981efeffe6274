"""Jacobian Lenses for the tests: objects with the attributes of TransformerLens's class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class OwnLens:
    """An object with the attributes of TransformerLens's `JacobianLens`, which 2.18 lacks."""

    def __init__(
        self, jacobians: Mapping[int, Any], n_prompts: int = 1, metadata: Any = None
    ) -> None:
        self.jacobians = dict(jacobians)
        self.n_prompts = n_prompts
        self.d_model = len(next(iter(jacobians.values())))
        self.metadata = metadata or {}


def identity_lens(model: Any, dtype: torch.dtype = torch.float32) -> OwnLens:
    """`J_l = I` in all layers."""
    layers = range(model.cfg.n_layers - 1)
    return OwnLens({layer: torch.eye(model.cfg.d_model, dtype=dtype) for layer in layers})


def random_lens(model: Any, seed: int = 0) -> OwnLens:
    """Matrices that are neither symmetric nor alike."""
    generator = torch.Generator().manual_seed(seed)
    width = model.cfg.d_model
    return OwnLens(
        {
            layer: torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
            for layer in range(model.cfg.n_layers - 1)
        }
    )


def slow_jacobians(
    model: Any, tokens: Tensor, skip: int, change: Callable[[int, Tensor], Tensor] | None = None
) -> OwnLens:
    """The estimator of TransformerLens's `fit` on one prompt, entry by entry, from its definition.

    `J_l[a, b]` is the average over source positions `t` of `d sum_{t' >= t} h_final[t', a] /
    d h_l[t, b]`, with both positions among those after the first `skip` and before the last.
    """
    n_layers, width = model.cfg.n_layers, model.cfg.d_model
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., Tensor]:
        def hook(stream: Tensor, hook: Any) -> Tensor:
            if layer == 0:
                stream = stream.detach().requires_grad_()
            streams[layer] = stream
            return stream

        return hook

    hooks = [(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in range(n_layers)]
    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    found = {
        layer: torch.zeros(width, width, dtype=streams[0].dtype) for layer in range(n_layers - 1)
    }
    valid = range(skip, tokens.shape[1] - 1)
    for entry in range(width):
        for target in valid:
            gradients = torch.autograd.grad(
                streams[n_layers - 1][0, target, entry],
                [streams[layer] for layer in found],
                retain_graph=True,
            )
            for layer, gradient in zip(found, gradients, strict=True):
                found[layer][entry] += gradient[0, list(valid)].sum(0) / len(valid)
    return OwnLens(found)
