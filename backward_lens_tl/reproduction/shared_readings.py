"""What the readings of all prompts have in common: junk tokens, and the last layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.readout.projections import CosineLens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import (
    Check,
    Finding,
    count_check,
    listed_values,
    spearman,
)
from backward_lens_tl.reproduction.last_token_claims import (
    by_layer_and_reading,
    verdicts_by_reading,
)
from backward_lens_tl.reproduction.vectors import PromptVjps, mean_of_others, target_ranks
from backward_lens_tl.views import figures

_LEADERS = 10
_RELATED = 0.5
_MOST_PROMPTS = 48
"""Prompts whose cells are all read; the scores of one layer are in memory together."""

_PLAIN, _CENTRED = "as it is", "minus the mean"
_CONTROL = "minus another layer's mean"
_COSINE = "as cosines"
_READINGS = [_PLAIN, _CENTRED, _CONTROL, _COSINE]


def junk_tokens(evidence: Evidence) -> Finding:
    """Tokens that lead many cells, before and after the mean of other prompts is subtracted."""
    import pandas as pd

    host, every = host_of(evidence.model), _several(evidence)
    step = max(1, len(every) // _MOST_PROMPTS)
    leaders = _cell_leaders(host, every[::step][:_MOST_PROMPTS])
    shares = {
        reading: sum(n for _, n in counts.most_common(_LEADERS)) / counts.total()
        for reading, counts in leaders.items()
    }
    shown = pd.DataFrame(
        [
            {
                "reading": reading,
                "token": host.vocabulary.text(token),
                "cells": n,
                "percent": 100 * n / counts.total(),
            }
            for reading, counts in leaders.items()
            for token, n in counts.most_common(_LEADERS)
        ]
    )
    table = by_layer_and_reading(_last_token_ranks(host, every), evidence)
    medians = table.pivot(index="layer", columns="reading", values="median_rank")
    near = medians <= evidence.near_end
    n_cells = leaders[_PLAIN].total()
    return Finding(
        (
            count_check(
                "without what other prompts share, the update at the last token has the target "
                "among the most probable 1 % in three quarters of the layers, by the median",
                near[_CENTRED],
                f"layers; as it is: {int(near[_PLAIN].sum())}; as cosines: "
                f"{int(near[_COSINE].sum())}; control, minus another layer's mean: "
                f"{int(near[_CONTROL].sum())}",
                at_least=0.75,
            ),
            Check(
                f"the {_LEADERS} most frequent leaders lead at least a tenth of the cells of "
                "W_out, and at most half as many with cosines, which no token's length affects",
                shares[_PLAIN] >= 0.1 and shares[_COSINE] <= shares[_PLAIN] / 2,
                f"{100 * shares[_PLAIN]:.1f} % of {n_cells} cells, {100 * shares[_COSINE]:.1f} % "
                f"with cosines, and {100 * shares[_CENTRED]:.1f} % minus the mean of the other "
                "prompts; the first three are "
                + listed_values(
                    (
                        (repr(token), 100 * n / n_cells)
                        for token, n in shown[["token", "cells"]].head(3).values.tolist()
                    ),
                    unit=" %",
                ),
            ),
        ),
        {
            "verdicts": verdicts_by_reading(table, evidence, [_PLAIN, _CENTRED, _COSINE]),
            "most frequent leaders": shown,
            "target rank by layer": table,
        },
        {
            "rank of the target": partial(
                figures.layer_lines,
                table.assign(rank=1 + table["median_rank"]),
                "rank",
                "reading",
                title=f"The target's place in the update at the last token, {len(every)} prompts",
                unit="median place, 1 is the top",
                scale="log",
            )
        },
        notes=(
            "The mean is over the other prompts' vectors of the same layer: those at the last "
            "token for ranks, those of all tokens for leaders.",
        ),
    )


def last_layer(evidence: Evidence) -> Finding:
    """The last layer's VJP, which is known in closed form (lemma 5.1), and its parts."""
    import pandas as pd

    host, every = host_of(evidence.model), _several(evidence)
    table = by_layer_and_reading(_last_token_ranks(host, every), evidence)
    own = table[table["layer"] == evidence.n_layers - 1].set_index("reading")
    medians = dict(zip(own.index, own["median_rank"], strict=True))
    parts = _parts(host, every)
    shared, own_length = _shared_order(host, every)
    ranks = {
        name: target_ranks(host.unembedding.logits(rows), every) for name, rows in parts.items()
    }
    decomposed = pd.DataFrame(
        [
            {
                "part": name,
                "median_rank": float(found.double().quantile(0.5)),
                "leads": float((found == 0).double().mean()),
            }
            for name, found in ranks.items()
        ]
    )
    leads = 100 * own["leads"]
    return Finding(
        (
            Check(
                "in the last layer, the target leads more than half of the updates at the last "
                "token once the mean of the other prompts is subtracted",
                bool(leads[_CENTRED] > 50),
                f"the target leads in {leads[_CENTRED]:.0f} % of the prompts; read as it is, in "
                f"{leads[_PLAIN]:.0f} %; as cosines, in {leads[_COSINE]:.0f} %; median ranks "
                f"{medians[_CENTRED]:.0f}, {medians[_PLAIN]:.0f} and {medians[_COSINE]:.0f} "
                f"of {evidence.d_vocab}",
            ),
            Check(
                "what the prompts share orders tokens by the length of their column of W_U, which "
                "has no meaning: Spearman's coefficient of scores and lengths is at least "
                f"{_RELATED} in absolute value for the mean update, and below {_RELATED} without "
                "it, averaged over prompts",
                abs(shared["length"]) >= _RELATED and own_length < _RELATED,
                f"coefficient {shared['length']:.2f}, without the mean {own_length:.2f}; with the "
                f"mean log probability, the mean update has {shared['log probability']:.2f}",
            ),
            Check(
                "control: with another layer's mean instead, the target leads at most half as "
                "often",
                bool(2 * leads[_CONTROL] <= leads[_CENTRED]),
                f"{leads[_CONTROL]:.0f} %",
            ),
        ),
        {"parts of the last VJP": decomposed, "target rank": own.reset_index()},
        notes=(
            f"{len(every)} prompts. Up to the Jacobian of the final norm, the update is u_t - E_p "
            "u, with the columns u of W_U and the model's probabilities p (lemma 5.1). Parts are "
            "read through the same Jacobian.",
        ),
    )


