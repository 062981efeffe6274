"""Gradients of activations: at hook points, and through the attention pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import checked_number
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

    With the softmax's output `A` and the gradient `E` there (`delta_z V^T` unless a caller's hook
    comes in between), the gradient at the softmax's scores is `A * (E - rowsum(A * E))`, even with
    attention sinks, softcaps and masks. Reversed Attention is this divided by `sqrt(d_head)` (Katz
    and Wolf, NAACL 2025, arXiv 2412.17019).

    Attributes:
        scores_vjp: The gradient at the scores; zero where attention is masked.
        d_head: Width of a head.
        is_patchable: Whether the model uses the pattern that a hook returns.
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
        scale: Factor of Reversed Attention.

    Returns:
        The name of the hook point and the hook. The hook expects a pattern of the same prompts, or
        of any number of copies of a single one.

    Raises:
        InputError: If `scale` is not a finite number; in the hook, if the pattern has another
            shape.
        UnsupportedModelError: If the model does not use the pattern that a hook returns.
    """
    if not attention.is_patchable:
        raise UnsupportedModelError(
            f"layer {layer} does not use what a hook at hook_pattern returns, so it cannot be "
            "patched; load the model as a HookedTransformer"
        )
    added = checked_number("scale", scale) * attention.reversed_attention

    def add(pattern: Tensor, hook: object) -> Tensor:
        del hook
        shape = tuple(getattr(pattern, "shape", ()))
        same_prompts = len(added) == 1 or shape[:1] == added.shape[:1]
        if not same_prompts or shape[1:] != added.shape[1:]:
            raise InputError(
                f"the pattern of layer {layer} is a {type(pattern).__name__} of shape {shape}, but "
                f"Reversed Attention has {tuple(added.shape)}; run the model on the prompts that "
                "were captured"
            )
        return pattern + added.to(pattern)

    return f"blocks.{layer}.attn.hook_pattern", add


def attribution(here: HookPointGradient, there: HookPointGradient) -> Float[Tensor, "batch *shape"]:
    """First-order change of the loss under a patch of one hook point.

    Args:
        here: The run that is patched.
        there: The run that the patch comes from.

    Returns:
        `(there - here) . delta`, summed over the last axis.

    Raises:
        InputError: If the two differ in shape.
    """
    if here.value.shape != there.value.shape:
        raise InputError(
            f"{here.name} has shape {tuple(here.value.shape)} here and {tuple(there.value.shape)} "
            "there; both captures must be of the same model"
        )
    # Masked scores are minus infinity in both runs, and their gradient is zero.
    return ((there.value - here.value) * here.vjp).masked_fill(here.vjp == 0, 0).sum(-1)
