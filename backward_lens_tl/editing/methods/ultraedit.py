"""UltraEdit: standardised gradients as targets, and the least-squares change that reaches them.

Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language
Models" (arXiv 2505.14679).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.pair_method import PairMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.models import Host
from backward_lens_tl.settings import Positive


@dataclass(frozen=True)
class UltraEdit(PairMethod):
    """An edit that solves for the outputs that standardised gradients call for, without training.

    At each position where a token of the target is predicted, the matrix's output should change by
    `v = -lr ||x'||^2 delta'`, with the standardised pair `(x', delta')`. The edit minimises
    `||X dW - V||^2 + ridge ||dW||^2` with the `x` themselves: `(X^T X + ridge I)^-1 X^T V`, for
    all requests together.

    `statistics` are those of positions `"answer"`. `matrices` and `layers` are explained in
    [`PairMethod`][backward_lens_tl.editing.PairMethod].

    Attributes:
        lr: The size of the targets. The published 1e-6 is for models of a few billion parameters;
            `||x'||^2` is about the width of what the matrix reads.
        ridge: The penalty on large changes; 1 as published.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(
        ...     model, requests, layers=[-1], positions="answer", progress=False
        ... )
        >>> blt.editing.UltraEdit(statistics, lr=1e-3)(model, requests[0])
        WeightDelta(UltraEdit, W_in of layer 7, W_out of layer 7)
    """

    lr: Positive = 1e-6
    ridge: Positive = 1.0

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Compute the changes, one outer product per token of each target."""
        pairs = self.statistics.standardized_pairs(
            host, requests, "answer", self.matrices, self.layers
        )
        deltas = []
        for own in pairs:
            wanted = -self.lr * own.inputs.square().sum(1, keepdim=True) * own.vjps
            right = _solved(own.raw_inputs, wanted, self.ridge)
            deltas.append(MatrixDelta(own.matrix, own.layer, own.raw_inputs.T, right))
        return deltas


def _solved(
    inputs: Float[Tensor, "n d_in"], wanted: Float[Tensor, "n d_out"], ridge: float
) -> Float[Tensor, "n d_out"]:
    """`(X X^T + ridge I)^-1 V`; `X^T` times it is `(X^T X + ridge I)^-1 X^T V` (push-through)."""
    x = inputs.double()
    gram = x @ x.T
    gram.diagonal().add_(ridge)
    solution: Tensor = torch.linalg.solve(gram, wanted.double())
    return solution.to(wanted.dtype)
