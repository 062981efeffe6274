"""Tables 2 to 5 and figures 8 to 10: single neurons of a gradient, and the vectors that span it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.neurons import neuron_overlap, neuron_tokens, spanning_tokens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_ALIKE = 0.9
_LIKE = 0.7
_MOST = 0.9
_PART = 0.01
_TOP = 100
_SHOWN = 3
_TIMES_MORE = 5
"""Of a small vocabulary at most a fifth is compared: all of it is the same for every vector."""


def shift_neurons(evidence: Evidence) -> Finding:
    """Neurons of `W_out`'s gradient in groups by norm (table 2)."""
    return _words(evidence, "W_out")


def shift_vectors(evidence: Evidence) -> Finding:
    """The VJPs that span `W_out`'s gradient (table 3)."""
    return _vectors(evidence, "W_out")


def imprint_neurons(evidence: Evidence) -> Finding:
    """Neurons of `W_in`'s gradient in groups by norm (table 4)."""
    return _words(evidence, "W_in")


def imprint_vectors(evidence: Evidence) -> Finding:
    """The inputs that span `W_in`'s gradient (table 5)."""
    return _vectors(evidence, "W_in")


def shift_similarity(evidence: Evidence) -> Finding:
    """Neurons of `W_out`'s gradient beside its VJPs (figures 8 and 9)."""
    return _similarity(evidence, "W_out")


def imprint_similarity(evidence: Evidence) -> Finding:
    """Neurons of `W_in`'s gradient beside its inputs (figure 10)."""
    return _similarity(evidence, "W_in")


def _words(evidence: Evidence, matrix: str) -> Finding:
    layer = evidence.example_layer
    table = neuron_tokens(evidence.model, evidence.example, matrix, layer, k=_SHOWN)
    # The update of W_out is towards the target; W_in gets the inputs, which need not be.
    target = evidence.example.target() if matrix == "W_out" else None
    return Finding(
        (_largest_agree(table, target), *_overlap_checks(_overlap(evidence, matrix), matrix)),
        {f"neurons of {matrix}, layer {layer}": table},
        notes=(_note(evidence),),
    )


def _largest_agree(table: pd.DataFrame, target: str | None) -> Check:
    """A neuron may have the tokens of its group at either end, since its sign varies."""
    largest = table[table["group"] == "largest"]
    said = [
        {*top, *bottom}
        for top, bottom in zip(largest["top_tokens"], largest["bottom_tokens"], strict=True)
    ]
    shared = sorted(set.intersection(*said)) if said else []
    return Check(
        "the largest neurons share their tokens, at one end or the other: "
        + ("at least one token" if target is None else f"the target {target!r}")
        + " is among the first three at an end of all of them",
        bool(shared) if target is None else target in shared,
        f"they share {', '.join(map(repr, shared)) or 'none'}",
    )


def _vectors(evidence: Evidence, matrix: str) -> Finding:
    layer = evidence.example_layer
    table = spanning_tokens(evidence.model, evidence.example, matrix, layer, k=_SHOWN)
    return Finding(
        (_few_say_it_all(_overlap(evidence, matrix)),),
        {f"spanning set of {matrix}, layer {layer}": table},
        notes=(_note(evidence),),
    )


def _few_say_it_all(table: pd.DataFrame) -> Check:
    spanning = table[table["position"].notna()]
    best = spanning["similarity"].abs().groupby(spanning["neuron"]).max()
    energy = spanning.groupby("neuron")["neuron_norm"].first() ** 2
    held = float(energy[best >= _LIKE].sum() / energy.sum())
    return Check(
        f"the spanning set says what the neurons say: nine tenths of the gradient, by squared "
        f"norm, are in neurons that have a cosine of at least {_LIKE} with one of its vectors, up "
        "to the sign",
        held >= _MOST,
        f"{100 * held:.1f} % of it, in {part(int((best >= _LIKE).sum()), len(best))} neurons",
    )


def _similarity(evidence: Evidence, matrix: str) -> Finding:
    layer = evidence.example_layer
    table = _overlap(evidence, matrix)
    return Finding(
        _overlap_checks(table, matrix),
        {f"similarity of {matrix}, layer {layer}": table},
        {
            f"neurons of {matrix}, layer {layer}": partial(
                figures.neuron_overlap, table, matrix, layer
            )
        },
        notes=(_note(evidence),),
    )


def _overlap(evidence: Evidence, matrix: str) -> pd.DataFrame:
    return neuron_overlap(
        evidence.model,
        evidence.example,
        matrix,
        evidence.example_layer,
        k=max(1, min(_TOP, evidence.d_vocab // _TIMES_MORE)),
    )


def _overlap_checks(table: pd.DataFrame, matrix: str) -> tuple[Check, ...]:
    spanning, zero = table[table["position"].notna()], table[table["position"].isna()]
    n_neurons = table["neuron"].nunique()
    group = max(1, round(_PART * n_neurons))
    longest = spanning[spanning["norm_order"] < group]
    likest = longest.loc[longest["similarity"].abs().groupby(longest["neuron"]).idxmax()]
    if matrix == "W_out":  # the paper names the vector
        whose = "the last token's VJP"
        best = longest.loc[longest["position"] == longest["position"].max(), "similarity"].abs()
    else:
        whose, best = "one of the inputs", likest["similarity"].abs()
    token = likest["token"].mode().iloc[0]
    shortest = table["norm_order"] >= n_neurons - group
    to_zero = zero.loc[shortest, "overlap"].mean()
    to_span = spanning.loc[shortest, "overlap"].groupby(spanning["position"]).mean().max()
    return (
        Check(
            f"the longest neurons are copies of {whose}: the longest 1 % have a cosine above "
            f"{_ALIKE} with it, up to the sign",
            bool((best > _ALIKE).all()),
            f"the {len(best)} longest have at least {best.min():.3f}; most often that of "
            f"{token!r} is the most alike",
        ),
        Check(
            "the shortest neurons read like the zero vector: the shortest 1 % share more of their "
            "top tokens with it than with any vector of the spanning set",
            bool(to_zero > to_span),
            f"they share {100 * to_zero:.0f} % with the zero vector, and at most "
            f"{100 * to_span:.0f} % with a vector of the spanning set",
        ),
    )


def _note(evidence: Evidence) -> str:
    prompt = evidence.example.capture.prompt(0)
    return (
        f"Of {prompt!r}, taught {evidence.example.target()!r}, in layer {evidence.example_layer} "
        f"of {evidence.n_layers}; the paper shows layer 14 of the 24 of GPT2-medium."
    )
