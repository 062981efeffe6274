"""Weight matrices, and where the forward pass reads their inputs and writes their outputs.

These are the matrix's *own* input and output. Three hook points seem to be these but are not:
`ln2.hook_normalized` (before the norm's gain and bias, except for `LayerNorm` in TransformerLens
2), `hook_mlp_in` (before the norm, and only with `use_hook_mlp_in`), and `hook_mlp_out` in models
that normalise the MLP's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.hooks import Tap

MatrixName = Literal["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"]
MATRIX_NAMES: tuple[MatrixName, ...] = get_args(MatrixName)
"""All matrices, in the order in which a layer uses them."""

ATTENTION_MATRICES: tuple[MatrixName, ...] = ("W_Q", "W_K", "W_V", "W_O")
"""The matrices of attention; the others are those of the MLP."""

READING_MATRICES: frozenset[MatrixName] = frozenset({"W_Q", "W_K", "W_V", "W_in", "W_gate"})
"""Matrices that read the residual stream: their inputs have width `d_model`."""

WRITING_MATRICES = frozenset(MATRIX_NAMES) - READING_MATRICES
"""Matrices that write to the residual stream: their outputs have width `d_model`."""

_MOST_SLOTS = 8
"""Largest number of experts per token in existing models."""


@dataclass(frozen=True)
class HookPointSite:
    """A hook point of TransformerLens, where an activation and its gradient can be kept.

    Attributes:
        name: TransformerLens's name.
        tap: The activation after the caller's hooks.
        as_hooked: Converts a tensor to the layout that hooks see there, for example by head.
        is_replaceable: Whether the model uses what a hook returns; some attention shows its hooks
            a finished pattern and ignores what they return.
    """

    name: str
    tap: Tap
    as_hooked: Callable[[Tensor], Tensor]
    is_replaceable: bool = True


@dataclass(frozen=True)
class Stored:
    """A weight matrix as the model stores it.

    Attributes:
        parameter: The parameter.
        layout: `"in_out"` is TransformerLens's `[d_in, d_out]`, possibly with a first axis for
            heads; `"out_in"` is that of `torch.nn.Linear`.
        n_heads: Number of heads, if the parameter has no axis for them.
        divided: The side that is divided into heads.
    """

    parameter: Tensor
    layout: Literal["in_out", "out_in"]
    n_heads: int | None = None
    divided: Literal["in", "out"] = "out"

    def in_out(self, tensor: Float[Tensor, "*stored"]) -> Float[Tensor, "*head d_in d_out"]:
        """Convert a tensor from the parameter's layout to TransformerLens's orientation."""
        turned = tensor.T if self.layout == "out_in" else tensor
        if self.n_heads is None:
            return turned
        pattern = f"{self._side_by_side} -> head d_in d_out"
        heads: Tensor = rearrange(turned, pattern, head=self.n_heads)
        return heads

    def as_stored(self, matrix: Float[Tensor, "*head d_in d_out"]) -> Float[Tensor, "*stored"]:
        """Convert a tensor from TransformerLens's orientation to the parameter's layout."""
        joined = matrix
        if self.n_heads is not None:
            joined = rearrange(matrix, f"head d_in d_out -> {self._side_by_side}")
        return joined.T if self.layout == "out_in" else joined

    @property
    def _side_by_side(self) -> str:
        """The einops pattern of concatenated heads."""
        return "d_in (head d_out)" if self.divided == "out" else "(head d_in) d_out"


@dataclass(frozen=True)
class MatrixSite:
    """One weight matrix of one layer, with its input and output.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        input: `x`, `[batch, pos, d_in]`, after the caller's hooks.
        output: `y = x @ W + b`, `[batch, pos, d_out]`, before the caller's hooks.
        weight: The stored parameter.
        bias: `b`, if there is one.
        input_heads: Number of heads of `x`, in a separate axis or concatenated along `d_in`.
        output_heads: The same for `y`.
        heads_per_weight: Heads of `y` per head of the weight (ungrouped queries).
        input_hook: TransformerLens's name of the hook point that shows `x`, if there is one.
        output_hook: The same for `y`, or for `y` after a norm or scale on its way to the residual
            stream.
        joins: Where the output of a writing matrix is added to the residual stream, after a norm
            or scale if there is one.
    """

    matrix: MatrixName
    layer: int
    input: Tap
    output: Tap
    weight: Stored
    bias: Tensor | None = None
    input_heads: int | None = None
    output_heads: int | None = None
    heads_per_weight: int = 1
    input_hook: str | None = None
    output_hook: str | None = None
    joins: HookPointSite | None = None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that make up the matrix."""
        return (self.weight.parameter,)

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """The parameters of the bias."""
        return () if self.bias is None else (self.bias,)

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the matrix with its heads concatenated."""
        *heads, d_in, d_out = self.weight.in_out(self.weight.parameter).shape
        n_heads = math.prod(heads)
        is_reading = self.matrix in READING_MATRICES
        return (d_in, n_heads * d_out) if is_reading else (n_heads * d_in, d_out)

    @property
    def width(self) -> int:
        """Number of values in both factors per token, at least."""
        return sum(self.shape)

    def joined(
        self, weight: Float[Tensor, "*head d_in d_out"]
    ) -> Float[Tensor, "in_side out_side"]:
        """Concatenate heads along the axis of the matrix that they divide."""
        if weight.ndim == 2:
            return weight
        return rearrange(weight, f"head d_in d_out -> {self._side_by_side}")

    def as_stored(self, matrix: Float[Tensor, "in_side out_side"]) -> Float[Tensor, "*stored"]:
        """Convert a matrix with concatenated heads to the layout of the parameter."""
        *heads, _, _ = self.weight.in_out(self.weight.parameter).shape
        if heads:
            pattern = f"{self._side_by_side} -> head d_in d_out"
            matrix = rearrange(matrix, pattern, head=heads[0])
        return self.weight.as_stored(matrix)

    @property
    def _side_by_side(self) -> str:
        is_reading = self.matrix in READING_MATRICES
        return "d_in (head d_out)" if is_reading else "(head d_in) d_out"

    def dense(self, gradients: Sequence[Tensor]) -> Float[Tensor, "*head d_in d_out"]:
        """Convert gradients of `weights` to TransformerLens's orientation."""
        return self.weight.in_out(gradients[0])

    def by_head(
        self, factor: Float[Tensor, "*rows d"], side: Literal["input", "output"], rows: torch.Size
    ) -> Float[Tensor, "batch pos *head d_side"]:
        """Reshape a factor to `[*rows, d]`, or `[*rows, head, d]` if heads differ.

        Args:
            factor: `x` or `delta`, as recorded. Some MLPs, such as OPT's, flatten batch and
                position.
            side: Which of the two.
            rows: The leading axes, batch and position.

        Returns:
            The factor. Copies of the residual stream that are equal for all heads are merged.

        Raises:
            UnsupportedModelError: If heads that share one weight read different inputs.
        """
        heads = self.input_heads if side == "input" else self.output_heads
        if heads is None:
            return factor.reshape(*rows, -1)
        split = factor.reshape(*rows, heads, -1)
        if self.heads_per_weight > 1 and side == "output":
            split = reduce(
                split, "... (head same) d -> ... head d", "sum", same=self.heads_per_weight
            )
        is_stream = (side == "input") == (self.matrix in READING_MATRICES)
        if is_stream and bool((split == split[..., :1, :]).all()):
            return split[..., 0, :].contiguous()  # a view would keep the copies in memory
        if is_stream and self.heads_per_weight > 1:
            raise UnsupportedModelError(
                f"the heads that share one {self.matrix} in layer {self.layer} read different "
                "inputs, so its gradient has more than one input per position; switch off "
                "ungroup_grouped_query_attention"
            )
        return split


