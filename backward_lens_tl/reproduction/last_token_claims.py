"""The paper's claims about the last token, for any way to read its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import count_of

if TYPE_CHECKING:
    import pandas as pd

NEAR, LEADING = ("fig7", "fig18"), ("fig5", "fig11")
"""Experiments whose main claim is that the target is near the top, and that it leads."""

_MOST_LAYERS = 0.75


def by_layer_and_reading(
    ranks: Mapping[str, Int[Tensor, "prompt layer"]], evidence: Evidence
) -> pd.DataFrame:
    """The target's rank in the last token's update, by layer and reading.

    Args:
        ranks: Ranks of the target, by reading.
        evidence: The evidence that they come from.

    Returns:
        One row per reading and layer: the `median_rank` over prompts, and the fractions of prompts
        in which the target `leads` and is among the most probable 1 % (`near_end`).
    """
    import pandas as pd

    rows = []
    for reading, found in ranks.items():
        values = found.double()
        columns = {
            "median_rank": values.quantile(0.5, dim=0),
            "near_end": (values <= evidence.near_end).double().mean(0),
            "leads": (values == 0).double().mean(0),
        }
        own = {name: column.tolist() for name, column in columns.items()}
        rows.append(pd.DataFrame({"reading": reading, "layer": range(found.shape[1]), **own}))
    return pd.concat(rows, ignore_index=True)


def verdicts_by_reading(
    table: pd.DataFrame, evidence: Evidence, readings: Sequence[str]
) -> pd.DataFrame:
    """Whether the claims of figures 5, 7, 11 and 18 hold with other readings.

    Args:
        table: What `by_layer_and_reading` returned.
        evidence: The evidence that it comes from.
        readings: The readings; the first is the paper's.

    Returns:
        One row per reading (`condition`) and `experiment`, with `holds` and what was `found`.
    """
    import pandas as pd

    rows = []
    for reading in readings:
        own = table[table["reading"] == reading]
        near = int((own["median_rank"] <= evidence.near_end).sum())
        for name in NEAR:
            holds = near >= _MOST_LAYERS * len(own)
            found = f"{count_of(near, len(own))} layers"
            rows.append(_row(reading, name, holds, found))
        leads = float(own["leads"].mean())
        for name in LEADING:
            found = f"{100 * leads:.0f} % of layers and prompts"
            rows.append(_row(reading, name, leads > 0.5, found))
    return pd.DataFrame(rows)


def _row(reading: str, name: str, holds: bool, found: str) -> dict[str, object]:
    return {"condition": reading, "experiment": name, "holds": holds, "found": found}
