"""Gradients of activations: at hook points, and through the attention pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError, UnsupportedModelError

HookFunction = Callable[[Tensor, object], Tensor]


@dataclass(frozen=True, repr=False)
class HookPointGradient:
    """The activation at one hook point, and its gradient.

    Attributes:
        name: TransformerLens's name of the hook point.
        value: The activation as hooks see it, after every edit.
        vjp: The gradient of each prompt's loss with respect to it.
    """

    name: str
    value: Float[Tensor, "batch *shape"]
    vjp: Float[Tensor, "batch *shape"]

    def __repr__(self) -> str:
        return f"HookPointGradient({self.name}, {list(self.vjp.shape)})"


@dataclass(frozen=True, repr=False)
class AttentionGradient:
    """The backward pass through the attention pattern of one layer.

    With the pattern `A` that the softmax gave and the gradient `E` there, which is `delta_z V^T`
    unless a caller's hook comes in between, the gradient at the softmax's scores is
    `A * (E - rowsum(A * E))`, also for attention sinks, softcaps and masks. Reversed Attention is
    that divided by `sqrt(d_head)` (Katz and Wolf, NAACL 2025, arXiv 2412.17019).

    Attributes:
        scores_vjp: The gradient at the scores; zero where attention is masked.
        d_head: Width of an attention head.
        is_patchable: Whether the model goes on with what a hook makes of its pattern.
    """

    scores_vjp: Float[Tensor, "batch head query key"]
    d_head: int
    is_patchable: bool

    @property
    def reversed_attention(self) -> Float[Tensor, "batch head query key"]:
        """Reversed Attention, `scores_vjp / sqrt(d_head)`."""
        return self.scores_vjp / math.sqrt(self.d_head)

    def __repr__(self) -> str:
        return f"AttentionGradient({list(self.scores_vjp.shape)})"


def attention_patch(
    attention: AttentionGradient, layer: int, scale: float
) -> tuple[str, HookFunction]:
    """A hook that adds Reversed Attention to the attention pattern of a forward pass.

    Args:
        attention: The backward pass through the pattern.
        layer: Its layer, from 0.
        scale: What Reversed Attention is multiplied by.

    Returns:
        The name of the hook point and the hook; it takes a pattern of the same prompts, or one
        prompt's for any number of copies.

    Raises:
        InputError: If `scale` is no finite number; by the hook, if the pattern is of other prompts.
        UnsupportedModelError: If the model does not go on with what a hook makes of its pattern.
    """
    if not attention.is_patchable:
        raise UnsupportedModelError(
            f"layer {layer} computes attention where a hook cannot reach it: what a hook at "
            "hook_pattern returns is dropped, so there is nothing to patch"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(f"scale is {scale!r}; pass a finite number")
    added = float(scale) * attention.reversed_attention

    def add(pattern: Tensor, hook: object) -> Tensor:
        del hook
        shape = tuple(getattr(pattern, "shape", ()))
        same_prompts = len(added) == 1 or shape[:1] == added.shape[:1]
        if not same_prompts or shape[1:] != added.shape[1:]:
            raise InputError(
                f"the pattern of layer {layer} is {type(pattern).__name__} of shape {shape}, and "
                f"Reversed Attention has {tuple(added.shape)}; run the model on the prompts that "
                "it was made from"
            )
        return pattern + added.to(pattern)

    return f"blocks.{layer}.attn.hook_pattern", add


def attribution(here: HookPointGradient, there: HookPointGradient) -> Float[Tensor, "batch *shape"]:
    """What a patch of one hook point would change, to first order.

    Args:
        here: The run that would be patched.
        there: The run that the patch comes from.

    Returns:
        `(there - here) . delta`, summed over the last axis.

    Raises:
        InputError: If the two differ in shape.
    """
    if here.value.shape != there.value.shape:
        raise InputError(
            f"{here.name} has shape {tuple(here.value.shape)} here and {tuple(there.value.shape)} "
            "there; both captures have to be of one model"
        )
    # Masked scores are minus infinity in both runs, and their gradient is zero.
    return ((there.value - here.value) * here.vjp).masked_fill(here.vjp == 0, 0).sum(-1)
