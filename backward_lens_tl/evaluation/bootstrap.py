"""Bootstrap samples of means and medians, and their intervals.

Blocks are resampled, not records, because the records of a block share one edit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_INTERVAL = (2.5, 97.5)


class Bootstrap:
    """The same bootstrap samples for any number of statistics, so that differences are paired.

    Args:
        blocks: The block of each record.
        seed: The seed. The samples of two tables with as many blocks are the same.
        resamples: The number of samples.
    """

    def __init__(self, blocks: np.ndarray, seed: int, resamples: int) -> None:
        names, self._block_of = np.unique(blocks, return_inverse=True)
        n_blocks = len(names)
        generator = np.random.default_rng(seed)
        chances = np.full(n_blocks, 1 / n_blocks)
        self._counts = generator.multinomial(n_blocks, chances, size=resamples)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means of each sample.

        Args:
            values: `[record, metric]`; NaN where there is no value.

        Returns:
            `[resample, metric]`.
        """
        # Infinite values are counted separately, because 0 times infinity is NaN.
        finite, infinite = np.isfinite(values), np.isinf(values)
        with np.errstate(invalid="ignore"):
            means = self._sums(np.where(finite, values, 0.0)) / self._sums(finite | infinite)
        return np.where(self._sums(infinite) > 0, np.inf, means)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        by_block = np.zeros((self._counts.shape[1], values.shape[1]))
        np.add.at(by_block, self._block_of, values)
        sums: np.ndarray = self._counts @ by_block
        return sums

    def medians(self, values: np.ndarray) -> np.ndarray:
        """Medians of each sample.

        Args:
            values: `[record]`; NaN where there is no value.

        Returns:
            `[resample]`; NaN for samples without a value.
        """
        present = ~np.isnan(values)
        if not present.any():
            return np.full(len(self._counts), math.nan)
        order = values[present].argsort()
        ascending = values[present][order]
        up_to = self._counts[:, self._block_of[present][order]].cumsum(1)
        n = up_to[:, -1]
        # The middle value, or the two of them, of as many copies as were drawn.
        middle = [
            ascending[(up_to > place[:, None]).argmax(1)]
            for place in (np.maximum(n - 1, 0) // 2, n // 2)
        ]
        return np.where(n > 0, (middle[0] + middle[1]) / 2, math.nan)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval.

    Args:
        draws: The statistic in each sample; NaN is left out.

    Returns:
        Its ends; NaN without draws.
    """
    present = draws[~np.isnan(draws)]
    if not len(present):
        return math.nan, math.nan
    # Without interpolation, which fails for infinite values.
    low, high = np.percentile(present, _INTERVAL, method="inverted_cdf").tolist()
    return low, high


def median(values: np.ndarray) -> Any:
    """The median of the values that are not NaN; NaN without values."""
    present = values[~np.isnan(values)]
    return np.median(present) if len(present) else math.nan
