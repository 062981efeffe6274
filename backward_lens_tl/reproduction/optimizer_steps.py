"""Steps of optimizers, which the paper leaves open: their rank, and the tokens that they add."""

from __future__ import annotations

from backward_lens_tl.editing.methods.steps import GradientStep, Optimizer
from backward_lens_tl.editing.tokens import compare_tokens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_of, listed_values

_MOST_REQUESTS = 20
_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "muon")
_OVERLAP = 0.5
_MEANS = ["rank", "top_energy", "stable_rank", "alignment", "answer_overlap", "answer_target_rank"]


def optimizer_steps(evidence: Evidence) -> Finding:
    """One step of SGD, Adam and Muon on each matrix, for one fact at a time."""
    import pandas as pd

    found = []
    for index, request in enumerate(evidence.requests[:_MOST_REQUESTS]):
        steps = {
            optimizer: GradientStep(
                optimizer, lr=1.0, matrices=("W_in", "W_out"), prepend_bos=evidence.prepend_bos
            )(evidence.model, request)
            for optimizer in _OPTIMIZERS
        }
        own = compare_tokens(evidence.model, steps, target=request.target, multi_token="first")
        found.append(own.assign(request=index))
    table = pd.concat(found, ignore_index=True)
    means = table.groupby(["matrix", "edit"], sort=False)[_MEANS].mean().reset_index()

    ranks = table.pivot(index=["request", "matrix", "layer"], columns="edit", values="rank")
    mean_ranks = ranks.mean()
    n_kept = int((ranks["muon"] == ranks["sgd"]).sum())
    overlap = table.groupby("edit")["answer_overlap"].mean()
    added = table[(table["matrix"] == "W_out") & table["answer_target_rank"].notna()]
    near = (added["answer_target_rank"] <= evidence.near_end).groupby(added["edit"]).mean()
    names = list(_OPTIMIZERS)
    checks = (
        Check(
            "Muon keeps the rank of the gradient, and the rank of Adam's step is on average more "
            "than five times as large",
            n_kept == len(ranks) and bool(mean_ranks["adam"] > 5 * mean_ranks["sgd"]),
            f"Muon keeps it in {count_of(n_kept, len(ranks))} steps; mean ranks: "
            + listed_values(mean_ranks[names].items()),
        ),
        Check(
            f"Adam's and Muon's steps each keep at least {100 * _OVERLAP:.0f} % of the tokens of "
            "SGD's step",
            bool((overlap[["adam", "muon"]] >= _OVERLAP).all()),
            listed_values((100 * overlap[names]).items(), ".0f", " %"),
        ),
        Check(
            "for every optimizer, the target is among the most probable 1 % of what W_out's step "
            "adds, in more than half of the layers and facts",
            bool((near > 0.5).all()),
            listed_values((100 * near[names]).items(), ".0f", " %"),
        ),
    )
    return Finding(
        checks,
        {"means": means, "steps": table},
        notes=(
            f"{table['request'].nunique()} facts, each with its own gradient. Tokens are those of "
            "the whole step's output for the direction that SGD's step reads, because no singular "
            "component of Muon's step is larger than another. The overlap is the fraction of them "
            "that SGD's step has too.",
        ),
    )
