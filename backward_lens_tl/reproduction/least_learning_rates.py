"""Figure 24: the least learning rate of a successful edit in one step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.evaluation.rates import STEPS, least_rates, least_rates_by_layer
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_REQUESTS = 50
_EQUAL = 0.01


def least_learning_rates(evidence: Evidence) -> Finding:
    """The least rate of SGD, Adam and the forward pass shift, layer by layer (figure 24)."""
    requests = evidence.requests[:_MOST_REQUESTS]
    config = evidence.evaluation_config()
    table = least_rates(evidence.model, requests, config=config, progress=evidence.progress)
    by_layer = least_rates_by_layer(table, evidence.perplexity)
    # A single layer is in the second half.
    early = (_early(by_layer),) if evidence.n_layers > 1 else ()
    return Finding(
        (_spread(by_layer), *early, _late(by_layer)),
        {"by layer": by_layer, "rates": table},
        {"least learning rates": partial(figures.least_rates, by_layer)},
        notes=(
            f"Of {len(requests)} records, as far as the first token of their target goes; rates "
            "are tried on a grid of four in each power of ten.",
            "No rate of the grid is enough, and perplexity is that of the others: "
            + ", ".join(f"{step} {_missing(table, step)}" for step in STEPS)
            + f" of {len(requests) * evidence.n_layers} steps each.",
        ),
    )


def _missing(table: pd.DataFrame, step: str) -> int:
    return int(table.loc[table["step"] == step, "rate"].isna().sum())


def _spread(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "spread")
    lower = int((own["shift"] < own["sgd"]).sum())
    means = own.mean()
    return Check(
        "the rate varies less from prompt to prompt for the shift than for SGD, in more than half "
        "of the layers",
        lower > len(own) / 2,
        f"in {part(lower, len(own))} layers; mean standard deviation of its decimal logarithm: "
        + ", ".join(f"{step} {means[step]:.2f}" for step in STEPS),
    )


def _early(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "perplexity")
    early = own.head(len(own) // 2)
    better = int((early["shift"] < early[["sgd", "adam"]].min(axis=1)).sum())
    return Check(
        "in the first half of the layers perplexity is better after the shift than after SGD and "
        "Adam, in more than half of them",
        better > len(early) / 2,
        f"in {part(better, len(early))} layers; {_means(early)}",
    )


def _late(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "perplexity")
    late = own.tail(len(own) - len(own) // 2)
    others = late[["sgd", "adam"]].mean(axis=1)
    equal = int(((late["shift"] / others - 1).abs() < _EQUAL).sum())
    return Check(
        "in the second half it is equal, within 1 %, in more than half of the layers",
        equal > len(late) / 2,
        f"in {part(equal, len(late))} layers; {_means(late)}",
    )


def _means(table: pd.DataFrame) -> str:
    means = table.mean()
    return "mean perplexity " + ", ".join(f"{step} {means[step]:.2f}" for step in STEPS)


def _by_layer(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per layer, a column per step."""
    return table.pivot(index="layer", columns="step", values=column)
