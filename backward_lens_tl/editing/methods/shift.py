"""The forward pass shift: a fact written with one outer product, found in one forward pass.

The gradient of `W_out` *shifts* its output towards the target (paper, section 5.2). The forward
pass shift writes that without a backward pass: with `x` what `W_out` reads at the prompt's last
token, and `e_t` the target's row of the decoding matrix,

    W_out <- W_out + eta x^T e_t                                      (paper, section 7)

so that the output there changes by `eta ||x||^2 e_t`, and at any other place, which reads `x_j`, by
`eta <x_j, x> e_t`. Both other forms choose which input is listened to, `l` in `W_out + c l^T e_t`
with `x l^T = 1`, so that the output changes by just `c e_t`:

    scale free   l = x / ||x||^2
    whitened     l = C^-1 x / (x^T C^-1 x),   C = E[x x^T]            (this package's own)

Of all `l` with `x l^T = 1` the whitened one writes least, on average, at the tokens that `C` is of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl._checks import check_choice, check_kind, check_number, is_integer, shown
from backward_lens_tl.editing.delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.activations import Addition, activations, adding
from backward_lens_tl.editing.statistics.moments import RIDGE, SecondMoments
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.selection import find_editable

ShiftForm = Literal["paper", "scale_free", "whitened"]
TargetEmbedding = Literal["auto", "unembed", "embed"]

_DEPENDENT = 1e-6
"""Part of its norm that is added to the Gram matrix of several inputs, which may be dependent."""


@dataclass(frozen=True, kw_only=True)
class ForwardPassShift(EditMethod):
    """Write the target's embedding where the prompt's last token reads it.

    One forward pass per edit, one outer product per request, `W_out` alone, no bias. Of a target of
    several tokens the first is written.

    Several requests share the edit. In the paper's form their outer products are added up, so that
    each also writes where others read something alike; the other two forms solve for `l_i` with
    `x_j l_i^T = 1` where `i = j` and 0 elsewhere, so that each prompt's output changes by its own
    `c e_t` alone.

    Attributes:
        layer: The layer, negative ones from the end.
        size: `eta` in the paper's form, where it depends on the layer and the model (GPT-2 xl: 0.24
            at layer 35); `c` in the others, where it hardly does.
        form: Which of the three.
        iterations: Forward passes at most: each adds `size` to the requests whose target is not yet
            the most probable token. The edited layer reads the same before and after, so this
            finds the smallest multiple of `size` that is enough.
        skip_if_answered: Whether a request whose target leads already is left out, as in the
            authors' code.
        target_embedding: `"unembed"` takes `e_t` out of the unembedding, `"embed"` out of the
            embedding. `"auto"` takes the embedding where both are or were one matrix, since weight
            processing folds the final norm into the unembedding and centers it; else the
            unembedding.
        moments: Second moments of `W_out`'s inputs, for the whitened form.
        ridge: Part of the mean variance that is added to `C`.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

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
    size: float
    form: ShiftForm = "paper"
    iterations: int = 1
    skip_if_answered: bool = False
    target_embedding: TargetEmbedding = "auto"
    moments: SecondMoments | None = None
    ridge: float = RIDGE
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        check_choice("form", self.form, get_args(ShiftForm), EditError)
        embeddings = get_args(TargetEmbedding)
        check_choice("target_embedding", self.target_embedding, embeddings, EditError)
        if not is_integer(self.iterations) or self.iterations < 1:
            raise EditError(f"iterations is {shown(self.iterations)}; pass an integer from 1 on")
        is_number = isinstance(self.size, int | float) and not isinstance(self.size, bool)
        if not is_number or not math.isfinite(self.size):
            raise EditError(f"size is {shown(self.size)}; pass a number")
        check_number("ridge", self.ridge, zero=True, error=EditError)
        if self.form == "whitened" and self.moments is None:
            raise EditError(
                "the whitened form needs moments, the statistics of what W_out reads: collect them "
                "with second_moments(model, texts), or take facts_moments() for the facts model"
            )
        if self.moments is not None:
            made = "second_moments(model, texts)"
            check_kind("moments", self.moments, SecondMoments, made, EditError)
        if self.moments is not None and self.moments.matrix != "W_out":
            raise EditError(
                f"moments are of what {self.moments.matrix} reads, and the edit is of W_out; "
                "collect them with second_moments(model, texts, matrix='W_out')"
            )

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """The shift of all requests together."""
        [site] = find_editable(host, "W_out", [self.layer])
        prompts = [request.prompt for request in requests]
        seen = activations(host, prompts, [site])
        last = [len(prompt) - 1 for prompt in prompts]
        reads = seen.inputs["W_out", site.layer][range(len(prompts)), last]
        first = [request.target[0] for request in requests]
        embeddings = torch.stack([self._embedding(host, token) for token in first]).to(reads)
        targets = torch.tensor(first, device=reads.device)
        left = self._listening(host, site.layer, reads)

        asked = torch.ones(len(prompts), dtype=torch.bool, device=reads.device)
        if self.skip_if_answered:
            asked = ~_leads(seen.logits, targets)
        sizes = self.size * asked.to(reads.dtype)
        for _ in range(self.iterations - 1):
            right = sizes[:, None] * embeddings
            with adding(site, _writing(left, right)):
                # One that leads now may not do so when others have written more.
                is_open = asked & ~_leads(activations(host, prompts).logits, targets)
            if not is_open.any():
                break
            sizes = sizes + self.size * is_open.to(reads.dtype)
        right = sizes[:, None] * embeddings
        written = sizes != 0
        return [MatrixDelta("W_out", site.layer, left[:, written], right[written])]

    def _listening(
        self, host: Host, layer: int, reads: Float[Tensor, "n d_mlp"]
    ) -> Float[Tensor, "d_mlp n"]:
        """`l` of each request, as columns."""
        if self.form == "paper":
            return reads.T.contiguous()
        keys = reads.T.double()
        if self.form == "whitened" and self.moments is not None:
            self.moments.check(host, [layer])
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
