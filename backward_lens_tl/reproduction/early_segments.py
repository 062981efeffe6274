"""What the tokens of a prompt are told, by segment: directly and through average Jacobians."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.by_segment import token_ranks_by_segment
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.readout.jacobian_projection import CarriedLens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Draw
from backward_lens_tl.reproduction.jacobian_controls import targets_of_others
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_PROMPTS = 30
_SUBJECT = "last subject token"
_DIRECT, _THROUGH, _CONTROL = "read directly", "through J", "another prompt's target, through J"


def ranks_of_segments(evidence: Evidence, lens: CarriedLens) -> pd.DataFrame | None:
    """Rank the target, and that of another prompt, in what is written at every token.

    `W_O` and `W_out` are read through their updates `-delta_i`, `W_V` through its inputs `x_i`.

    Args:
        evidence: The prompts and the model.
        lens: The Jacobian Lens.

    Returns:
        What `token_ranks_by_segment` returns, with a column `reading` in front; `None` if the
        prompts with a subject have one target only. Models whose attention cannot be analysed have
        `W_out` only.
    """
    import pandas as pd

    prompts = evidence.prompts[evidence.prompts["subject"].notna()]
    chosen = prompts.iloc[:: max(1, len(prompts) // _MOST_PROMPTS)].head(_MOST_PROMPTS)
    if chosen["target_id"].nunique() < 2:
        return None
    try:
        cells = dict(_cells(evidence, lens, chosen, ("W_V", "W_O", "W_out")))
    except UnsupportedModelError:
        cells = dict(_cells(evidence, lens, chosen, ("W_out",)))
    found = []
    for reading, own in cells.items():
        table = token_ranks_by_segment(own).drop(columns=["projection", "of"])
        table.insert(0, "reading", reading)
        found.append(table)
    return pd.concat(found, ignore_index=True)


def subject_check(table: pd.DataFrame, evidence: Evidence) -> Check:
    """Whether the subject's last token shows the target through the Jacobians only.

    Args:
        table: What `ranks_of_segments` returned.
        evidence: The evidence that it comes from.

    Returns:
        The check.
    """
    early = list(evidence.layers(0.0, 0.5))
    own = _at_subject(table).pivot(index="layer", columns="reading", values="median")
    near = (own.loc[early] <= evidence.near_end).sum()
    return Check(
        "the subject's last token is told the target, too: in half of the layers of the first "
        "half, by the median, its update of W_out has the target among the most probable 1 % "
        "through J_l, in none read directly, and in none that of another prompt",
        bool(2 * near[_THROUGH] >= len(early) and near[_DIRECT] == 0 and near[_CONTROL] == 0),
        f"{near[_THROUGH]} of {len(early)} layers; read directly: {near[_DIRECT]}; another "
        f"prompt's target: {near[_CONTROL]}",
    )


def subject_figure(table: pd.DataFrame) -> Draw:
    """The target's place in the update at the subject's last token."""
    own = _at_subject(table)
    return partial(
        figures.layer_lines,
        own.assign(rank=1 + own["median"]),
        "rank",
        "reading",
        title=f"The target's place in the update at the subject's last token, "
        f"{own['prompts'].max()} prompts",
        unit="median place, 1 is the top",
        scale="log",
    )


def _at_subject(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the subject's last token, where the update of `W_out` adds anything."""
    is_there = (table["matrix"] == "W_out") & (table["segment"] == _SUBJECT)
    return table[is_there & table["median"].notna()]


def _cells(
    evidence: Evidence, lens: CarriedLens, prompts: pd.DataFrame, matrices: Sequence[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tables with a row per prompt, matrix, layer and position, by reading."""
    import pandas as pd

    tables: dict[str, list[pd.DataFrame]] = {_DIRECT: [], _THROUGH: [], _CONTROL: []}
    targets = prompts["target_id"].tolist()
    rows = prompts[["prompt", "text", "subject"]].values.tolist()
    for (row, text, subject), target, other in zip(
        rows, targets, targets_of_others(targets), strict=True
    ):
        read = partial(
            backward_lens,
            evidence.model,
            text,
            objective=target_nll(target),
            matrices=matrices,
            k=1,
            prepend_bos=evidence.prepend_bos,
        )
        both = read(target, projection=("logit_lens", lens))
        results = {
            _DIRECT: both,
            _THROUGH: both.under(lens.name),
            _CONTROL: read(other, projection=lens),
        }
        for reading, result in results.items():
            tables[reading].append(result.to_df(subject).assign(prompt=row))
    for reading, each in tables.items():
        yield reading, pd.concat(each, ignore_index=True)
