"""An evaluation in one row per method: means, standard deviations and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Metric:
    """A number of each record, and how tables show its mean.

    Attributes:
        name: Its column in the table of edits.
        label: What people call it.
        scale: What it is multiplied by, 100 for rates.
        decimals: How many are shown.
        definition: Whose: `"paper"`, `"rome"` or neither.
    """

    name: str
    label: str
    scale: float = 100.0
    decimals: int = 1
    definition: str = ""


METRICS = (
    Metric("efficacy", "Efficacy", definition="paper"),
    Metric("paraphrase", "Paraphrase", definition="paper"),
    Metric("neighborhood", "Neighborhood", definition="paper"),
    Metric("free_efficacy", "Free efficacy"),
    Metric("efficacy_success", "ES", definition="rome"),
    Metric("paraphrase_success", "PS", definition="rome"),
    Metric("neighborhood_success", "NS", definition="rome"),
    Metric("efficacy_magnitude", "EM"),
    Metric("paraphrase_magnitude", "PM"),
    Metric("neighborhood_magnitude", "NM"),
    Metric("ngram_entropy", "N-gram entropy"),
    Metric("perplexity", "Perplexity", 1.0, 2),
    Metric("corpus_perplexity", "Corpus perplexity", 1.0, 3),
    Metric("norm", "Norm", 1.0, 3),
    Metric("rank", "Rank", 1.0),
    Metric("seconds", "s / edit", 1.0, 3),
    Metric("memory", "MiB", 1 / 2**20),
)
"""In the order of the tables; the score S, the harmonic mean of ES, PS and NS, stands beside."""

_SUCCESS = ("efficacy_success", "paraphrase_success", "neighborhood_success")
_LEFT_OUT = ("efficacy_magnitude", "paraphrase_magnitude", "neighborhood_magnitude", "norm", "rank")
"""What a page has no room for."""

_INTERVAL = (2.5, 97.5)


def summarize(edits: pd.DataFrame, *, seed: int, resamples: int) -> pd.DataFrame:
    """One row per method.

    Args:
        edits: The table of edits.
        seed: Of the bootstrap.
        resamples: How many times blocks are drawn with replacement; all methods that have the same
            blocks are resampled alike.

    Returns:
        `method`, `records`, `failed`, and for each metric its mean under its name, its population
        standard deviation (`_std`), and the ends of a 95 % percentile interval (`_low`, `_high`),
        each times the metric's scale. Records that lack a metric do not count in it.
    """
    import pandas as pd

    rows = []
    for name, own in edits.groupby("method", sort=False):
        row: dict[str, Any] = {
            "method": name,
            "records": len(own),
            "failed": int(own["error"].notna().sum()),
        }
        drawn = _Drawn(own["block"].to_numpy(), seed, resamples)
        means: dict[str, Any] = {}
        for metric in METRICS:
            values = own[metric.name].to_numpy(dtype=float, na_value=math.nan) * metric.scale
            there = values[~_isnan(values)]
            means[metric.name] = drawn.means(values)
            row[metric.name] = there.mean() if len(there) else math.nan
            row[f"{metric.name}_std"] = _std(there)
            row |= _interval(metric.name, means[metric.name])
        row["score"] = float(_harmonic([_array([row[name]]) for name in _SUCCESS])[0])
        row |= _interval("score", _harmonic([means[name] for name in _SUCCESS]))
        rows.append(row)
    return pd.DataFrame(rows, columns=_columns())


def _columns() -> list[str]:
    names = [metric.name for metric in METRICS]
    own = [f"{name}{end}" for name in names for end in ("", "_std", "_low", "_high")]
    return ["method", "records", "failed", *own, "score", "score_low", "score_high"]


class _Drawn:
    """Blocks, drawn with replacement: the records of one block have one edit in common."""

    def __init__(self, blocks: np.ndarray, seed: int, resamples: int) -> None:
        import numpy as np

        names, self.places = np.unique(blocks, return_inverse=True)
        self.n = len(names)
        generator = np.random.default_rng(seed)
        # How often each block is drawn, which is all that a mean depends on.
        self.counts = generator.multinomial(self.n, np.full(self.n, 1 / self.n), size=resamples)

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each resample; NaN where it has no value."""
        import numpy as np

        there = ~np.isnan(values)
        # Infinite values have no part in sums of products: 0 times infinity is NaN.
        infinite = np.bincount(self.places, np.isinf(values), self.n)
        finite = np.where(there & ~np.isinf(values), values, 0.0)
        sums = self.counts @ np.bincount(self.places, finite, self.n)
        numbers = self.counts @ np.bincount(self.places, there, self.n)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: np.ndarray = sums / numbers
        return np.where(self.counts @ infinite > 0, np.inf, means)


def _interval(name: str, means: np.ndarray) -> dict[str, float]:
    import numpy as np

    there = means[~np.isnan(means)]
    if not len(there):
        return {f"{name}_low": math.nan, f"{name}_high": math.nan}
    # Without interpolation, which cannot go towards infinity.
    low, high = np.percentile(there, _INTERVAL, method="inverted_cdf")
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _std(values: np.ndarray) -> float:
    import numpy as np

    if not len(values) or np.isinf(values).any():
        return math.nan
    return float(values.std(ddof=0))


def _harmonic(rates: Sequence[np.ndarray]) -> np.ndarray:
    """The harmonic mean, which is 0 if any of them is."""
    import numpy as np

    with np.errstate(divide="ignore"):
        inverses: np.ndarray = np.sum([1 / rate for rate in rates], axis=0)
    return len(rates) / inverses


def _isnan(values: np.ndarray) -> Any:
    import numpy as np

    return np.isnan(values)


def _array(values: Sequence[float]) -> np.ndarray:
    import numpy as np

    return np.array(values, dtype=float)


# --- as a table to read --------------------------------------------------------------------------


def shown_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary in texts, as the published tables have it: the mean, and in brackets the deviation.

    Args:
        summary: What `summarize` returned.

    Returns:
        A column per metric that has a value somewhere.
    """
    import pandas as pd

    metrics = [
        metric
        for metric in METRICS
        if metric.name not in _LEFT_OUT and bool(summary[metric.name].notna().any())
    ]
    rows = []
    for row in summary.to_dict("records"):
        shown = {"Method": row["method"], "Records": _records(row)}
        for metric in metrics:
            shown[metric.label] = _shown(row, metric)
            if metric.name == _SUCCESS[-1]:
                shown["S"] = _number(row["score"], 1)
        rows.append(shown)
    return pd.DataFrame(rows)


def _records(row: Mapping[Hashable, Any]) -> str:
    return str(row["records"]) + (f" ({row['failed']} failed)" if row["failed"] else "")


def _shown(row: Mapping[Hashable, Any], metric: Metric) -> str:
    mean, deviation = row[metric.name], row[f"{metric.name}_std"]
    if math.isnan(mean):
        return ""
    text = _number(mean, metric.decimals)
    return text if math.isnan(deviation) else f"{text} ({_number(deviation, metric.decimals)})"


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


def to_markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, its columns in line.

    Args:
        table: The table.

    Returns:
        The lines, without a line break behind the last.
    """
    names = [str(name) for name in table.columns]
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
