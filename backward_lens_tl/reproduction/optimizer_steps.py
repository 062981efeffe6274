"""What optimizers make of a gradient's low rank and of its words, which the paper leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backward_lens_tl.editing.methods.steps import GradientStep, Optimizer
from backward_lens_tl.editing.tokens import compare_tokens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part

if TYPE_CHECKING:
    import pandas as pd

_MOST_REQUESTS = 20
_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "muon")
_SOME_WORDS = 0.5


def optimizer_steps(evidence: Evidence) -> Finding:
    """One step of SGD, Adam and Muon on each matrix, for one fact at a time."""
    import pandas as pd

    found = []
    for place, request in enumerate(evidence.requests[:_MOST_REQUESTS]):
        steps = {
            optimizer: GradientStep(
                optimizer, lr=1.0, matrices=("W_in", "W_out"), prepend_bos=evidence.prepend_bos
            )(evidence.model, request)
            for optimizer in _OPTIMIZERS
        }
        own = compare_tokens(evidence.model, steps, target=request.target, multi_token="first")
        found.append(own.assign(request=place))
    table = pd.concat(found, ignore_index=True)
    means = table.groupby(["matrix", "edit"], sort=False)[
        ["rank", "top_energy", "stable_rank", "alignment", "answer_overlap", "answer_target_rank"]
    ].mean()
    return Finding(
        (_ranks(table), _words(table), _target(table, evidence)),
        {"means": means.reset_index(), "steps": table},
        notes=(
            f"Of {table['request'].nunique()} facts, each a gradient of its own. Words are those "
            "that the whole step answers to what SGD's step listens to, since no singular "
            "component of Muon's is larger than another; overlap is the part of them that are "
            "SGD's, too.",
        ),
    )


def _ranks(table: pd.DataFrame) -> Check:
    ranks = table.pivot_table(index=["request", "matrix", "layer"], columns="edit", values="rank")
    kept = int((ranks["muon"] == ranks["sgd"]).sum())
    return Check(
        "Muon keeps the rank of the gradient, and Adam's step has a rank more than five times "
        "as large on average",
        bool(kept == len(ranks) and ranks["adam"].mean() > 5 * ranks["sgd"].mean()),
        f"Muon for {part(kept, len(ranks))} steps; mean ranks: "
        + ", ".join(f"{name} {ranks[name].mean():.1f}" for name in _OPTIMIZERS),
    )


def _words(table: pd.DataFrame) -> Check:
    means = table.groupby("edit")["answer_overlap"].mean()
    return Check(
        f"of the words of SGD's step at least {100 * _SOME_WORDS:.0f} % are left in Adam's, and as "
        "many in Muon's",
        bool((means[["adam", "muon"]] >= _SOME_WORDS).all()),
        ", ".join(f"{name} {100 * means[name]:.0f} %" for name in _OPTIMIZERS),
    )


def _target(table: pd.DataFrame, evidence: Evidence) -> Check:
    rank = "answer_target_rank"
    writing = table[(table["matrix"] == "W_out") & table[rank].notna()]
    near = {name: (own[rank] <= evidence.near_end).mean() for name, own in writing.groupby("edit")}
    return Check(
        "the target is among the most probable 1 % of what W_out's step writes, in more than half "
        "of the layers and facts, whatever the optimizer",
        bool(min(near.values()) > 0.5),
        ", ".join(f"{name} {100 * near[name]:.0f} %" for name in _OPTIMIZERS),
    )
