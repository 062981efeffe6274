"""MEMIT (Meng et al. 2023): many facts at once, spread over the `W_out` of several layers.

For each fact a value `z` of the residual stream behind the last layer is searched for. Then, from
the lowest layer to the highest, each writes its part of what is still missing:
`dW = A R` with `A = (lambda C + K K^T)^-1 K`, the least squares between writing the facts and
leaving other text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, check_number
from backward_lens_tl.capture.hooks import Values
from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.activations import activations, resid_tap
from backward_lens_tl.editing.statistics.contexts import sampled_prefixes
from backward_lens_tl.editing.statistics.keys import (
    FactContexts,
    FactToken,
    Moments,
    checked_moments,
    read_facts,
    whitened,
)
from backward_lens_tl.editing.statistics.moments import RIDGE, SecondMoments
from backward_lens_tl.editing.statistics.values import ValueSearch
from backward_lens_tl.errors import EditError, UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.models.taps import hooked

_STARTS = ("The", "Therefore", "Because", "I", "You")
_PER_WIDTH = 3.0
_CLOSE = 1e-3


@dataclass(frozen=True)
class MEMIT(EditMethod):
    """MEMIT: many facts in one edit of several layers.

    Of one fact the part `s / (lambda + s)` of a layer's share is written, with `s = k^T C^-1 k`,
    which is `d_mlp` for an average key. The published 20000 was chosen for thousands of facts at
    once in models of `d_mlp` 6400 and 16384; the default scales with the width and suits few.

    Attributes:
        layers: The layers, from the lowest to the highest; negative ones count from the end.
        moments: Second moments of what their `W_out` read; `"identity"` does without, at the cost
            of other facts.
        regularization: `lambda`: how much other text counts beside the facts; `None` is three
            times `d_mlp`.
        fact_token: The token that is edited: the subject's last one, or the prompt's.
        steps: Times that the loss of each search is computed.
        lr: Learning rate of the searches.
        weight_decay: Weight of the penalty on `||delta|| / ||h0||^2`.
        kl_factor: Weight of the divergence of what is predicted right after the subject.
        clamp: `delta` gets no longer than so many times `||h0||`, the residual stream's norm.
        starts: What the sampled prefixes begin with.
        prefix_length: Tokens of each prefix, its start included.
        seed: Of the prefixes.
        ridge: Part of the mean variance that is added to the diagonal of `C`.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

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

    layers: tuple[int, ...]
    moments: Moments = None
    regularization: float | None = None
    fact_token: FactToken = "subject_last"
    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.75
    starts: tuple[str, ...] = _STARTS
    prefix_length: int = 10
    seed: int = 0
    ridge: float = RIDGE
    prepend_bos: bool | None = None

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """What is added to each layer's matrix, of rank up to the number of requests.

        Args:
            host: The model.
            requests: What it is to be taught.

        Returns:
            The changes, from the lowest layer to the highest.

        Raises:
            EditError: If a setting, the statistics or a request does not fit.
            UnsupportedModelError: If a layer's MLP does not write straight to the residual stream.
        """
        check_choice("fact_token", self.fact_token, ("subject_last", "last"), EditError)
        check_number("ridge", self.ridge, zero=True, error=EditError)
        if self.regularization is not None:
            check_number("regularization", self.regularization, zero=False, error=EditError)
        search = ValueSearch(self.steps, self.lr, self.weight_decay, self.kl_factor, self.clamp)
        sites = find_editable(host, "W_out", self.layers)
        moments = checked_moments(host, self.moments, [site.layer for site in sites])
        _check_writes_to_stream(host, sites, requests[0])
        prefixes = sampled_prefixes(
            host, self.starts, [self.prefix_length] * len(self.starts), self.seed
        )
        facts = [
            FactContexts.of(host, asked, prefixes, self.fact_token, self.prepend_bos)
            for asked in requests
        ]
        wanted = self._wanted(host, sites[-1].layer, search, facts)
        changes: list[MatrixDelta] = []
        with ExitStack() as edited:
            for place, site in enumerate(sites):
                share = len(sites) - place
                change = self._spread(host, site, sites[-1].layer, moments, facts, wanted, share)
                changes.append(change)
                edited.enter_context(WeightDelta((change,), {}).applied(host.model))
        return changes

    def _wanted(
        self, host: Host, last: int, search: ValueSearch, facts: Sequence[FactContexts]
    ) -> Float[Tensor, "request d_model"]:
        """The residual stream behind the last layer that says each target."""
        tap, found = resid_tap(host, last), []
        for fact in facts:
            (read,) = read_facts(host, [_bare(fact)], [], [last])
            start = read.resid[last][0]
            found.append(start + search.find(host, tap, fact, start))
        return torch.stack(found)

    def _spread(
        self,
        host: Host,
        site: MatrixSite,
        last: int,
        moments: SecondMoments | Literal["identity"],
        facts: Sequence[FactContexts],
        wanted: Float[Tensor, "request d_model"],
        share: int,
    ) -> MatrixDelta:
        """One layer's change, in the model with those of the layers before it."""
        read = read_facts(host, facts, [site], [last])
        keys = torch.stack([_group_mean(own.keys[site.layer]) for own in read], dim=1)
        now = torch.stack([own.resid[last][0] for own in read])
        asked = self.regularization
        weight = _PER_WIDTH * len(keys) if asked is None else float(asked)
        left = _least_squares(whitened(moments, site.layer, keys, self.ridge), keys, weight)
        return MatrixDelta("W_out", site.layer, left.to(keys.dtype), (wanted - now) / share)


def _least_squares(
    solved: Float[Tensor, "d_in request"], keys: Float[Tensor, "d_in request"], weight: float
) -> Float[Tensor, "d_in request"]:
    """`(lambda C + K K^T)^-1 K`, as `C^-1 K (lambda + K^T C^-1 K)^-1`, in float64.

    Args:
        solved: `C^-1 K`.
        keys: `K`.
        weight: `lambda`.

    Returns:
        The solution.
    """
    core = keys.double().T @ solved
    core.diagonal().add_(weight)
    solution: Tensor = torch.linalg.solve(core, solved.T).T
    return solution


def _group_mean(keys: Float[Tensor, "context d_in"]) -> Float[Tensor, "d_in"]:
    """The mean of the bare prompt's key and of the mean over the prefixes."""
    bare, rest = keys[0], keys[1:]
    return (bare + rest.mean(0)) / 2 if len(rest) else bare


def _bare(fact: FactContexts) -> FactContexts:
    """A fact in its bare prompt alone."""
    return FactContexts(fact.rows[:1], fact.positions[:1], fact.target, fact.essence)


def _check_writes_to_stream(
    host: Host, sites: Sequence[MatrixSite], asked: TokenizedRequest
) -> None:
    """Refuse a model in which something lies between `W_out` and the residual stream."""
    joins = [site for site in sites if site.joins is not None]
    joined = {site.layer: Values(f"the MLP of layer {site.layer}") for site in joins}
    with ExitStack() as hooks:
        for site in joins:
            if site.joins is not None:
                hooks.enter_context(hooked(site.joins.tap, joined[site.layer].keep))
        outputs = activations(host, [asked.prompt], joins).outputs
    for site in joins:
        wrote = outputs["W_out", site.layer]
        added = joined[site.layer].only.to(wrote.device)
        if float((added - wrote).norm()) > _CLOSE * float(wrote.norm()):
            raise UnsupportedModelError(
                f"between W_out of layer {site.layer} and the residual stream there is a norm or a "
                "scale, and MEMIT's least squares needs a matrix that writes straight to it; use "
                "ROME, which edits what the matrix itself writes"
            )