def _several(evidence: Evidence) -> list[PromptVjps]:
    if len(evidence.vjps) < 2:
        raise InputError("a mean over other prompts needs at least two prompts; pass more")
    return evidence.vjps


@torch.no_grad()
def _last_token_ranks(
    host: Host, every: Sequence[PromptVjps]
) -> dict[str, Int[Tensor, "prompt layer"]]:
    """The target's rank at the last token, under three readings."""
    updates = torch.stack([each.updates for each in every])
    n_layers = updates.shape[1]
    cosine = CosineLens(host)
    found: dict[str, list[Tensor]] = {reading: [] for reading in _READINGS}
    for layer in range(n_layers):
        scores = host.unembedding.logits(updates[:, layer])
        elsewhere = host.unembedding.logits(updates[:, (layer + n_layers // 2) % n_layers])
        readings = (
            scores,
            scores - mean_of_others(scores),
            scores - mean_of_others(elsewhere),
            cosine.project(updates[:, layer], layer),
        )
        for reading, read in zip(_READINGS, readings, strict=True):
            found[reading].append(target_ranks(read, every))
    return {reading: torch.stack(columns, dim=1) for reading, columns in found.items()}


@torch.no_grad()
def _cell_leaders(host: Host, every: Sequence[PromptVjps]) -> dict[str, Counter[int]]:
    """The most probable token of each update of `W_out`, at all tokens with a VJP."""
    cosine = CosineLens(host)
    leaders: dict[str, Counter[int]] = {_PLAIN: Counter(), _CENTRED: Counter(), _COSINE: Counter()}
    for layer in range(len(every[0].vjps)):
        own = [-each.vjps[layer][each.vjps[layer].any(-1)] for each in every]
        scores = [host.unembedding.logits(vectors) for vectors in own]
        total = torch.stack([each.sum(0) for each in scores]).sum(0)
        n_cells = sum(map(len, scores))
        for vectors, each in zip(own, scores, strict=True):
            leaders[_PLAIN].update(each.argmax(-1).tolist())
            leaders[_COSINE].update(cosine.project(vectors, layer).argmax(-1).tolist())
            if n_cells > len(each):
                mean = (total - each.sum(0)) / (n_cells - len(each))
                leaders[_CENTRED].update((each - mean).argmax(-1).tolist())
    return leaders


@torch.no_grad()
def _parts(host: Host, every: Sequence[PromptVjps]) -> dict[str, Float[Tensor, "prompt d_model"]]:
    """Terms of the last update at the norm's output, each through the norm's Jacobian."""
    streams = torch.stack([each.stream[-1] for each in every])
    probabilities = host.unembedding.logits(streams).softmax(-1)
    columns: Float[Tensor, "d_vocab d_model"] = host.model.W_U.detach().T
    target = columns[[each.target for each in every]]
    expected, mean = probabilities @ columns, columns.mean(0)
    usual = mean_of_others(probabilities) @ columns
    wanted = {
        "u_t - E_p u, the whole update": target - expected,
        "u_t": target,
        "-E_p u": -expected,
        "u_t - mean u": target - mean,
        "u_t - E_p u + E_q u - mean u, q: mean p of other prompts": target
        - expected
        + usual
        - mean,
    }
    return {name: _through_the_norm(host, streams, rows) for name, rows in wanted.items()}


@torch.no_grad()
def _shared_order(host: Host, every: Sequence[PromptVjps]) -> tuple[dict[str, float], float]:
    """How the scores of the mean last update, and those without it, are related to lengths."""
    scores = host.unembedding.logits(torch.stack([each.updates[-1] for each in every]))
    streams = torch.stack([each.stream[-1] for each in every])
    lengths = host.model.W_U.norm(dim=0)
    others = {"length": lengths, "log probability": _mean_log_probability(host, streams)}
    shared = scores.mean(0).tolist()
    mean = {name: spearman(shared, values.tolist()) for name, values in others.items()}
    remainders = (scores - mean_of_others(scores)).tolist()
    own = [abs(spearman(each, lengths.tolist())) for each in remainders]
    return mean, sum(own) / len(own)


def _mean_log_probability(
    host: Host, streams: Float[Tensor, "n d_model"]
) -> Float[Tensor, "d_vocab"]:
    return host.unembedding.logits(streams).log_softmax(-1).mean(0)


def _through_the_norm(
    host: Host, streams: Float[Tensor, "n d_model"], vectors: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Vectors at the norm's output, times the transposed Jacobian of the final norm."""
    with torch.enable_grad():
        inputs = streams.detach().clone().requires_grad_()
        [found] = torch.autograd.grad(host.unembedding.normed(inputs), inputs, vectors)
    return found
