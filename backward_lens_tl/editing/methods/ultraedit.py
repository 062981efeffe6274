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

from backward_lens_tl._checks import check_kind, check_number
from backward_lens_tl.editing.delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class UltraEdit(EditMethod):
    """An edit that solves for what standardised gradients ask of a matrix, without training.

    At each position at which a token of the target is to be said, the matrix's output is to change
    by `v = -lr ||x'||^2 delta'`, with the standardised pair `(x', delta')`. The edit is the least
    of `||X dW - V||^2 + ridge ||dW||^2` with the `x` as they are: `(X^T X + ridge I)^-1 X^T V`,
    all requests at once.

    Attributes:
        statistics: Mean and standard deviation of the pairs at the matrices to edit, of positions
            `"answer"` (`pair_statistics`).
        lr: The size of the targets. The published 1e-6 is for models of some billion parameters;
            `||x'||^2` is about the width of what the matrix reads.
        ridge: What a large change costs; 1 as published.
        matrices: Only those of these names; `None` for all that there are statistics of.
        layers: Only those of these layers, negative ones from the end; `None` likewise.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

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

    statistics: PairStatistics
    lr: float = 1e-6
    ridge: float = 1.0
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        made = "pair_statistics(model, requests)"
        check_kind("statistics", self.statistics, PairStatistics, made, EditError)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """What is added to each matrix: an outer product per token of each target.

        Args:
            host: The model.
            requests: What it is to be taught.

        Returns:
            The changes, as factors.
        """
        check_number("lr", self.lr, zero=False, error=EditError)
        check_number("ridge", self.ridge, zero=False, error=EditError)
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
