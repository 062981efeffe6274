"""Exact top, bottom and ranks against a stable sort of all scores, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backward_lens_tl.readout.topk import count_beyond, extremes

# Less than a block, one block, blocks with and without a remainder, several slices.
WIDTHS = (1, 5, 63, 64, 65, 128, 1000, 64 * 30, 9001)


def slow_extremes(scores: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """A stable sort keeps equal scores in order of their ids."""
    values, ids = scores.double().sort(dim=1, descending=largest, stable=True)
    return values[:, :k], ids[:, :k]


def laid_out(scores: Tensor, layout: str) -> Tensor:
    return scores.contiguous() if layout == "rows" else scores.T.contiguous().T


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("levels", [2, 10_000], ids=["two values", "distinct"])
def test_against_a_stable_sort(width: int, largest: bool, layout: str, levels: int) -> None:
    torch.manual_seed(width)
    scores = laid_out(torch.randint(levels, (9, width)).float() / 7, layout)
    for k in sorted({1, min(3, width), min(10, width), max(1, width - 1), width}):
        found = extremes(scores, k, largest=largest)
        values, ids = slow_extremes(scores, k, largest=largest)
        assert torch.equal(found.scores.double(), values), k
        assert torch.equal(found.ids, ids), k


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    width, n = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 4))
    dtype = data.draw(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    )
    pool = [0.0, -0.0, 1.0, -1.0, 1e-8, 3e4, -3e4, torch.inf, -torch.inf]
    values = data.draw(
        st.lists(st.sampled_from(pool), min_size=n * width, max_size=n * width)
        if width < 40
        else st.just(torch.randn(n * width).tolist())
    )
    scores = torch.tensor(values).reshape(n, width).to(dtype)
    scores = laid_out(scores, data.draw(st.sampled_from(["rows", "columns"])))
    k, largest = data.draw(st.integers(1, width)), data.draw(st.booleans())
    found = extremes(scores, k, largest=largest)
    expected, ids = slow_extremes(scores, k, largest=largest)
    assert torch.equal(found.scores.double(), expected)
    assert torch.equal(found.ids, ids)
    bounds = scores[:, :1]
    assert torch.equal(count_beyond(scores, bounds, largest=True), (scores > bounds).sum(1))
    assert torch.equal(count_beyond(scores, bounds, largest=False), (scores < bounds).sum(1))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_largest_in_one_block_in_the_last_and_in_the_remainder(layout: str) -> None:
    """Cases in which a selection by blocks fails if it keeps one block too few."""
    d_vocab = 64 * 40 + 17
    scores = torch.randn(4, d_vocab)
    scores[0, 64:74] += 100  # all ten in one block
    scores[1, torch.arange(10) * 64 + 63] += 100  # one in each of ten blocks
    scores[2, -17:] += 100  # after the last block
    scores[3, :] = 0  # ties only
    for largest, sign in ((True, 1), (False, -1)):
        found = extremes(laid_out(sign * scores, layout), 10, largest=largest)
        values, ids = slow_extremes(sign * scores, 10, largest=largest)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.scores.double(), values)
    assert found.ids[3].tolist() == list(range(10))


def test_nan_ranks_first() -> None:
    scores = torch.randn(3, 1000)
    scores[1, 777] = torch.nan
    assert extremes(scores, 3, largest=True).scores[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("width", WIDTHS)
def test_counts(width: int, layout: str) -> None:
    torch.manual_seed(0)
    scores = laid_out(torch.randint(5, (6, width)).float(), layout)
    bounds = scores[:, width // 2 :][:, :1]
    assert torch.equal(count_beyond(scores, bounds, largest=True), (scores > bounds).sum(1))
    assert torch.equal(count_beyond(scores, bounds, largest=False), (scores < bounds).sum(1))
