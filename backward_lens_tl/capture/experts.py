"""Factors of stacked experts, derived from the input and output of the whole stack.

For a token `t` and one of its slots `s` with expert `e` and router weight `p[t, s]`,

    z = x[t] @ W_in[e] + b_in[e]
    a = activate(z)
    y[t] = sum_s p[t, s] * (a @ W_out[e] + b_out[e])

so with `delta[t]`, the VJP at `y[t]`, the VJP at the output of `W_out[e]` is `p[t, s] * delta[t]`
(its input is `a`), and the VJP at `z` is that pulled back through `W_out[e]` and `activate`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.sites import READING_MATRICES, StackedExpertsSite

_ROUNDING = 8
"""Allowed relative error of the derived output, in `eps`."""


def stacked_factors(
    site: StackedExpertsSite,
    inputs: Float[Tensor, "tokens d_model"],
    chosen: Int[Tensor, "tokens slot"],
    routing: Float[Tensor, "tokens slot"],
    outputs: Float[Tensor, "tokens d_model"],
    vjps: Float[Tensor, "tokens d_model"],
) -> tuple[Float[Tensor, "tokens *slot d_in"], Float[Tensor, "tokens slot d_out"]]:
    """Derive the factors of one matrix for every token and slot.

    Args:
        site: The matrix.
        inputs: The stack's inputs.
        chosen: Each token's experts.
        routing: The router's weights.
        outputs: The stack's outputs.
        vjps: The VJPs at its outputs.

    Returns:
        Inputs, `[tokens, d_model]` for reading matrices, which share them, or
        `[tokens, slot, d_mlp]`; VJPs, `[tokens, slot, d_out]`.

    Raises:
        UnsupportedModelError: If the stack computes something other than the formula above.
    """
    stack = site.stack
    with torch.no_grad():
        z = _per_expert(inputs[:, None].expand(-1, chosen.shape[1], -1), stack.w_in, chosen)
        z = z if stack.b_in is None else z + stack.b_in[chosen]
    with torch.enable_grad():
        z.requires_grad_()
        activations = stack.activate(z)
    with torch.no_grad():
        _check_outputs(site, activations.detach(), chosen, routing, outputs)
        weighted = routing[..., None].to(vjps.dtype) * vjps[:, None]
        if site.matrix not in READING_MATRICES:
            return activations.detach(), weighted
        back = _per_expert(weighted, stack.w_out.transpose(1, 2), chosen)
    (at_z,) = torch.autograd.grad(activations, z, back.to(activations.dtype))
    return inputs, at_z[..., site.columns]


def _per_expert(
    vectors: Float[Tensor, "tokens slot d_in"],
    weights: Float[Tensor, "expert d_in d_out"],
    chosen: Int[Tensor, "tokens slot"],
) -> Float[Tensor, "tokens slot d_out"]:
    """Multiply each vector by its expert's matrix, without a copy of a matrix per token."""
    found = vectors.new_zeros(*chosen.shape, weights.shape[-1])
    for expert in chosen.unique().tolist():
        rows = chosen == expert
        found[rows] = vectors[rows] @ weights[expert].detach()
    return found


def _check_outputs(
    site: StackedExpertsSite,
    activations: Float[Tensor, "tokens slot d_mlp"],
    chosen: Int[Tensor, "tokens slot"],
    routing: Float[Tensor, "tokens slot"],
    outputs: Float[Tensor, "tokens d_model"],
) -> None:
    stack = site.stack
    written = _per_expert(activations, stack.w_out, chosen)
    written = written if stack.b_out is None else written + stack.b_out[chosen]
    expected = (routing[..., None].to(written.dtype) * written).sum(1)
    off, size = (expected.double() - outputs.double()).norm(), outputs.double().norm()
    # Not a quotient: the output may be all zeros.
    if not off <= _ROUNDING * torch.finfo(outputs.dtype).eps * size:
        raise UnsupportedModelError(
            f"the experts of layer {site.layer} ({type(stack.module).__name__}) do not "
            f"compute a gated MLP: their output has a relative error of {off / size:.1e}; "
            "pass matrices='attn'"
        )
