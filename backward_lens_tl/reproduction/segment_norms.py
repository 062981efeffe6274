"""Figures 6, 16 and 17: which part of a prompt writes into which layer."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.by_segment import norm_correlation, norms_by_segment
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Draw, Finding, by_layer, part
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
    table = norms_by_segment(cells[cells["matrix"] == "W_out"])
    checks = (
        _subject_leads_early(table, evidence),
        _last_token_peaks(table, evidence),
        _others_are_small(table),
    )
    return Finding(checks, *_shown(table))


def norms_of_all(evidence: Evidence) -> Finding:
    """The same for every kind of matrix; the paper speaks of the MLPs' (figure 16)."""
    import pandas as pd

    attention, table = evidence.attention_sweep, norms_by_segment(evidence.positions)
    mlp: list[str] = table["matrix"].unique().tolist()
    checks = [
        check(table, matrix, evidence)
        for matrix in mlp
        for check in (_last_subject_token_leads, _last_token_peaks_midway)
    ]
    if attention is None:
        note = "The attention of this model cannot be analysed."
    else:
        # Each by itself, which takes less memory than all cells together.
        own = norms_by_segment(attention)
        leaders = (
            f"{matrix} {_early_leader(own, matrix, evidence)}" for matrix in own["matrix"].unique()
        )
        note = (
            "Of attention, which the paper shows and does not speak of, most in the first quarter "
            f"of the layers is written, but for the last token, by: {', '.join(leaders)}."
        )
        table = pd.concat([own, table], ignore_index=True)
    return Finding(tuple(checks), *_shown(table), notes=(note,))


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


def _shown(table: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], dict[str, Draw]]:
    """The table of norms, and a figure for each matrix."""
    return {"norms by segment": table}, {
        f"norm of delta_i, {matrix}": partial(figures.norms_by_segment, table, matrix=matrix)
        for matrix in table["matrix"].unique()
    }


def _last_subject_token_leads(table: pd.DataFrame, matrix: str, evidence: Evidence) -> Check:
    leader = _early_leader(table, matrix, evidence)
    return Check(
        f"{matrix}: in the first quarter of the layers the subject's last token writes more than "
        "any other but the prompt's last one",
        leader == "last subject token",
        f"most is written by: {leader}",
    )


def _last_token_peaks_midway(table: pd.DataFrame, matrix: str, evidence: Evidence) -> Check:
    last = by_layer(table, "mean", matrix=matrix, segment="last token")
    peak = max(last, key=last.__getitem__)
    return Check(
        f"{matrix}: the last token writes most around the middle of the layers, between a quarter "
        "and three quarters",
        peak in evidence.layers(0.25, 0.75),
        f"most in layer {peak} of {evidence.n_layers}",
    )


def _others_are_small(table: pd.DataFrame) -> Check:
    peak = max(by_layer(table, "mean", segment="last token").values())
    means = {name: by_layer(table, "mean", segment=name) for name in _OTHERS}
    parts = {name: fmean(own.values()) / peak for name, own in means.items() if own}
    return Check(
        "tokens outside of the subject, but for the last one, write little: over the layers "
        f"less than {_SMALL} of what the last token writes at its strongest",
        bool(parts) and all(mean < _SMALL for mean in parts.values()),
        ", ".join(f"{name} {mean:.2f}" for name, mean in parts.items()) or "there are none",
    )


def _subject_leads_early(table: pd.DataFrame, evidence: Evidence) -> Check:
    means = _early_means(table, "W_out", evidence)
    ordered = _by_strength(means)
    return Check(
        "in the first quarter of the layers a token of the subject writes more than any other but "
        "the last one",
        ordered[0] in _SUBJECT,
        "mean norms: " + ", ".join(f"{name} {means.get(name, 0):.3g}" for name in ordered),
    )


def _early_leader(table: pd.DataFrame, matrix: str, evidence: Evidence) -> str:
    return _by_strength(_early_means(table, matrix, evidence))[0]


def _by_strength(means: dict[str, float]) -> list[str]:
    """Segments, those that write most first."""
    return sorted(means, key=means.__getitem__, reverse=True) or ["none"]


def _early_means(table: pd.DataFrame, matrix: str, evidence: Evidence) -> dict[str, float]:
    """What each segment but the last token writes in the first quarter of the layers."""
    layers = evidence.layers(0.0, 0.25)
    own = table[(table["matrix"] == matrix) & (table["segment"] != "last token")]
    by_segment = {name: by_layer(own, "mean", segment=name) for name in own["segment"].unique()}
    return {name: fmean(means[layer] for layer in layers) for name, means in by_segment.items()}


def _last_token_peaks(table: pd.DataFrame, evidence: Evidence) -> Check:
    last = by_layer(table, "mean", segment="last token")
    peak, second_quarter = max(last, key=last.__getitem__), evidence.layers(0.25, 0.5)
    return Check(
        "the last token writes most in the second quarter of the layers",
        peak in second_quarter,
        f"most in layer {peak} of {evidence.n_layers}, a norm of {last[peak]:.3g}; in the second "
        f"quarter up to {max(last[layer] for layer in second_quarter):.3g}",
    )
