"""What the section about editing shows, from the evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.comparison import compare
from backward_lens_tl.evaluation.run import Evaluation
from backward_lens_tl.evaluation.summary import summarize

if TYPE_CHECKING:
    import pandas as pd

MEANS = (
    *("efficacy", "paraphrase", "neighborhood"),
    *("efficacy_success", "paraphrase_success", "neighborhood_success", "kept"),
    *("neighborhood_kl", "text_kl", "corpus_perplexity", "is_reached", "seconds"),
    *("forward_passes", "backward_passes", "contrast_prompts"),
)
MEDIANS = ("neighborhood_kl_median", "text_kl_median")


def collected(trials: Mapping[str, Sequence[Evaluation]], reference: str) -> dict[str, Any]:
    """Summarize the evaluations of one model.

    Args:
        trials: The evaluations by trial, each of its own records; those without any are left out.
        reference: The method that others are compared with, in the first trial.

    Returns:
        `about`; `methods`, a list with each method's values and intervals; `pairs`, the ratio of
        the reference's median KL on neighbors to that of each other method, on the same records.
    """
    first = next(parts[0] for parts in trials.values() if parts)
    config, about = first.config, first.about
    samples = {"seed": config.seed, "resamples": config.resamples}
    base = None
    methods, pairs = [], []
    unedited: set[int] = set()
    for run, parts in trials.items():
        edits = _joined(parts)
        if edits is None:
            continue
        facts = parts[0].config.edits_at_once
        if base is None:
            base = edits[edits["method"] == reference]
        for row in summarize(edits, **samples).to_dict("records"):
            name = row["method"]
            if name == NONE:  # once for each number of records
                if facts > 1 or int(row["records"]) in unedited:
                    continue
                unedited.add(int(row["records"]))
            own = edits[edits["method"] == name]
            methods.append(
                {
                    "name": name,
                    "run": run,
                    "facts": facts,
                    "records": int(row["records"]),
                    "failed": int(row["failed"]),
                    "settings": parts[0].about["methods"].get(name),
                    "most_forward_passes": _most(own),
                    "most_passes_if_reached": _most(own[own["is_reached"].eq(True).fillna(False)]),
                    **{each: _with_interval(row, each) for each in (*MEANS, *MEDIANS)},
                }
            )
            if facts == 1 and name not in (NONE, reference):
                pairs.append(_ratio(base, own, reference, name, samples))
    return {
        "about": {
            "data": about["data"]["name"].rpartition("/")[2],
            "texts": {**about["texts"], "name": about["texts"]["name"].rpartition("/")[2]},
            "shuffle": config.shuffle,
            "first": min(config.rows or (0,)),
            "versions": about["versions"],
        },
        "methods": methods,
        "pairs": [pair for pair in pairs if pair is not None],
    }


def _joined(parts: Sequence[Evaluation]) -> pd.DataFrame | None:
    """The edits of all parts, of methods that have all records; blocks are counted through."""
    import pandas as pd

    tables, n_blocks = [], 0
    for part in parts:
        edits = part.edits()
        counts = edits["method"].value_counts()
        complete = counts.index[counts == counts.get(NONE, 0)]
        if set(complete) <= {NONE}:
            continue
        own = edits[edits["method"].isin(complete)]
        tables.append(own.assign(block=own["block"] + n_blocks))
        n_blocks += 1 + int(edits["block"].max())
    return pd.concat(tables, ignore_index=True) if tables else None


def _most(edits: pd.DataFrame) -> int | None:
    passes = edits["forward_passes"].dropna()
    return int(passes.max()) if len(passes) else None


def _with_interval(row: Mapping[Any, Any], name: str) -> list[float | None]:
    return [_plain(row[f"{name}{end}"]) for end in ("", "_low", "_high")]


def _plain(value: float) -> float | None:
    """A number that JSON has, with six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _ratio(
    base: pd.DataFrame, own: pd.DataFrame, reference: str, name: str, samples: Mapping[str, int]
) -> dict[str, Any] | None:
    import pandas as pd

    table = compare(pd.concat([base, own]), reference, name, **samples)
    rows = table[(table["metric"] == "neighborhood_kl") & (table["statistic"] == "median")]
    if not len(rows):
        return None
    found = rows.iloc[0]
    ratio = [_plain(found[each]) for each in ("ratio", "ratio_low", "ratio_high")]
    return {"name": name, "records": int(found["records"]), "ratio": ratio}
