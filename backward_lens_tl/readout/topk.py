"""The largest and the smallest scores of each vector, exactly, in about one pass over the scores.

A vocabulary is cut into blocks. The `k` largest scores lie in the `k` blocks with the largest
maxima, so after one pass for the maxima only those few blocks are sorted. Among equal scores the
smaller token id comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl._checks import checked_count

_BLOCK = 64
"""Tokens per block: 50,257 scores have about as many block maxima as ten blocks have tokens."""

_LARGE = 4
"""If candidates are at least 1/4 of the vocabulary, all of it is sorted instead."""

_SLICE = 4096
"""Tokens compared with the target at a time: as many as fit in a processor's cache."""

_Pick = Callable[[Float[Tensor, "n m"], int, bool], Int[Tensor, "n k"]]


def checked_k(k: int, d_vocab: int) -> int:
    """Check `k` and limit it to the size of the vocabulary.

    Args:
        k: Number of tokens requested.
        d_vocab: Number of tokens in the vocabulary.

    Returns:
        The smaller of the two.

    Raises:
        InputError: If `k` is not an integer of at least 1.
    """
    return min(checked_count("k", k), d_vocab)


class Extremes(NamedTuple):
    """Scores at one end, the outermost first, and their token ids."""

    scores: Float[Tensor, "n k"]
    ids: Int[Tensor, "n k"]


def extremes(scores: Float[Tensor, "n d_vocab"], k: int, *, largest: bool) -> Extremes:
    """The `k` largest or smallest scores of each vector.

    Fastest if the scores of one token are contiguous in memory, as in a transposed
    `[d_vocab, n]`.

    Args:
        scores: Scores of every token for each vector, in any memory layout.
        k: Number of scores; at most `d_vocab`.
        largest: Which end.

    Returns:
        The scores, the outermost first, and their token ids, the smaller one first where scores
        are equal. A NaN is the largest score.
    """
    wanted = min(k + 1, scores.shape[1])
    blocks = _outermost_of_blocks(scores, largest)
    rows = torch.arange(len(scores), device=scores.device)
    found = _outermost(scores, blocks, rows, wanted, largest, _pick_any)
    # Ties among the k + 1 outermost scores are broken by token id.
    tied = (found.scores[:, 1:] == found.scores[:, :-1]).any(1).nonzero()[:, 0]
    if len(tied):
        chosen = _outermost(scores, blocks, tied, wanted, largest, _pick_earliest)
        found.scores[tied], found.ids[tied] = chosen.scores, chosen.ids
    return Extremes(found.scores[:, :k].contiguous(), found.ids[:, :k].contiguous())


def count_beyond(
    scores: Float[Tensor, "n d_vocab"], bounds: Float[Tensor, "n 1"], *, largest: bool
) -> Int[Tensor, "n"]:
    """How many scores of each vector are strictly larger, or smaller, than a bound.

    Args:
        scores: Scores of every token for each vector, in any memory layout.
        bounds: The bound of each vector.
        largest: Whether to count the larger ones.

    Returns:
        The counts.
    """
    # float32 sums are many times faster than boolean ones, and exact for up to 2^24 ones.
    buffer = torch.empty_like(scores[:, :_SLICE], dtype=torch.float32)
    count = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    is_beyond = torch.gt if largest else torch.lt
    for part in scores.split(_SLICE, dim=1):
        beyond = is_beyond(part, bounds, out=buffer[:, : part.shape[1]])
        count += beyond.sum(1).long()
    return count


def _outermost(
    scores: Float[Tensor, "n d_vocab"],
    blocks: Float[Tensor, "n n_blocks"],
    rows: Int[Tensor, "m"],
    k: int,
    largest: bool,
    pick: _Pick,
) -> Extremes:
    candidates = _candidates(blocks[rows], scores.shape[1], k, largest, pick)
    values = scores[rows[:, None], candidates]
    order = pick(values, k, largest)
    return Extremes(values.gather(1, order), candidates.gather(1, order))


def _candidates(
    blocks: Float[Tensor, "m n_blocks"], d_vocab: int, k: int, largest: bool, pick: _Pick
) -> Int[Tensor, "m candidates"]:
    """Token ids, ascending, that include the `k` outermost."""
    n, n_blocks = blocks.shape
    if k * _BLOCK * _LARGE >= d_vocab:
        return torch.arange(d_vocab, device=blocks.device).expand(n, -1)
    # Blocks in ascending order, so that the first of several equal candidates has the smallest id.
    # The tokens after the last full block are always candidates.
    chosen = pick(blocks, k, largest).sort(dim=1).values
    inside = chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=blocks.device)
    remainder = torch.arange(n_blocks * _BLOCK, d_vocab, device=blocks.device).expand(n, -1)
    return torch.cat([inside.flatten(1), remainder], dim=1)


def _outermost_of_blocks(
    scores: Float[Tensor, "n d_vocab"], largest: bool
) -> Float[Tensor, "n n_blocks"]:
    reduce = torch.amax if largest else torch.amin
    n_blocks = scores.shape[1] // _BLOCK
    size = (n_blocks, _BLOCK)
    in_blocks = scores[:, : n_blocks * _BLOCK]
    if scores.stride(0) != 1:
        return reduce(in_blocks.unflatten(1, size), 2)
    # Reduce along contiguous memory.
    return reduce(in_blocks.T.unflatten(0, size), 1).T.contiguous()


def _pick_any(values: Float[Tensor, "n m"], k: int, largest: bool) -> Int[Tensor, "n k"]:
    """Indices of the `k` outermost values, with ties in any order."""
    return values.topk(k, dim=1, largest=largest).indices


def _pick_earliest(values: Float[Tensor, "n m"], k: int, largest: bool) -> Int[Tensor, "n k"]:
    """Indices of the `k` outermost values, the first of equal ones."""
    return values.sort(dim=1, descending=largest, stable=True).indices[:, :k]
