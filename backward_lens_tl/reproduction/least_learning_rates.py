"""Figure 24: the least learning rate of a successful edit in one step."""

from __future__ import annotations

from functools import partial

from backward_lens_tl.evaluation.rates import STEPS, least_rates, least_rates_by_layer
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Finding, by_layer, count_check, listed_values
from backward_lens_tl.views import figures

_MOST_REQUESTS = 50


def least_learning_rates(evidence: Evidence) -> Finding:
    """The least rate of SGD, Adam and the forward pass shift, by layer (figure 24)."""
    requests = evidence.requests[:_MOST_REQUESTS]
    config = evidence.evaluation_config()
    table = least_rates(evidence.model, requests, config=config, progress=evidence.progress)
    layers = least_rates_by_layer(table, evidence.perplexity)
    spread = by_layer(layers, "spread", "step")[list(STEPS)]
    perplexity = by_layer(layers, "perplexity", "step")[list(STEPS)]
    half = len(perplexity) // 2
    early, late = perplexity.head(half), perplexity.tail(len(perplexity) - half)
    baseline = late[["sgd", "adam"]].mean(axis=1)
    checks = [
        count_check(
            "the rate varies less between prompts for the shift than for SGD, in more than half of "
            "the layers",
            spread["shift"] < spread["sgd"],
            "layers; mean standard deviation of its decimal logarithm: "
            + listed_values(spread.mean().items(), ".2f"),
        ),
        count_check(
            "in the first half of the layers, perplexity is lower after the shift than after SGD "
            "and Adam, in more than half of them",
            early["shift"] < early[["sgd", "adam"]].min(axis=1),
            "layers; mean perplexity " + listed_values(early.mean().items(), ".2f"),
        ),
        count_check(
            "in the second half, it is equal to within 1 %, in more than half of the layers",
            (late["shift"] / baseline - 1).abs() < 0.01,
            "layers; mean perplexity " + listed_values(late.mean().items(), ".2f"),
        ),
    ]
    if early.empty:  # a model with one layer
        del checks[1]
    missing = table["rate"].isna().groupby(table["step"]).sum()[list(STEPS)]
    return Finding(
        tuple(checks),
        {"by layer": layers, "rates": table},
        {"least learning rates": partial(figures.least_rates, layers)},
        notes=(
            f"{len(requests)} records, each with the first token of its target. The rates are on a "
            "grid of four per power of ten.",
            "Steps without a sufficient rate on the grid, which perplexity leaves out: "
            + listed_values(missing.items(), "d")
            + f" of {len(requests) * evidence.n_layers} each.",
        ),
    )