@dataclass(frozen=True)
class ExpertsSite:
    """One matrix of a mixture of experts, where every expert is a module.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        experts: The matrix of each expert, which gets the tokens that are routed to it.
        chosen: The indices of each token's experts, `[tokens, slot]`.
        joins: Where the output of all experts is added to the residual stream.
    """

    matrix: MatrixName
    layer: int
    experts: tuple[MatrixSite, ...]
    chosen: Tap
    joins: HookPointSite | None = None

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def width(self) -> int:
        """Number of values in both factors per token, at most."""
        return min(_MOST_SLOTS, self.n_experts) * self.experts[0].width

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that make up the matrix, one per expert."""
        return tuple(expert.weight.parameter for expert in self.experts)

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """The parameters of the bias."""
        return tuple(bias for expert in self.experts for bias in expert.biases)

    def dense(self, gradients: Sequence[Tensor]) -> Float[Tensor, "expert d_in d_out"]:
        """Convert gradients of `weights` to TransformerLens's orientation."""
        pairs = zip(self.experts, gradients, strict=True)
        return torch.stack([expert.dense([gradient]) for expert, gradient in pairs])


@dataclass(frozen=True)
class StackedExperts:
    """All experts of one layer, with weights stacked along an axis for experts.

    Hooks see only the input and output of the whole stack; `capture/experts.py` derives those of
    each expert.

    Attributes:
        module: The stack. Its arguments are hidden states `[tokens, d_model]`, indices of each
            token's experts `[tokens, slot]`, and the router's weights `[tokens, slot]`.
        w_in: `W_in` and `W_gate` of all experts, `[expert, d_model, 2 * d_mlp]`.
        b_in: Their biases, `[expert, 2 * d_mlp]`, if there are any.
        w_out: `W_out`, `[expert, d_mlp, d_model]`.
        b_out: Its bias, `[expert, d_model]`, if there is one.
        activate: Maps pre-activations of both, `[..., 2 * d_mlp]`, to `[..., d_mlp]`.
        gate: True at the columns, out of `2 * d_mlp`, that belong to `W_gate`.
    """

    module: nn.Module
    w_in: Float[Tensor, "expert d_model two_d_mlp"]
    b_in: Float[Tensor, "expert two_d_mlp"] | None
    w_out: Float[Tensor, "expert d_mlp d_model"]
    b_out: Float[Tensor, "expert d_model"] | None
    activate: Callable[[Float[Tensor, "*rows two_d_mlp"]], Float[Tensor, "*rows d_mlp"]]
    gate: Bool[Tensor, "two_d_mlp"]


