"""Figure 4: the rank of each layer's gradient."""

from __future__ import annotations

from functools import partial

import numpy as np

from backward_lens_tl.analysis.ranks import gradient_ranks, rank_exceptions
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_check
from backward_lens_tl.views import figures

_AT_LEAST = 0.95
_LARGEST_DROP = 2


def rank_law(evidence: Evidence) -> Finding:
    """Rank against prompt length (figure 4)."""
    table, off = evidence.gradients, rank_exceptions(evidence.gradients)
    known = table[table["rank"].notna()]
    is_last = known["is_last_layer"].astype(bool)
    checks = []
    for claim, own in (
        ("in every layer but the last, the rank is the length of the prompt", known[~is_last]),
        ("in the last layer, the rank is 1", known[is_last]),
    ):
        if own.empty:
            continue
        wrong = off[off["layer"].isin(own["layer"])]
        causes = wrong["cause"].value_counts()
        checks.append(
            count_check(
                f"{claim}, with rare exceptions",
                np.repeat([True, False], [len(own) - len(wrong), len(wrong)]),
                "gradients",
                at_least=_AT_LEAST,
                exceptions="; ".join(f"{cause} ({count})" for cause, count in causes.items()),
            )
        )
    note = "No gradient has a rank: the factors of each head or expert are separate."
    if checks:
        largest = max((off["law"] - off["rank"]).abs(), default=0)
        checks.append(
            Check(
                "no rank differs from this by more than two",
                bool(largest <= _LARGEST_DROP),
                f"gradients with another rank: {len(off)}; largest difference: {largest}",
            )
        )
        note = "A singular value counts if it exceeds n times float32's eps times the largest one."
    return Finding(
        tuple(checks),
        {"ranks": gradient_ranks(table), "exceptions": off},
        {"rank against length": partial(figures.gradient_ranks, table)},
        notes=(note,),
    )
