"""Figure 4: the rank of each layer's gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.ranks import gradient_ranks, rank_exceptions
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_ALMOST = 0.95
_DROP = 2
_TOLERANCE = (
    "A singular value counts if it is larger than n times the eps of float32 of the largest one."
)
_NO_RANKS = "No gradient has a rank of its own: heads or experts have factors of their own."


def rank_law(evidence: Evidence) -> Finding:
    """Rank against length of the prompt (figure 4)."""
    table, off = evidence.gradients, rank_exceptions(evidence.gradients)
    claims = {
        False: "every layer but the last has the prompt's length as its rank",
        True: "the last layer has rank 1",
    }
    there = set(table.loc[table["rank"].notna(), "is_last_layer"].astype(bool))
    checks = [
        _check(table, off, claim, is_last) for is_last, claim in claims.items() if is_last in there
    ]
    return Finding(
        (*checks, _drops(off)) if checks else (),
        {"ranks": gradient_ranks(table), "exceptions": off},
        {"rank against length": partial(figures.gradient_ranks, table)},
        notes=(_TOLERANCE if checks else _NO_RANKS,),
    )


def _check(table: pd.DataFrame, off: pd.DataFrame, claim: str, is_last: bool) -> Check:
    own = table[table["rank"].notna() & (table["is_last_layer"].astype(bool) == is_last)]
    last = table.loc[table["is_last_layer"].astype(bool), "layer"]
    others = off[off["layer"].isin(last) == is_last]
    right = len(own) - len(others)
    causes = others["cause"].value_counts()
    return Check(
        f"{claim}, but for a rare drop",
        right >= _ALMOST * len(own),
        f"{part(right, len(own))} gradients",
        "; ".join(f"{count} times {cause}" for cause, count in causes.items()),
    )


def _drops(off: pd.DataFrame) -> Check:
    largest = max((off["law"] - off["rank"]).abs().tolist(), default=0)
    return Check(
        "where the rank drops, it does so by one or two",
        largest <= _DROP,
        f"gradients off the law: {len(off)}, by at most {largest}",
    )
