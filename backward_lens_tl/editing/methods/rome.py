"""ROME (Meng et al. 2022): one outer product in one `W_out`, so that a key maps to a value.

Among all changes `dW` with `k (W + dW) = v* - b`, it chooses the one that least changes what the
matrix writes for other text: `tr(dW^T C dW)` is smallest, with `C` the second moments of what it
reads. That is `dW = u (v* - v)^T / (k . u)` with `u` along `C^-1 k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from backward_lens_tl.editing.fact_contexts import FactContexts, read_facts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.fact_method import FactMethod, with_progress
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import warn
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite

Pair = Annotated[tuple[int, int], Field(strict=False)]  # a list of two, too

KeyMode = Literal["mean", "bare", "rome"]
"""Which key an edit responds to, and which one it is scaled for."""


@dataclass(frozen=True)
class ROME(FactMethod):
    """ROME: find the value that makes the model predict the target, and write it into one layer.

    The value `v* = v0 + delta` is searched for at the edited token, in the bare prompt and after
    prefixes that are sampled from the model. Several requests are edited one after the other, each
    in the model with the earlier edits.

    The published code corresponds to `key_mode="rome"`: the mean key in `u`, and the bare prompt's
    in the denominator. Where the two barely agree, the edit is very large and disables the model; a
    warning reports edits that are larger than the matrix.

    Settings of the search (`steps`, `lr`, `weight_decay`, `kl_factor`, `clamp`), `moments`,
    `fact_token`, `seed`, `ridge` and `prepend_bos` are explained in
    [`FactMethod`][backward_lens_tl.editing.FactMethod].

    Attributes:
        layer: The layer, from 0; negative ones count from the end.
        key_mode: `"mean"` uses the mean key over all contexts, which then maps to `v*`; `"bare"`
            the bare prompt's; `"rome"` the mean key in `u` and the bare prompt's in the
            denominator, which then maps to `v*`.
        prefixes: Pairs of a length, in tokens with the BOS or EOS that a prefix is sampled from,
            and how many prefixes have it.

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
    key_mode: KeyMode = "mean"
    prefixes: Sequence[Pair] = ((5, 10), (10, 10))

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute the change of the matrix, one outer product per request."""
        [site] = find_editable(host, "W_out", [self.layer])
        self._check_moments(host, [site.layer])
        lengths = [length for length, number in self.prefixes for _ in range(number)]
        changes: tuple[MatrixDelta, ...] = ()
        norm = float(site.weight.parameter.norm())
        facts = self._contexts(host, requests, [""] * len(lengths), lengths)
        for fact in with_progress(facts):
            with WeightDelta(changes, {}).applied(host.model):
                own = self._edit(host, site, fact)
            _warn_if_huge(own, norm)
            changes = (changes[0] + own if changes else own,)
        return changes

    def _edit(self, host: Host, site: MatrixSite, fact: FactContexts) -> MatrixDelta:
        """The outer product for one request, in the model as it is now."""
        [read] = read_facts(host, [fact], site)
        start = read.values[0]
        wanted = start + self._find_value(host, site.layer, site.output, fact, start)
        matched = read.keys[0] if self.key_mode == "bare" else read.keys.mean(0)
        key, value = (
            (matched, read.values.mean(0)) if self.key_mode == "mean" else (read.keys[0], start)
        )
        along = self._whitened(site.layer, matched[:, None])[:, 0]
        u = (along / along.norm()).to(key.dtype)
        right = (wanted - value) / (key @ u)
        return MatrixDelta("W_out", site.layer, u[:, None], right[None])


def _warn_if_huge(own: MatrixDelta, norm: float) -> None:
    if own.norm > norm:
        warn(
            f"an edit of layer {own.layer} has norm {own.norm:.3g}, more than W_out itself "
            f"({norm:.3g}), and may disable the model: the direction it responds to is nearly "
            "orthogonal to the key; use key_mode='mean', statistics of more text, a larger ridge "
            "or a smaller clamp"
        )
