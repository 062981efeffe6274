"""Are early layers readable through average Jacobians, and how much of that is circular?

An update `-delta_l` at the last token is `-J_p^T g`, with the Jacobian `J_p` of the prompt's own
later layers and the gradient `g` at the last residual stream, which has the target in it. Reading
it through an average Jacobian `J_l` is therefore partly circular: `-J_l J_l^T g` has the target
near the top, whatever the prompt is. Each control lacks one property of the reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.readout.jacobian_projection import CarriedLens
from backward_lens_tl.reproduction.early_readings import (
    ANOTHER,
    CIRCULAR,
    DIRECT,
    EARLIER,
    EXACT,
    LAST,
    LATER,
    NORMALIZED,
    SHUFFLED,
    SHUFFLED_DIRECT,
    SPAN,
    THROUGH,
    TURNED,
    TURNED_CIRCULAR,
    exact_rows,
    ranks_by_reading,
    ranks_through,
)  # fmt: skip
from backward_lens_tl.reproduction.early_segments import (
    ranks_of_segments,
    subject_check,
    subject_figure,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Draw, Finding
from backward_lens_tl.reproduction.last_token_claims import (
    by_layer_and_reading,
    verdicts_by_reading,
)
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_TOP = 10
_COLUMNS = 8

_READABLE, _HIDDEN, _OF_EXACT = 0.7, 0.4, 0.75

_OF_OWN = 0.9
"""Bound of what another layer's Jacobian shows in the first half of the layers, as a fraction of
what the layer's own shows. Near the end, all Jacobians are close to the identity."""

_CONTROLS = {
    ANOTHER: ("the target of another prompt, read through J_l, is", 0.2),
    TURNED: ("through a random matrix with the singular values of J_l, the target is", 0.05),
    SHUFFLED: ("in updates of a model with shuffled weights, through J_l, the target is", 0.5),
    SPAN: ("in random combinations of activations, through J_l, the target is", 0.15),
}
"""Other controls, with bounds of the share itself.

All bounds were chosen on other prompts than those of docs/real-model.md.
"""

_RANKED = (DIRECT, NORMALIZED, THROUGH, EXACT)
_COMPARED = (DIRECT, THROUGH, EARLIER, LATER, ANOTHER, SHUFFLED, SPAN)
"""The readings of each figure, at most as many as there are colours."""


def early_layers(evidence: Evidence) -> Finding:
    """Updates of `W_out` at the last token, read directly and through average Jacobians."""
    lenses, every = evidence.jacobian_lenses, evidence.vjps
    if any(each.has_norm_after for each in every):
        raise UnsupportedModelError(
            "the output of W_out passes a norm before it is added to the residual stream, so the "
            "Jacobians do not apply to it"
        )
    ranks = ranks_by_reading(evidence, lenses[-1])
    table, shares = by_layer_and_reading(ranks, evidence), _shares(ranks, evidence)
    of_same = _shares({THROUGH: ranks[THROUGH][exact_rows(len(every))]}, evidence)
    by_fit = {_fit_name(each): ranks_through(evidence, each) for each in lenses}
    checks = list(_checks(shares, float(of_same["top_1_percent"].iloc[0])))
    tables = {
        "verdicts": verdicts_by_reading(table, evidence, [DIRECT, THROUGH, EXACT]),
        "readings": shares.reset_index(),
        "median rank by layer": _medians(table, evidence),
        "target rank by layer": table,
        "prompts of the fit": _shares(by_fit, evidence).drop(columns="bound").reset_index(),
    }
    last = f"the update at the last token, {len(every)} prompts"
    drawn: dict[str, Draw] = {
        "rank of the target": _rank_figure(table[table["reading"].isin(_RANKED)], last),
        "readings and controls": partial(
            figures.layer_lines,
            _in_percent(table[table["reading"].isin(_COMPARED)]),
            "percent",
            "reading",
            title=f"The target in the top 1 % of {last}",
            unit="prompts, %",
        ),
    }
    if len(lenses) > 1:
        drawn["prompts of the fit"] = _rank_figure(by_layer_and_reading(by_fit, evidence), last)
    segments = ranks_of_segments(evidence, lenses[-1])
    if segments is not None:
        checks.append(subject_check(segments, evidence))
        tables["target rank by segment"] = segments
        drawn["the subject's last token"] = subject_figure(segments)
    return Finding(tuple(checks), tables, drawn, notes=_notes(shares, lenses[-1]))


def _fit_name(lens: CarriedLens) -> str:
    return f"through J of {lens.jacobians.n_prompts} prompts"


def _medians(table: pd.DataFrame, evidence: Evidence) -> pd.DataFrame:
    """Median ranks of a few layers, one column per layer."""
    layers = sorted(
        {round(at * (evidence.n_layers - 1) / (_COLUMNS - 1)) for at in range(_COLUMNS)}
    )
    medians = table.pivot(index="reading", columns="layer", values="median_rank")[layers]
    medians.columns = [f"layer {layer}" for layer in layers]
    return medians.loc[list(dict.fromkeys((*_RANKED, *_COMPARED, TURNED)))].reset_index()


