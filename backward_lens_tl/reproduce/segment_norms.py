"""Figures 6, 16 and 17: which part of a prompt writes into which layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.by_segment import norm_correlation, norms_by_segment
from backward_lens_tl.reproduce.evidence import Evidence
from backward_lens_tl.reproduce.finding import Check, Finding, by_layer, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_SMALL = 0.25
_UNCORRELATED = 0.3
_SUBJECT = ("first subject token", "middle subject tokens", "last subject token")
_OTHERS = ("before subject", "after subject")


def norms_of_shifts(evidence: Evidence) -> Finding:
    """Norms of `W_out`'s VJPs by segment and layer (figure 6)."""
    cells = evidence.positions
    return _norms(evidence, norms_by_segment(cells[cells["matrix"] == "W_out"]))


def norms_of_all(evidence: Evidence) -> Finding:
    """The same for every kind of matrix (figure 16)."""
    import pandas as pd

    attention = evidence.attention_sweep
    if attention is None:
        notes: tuple[str, ...] = ("The attention of this model cannot be analysed.",)
        return _norms(evidence, norms_by_segment(evidence.positions), notes)
    # Each by itself, which takes less memory than all cells together.
    both = (norms_by_segment(cells) for cells in (attention.positions(), evidence.positions))
    return _norms(evidence, pd.concat(both))


def norms_of_inputs(evidence: Evidence) -> Finding:
    """Norms of the inputs `x_i` by segment and layer (figure 17)."""
    cells = evidence.positions
    table, correlation = norms_by_segment(cells, "input"), norm_correlation(cells)
    # A layer in which one token writes has none.
    known = correlation[correlation["spearman"].notna()]
    found: list[float] = known["spearman"].tolist()
    strong = known[known["spearman"].abs() >= _UNCORRELATED]
    weak = len(found) - len(strong)
    return Finding(
        (
            Check(
                "the norms of x_i and delta_i are not correlated: in most layers Spearman's "
                f"coefficient is below {_UNCORRELATED} in size",
                weak > len(found) / 2,
                f"it is in {part(weak, len(found))} layers and matrices"
                + (f", and lies between {min(found):.2f} and {max(found):.2f}" if found else ""),
                ", ".join(
                    f"{row.spearman:.2f} in layer {row.layer} of {row.matrix}"
                    for row in strong.itertuples()
                ),
            ),
        ),
        {"input norms by segment": table, "correlation": correlation},
        {
            f"norm of x_i, {matrix}": partial(
                figures.norms_by_segment, table, matrix=matrix, of="input"
            )
            for matrix in table["matrix"].unique()
        },
    )


def _norms(evidence: Evidence, table: pd.DataFrame, notes: tuple[str, ...] = ()) -> Finding:
    matrices: list[str] = table["matrix"].unique().tolist()
    others = [name for name in matrices if name != "W_out"]
    return Finding(
        (
            _others_are_small(table, "W_out"),
            _subject_leads_early(table, evidence),
            _last_token_peaks(table, evidence),
            *(_others_are_small(table, name) for name in others),
        ),
        {"norms by segment": table},
        {
            f"norm of delta_i, {matrix}": partial(figures.norms_by_segment, table, matrix=matrix)
            for matrix in matrices
        },
        notes=notes,
    )


def _others_are_small(table: pd.DataFrame, matrix: str) -> Check:
    peak = max(by_layer(table, "mean", matrix=matrix, segment="last token").values())
    means = {name: by_layer(table, "mean", matrix=matrix, segment=name) for name in _OTHERS}
    parts = {name: fmean(own.values()) / peak for name, own in means.items() if own}
    return Check(
        f"{matrix}: tokens outside of the subject, but for the last one, write little: over the "
        f"layers less than {_SMALL} of what the last token writes at its strongest",
        all(mean < _SMALL for mean in parts.values()),
        ", ".join(f"{name} {mean:.2f}" for name, mean in parts.items()) or "there are none",
    )


def _subject_leads_early(table: pd.DataFrame, evidence: Evidence) -> Check:
    early = evidence.layers(0.0, 0.25)
    means = {
        name: _mean(by_layer(table, "mean", matrix="W_out", segment=name), early)
        for name in table["segment"].unique()
        if name != "last token"
    }
    ordered = sorted(means, key=means.__getitem__, reverse=True)
    return Check(
        "in the first quarter of the layers a token of the subject writes more than any other but "
        "the last one",
        bool(ordered) and ordered[0] in _SUBJECT,
        "mean norms: " + ", ".join(f"{name} {means[name]:.3g}" for name in ordered),
    )


def _last_token_peaks(table: pd.DataFrame, evidence: Evidence) -> Check:
    last = by_layer(table, "mean", matrix="W_out", segment="last token")
    peak, second_quarter = max(last, key=last.__getitem__), evidence.layers(0.25, 0.5)
    return Check(
        "the last token writes most in the second quarter of the layers",
        peak in second_quarter,
        f"most in layer {peak} of {evidence.n_layers}, a norm of {last[peak]:.3g}; in the second "
        f"quarter up to {max(last[layer] for layer in second_quarter):.3g}",
    )


def _mean(numbers: dict[int, float], layers: Sequence[int]) -> float:
    return fmean(numbers[layer] for layer in layers)