@dataclass(frozen=True)
class StackedExpertsSite:
    """One matrix of a mixture of experts whose weights are stacked in one parameter.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        stack: The experts.
        weights: The parameter that contains the matrix, as it is stored.
        biases: The parameter that contains its bias, if there is one.
        columns: True at the columns of the parameter that belong to the matrix; `None` for all.
        is_transposed: Whether the parameter is stored as `[expert, d_out, d_in]`.
        joins: Where the output of all experts is added to the residual stream.
    """

    matrix: MatrixName
    layer: int
    stack: StackedExperts
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    columns: Bool[Tensor, "columns"] | None
    is_transposed: bool
    joins: HookPointSite | None = None

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.stack.w_out)

    @property
    def width(self) -> int:
        """Number of values in both factors per token, at most."""
        return min(_MOST_SLOTS, self.n_experts) * sum(self.stack.w_out.shape[1:])

    def dense(self, gradients: Sequence[Tensor]) -> Float[Tensor, "expert d_in d_out"]:
        """Convert gradients of `weights` to TransformerLens's orientation."""
        turned = gradients[0].transpose(1, 2) if self.is_transposed else gradients[0]
        return turned if self.columns is None else turned[..., self.columns]


Site = MatrixSite | ExpertsSite | StackedExpertsSite