def _in_percent(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(percent=100 * table["near_end"])


def _shares(ranks: Mapping[str, Int[Tensor, "prompt layer"]], evidence: Evidence) -> pd.DataFrame:
    """The fractions of layers and prompts with the target near the top, by reading."""
    import pandas as pd

    early = list(evidence.layers(0.0, 0.5))
    rows = {}
    for reading, found in ranks.items():
        near = (found <= evidence.near_end).double()
        rows[reading] = {
            "prompts": len(found),
            "top_1_percent": float(near.mean()),
            "top_1_percent_in_first_half": float(near[:, early].mean()),
            "top_10": float((found < _TOP).double().mean()),
            "bound": _CONTROLS[reading][1] if reading in _CONTROLS else None,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("reading")


def _rank_figure(table: pd.DataFrame, of: str) -> Draw:
    return partial(
        figures.layer_lines,
        table.assign(rank=1 + table["median_rank"]),
        "rank",
        "reading",
        title=f"The target's place in {of}",
        unit="median place, 1 is the top",
        scale="log",
    )


def _checks(shares: pd.DataFrame, same: float) -> tuple[Check, ...]:
    """The claims; `same` is the share through J on the prompts that were carried exactly."""
    near, early, ten = (
        100 * shares[column]
        for column in ("top_1_percent", "top_1_percent_in_first_half", "top_10")
    )

    def found(reading: str) -> str:
        return f"{near[reading]:.1f} % ({early[reading]:.1f} % in the first half of the layers)"

    there = "the target among the most probable 1 %"
    return (
        Check(
            f"read through J_l, the update at the last token has {there} in at least "
            f"{100 * _READABLE:.0f} % of the layers and prompts",
            bool(near[THROUGH] >= 100 * _READABLE),
            f"{found(THROUGH)}; among the first {_TOP}: {ten[THROUGH]:.1f} %",
        ),
        Check(
            f"the Logit Lens does not show it: {there} in at most {100 * _HIDDEN:.0f} %",
            bool(near[DIRECT] <= 100 * _HIDDEN),
            f"{found(DIRECT)}; among the first {_TOP}: {ten[DIRECT]:.1f} %; "
            f"normalized: {near[NORMALIZED]:.1f} %",
        ),
        Check(
            "the average comes close to the prompt's own Jacobian: on the same prompts, J_l brings "
            f"the target there at least {_OF_EXACT:.2f} times as often",
            bool(100 * same >= _OF_EXACT * near[EXACT]),
            f"{100 * same:.1f} %, compared with {found(EXACT)}",
        ),
        *(
            Check(
                f"control: {reading}, a quarter of the depth away, the target is there at most "
                f"{_OF_OWN:.1f} times as often in the first half of the layers",
                bool(early[reading] <= _OF_OWN * early[THROUGH]),
                f"{early[reading]:.1f} %, compared with {early[THROUGH]:.1f} %; "
                f"{near[reading]:.1f} % in all layers",
            )
            for reading in (EARLIER, LATER)
        ),
        *(
            Check(
                f"control: {claim} there in at most {100 * bound:.0f} %",
                bool(near[reading] <= 100 * bound),
                found(reading)
                + (f"; read directly: {found(SHUFFLED_DIRECT)}" if reading == SHUFFLED else ""),
            )
            for reading, (claim, bound) in _CONTROLS.items()
        ),
    )


def _notes(shares: pd.DataFrame, lens: CarriedLens) -> tuple[str, ...]:
    near = 100 * shares["top_1_percent"]
    corpus = lens.jacobians.metadata.get("corpus")
    return (
        f"J_l is the mean Jacobian from the output of block l to that of the last block, of "
        f"{lens.jacobians.n_prompts} texts{f' ({corpus})' if corpus else ''}. "
        f"{int(shares['prompts'][EXACT])} prompts were carried by their own later layers. Layers "
        "without another one a quarter of the depth away in one direction use the other. Random "
        "matrices have the singular values of J_l. Shuffled weights are those of the blocks, with "
        "the entries of each matrix permuted; embeddings and norms are unchanged.",
        "Reading an update through J_l is partly circular: the transposed Jacobian of the prompt's "
        "own layers made it from the last layer's update, which has the target in it. If J_l^T, "
        "which knows nothing of the prompt, makes it instead, the target is there in "
        f"{near[CIRCULAR]:.1f} % of the layers and prompts; if random matrices make and read it, "
        f"in {near[TURNED_CIRCULAR]:.1f} %; if the last layer's update is read through J_l, in "
        f"{near[LAST]:.1f} %. Where the first of these shares is high, a readable layer shows only "
        "that the prompt's own Jacobian resembles the average one, not that the layer knows the "
        "target.",
    )
