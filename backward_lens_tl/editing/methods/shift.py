"""The forward pass shift: a fact written with one outer product, found in one forward pass.

The gradient of `W_out` *shifts* its output towards the target (paper, section 5.2). The forward
pass shift writes that without a backward pass: with the input `x` of `W_out` at the prompt's last
token, and the target's row `e_t` of the decoding matrix,

    W_out <- W_out + eta x^T e_t                                      (paper, section 7)

so that the output there changes by `eta ||x||^2 e_t`, and at any other position, which reads `x_j`,
by `eta <x_j, x> e_t`. The two other forms choose the input direction `l` in `W_out + c l^T e_t`
with `x l^T = 1`, so that the output changes by exactly `c e_t`:

    scale free   l = x / ||x||^2
    whitened     l = C^-1 x / (x^T C^-1 x),   C = E[x x^T]            (this package's own)

Of all `l` with `x l^T = 1`, the whitened one writes the least, on average, at the tokens of `C`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl._checks import check_kind
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.interventions import Addition, adding
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.moments import RIDGE, SecondMoments
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.settings import Count, Finite, NonNegative

ShiftForm = Literal["paper", "scale_free", "whitened"]
TargetEmbedding = Literal["auto", "unembed", "embed"]

_DEPENDENT = 1e-6
"""Fraction of its mean diagonal that is added to the Gram matrix of several inputs, which may be
linearly dependent."""


@dataclass(frozen=True, kw_only=True)
class ForwardPassShift(EditMethod):
    """Write the target's embedding where the prompt's last token reads it.

    An edit takes one forward pass, and adds one outer product per request to `W_out`; biases do not
    change. For a target of several tokens, the first one is written.

    Several requests share the edit. In the paper's form their outer products are added up, so each
    of them also writes where others read something similar. The two other forms solve for `l_i`
    with `x_j l_i^T = 1` where `i = j` and 0 elsewhere, so each prompt's output changes by its own
    `c e_t` alone.

    Attributes:
        layer: The layer, negative ones from the end.
        size: `eta` in the paper's form, where it depends on the layer and the model (GPT-2 xl: 0.24
            at layer 35); `c` in the others, where it barely does.
        form: `"paper"`, `"scale_free"` or `"whitened"`.
        iterations: Maximum number of forward passes: each adds `size` to the requests whose target
            is not yet the most probable token. The edited layer reads the same before and after, so
            this finds the smallest sufficient multiple of `size`.
        skip_if_answered: Whether to leave out requests whose target is already the most probable
            token, as in the authors' code.
        target_embedding: Whether `e_t` comes from the unembedding or the embedding. `"auto"` uses
            the embedding where both are or were one matrix, because weight processing folds the
            final norm into the unembedding and centers it; otherwise the unembedding.
        moments: Second moments of `W_out`'s inputs, for the whitened form.
        ridge: Fraction of the mean variance that is added to the diagonal of `C`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.editing import EditRequest, ForwardPassShift
        >>> model = blt.load_facts_model()
        >>> shift = ForwardPassShift(layer=5, size=4.0, form="scale_free", iterations=10)
        >>> delta = shift(model, EditRequest("Lionel Messi plays for", " Paris"))
        >>> delta["W_out", 5].shape, delta.rank
        ((512, 128), 1)
    """

    layer: int
    size: Finite
    form: ShiftForm = "paper"
    iterations: Count = 1
    skip_if_answered: bool = False
    target_embedding: TargetEmbedding = "auto"
    moments: SecondMoments | None = None
    ridge: NonNegative = RIDGE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "whitened" and self.moments is None:
            raise EditError(
                "the whitened form needs moments, the statistics of what W_out reads: collect them "
                "with second_moments(model, texts), or pass facts_moments() for the facts model"
            )
        if self.moments is not None:
            made = "second_moments(model, texts)"
            check_kind("moments", self.moments, SecondMoments, made, EditError)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Compute the shift of all requests together."""
        [site] = find_editable(host, "W_out", [self.layer])
        batch = pad_prompts(host, [request.prompt for request in requests])
        seen = forward_pass(host, batch, inputs=[site])
        rows = torch.arange(len(requests), device=batch.last.device)
        reads = at_least_float32(seen.inputs[0][rows, batch.last])
        first = [request.target[0] for request in requests]
        embeddings = torch.stack([self._embedding(host, token) for token in first]).to(reads)
        targets = torch.tensor(first, device=reads.device)
        left = self._input_directions(host, site.layer, reads)

        asked = torch.ones(len(requests), dtype=torch.bool, device=reads.device)
        if self.skip_if_answered:
            asked = ~_leads(seen.logits, targets)
        sizes = self.size * asked.to(reads.dtype)
        for _ in range(self.iterations - 1):
            right = sizes[:, None] * embeddings
            with adding(site, _writing(left, right)):
                # A target that leads now may no longer do so when others have written more.
                is_open = asked & ~_leads(forward_pass(host, batch).logits, targets)
            if not is_open.any():
                break
            sizes = sizes + self.size * is_open.to(reads.dtype)
        right = sizes[:, None] * embeddings
        written = sizes != 0
        return [MatrixDelta("W_out", site.layer, left[:, written], right[written])]

    def _input_directions(
        self, host: Host, layer: int, reads: Float[Tensor, "n d_mlp"]
    ) -> Float[Tensor, "d_mlp n"]:
        """`l` of each request, as columns."""
        if self.form == "paper":
            return reads.T.contiguous()
        keys = reads.T.double()
        if self.form == "whitened" and self.moments is not None:
            self.moments.check(host, [layer], matrix="W_out")
            keys = self.moments.solve(layer, keys, self.ridge)
        gram = reads.double() @ keys
        gram.diagonal().add_(_DEPENDENT * gram.diagonal().mean() * (len(reads) > 1))
        solution: Tensor = torch.linalg.solve(gram.T, keys.T).T
        return solution.to(reads.dtype)

    def _embedding(self, host: Host, token_id: int) -> Float[Tensor, "d_model"]:
        kind = self.target_embedding
        if kind == "auto":
            kind = "embed" if host.is_tied else "unembed"
        vector = host.embedding_vector if kind == "embed" else host.unembedding.column
        return vector(token_id)


def _leads(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, "n"]) -> Bool[Tensor, "n"]:
    return logits.argmax(-1) == targets


def _writing(left: Float[Tensor, "d_in n"], right: Float[Tensor, "n d_out"]) -> Addition:
    return lambda reads: reads.to(left) @ left @ right
