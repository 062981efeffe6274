"""Do layers write in different bases? VJPs that the model itself carries to its last layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.readout.projections import CosineLens, LogitLens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_check, spearman
from backward_lens_tl.reproduction.last_token_claims import (
    by_layer_and_reading,
    verdicts_by_reading,
)
from backward_lens_tl.reproduction.vectors import (
    PromptVjps,
    carried,
    ranks_by_layer,
)
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_PROMPTS = 20
_CARRIERS = 4
_DIRECT, _OWN, _OTHERS = "read directly", "carried by its own prompt", "carried by other prompts"
_OWN_COSINE = "carried by its own prompt, as cosines"
_OWN_CENTRED = "carried by its own prompt, minus the mean"
_CENTRED = "carried by other prompts, minus the mean"
_REMEASURED = (_OWN_COSINE, _OWN_CENTRED, _OTHERS, _CENTRED)
_ELSEWHERE, _RANDOM = "carried from another layer", "random vector, carried"
_DRAWN = (_DIRECT, _OWN, _OTHERS, _ELSEWHERE, _RANDOM)
_CHANCE = 0.05


def residual_bases(evidence: Evidence) -> Finding:
    """The updates of `W_out` read directly, and after the model's own later layers."""
    import pandas as pd

    host, every = host_of(evidence.model), evidence.vjps
    chosen = every[:: max(1, len(every) // _MOST_PROMPTS)][:_MOST_PROMPTS]
    vectors: dict[str, list[Tensor]] = {}
    for index, prompt in enumerate(chosen):
        others = _carriers(prompt, every)
        generator = torch.Generator().manual_seed(evidence.seed + index)
        for reading, found in _readings(evidence, prompt, others, generator):
            vectors.setdefault(reading, []).append(found)
    lens = LogitLens(host)
    ranks = {
        reading: ranks_by_layer(lens, torch.stack(own), chosen) for reading, own in vectors.items()
    }
    ranks[_OWN_COSINE] = ranks_by_layer(CosineLens(host), torch.stack(vectors[_OWN]), chosen)
    if len(chosen) > 1:
        for reading, of in ((_OWN_CENTRED, _OWN), (_CENTRED, _OTHERS)):
            ranks[reading] = ranks_by_layer(lens, torch.stack(vectors[of]), chosen, is_centred=True)
    table = by_layer_and_reading(ranks, evidence)
    cosines = _cosines(every)
    along = pd.DataFrame({"layer": range(evidence.n_layers), "cosine": cosines, "of": "mean"})
    return Finding(
        _checks(table, cosines, evidence),
        {
            "verdicts": verdicts_by_reading(
                table,
                evidence,
                [
                    _DIRECT,
                    _OWN,
                    *(name for name in _REMEASURED if name in ranks),
                ],
            ),
            "target rank by layer": table,
            "cosine by layer": along,
        },
        {
            "the target near the top": partial(
                figures.layer_lines,
                _drawn(table),
                "percent",
                "reading",
                title=f"Updates with the target in the top 1 %, {len(chosen)} prompts",
                unit="prompts, %",
            ),
            "direction of the VJPs": partial(
                figures.layer_lines,
                along.assign(of="all prompts"),
                "cosine",
                "of",
                title=f"Cosine with the VJP of the last layer but one, {len(every)} prompts",
            ),
        },
        notes=(
            f"{len(chosen)} prompts; {_OTHERS} means the mean over {_CARRIERS} prompts with other "
            "targets. A carried vector is added to the output of W_out at the last token, and the "
            "change of the last residual stream is read.",
            "That a prompt's own later layers turn its update towards the target is expected, "
            "because the update lowers the loss to first order. How close to the top the target "
            "comes, and that other prompts do the same, is not. The experiment "
            "early_layers carries updates by average Jacobians, with controls for this.",
        ),
    )


def _drawn(table: pd.DataFrame) -> pd.DataFrame:
    """The shares of prompts in percent, of as many readings as there are colours."""
    return table[table["reading"].isin(_DRAWN)].assign(percent=100 * table["near_end"])


def _readings(
    evidence: Evidence,
    prompt: PromptVjps,
    others: Sequence[PromptVjps],
    generator: torch.Generator,
) -> Iterator[tuple[str, Float[Tensor, "layer d_model"]]]:
    carry = partial(carried, host_of(evidence.model))
    updates = prompt.updates
    elsewhere = updates.roll(evidence.n_layers // 2, 0)
    noise = torch.randn(updates.shape, generator=generator).to(updates)
    yield _DIRECT, updates
    yield _OWN, carry(prompt, updates)
    yield _OTHERS, torch.stack([carry(other, updates) for other in others]).mean(0)
    if evidence.n_layers > 1:
        yield _ELSEWHERE, torch.stack([carry(other, elsewhere) for other in others]).mean(0)
    yield _RANDOM, carry(others[0], noise)


def _carriers(prompt: PromptVjps, every: Sequence[PromptVjps]) -> list[PromptVjps]:
    """Prompts with other targets, the shortest first."""
    others = [each for each in every if each.target != prompt.target]
    if not others:
        raise InputError("all prompts have the same target; pass prompts with different targets")
    return sorted(others, key=lambda each: len(each.tokens))[:_CARRIERS]


def _cosines(every: Sequence[PromptVjps]) -> list[float]:
    """Mean cosine of the last token's VJP with that of the last layer but one, by layer."""
    updates = torch.stack([each.updates for each in every]).double()
    reference = updates[:, max(0, updates.shape[1] - 2), None]
    found: list[float] = torch.cosine_similarity(updates, reference, dim=-1).mean(0).tolist()
    return found


def _checks(table: pd.DataFrame, cosines: Sequence[float], evidence: Evidence) -> tuple[Check, ...]:
    by_reading = table.pivot(index="layer", columns="reading", values="near_end")
    medians = table.pivot(index="layer", columns="reading", values="median_rank")
    mean = by_reading.mean()
    turn = spearman(cosines, by_reading[_DIRECT])
    quarter = list(evidence.layers(0.0, 0.25))
    early = sum(cosines[layer] for layer in quarter) / len(quarter)
    checks = [
        count_check(
            "carried to the last layer by the model itself, the update at the last token has the "
            "target among the most probable 1 % in three quarters of the layers, by the median",
            medians[_OWN] <= evidence.near_end,
            f"layers; read directly: {int((medians[_DIRECT] <= evidence.near_end).sum())}",
            at_least=0.75,
        ),
        Check(
            "the target is readable where VJPs point as they do near the end: over the layers, the "
            "cosine with the VJP of the last layer but one and the share of prompts with the "
            "target among the most probable 1 % have a Spearman's coefficient of at least 0.8",
            turn >= 0.8,
            ("all layers are alike" if math.isnan(turn) else f"coefficient {turn:.2f}")
            + f"; the mean cosine in the first quarter of the layers is {early:.2f}",
        ),
        Check(
            "other prompts carry it, too: the target is among the most probable 1 % more often "
            "than when read directly",
            bool(mean[_OTHERS] > mean[_DIRECT]),
            f"{100 * mean[_OTHERS]:.0f} % of the layers and prompts carried by other prompts"
            + (f" ({100 * mean[_CENTRED]:.0f} % minus their mean)" if _CENTRED in mean else "")
            + f", {100 * mean[_OWN]:.0f} % by its own, {100 * mean[_DIRECT]:.0f} % read directly",
        ),
        Check(
            f"control: a random vector brings the target there in less than {100 * _CHANCE:.0f} %",
            bool(mean[_RANDOM] < _CHANCE),
            f"{100 * mean[_RANDOM]:.1f} %",
        ),
    ]
    if _ELSEWHERE in mean:
        checks.append(
            Check(
                "control: added half the model away, where another basis is expected, the update "
                "brings it there half as often at most",
                bool(2 * mean[_ELSEWHERE] <= mean[_OTHERS]),
                f"{100 * mean[_ELSEWHERE]:.0f} %, compared with {100 * mean[_OTHERS]:.0f} %",
            )
        )
    return tuple(checks)
