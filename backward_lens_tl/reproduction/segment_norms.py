"""Figures 6, 16 and 17: norms by segment of the prompt and by layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from backward_lens_tl.analysis.by_segment import norm_correlation, norms_by_segment
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import (
    Check,
    Draw,
    Finding,
    by_layer,
    count_check,
    listed_values,
)
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
    means = by_layer(table, "mean", "segment")
    early, last = _early_means(table, "W_out", evidence), means["last token"]
    quarter = evidence.layers(0.25, 0.5)
    others = {name: means[name].mean() / last.max() for name in _OTHERS if name in means}
    checks = (
        Check(
            "in the first quarter of the layers, a token of the subject has the largest norm, not "
            "counting the last token of the prompt",
            early.index[0] in _SUBJECT,
            "mean norms: " + listed_values(early.items(), ".3g"),
        ),
        Check(
            "the last token has its largest norm in the second quarter of the layers",
            last.idxmax() in quarter,
            f"in layer {last.idxmax()} of {evidence.n_layers}, where it is {last.max():.3g}; in "
            f"the second quarter it is at most {last[list(quarter)].max():.3g}",
        ),
        Check(
            "tokens before and after the subject have small norms: averaged over the layers, less "
            f"than {_SMALL} of the last token's largest norm",
            bool(others) and all(mean < _SMALL for mean in others.values()),
            listed_values(others.items(), ".2f") or "there are none",
        ),
    )
    return Finding(checks, {"norms by segment": table}, _figures(table, "vjp"))


def norms_of_all(evidence: Evidence) -> Finding:
    """Norms of the VJPs of every kind of matrix; the paper's text is about the MLPs (figure 16)."""
    import pandas as pd

    attention, table = evidence.attention_sweep, norms_by_segment(evidence.positions)
    checks = []
    for matrix in table["matrix"].unique():
        leader = _early_means(table, matrix, evidence).index[0]
        last = by_layer(table, "mean", "segment", matrix=matrix)["last token"]
        checks += [
            Check(
                f"{matrix}: in the first quarter of the layers, the last token of the subject has "
                "the largest norm, not counting the last token of the prompt",
                leader == "last subject token",
                f"the largest is that of: {leader}",
            ),
            Check(
                f"{matrix}: the last token has its largest norm between a quarter and three "
                "quarters of the layers",
                last.idxmax() in evidence.layers(0.25, 0.75),
                f"in layer {last.idxmax()} of {evidence.n_layers}",
            ),
        ]
    if attention is None:
        note = "The attention of this model cannot be analysed."
    else:
        # By itself, which takes less memory than all cells together.
        own = norms_by_segment(attention)
        leaders = ", ".join(
            f"{matrix} {_early_means(own, matrix, evidence).index[0]}"
            for matrix in own["matrix"].unique()
        )
        note = (
            "The paper shows attention but does not discuss it. In the first quarter of the "
            f"layers, the largest norms, not counting the last token, are those of: {leaders}."
        )
        table = pd.concat([own, table], ignore_index=True)
    return Finding(
        tuple(checks), {"norms by segment": table}, _figures(table, "vjp"), notes=(note,)
    )


def norms_of_inputs(evidence: Evidence) -> Finding:
    """Norms of the inputs `x_i` by segment and layer (figure 17)."""
    cells = evidence.positions
    table, correlation = norms_by_segment(cells, "input"), norm_correlation(cells)
    known = correlation[correlation["spearman"].notna()]  # one vector alone has no correlation
    is_weak = known["spearman"].abs() < _UNCORRELATED
    between = f" from {known['spearman'].min():.2f} to {known['spearman'].max():.2f}"
    check = count_check(
        "the norms of x_i and delta_i are not correlated: in most layers, Spearman's coefficient "
        f"is below {_UNCORRELATED} in absolute value",
        is_weak,
        "layers and matrices" + (f"; the coefficients are{between}" if len(known) else ""),
        exceptions=", ".join(
            f"{row.spearman:.2f} in layer {row.layer} of {row.matrix}"
            for row in known[~is_weak].itertuples()
        ),
    )
    return Finding(
        (check,),
        {"input norms by segment": table, "correlation": correlation},
        _figures(table, "input"),
    )


def _figures(table: pd.DataFrame, of: Literal["vjp", "input"]) -> dict[str, Draw]:
    vector = {"vjp": "delta_i", "input": "x_i"}[of]
    return {
        f"norm of {vector}, {matrix}": partial(
            figures.norms_by_segment, table, matrix=matrix, of=of
        )
        for matrix in table["matrix"].unique()
    }


def _early_means(table: pd.DataFrame, matrix: str, evidence: Evidence) -> pd.Series[float]:
    """Mean norm of each segment but the last token in the first quarter of the layers."""
    import pandas as pd

    own = by_layer(table[table["segment"] != "last token"], "mean", "segment", matrix=matrix)
    if own.empty:
        return pd.Series({"none": 0.0})
    means = own.loc[list(evidence.layers(0.0, 0.25))].mean()
    return means.sort_values(ascending=False, kind="stable")
