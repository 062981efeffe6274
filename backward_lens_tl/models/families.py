"""How model families differ inside a `TransformerBridge`. To add a family, extend this file.

TransformerLens gives the blocks of all families the same names. Families still differ in the names
of an MLP's projections, in projections that are fused, in the layout of stacked experts, and in
rotary angles that depend on the length of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.sites import MatrixName, StackedExperts

MLP_PROJECTIONS: dict[MatrixName, tuple[str, ...]] = {
    "W_in": ("dense_in", "in"),
    "W_gate": ("dense_gate", "gate"),
    "W_out": ("dense_out", "out"),
}
"""Names of an MLP's projections; the first are those of dense layers in mixtures of experts."""

FUSED = ("qkv", "gate_up", "gate_up_proj")
"""Projections that a bridge splits into separate linear modules, and no longer uses."""


def unwrapped(component: Any) -> Any:
    """The Hugging Face module inside a bridge's component."""
    while (inner := getattr(component, "original_component", None)) is not None:
        component = inner
    return component


def linear_of(projection: Any) -> Any:
    """The Hugging Face module of a projection, or `None` if there is no such projection."""
    found = getattr(projection, "original_component", None)
    return None if getattr(found, "weight", None) is None else found


def mlp_projections(mlp: Any, layer: int) -> dict[MatrixName, Any]:
    """The projections of a dense or gated MLP.

    Args:
        mlp: The bridge's component.
        layer: Its layer, for the message.

    Returns:
        The bridge's components by matrix.

    Raises:
        UnsupportedModelError: If it is not such an MLP.
    """
    found = {
        matrix: projection
        for matrix, names in MLP_PROJECTIONS.items()
        for name in names
        if linear_of(projection := getattr(mlp, name, None)) is not None
    }
    if not {"W_in", "W_out"} <= found.keys():
        raise UnsupportedModelError(
            f"layer {layer} has no dense or gated MLP "
            f"({'none at all' if mlp is None else type(mlp).__name__})"
        )
    return found


def processed_copies(mlp: nn.Module) -> dict[int, Tensor]:
    """Tensors that a gated MLP with processed weights multiplies by instead of its parameters.

    Args:
        mlp: The bridge's component.

    Returns:
        The tensors, by the `id` of the parameter that each one replaces.
    """
    copies: dict[int, Tensor] = {}
    for matrix, names in MLP_PROJECTIONS.items():
        linear = linear_of(getattr(mlp, names[-1], None))
        for kind, letter in (("weight", "W"), ("bias", "b")):
            replaced = getattr(linear, kind, None)
            own = vars(mlp).get(f"_processed_{letter}{matrix[1:]}")
            if replaced is not None and isinstance(own, Tensor):
                copies[id(replaced)] = own
    return copies


def expert_stack(experts: Any, layer: int) -> StackedExperts:
    """Read the layout of stacked experts from the flags that transformers 5 sets on them.

    Args:
        experts: The Hugging Face module.
        layer: Its layer, for the message.

    Returns:
        The experts.

    Raises:
        UnsupportedModelError: If it is not a stack of gated MLPs.
    """
    needed = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "_apply_gate")
    if (
        not all(hasattr(experts, name) for name in (*needed, "gate_up_proj", "down_proj"))
        or not experts.has_gate
        or getattr(experts, "has_post_expert_norm", False)
        or getattr(experts, "_is_expert_parallel", False)
    ):
        raise UnsupportedModelError(
            f"the experts of layer {layer} ({type(experts).__name__}) are not a stack of gated "
            "MLPs in the layout of transformers 5, so their factors cannot be derived; pass "
            "matrices='attn'"
        )
    w_in, w_out = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    columns = torch.arange(w_in.shape[-1], device=w_in.device)
    half = w_in.shape[-1] // 2
    return StackedExperts(
        module=experts,
        w_in=w_in,
        b_in=experts.gate_up_proj_bias if experts.has_bias else None,
        w_out=w_out,
        b_out=experts.down_proj_bias if experts.has_bias else None,
        activate=experts._apply_gate,
        gate=columns < half if experts.is_concatenated else columns % 2 == 0,
    )


def rotary_limits(modules: Iterable[nn.Module]) -> dict[str, list[int]]:
    """Lengths above which rotary angles depend on the length of the forward pass.

    Args:
        modules: All modules of the model.

    Returns:
        The lengths by kind: `"dynamic"` NTK scaling, where angles also depend on earlier passes,
        and `"longrope"`, where they depend on the longest prompt of the pass.
    """
    found: dict[str, set[int]] = {"dynamic": set(), "longrope": set()}
    for module in modules:
        rotary: Any = module
        own = getattr(rotary, "rope_type", None)
        for layer_type, kind in (own if isinstance(own, dict) else {None: own}).items():
            if isinstance(kind, str) and "dynamic" in kind:
                found["dynamic"].add(int(rotary.original_max_seq_len))
            elif kind == "longrope":
                found["longrope"].add(_original_context(rotary, layer_type))
    return {kind: sorted(limits) for kind, limits in found.items()}


def _original_context(rotary: Any, layer_type: str | None) -> int:
    """Length above which LongRoPE uses its long factors."""
    settings = getattr(rotary.config, "rope_parameters", None) or rotary.config.rope_scaling
    settings = settings if layer_type is None else settings[layer_type]
    name = "original_max_position_embeddings"
    return int(settings.get(name) or getattr(rotary.config, name))
