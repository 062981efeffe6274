"""Two methods on the same records: paired differences and ratios."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from backward_lens_tl.evaluation.bootstrap import Bootstrap, interval, median
from backward_lens_tl.evaluation.summary import METRICS, Metric

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = [
    *("metric", "statistic", "records", "first", "second"),
    *("difference", "difference_low", "difference_high"),
    *("ratio", "ratio_low", "ratio_high"),
]


def compare(
    edits: pd.DataFrame, first: str, second: str, *, seed: int, resamples: int
) -> pd.DataFrame:
    """Compare two methods metric by metric, on the records where both have a value.

    Args:
        edits: The table of edits, with both methods.
        first: A method.
        second: The method that it is compared with.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples of blocks, which both methods share.

    Returns:
        One row per metric, and another one for the median of skewed metrics: `metric`, `statistic`
        (`"mean"` or `"median"`), `records`, the values of `first` and `second`, their `difference`
        and `ratio` (first to second), and 95 % intervals of both (`_low`, `_high`).
    """
    import pandas as pd

    keys = ["record", "block"]
    own, other = (edits[edits["method"] == name].set_index(keys) for name in (first, second))
    both = own.index.intersection(other.index)
    rows = []
    for metric in METRICS:
        pair = np.stack([_values(each.loc[both], metric) for each in (own, other)], 1)
        present = ~np.isnan(pair).any(1)
        if not present.any():
            continue
        blocks = both.get_level_values("block").to_numpy()[present]
        samples, pair = Bootstrap(blocks, seed, resamples), pair[present]
        rows.append(_row(metric, "mean", pair.mean(0), samples.means(pair), len(pair)))
        if metric.is_skewed:
            medians = [samples.medians(values) for values in pair.T]
            found = np.array([median(values) for values in pair.T])
            rows.append(_row(metric, "median", found, np.stack(medians, 1), len(pair)))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _values(edits: pd.DataFrame, metric: Metric) -> np.ndarray:
    values: np.ndarray = edits[metric.name].to_numpy(dtype=float, na_value=math.nan)
    return values * metric.scale


def _row(
    metric: Metric, statistic: str, found: np.ndarray, draws: np.ndarray, records: int
) -> dict[str, object]:
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite or undefined ratios
        differences = [each[..., 0] - each[..., 1] for each in (found, draws)]
        ratios = [each[..., 0] / each[..., 1] for each in (found, draws)]
    row: dict[str, object] = {
        "metric": metric.name,
        "statistic": statistic,
        "records": records,
        "first": float(found[0]),
        "second": float(found[1]),
    }
    for name, (value, drawn) in {"difference": differences, "ratio": ratios}.items():
        low, high = interval(drawn)
        row |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    return row
