"""One step of an optimizer on weight matrices, as an edit.

With the gradient `G = sum_i x_i^T delta_i` of the loss, as captured by the lens:

    sgd     -lr G                   as many outer products as positions, exactly
    adam    -lr G / (|G| + eps)     torch's first step: nearly the sign of each entry
    muon    -lr U V^T               from the singular value decomposition G = U S V^T

SGD writes the gradient's factors. Adam's step on each entry is independent of the others, so it
usually has full rank and is stored as a dense matrix. Muon's step has the gradient's row and column
space, with all directions there weighted equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.bound_objectives import SequenceNLL
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import Objective
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod, Layers
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.settings import Positive

Optimizer = Literal["sgd", "adam", "muon"]

_ADAM_EPS = 1e-8
"""torch's default."""


@dataclass(frozen=True)
class GradientStep(EditMethod):
    """One step of an optimizer from the model's weights, on some matrices only.

    The loss is the mean over requests of the mean negative log-likelihood of the target's tokens,
    each read after the true ones before it (teacher forcing). Biases do not change. There is no
    weight decay.

    - `"sgd"` is `torch.optim.SGD`, stored as outer products: `left` has what the matrix read at
      each position of each request, `right` the VJPs times `-lr`. Positions that add nothing are
      left out.
    - `"adam"` is the first step of `torch.optim.Adam` with its default betas and `eps` 1e-8. Both
      bias corrections undo what the betas do to the first gradient. Dense: it computes the
      `d_in x d_out` matrix.
    - `"muon"` orthogonalises the gradient, with heads concatenated: every singular value above
      rounding becomes `lr`. There is no other factor, so the step's spectral norm is `lr` for any
      size of matrix. `torch.optim.Muon` approximates this by five Newton-Schulz iterations, which
      leave singular values of about 0.7 to 1.2 and do not lift those that are far smaller than the
      largest; it computes in bfloat16, and the iterations amplify the rounding errors in all
      other directions. It also
      multiplies by `sqrt(max(1, rows / columns))` of the stored matrix, or by `0.2 sqrt(max(rows,
      columns))` with `adjust_lr_fn="match_rms_adamw"`.

    Attributes:
        optimizer: The optimizer.
        lr: The learning rate.
        matrices: Names or groups, as in `capture_gradients`.
        layers: Layers, negative ones from the end; `None` for all.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> step = blt.editing.GradientStep("sgd", lr=1.0, matrices="W_out", layers=[5, 7])
        >>> delta = step(model, request)
        >>> [each.rank() for each in delta]
        [6, 1]
        >>> with delta.applied(model):
        ...     blt.backward_lens(model, request.prompt).target()
        ' Paris'
    """

    optimizer: Optimizer
    lr: Positive
    matrices: str | Sequence[str] = ("W_out",)
    layers: int | Layers | None = None

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute what the step adds to each matrix."""
        find_editable(host, self.matrices, self.layers)  # raises before any forward pass
        targets = [request.target for request in requests]
        capture = capture_gradients(
            host.model,
            [request.request.prompt for request in requests],
            Objective(
                "mean NLL of the targets", lambda prompts: SequenceNLL(targets, is_mean=True)
            ),
            matrices=self.matrices,
            layers=self.layers,
            prepend_bos=self.prepend_bos,
        )
        return [self._step(gradient) for gradient in capture]

    def _step(self, gradient: MatrixGradient) -> MatrixDelta:
        left, right = _mean_over_prompts(gradient)
        # A step of learning rate 1 down the gradient.
        descent = MatrixDelta(gradient.matrix, gradient.layer, left=left, right=-right)
        if self.optimizer == "sgd":
            return descent.scale(self.lr)
        if self.optimizer == "adam":
            dense = descent.dense()
            step = self.lr * dense / (dense.abs() + _ADAM_EPS)
            return MatrixDelta(gradient.matrix, gradient.layer, values=step)
        u, _, vh = descent.svd()
        return MatrixDelta(
            gradient.matrix,
            gradient.layer,
            left=u.to(left.dtype),
            right=(self.lr * vh).to(right.dtype),
        )


def _mean_over_prompts(
    gradient: MatrixGradient,
) -> tuple[Float[Tensor, "d_in n"], Float[Tensor, "n d_out"]]:
    """Concatenated factors of the mean over prompts, without positions that add nothing."""
    left, right = [], []
    for prompt in range(len(gradient.mask)):
        factors = gradient.factored(prompt)
        counts = ~gradient.is_zero[prompt, gradient.mask[prompt]]
        left.append(factors.A[:, counts])
        right.append(factors.B[counts])
    return torch.cat(left, dim=1), torch.cat(right) / len(gradient.mask)
