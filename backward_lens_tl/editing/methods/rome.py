"""ROME (Meng et al. 2022): one outer product in one `W_out`, so that a key gives a value.

Of all changes `dW` with `k (W + dW) = v* - b` it takes the one that changes least what the matrix
writes for other text: `tr(dW^T C dW)` is smallest, with `C` the second moments of what it reads.
That is `dW = u (v* - v)^T / (k . u)` with `u` along `C^-1 k`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backward_lens_tl._checks import check_choice, check_number
from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
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
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MatrixSite

KeyMode = Literal["mean", "bare", "rome"]
"""Which key an edit listens to, and which one it is scaled for."""


@dataclass(frozen=True)
class ROME(EditMethod):
    """ROME: the value that makes the model say the target, written into one layer.

    The value `v* = v0 + delta` is searched for at the fact's token (`ValueSearch`), in the bare
    prompt and behind prefixes that the model makes up. Several requests are edited one after the
    other, each in a model that has the earlier ones.

    What the published code does is `key_mode="rome"`: it listens to the mean key and scales for
    the bare prompt's. Where the two hardly agree the edit becomes huge and disables the model; a
    warning tells of edits that are larger than the matrix.

    Attributes:
        layer: The layer, from 0; negative ones count from the end.
        moments: Second moments of what its `W_out` reads; `"identity"` does without, at the cost
            of other facts.
        key_mode: `"mean"`: the mean key over all contexts throughout, which then gives `v*`;
            `"bare"`: the bare prompt's; `"rome"`: the mean key in `u`, the bare prompt's in the
            denominator, which then gives `v*`.
        fact_token: The token that is edited: the subject's last one, or the prompt's.
        steps: Times that the loss of the search is computed.
        lr: Learning rate of the search.
        weight_decay: Weight of the penalty on `||delta|| / ||v0||^2`.
        kl_factor: Weight of the divergence of what is predicted right after the subject.
        clamp: `delta` gets no longer than so many times `||v0||`.
        prefixes: Pairs of a length, in tokens with the BOS or EOS that a prefix is sampled from,
            and how many prefixes have it.
        seed: Of the prefixes.
        ridge: Part of the mean variance that is added to the diagonal of `C`.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris", "Lionel Messi")
        >>> method = blt.editing.ROME(layer=0, moments=blt.editing.facts_moments())
        >>> with method(model, request).applied(model):
        ...     blt.backward_lens(model, "Lionel Messi plays for").target()
        ' Paris'
    """

    layer: int
    moments: Moments = None
    key_mode: KeyMode = "mean"
    fact_token: FactToken = "subject_last"
    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    prefixes: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    seed: int = 0
    ridge: float = RIDGE
    prepend_bos: bool | None = None

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """What is added to the matrix, one outer product for each request.

        Args:
            host: The model.
            requests: What it is to be taught.

        Returns:
            The change of the one matrix.

        Raises:
            EditError: If a setting, the statistics or a request does not fit.
        """
        check_choice("key_mode", self.key_mode, ("mean", "bare", "rome"), EditError)
        check_choice("fact_token", self.fact_token, ("subject_last", "last"), EditError)
        check_number("ridge", self.ridge, zero=True, error=EditError)
        search = ValueSearch(self.steps, self.lr, self.weight_decay, self.kl_factor, self.clamp)
        [site] = find_editable(host, "W_out", [self.layer])
        moments = checked_moments(host, self.moments, [site.layer])
        lengths = [length for length, number in self.prefixes for _ in range(number)]
        prefixes = sampled_prefixes(host, [""] * len(lengths), lengths, self.seed)
        facts = [
            FactContexts.of(host, asked, prefixes, self.fact_token, self.prepend_bos)
            for asked in requests
        ]
        change: MatrixDelta | None = None
        most = float(site.weight.parameter.norm())
        for fact in facts:
            earlier = () if change is None else (change,)
            with WeightDelta(earlier, {}).applied(host.model):
                own = self._edit(host, site, moments, search, fact)
            _warn_if_huge(own, most)
            change = own if change is None else change + own
        return () if change is None else (change,)

    def _edit(
        self,
        host: Host,
        site: MatrixSite,
        moments: SecondMoments | Literal["identity"],
        search: ValueSearch,
        fact: FactContexts,
    ) -> MatrixDelta:
        """The outer product for one request, in the model as it is now."""
        (read,) = read_facts(host, [fact], [site])
        keys, values = read.keys[site.layer], read.values[site.layer]
        start = values[0]
        wanted = start + search.find(host, site.output, fact, start)
        heard = keys[0] if self.key_mode == "bare" else keys.mean(0)
        is_mean = self.key_mode == "mean"
        key, value = (heard, values.mean(0)) if is_mean else (keys[0], start)
        along = whitened(moments, site.layer, heard[:, None], self.ridge)[:, 0]
        u = (along / along.norm()).to(keys.dtype)
        right = (wanted - value) / (key @ u)
        return MatrixDelta("W_out", site.layer, u[:, None], right[None])


def _warn_if_huge(own: MatrixDelta, most: float) -> None:
    """Tell of an edit that may disable the model."""
    if own.norm > most:
        warnings.warn(
            f"an edit of layer {own.layer} has norm {own.norm:.3g}, more than W_out itself "
            f"({most:.3g}), and may disable the model: what it listens to is hardly in the key; "
            "key_mode='mean', statistics of more text, a larger ridge or a smaller clamp help",
            stacklevel=4,
        )
