"""MEMIT (Meng et al. 2023): many facts at once, spread over the `W_out` of several layers.

For each fact, a value `z` of the residual stream after the last layer is searched for. Then, from
the lowest layer to the highest, each writes its share of what is still missing: `dW = A R` with
`A = (lambda C + K K^T)^-1 K`, the least-squares compromise between writing the facts and leaving
other text unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.fact_contexts import read_facts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.fact_method import SEARCH_VERSION, FactMethod, with_progress
from backward_lens_tl.editing.methods.kept_values import KeptValues
from backward_lens_tl.editing.methods.method import UNRECORDED, Layers
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.settings import Count, Positive

_STARTS = ("The", "Therefore", "Because", "I", "You")
_PER_WIDTH = 3.0
_CLOSE = 1e-3
_OF_A_SEARCH = ("steps", "lr", "weight_decay", "kl_factor", "clamp")


@dataclass(frozen=True)
class MEMIT(FactMethod):
    """MEMIT: teach many facts with one edit of several layers.

    For a single fact, each layer writes the fraction `s / (lambda + s)` of its share, with
    `s = k^T C^-1 k`, which is `d_mlp` for an average key. The published `lambda` of 20000 was
    chosen for thousands of facts at once in models with `d_mlp` 6400 and 16384; the default scales
    with the width and suits a few facts.

    Settings of the search (`steps`, `lr`, `weight_decay`, `kl_factor`, `clamp`), `moments`,
    `fact_token`, `seed`, `ridge` and `prepend_bos` are explained in
    [`FactMethod`][backward_lens_tl.editing.FactMethod].

    Attributes:
        layers: The layers, in any order; negative ones count from the end.
        regularization: `lambda`, the weight of other text against the facts; three times `d_mlp`
            by default.
        clamp: `||delta||` is at most this multiple of the norm of the residual stream.
        starts: The starts of the sampled prefixes.
        prefix_length: Tokens of each prefix, its start included.
        value_folder: A folder that keeps the values that were found. A later edit with the same
            fact, model and search takes them from there, also after an interruption. The model
            must have no hooks that change what it computes.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris", "Lionel Messi")
        >>> moments = blt.editing.facts_moments()
        >>> method = blt.editing.MEMIT(layers=(0, 1), moments=moments, regularization=5.0)
        >>> with method(model, request).applied(model):
        ...     blt.backward_lens(model, "Lionel Messi plays for").target()
        ' Paris'
    """

    layers: Layers
    regularization: Positive | None = None
    clamp: Positive = field(default=0.75, kw_only=True)
    starts: Sequence[str] = _STARTS
    prefix_length: Count = 10
    value_folder: str | Path | None = field(default=None, kw_only=True, metadata=UNRECORDED)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute the change of each layer's matrix, of rank up to the number of requests."""
        sites = find_editable(host, "W_out", self.layers)
        self._check_moments(host, [site.layer for site in sites])
        _check_writes_to_stream(host, sites, requests[0])
        lengths = [self.prefix_length] * len(self.starts)
        facts = self._contexts(host, requests, self.starts, lengths)
        last = sites[-1].layer
        resid = host.hook_points[f"blocks.{last}.hook_resid_post"]
        kept = self._kept_values(host, last)
        wanted = []
        for fact in with_progress(facts):
            [bare] = read_facts(host, [fact.bare], sites[-1], [resid], last=last)
            start = bare.points[0][0]
            find = partial(self._find_value, host, last, resid.tap, fact, start)
            found = find() if kept is None else kept.of(fact, find).to(start)
            wanted.append(start + found)
        changes: list[MatrixDelta] = []
        with ExitStack() as edited:
            for place, site in enumerate(sites):
                read = read_facts(host, facts, site, [resid], last=last)
                keys = torch.stack([_group_mean(own.keys) for own in read], dim=1)
                missing = torch.stack(wanted) - torch.stack([own.points[0][0] for own in read])
                left = self._least_squares(site.layer, keys)
                right = missing / (len(sites) - place)
                changes.append(MatrixDelta("W_out", site.layer, left.to(keys.dtype), right))
                edited.enter_context(WeightDelta((changes[-1],), {}).applied(host.model))
        return changes

    def _kept_values(self, host: Host, layer: int) -> KeptValues | None:
        if self.value_folder is None or host.hooked_modules:  # hooks change what is found
            return None
        own = {name: value for name, value in self.settings().items() if name in _OF_A_SEARCH}
        return KeptValues(self.value_folder, host, [SEARCH_VERSION, layer, own])

    def _least_squares(
        self, layer: int, keys: Float[Tensor, "d_in request"]
    ) -> Float[Tensor, "d_in request"]:
        """`(lambda C + K K^T)^-1 K`, as `C^-1 K (lambda + K^T C^-1 K)^-1`, in float64."""
        asked = self.regularization
        solved = self._whitened(layer, keys)
        core = keys.double().T @ solved
        core.diagonal().add_(_PER_WIDTH * len(keys) if asked is None else float(asked))
        solution: Tensor = torch.linalg.solve(core, solved.T).T
        return solution


def _group_mean(keys: Float[Tensor, "context d_in"]) -> Float[Tensor, "d_in"]:
    """The mean of the bare prompt's key and of the mean over the prefixes."""
    bare, rest = keys[0], keys[1:]
    return (bare + rest.mean(0)) / 2 if len(rest) else bare


def _check_writes_to_stream(
    host: Host, sites: Sequence[MatrixSite], asked: TokenizedRequest
) -> None:
    """Refuse a model with a norm or a scale between `W_out` and the residual stream."""
    joined = [(site, site.joins) for site in sites if site.joins is not None]
    seen = forward_pass(
        host,
        pad_prompts(host, [asked.prompt]),
        outputs=[site for site, _ in joined],
        points=[joins for _, joins in joined],
    )
    for (site, _), wrote, added in zip(joined, seen.outputs, seen.points, strict=True):
        if float((added - wrote).norm()) > _CLOSE * float(wrote.norm()):
            raise UnsupportedModelError(
                f"there is a norm or a scale between W_out of layer {site.layer} and the residual "
                "stream, but MEMIT's least squares needs a matrix that writes directly to it; use "
                "ROME, which edits the matrix's own output"
            )
