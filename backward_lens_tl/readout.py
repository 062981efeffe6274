"""What vectors say in words: their top and bottom tokens and a target's rank.

Logits are made in chunks and thrown away; `[layer, pos, d_vocab]` is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.arguments import shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.projection import Projection

_SCORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CHUNK_BYTES = 64 * 2**20
"""Memory that the logits of one chunk of vectors may take."""


@dataclass(frozen=True)
class Readout:
    """Vectors, read over the vocabulary.

    Attributes:
        top_ids: The largest scores' tokens, best first.
        top_scores: Their scores.
        bottom_ids: The smallest scores' tokens, smallest first.
        bottom_scores: Their scores.
        target_rank: Number of tokens with a strictly larger score than the target; 0 is the top.
    """

    top_ids: Int[Tensor, "*lead k"]
    top_scores: Float[Tensor, "*lead k"]
    bottom_ids: Int[Tensor, "*lead k"]
    bottom_scores: Float[Tensor, "*lead k"]
    target_rank: Int[Tensor, "*lead"]

    def spread(self, where: Bool[Tensor, "*lead"]) -> Readout:
        """Lay vectors out over a larger grid.

        Args:
            where: True at the cells that were read, as many as there are vectors.

        Returns:
            The readout of every cell: where nothing was read, ids and ranks are -1 and scores NaN.
        """

        def laid_out(values: Tensor) -> Tensor:
            empty = float("nan") if values.is_floating_point() else -1
            grid = values.new_full((*where.shape, *values.shape[1:]), empty)
            grid[where] = values
            return grid

        return join_readouts([self], lambda values: laid_out(values[0]))


def join_readouts(readouts: Sequence[Readout], join: Callable[[list[Tensor]], Tensor]) -> Readout:
    """Make one readout of several, field by field.

    Args:
        readouts: At least one.
        join: `torch.cat` for more vectors, `torch.stack` for a new first axis.

    Returns:
        The joined readout.
    """
    return Readout(
        **{
            field.name: join([getattr(readout, field.name) for readout in readouts])
            for field in fields(Readout)
        }
    )


@torch.no_grad()
def read_vectors(
    vectors: Float[Tensor, "n d_model"],
    targets: Int[Tensor, "n"],
    projection: Projection,
    layer: int,
    k: int,
    d_vocab: int,
) -> Readout:
    """Read vectors over the vocabulary, chunk by chunk.

    Args:
        vectors: Vectors of the residual stream's width.
        targets: The token to rank for each vector, or -1 for none.
        projection: Scores vectors.
        layer: The layer that they come from.
        k: How many tokens to keep at either end.
        d_vocab: Number of tokens.

    Returns:
        The readout; the rank is -1 where there is no target.
    """
    rows = max(1, CHUNK_BYTES // (d_vocab * 4))
    chunks = zip(vectors.split(rows), targets.split(rows), strict=True)
    read = [
        _read_scores(_checked(projection.project(chunk, layer), len(chunk), d_vocab), ids, k)
        for chunk, ids in chunks
    ]
    # The unembedding may lie on another device than the first layers.
    return join_readouts(read, lambda values: torch.cat(values).to(vectors.device))


def check_k(k: int, d_vocab: int) -> None:
    """Refuse a number of tokens that cannot be kept.

    Args:
        k: How many tokens to keep at either end.
        d_vocab: Number of tokens.

    Raises:
        InputError: If `k` is not between 1 and `d_vocab`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_vocab:
        raise InputError(f"k is {shown(k)}; allowed are 1 to {d_vocab}, the size of the vocabulary")


def _read_scores(scores: Float[Tensor, "n d_vocab"], targets: Int[Tensor, "n"], k: int) -> Readout:
    targets = targets.to(scores.device)
    top, bottom = scores.topk(k), scores.topk(k, largest=False)
    wanted = scores.gather(1, targets.clamp_min(0)[:, None])
    return Readout(
        top_ids=top.indices,
        top_scores=top.values,
        bottom_ids=bottom.indices,
        bottom_scores=bottom.values,
        target_rank=(scores > wanted).sum(1).masked_fill(targets < 0, -1),
    )


def _checked(scores: object, n: int, d_vocab: int) -> Float[Tensor, "n d_vocab"]:
    if not isinstance(scores, Tensor) or scores.shape != (n, d_vocab):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"the projection returned {shape} for {n} vectors; it must return one score per token, "
            f"a tensor of shape ({n}, {d_vocab})"
        )
    is_plain = scores.dtype in _SCORE_DTYPES and scores.layout == torch.strided
    if not is_plain or scores.is_meta or bool(scores.isnan().any()):
        raise InputError(
            f"the projection returned {scores.layout} scores of dtype {scores.dtype} on "
            f"{scores.device}, or NaN among them; they must be real numbers"
        )
    return scores
