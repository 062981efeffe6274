"""Tables 2 to 5 and figures 8 to 10: a gradient's neurons and the vectors that span it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.neurons import neuron_overlap, neuron_tokens, spanning_tokens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_of
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_COPY, _SIMILAR = 0.9, 0.7
_NORM_SHARE = 0.9
_GROUP = 0.01
_TOP_TOKENS = 100
_SHOWN_TOKENS = 3


def tokens_of_neurons(evidence: Evidence, matrix: str) -> Finding:
    """The tokens of a gradient's neurons, in groups by norm (tables 2 and 4)."""
    layer = evidence.example_layer
    table = neuron_tokens(evidence.model, evidence.example, matrix, layer, k=_SHOWN_TOKENS)
    largest = table[table["group"] == "largest"]
    # The sign of a neuron varies, so its tokens may be at either end.
    ends = zip(largest["top_tokens"], largest["bottom_tokens"], strict=True)
    tokens = [{*top, *bottom} for top, bottom in ends]
    shared = sorted(set.intersection(*tokens)) if tokens else []
    wanted, is_shared = "a token", bool(shared)
    if matrix == "W_out":  # the update of W_in adds inputs, which are unrelated to the target
        target = evidence.example.target()
        wanted, is_shared = f"the target {target!r}", target in shared
    check = Check(
        f"the largest neurons share their tokens: {wanted} is among the first three tokens, at "
        "either end, of all of them",
        is_shared,
        f"they share {', '.join(map(repr, shared)) or 'none'}",
    )
    return Finding(
        (check, *_overlap_checks(_overlap(evidence, matrix), matrix)),
        {f"neurons of {matrix}, layer {layer}": table},
        notes=(_note(evidence),),
    )


def tokens_of_spanning_set(evidence: Evidence, matrix: str) -> Finding:
    """The tokens of the vectors that span a gradient (tables 3 and 5)."""
    layer = evidence.example_layer
    table = _overlap(evidence, matrix)
    spanning = table[table["position"].notna()]
    best = spanning["similarity"].abs().groupby(spanning["neuron"]).max()
    energy = spanning.groupby("neuron")["neuron_norm"].first() ** 2
    is_similar = best >= _SIMILAR
    share = float(energy[is_similar].sum() / energy.sum())
    check = Check(
        "the spanning set has the tokens of the neurons: 90 % of the squared norm of the gradient "
        f"is in neurons with a cosine of at least {_SIMILAR}, up to the sign, with one of its "
        "vectors",
        share >= _NORM_SHARE,
        f"{100 * share:.1f} % of it, in {count_of(int(is_similar.sum()), len(best))} neurons",
    )
    vectors = spanning_tokens(evidence.model, evidence.example, matrix, layer, k=_SHOWN_TOKENS)
    return Finding(
        (check,), {f"spanning set of {matrix}, layer {layer}": vectors}, notes=(_note(evidence),)
    )


def similarity(evidence: Evidence, matrix: str) -> Finding:
    """A gradient's neurons compared with the vectors that span it (figures 8 to 10)."""
    layer, table = evidence.example_layer, _overlap(evidence, matrix)
    draw = partial(figures.neuron_overlap, table, matrix, layer)
    return Finding(
        _overlap_checks(table, matrix),
        {f"similarity of {matrix}, layer {layer}": table},
        {f"neurons of {matrix}, layer {layer}": draw},
        notes=(_note(evidence),),
    )


def _overlap(evidence: Evidence, matrix: str) -> pd.DataFrame:
    # At most a fifth of a small vocabulary: all vectors share all of it.
    k = max(1, min(_TOP_TOKENS, evidence.d_vocab // 5))
    return neuron_overlap(evidence.model, evidence.example, matrix, evidence.example_layer, k=k)


def _overlap_checks(table: pd.DataFrame, matrix: str) -> tuple[Check, Check]:
    spanning, zero = table[table["position"].notna()], table[table["position"].isna()]
    n_neurons = table["neuron"].nunique()
    n_group = max(1, round(_GROUP * n_neurons))
    largest = spanning[spanning["norm_order"] < n_group]
    closest = largest.loc[largest["similarity"].abs().groupby(largest["neuron"]).idxmax()]
    whose, cosines = "one of the inputs", closest["similarity"].abs()
    if matrix == "W_out":
        is_last = largest["position"] == largest["position"].max()
        whose, cosines = "the last token's VJP", largest.loc[is_last, "similarity"].abs()
    token = closest["token"].mode().iloc[0]
    smallest = table["norm_order"] >= n_neurons - n_group
    to_zero = zero.loc[smallest, "overlap"].mean()
    to_span = spanning.loc[smallest, "overlap"].groupby(spanning["position"]).mean().max()
    return (
        Check(
            f"the largest neurons are copies of {whose}: the largest 1 % have a cosine above "
            f"{_COPY} with it, up to the sign",
            bool((cosines > _COPY).all()),
            f"the {len(cosines)} largest have at least {cosines.min():.3f}; the closest vector is "
            f"most often that of {token!r}",
        ),
        Check(
            "the smallest neurons resemble the zero vector: the smallest 1 % share more of their "
            "top tokens with it than with any vector of the spanning set",
            bool(to_zero > to_span),
            f"they share {100 * to_zero:.0f} % with the zero vector, and at most "
            f"{100 * to_span:.0f} % with a vector of the spanning set",
        ),
    )


def _note(evidence: Evidence) -> str:
    return (
        f"The prompt {evidence.example.capture.prompt(0)!r} with the target "
        f"{evidence.example.target()!r}, in layer {evidence.example_layer} of {evidence.n_layers}; "
        "the paper shows layer 14 of the 24 of GPT2-medium."
    )
