"""Why the Normalized Logit Lens may change nothing: final norms without a bias."""

from __future__ import annotations

from backward_lens_tl.models import host_of
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_check

_ALIKE = 0.99


def normalization(evidence: Evidence) -> Finding:
    """Ranks of the target under both lenses, VJP by VJP."""
    cells = evidence.positions
    cells = cells[(cells["matrix"] == "W_out") & ~cells["is_zero"]]
    keys = ["prompt", "layer", "position"]
    ranks = cells.pivot(index=keys, columns="projection", values="target_rank")
    is_alike = ranks["logit_lens"] == ranks["normalized"]
    faint = host_of(evidence.model).unembedding.faint_norm
    return Finding(
        (
            count_check(
                "normalization changes nothing: W_out's VJPs rank the target equally with and "
                "without it",
                is_alike,
                "VJPs",
                at_least=_ALIKE,
            ),
            Check(
                "the final norm and the unembedding have no bias, so the length of a vector does "
                "not affect the order of its scores",
                faint == 0,
                "no bias"
                if faint == 0
                else f"a bias; it outweighs vectors shorter than {faint:.2g}, the length of "
                f"{100 * (cells['norm'] < faint).mean():.0f} % of the VJPs",
            ),
        )
    )
