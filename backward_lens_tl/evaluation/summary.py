"""Summary of an evaluation: means, standard deviations and bootstrap intervals per method."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backward_lens_tl.evaluation.bootstrap import Bootstrap, interval, median

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Metric:
    """A metric, and how tables show its mean.

    Attributes:
        name: Its column in the table of edits.
        label: Its label in tables and figures.
        scale: Factor for tables, 100 for rates.
        decimals: Number of decimals shown.
        definition: Whose definition it is: `"paper"`, `"rome"` or neither.
        is_skewed: Whether a few records can dominate the mean. Then there is a median, too, which
            tables show.
    """

    name: str
    label: str
    scale: float = 100.0
    decimals: int = 1
    definition: str = ""
    is_skewed: bool = False


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
    Metric("kept", "Kept"),
    Metric("neighborhood_kl", "Neighbor KL", 1.0, 4, is_skewed=True),
    Metric("text_kl", "Text KL", 1.0, 4, is_skewed=True),
    Metric("ngram_entropy", "N-gram entropy"),
    Metric("perplexity", "Perplexity", 1.0, 2),
    Metric("corpus_perplexity", "Corpus perplexity", 1.0, 3),
    Metric("norm", "Norm", 1.0, 3),
    Metric("rank", "Rank", 1.0),
    Metric("is_reached", "Reached"),
    Metric("forward_passes", "Forward", 1.0),
    Metric("backward_passes", "Backward", 1.0),
    Metric("contrast_prompts", "Contrast", 1.0),
    Metric("seconds", "s / edit", 1.0, 3),
    Metric("memory", "MiB", 1 / 2**20),
)
"""The metrics, in table order. The score S, the harmonic mean of ES, PS and NS, follows NS."""

_SUCCESS = ["efficacy_success", "paraphrase_success", "neighborhood_success"]
_NOT_SHOWN = (
    "efficacy_magnitude",
    "paraphrase_magnitude",
    "neighborhood_magnitude",
    "norm",
    "rank",
    "is_reached",
    "forward_passes",
    "backward_passes",
    "contrast_prompts",
)


def summarize(edits: pd.DataFrame, *, seed: int, resamples: int) -> pd.DataFrame:
    """Summarize the table of edits.

    Args:
        edits: The table.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples of blocks. Methods with the same blocks use the
            same samples.

    Returns:
        One row per method: `method`, `records`, `failed`, and for each metric its mean under its
        name, the population standard deviation (`_std`), and a 95 % percentile interval (`_low`,
        `_high`), all multiplied by the metric's scale. Skewed metrics also have a median
        (`_median`) and its interval (`_median_low`, `_median_high`). Records without a value are
        left out.
    """
    import pandas as pd

    names, scales = [metric.name for metric in METRICS], [metric.scale for metric in METRICS]
    rows = []
    for method, own in edits.groupby("method", sort=False):
        numbers = pd.DataFrame(
            own[names].to_numpy(dtype=float, na_value=math.nan) * scales, columns=names
        )
        with np.errstate(invalid="ignore"):  # infinite values have no standard deviation
            means, deviations = numbers.mean(), numbers.std(ddof=0)
        samples = Bootstrap(own["block"].to_numpy(), seed, resamples)
        drawn = pd.DataFrame(samples.means(numbers.to_numpy()), columns=names)
        row = {"method": method, "records": len(own), "failed": int(own["error"].notna().sum())}
        for metric in METRICS:
            name = metric.name
            row |= _with_interval(name, means[name], drawn[name].to_numpy())
            row[f"{name}_std"] = deviations[name]
            if metric.is_skewed:
                values = numbers[name].to_numpy()
                row |= _with_interval(f"{name}_median", median(values), samples.medians(values))
        score = harmonic_mean(means[_SUCCESS].to_numpy())
        rows.append(row | _with_interval("score", score, harmonic_mean(drawn[_SUCCESS].to_numpy())))
    return pd.DataFrame(rows, columns=["method", "records", "failed", *_columns()])


def _columns() -> Iterator[str]:
    """The columns of a summary, after those that identify the method."""
    for metric in METRICS:
        yield from (f"{metric.name}{end}" for end in ("", "_std", "_low", "_high"))
        if metric.is_skewed:
            yield from (f"{metric.name}_median{end}" for end in ("", "_low", "_high"))
    yield from ("score", "score_low", "score_high")


def _with_interval(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def harmonic_mean(rates: np.ndarray) -> Any:
    """Compute the harmonic mean along the last axis.

    Args:
        rates: Rates from 0.

    Returns:
        The means, 0 where any rate is 0.
    """
    with np.errstate(divide="ignore"):
        return rates.shape[-1] / (1 / rates).sum(-1)


# --- as text -------------------------------------------------------------------------------------


def shown_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Format a summary like the published tables: means, with standard deviations in parentheses.

    Args:
        summary: A table from `summarize`.

    Returns:
        Text, with one column per metric that has a value.
    """
    import pandas as pd

    metrics = [
        metric
        for metric in METRICS
        if metric.name not in _NOT_SHOWN and bool(summary[metric.name].notna().any())
    ]
    rows = []
    for row in summary.to_dict("records"):
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        shown = {"Method": row["method"], "Records": f"{row['records']}{failed}"}
        for metric in metrics:
            label = f"{metric.label}, median" if metric.is_skewed else metric.label
            shown[label] = _shown(row, metric)
            if metric.name == _SUCCESS[-1]:
                shown["S"] = _number(row["score"], 1)
        rows.append(shown)
    return pd.DataFrame(rows)


def _shown(row: Mapping[Hashable, Any], metric: Metric) -> str:
    if metric.is_skewed:
        return _number(row[f"{metric.name}_median"], metric.decimals)
    mean, deviation = (
        _number(row[name], metric.decimals) for name in (metric.name, f"{metric.name}_std")
    )
    return f"{mean} ({deviation})" if mean and deviation else mean


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


def to_markdown(table: pd.DataFrame) -> str:
    """Format a table of text as Markdown; pandas needs the package tabulate for that.

    Args:
        table: The table.

    Returns:
        The lines, without a final line break.
    """
    names = [str(name) for name in table.columns]
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
