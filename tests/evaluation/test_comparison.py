"""Medians and paired comparisons against slow resampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_evaluation import edits_of

from backward_lens_tl.evaluation.bootstrap import Bootstrap
from backward_lens_tl.evaluation.comparison import compare
from backward_lens_tl.evaluation.summary import summarize

BLOCKS = [0, 0, 1, 2, 2, 2, 3]
FIRST = [0.5, 0.1, math.nan, 0.25, 4.0, 0.125, 0.75]
SECOND = [0.25, 0.5, 0.3, 1.0, 2.0, math.inf, 0.5]


def slow_samples(blocks: Any, values: Any, seed: int, n: int) -> list[list[float]]:
    """The values of each bootstrap sample, repeated as often as their block was drawn."""
    names = sorted({*blocks})
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), [1 / len(names)] * len(names), size=n)
    return [
        [
            value
            for block, value in zip(blocks, values, strict=True)
            for _ in range(drawn[names.index(block)])
            if not math.isnan(value)
        ]
        for drawn in counts
    ]


@pytest.mark.parametrize("values", [FIRST, SECOND, [math.nan] * 7])
def test_medians_of_samples(values: list[float]) -> None:
    found = Bootstrap(np.array(BLOCKS), 3, 300).medians(np.array(values))
    samples = slow_samples(BLOCKS, values, 3, 300)
    expected = [np.median(sample) if sample else math.nan for sample in samples]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_medians_in_the_summary() -> None:
    found = summarize(edits_of({"neighborhood_kl": FIRST}, BLOCKS), seed=1, resamples=400).iloc[0]
    present = [value for value in FIRST if not math.isnan(value)]
    assert found["neighborhood_kl"] == pytest.approx(np.mean(present))
    assert found["neighborhood_kl_median"] == np.median(present) == 0.375
    medians = [np.median(each) for each in slow_samples(BLOCKS, FIRST, 1, 400) if each]
    ends = np.percentile(medians, [2.5, 97.5], method="inverted_cdf")
    ours = ["neighborhood_kl_median_low", "neighborhood_kl_median_high"]
    assert found[ours].tolist() == ends.tolist()
    assert "efficacy_median" not in found.index


def two_methods(column: str, blocks: list[int]) -> Any:
    tables = [
        edits_of({column: values}, blocks).assign(method=name, record=range(len(blocks)))
        for name, values in (("a", FIRST), ("b", SECOND))
    ]
    return pd.concat(tables, ignore_index=True)


def test_paired_comparison() -> None:
    """Both methods have the same samples, of the records where both have a value."""
    found = compare(two_methods("text_kl", BLOCKS), "a", "b", seed=2, resamples=500)
    assert found[["metric", "statistic"]].to_numpy().tolist() == [
        ["text_kl", "mean"], ["text_kl", "median"]
    ]  # fmt: skip
    row = found.iloc[1]
    paired = [at for at, value in enumerate(FIRST) if not math.isnan(value)]
    first, second, blocks = ([own[at] for at in paired] for own in (FIRST, SECOND, BLOCKS))
    assert row["records"] == 6
    medians = np.median(first), np.median(second)
    assert (row["first"], row["second"]) == medians
    assert (row["difference"], row["ratio"]) == (medians[0] - medians[1], medians[0] / medians[1])
    draws = [
        [np.median(each) for each in slow_samples(blocks, own, 2, 500)] for own in (first, second)
    ]
    for name, values in (
        ("difference", [a - b for a, b in zip(*draws, strict=True)]),
        ("ratio", [a / b for a, b in zip(*draws, strict=True)]),
    ):
        ends = np.percentile(values, [2.5, 97.5], method="inverted_cdf").tolist()
        assert row[[f"{name}_low", f"{name}_high"]].tolist() == ends
    assert found.iloc[0]["second"] == math.inf
    none = compare(two_methods("text_kl", BLOCKS), "a", "c", seed=2, resamples=5)
    assert (len(none), [*none.columns]) == (0, [*found.columns])


def test_pairs_have_narrower_intervals_than_the_methods() -> None:
    """Records differ much, but the two methods always by 0.1 to 0.2."""
    generator = np.random.default_rng(0)
    easy = generator.uniform(0, 1, 60)
    table = pd.concat(
        [
            edits_of({"paraphrase": (easy + more).tolist()}).assign(method=name, record=range(60))
            for name, more in (("a", generator.uniform(0.1, 0.2, 60)), ("b", 0.0))
        ]
    )
    row = compare(table, "a", "b", seed=0, resamples=500).iloc[0]
    assert 10 < row["difference_low"] < row["difference"] < row["difference_high"] < 20
    single = summarize(table, seed=0, resamples=500).iloc[0]
    width = single["paraphrase_high"] - single["paraphrase_low"]
    assert row["difference_high"] - row["difference_low"] < 0.2 * width
