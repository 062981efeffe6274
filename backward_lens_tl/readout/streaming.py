"""Read many vectors over the vocabulary, in chunks of bounded memory.

The scores of a chunk are dropped once its top tokens and ranks are known, so
`[layer, pos, d_vocab]` is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.readout.jacobian_projection import CarriedLens
from backward_lens_tl.readout.projections import (
    LogitLens,
    Projection,
    reads_layers_alike,
    scores_by_each,
)
from backward_lens_tl.readout.readout import Readout, join_readouts
from backward_lens_tl.readout.topk import count_beyond, extremes

_SCORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ENTROPY_ROWS = 32

_CPU_CHUNK = 60 * 2**20
_DEVICE_CHUNK = 256 * 2**20
"""Memory for the scores of one chunk. On a CPU the product is slower with fewer vectors, and
everything after it is slower with more; an accelerator needs more vectors to be busy."""


@dataclass(frozen=True)
class VectorGroup:
    """Vectors of one layer to read.

    Attributes:
        layer: The layer that they come from.
        block: The block whose output they are at, or reach next along the residual stream; -1 for
            the embedding.
        vectors: Vectors of width `d_model`.
        ranked: Tokens to rank for each vector: the target and the model's own answer; -1 for none.
    """

    layer: int
    block: int
    vectors: Float[Tensor, "n d_model"]
    ranked: Int[Tensor, "n 2"]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice) -> VectorGroup:
        return VectorGroup(self.layer, self.block, self.vectors[rows], self.ranked[rows])


@torch.no_grad()
def read_groups(
    groups: Iterable[VectorGroup],
    projections: Sequence[Projection],
    k: int,
    d_vocab: int,
    *,
    entropy: bool = False,
    most_bytes: int | None = None,
) -> list[list[Readout]]:
    """Read groups of vectors over the vocabulary, with many layers in one product.

    Args:
        groups: What to read, at least one vector in total. Each group is taken from the iterable
            only when it is read.
        projections: Each scores all vectors.
        k: Number of tokens to keep at either end.
        d_vocab: Number of tokens.
        entropy: Whether to compute the entropy of each readout.
        most_bytes: Memory for the scores of one product; one vector's scores may always take more.

    Returns:
        For each projection, the readout of each group. A rank is -1 where there is no token.
    """
    sizes: list[int] = []

    def counted() -> Iterator[VectorGroup]:
        for group in groups:
            sizes.append(len(group))
            yield group

    chunks = _chunks(counted(), d_vocab, most_bytes, all(map(_mixes_layers, projections)))
    read = [_read_chunk(chunk, projections, k, d_vocab, entropy) for chunk in chunks]
    return [_split(join_readouts(pieces, torch.cat), sizes) for pieces in zip(*read, strict=True)]


def _split(whole: Readout, sizes: Sequence[int]) -> list[Readout]:
    columns = (getattr(whole, field.name).split(sizes) for field in fields(Readout))
    return [Readout(*values) for values in zip(*columns, strict=True)]


def _chunks(
    groups: Iterable[VectorGroup], d_vocab: int, most_bytes: int | None, mixes_layers: bool
) -> Iterator[list[VectorGroup]]:
    """Cut large groups and combine small ones, so that all products are about equally large."""
    chunk: list[VectorGroup] = []
    room = 0
    for group in groups:
        if chunk and not mixes_layers and chunk[0].layer != group.layer:
            yield chunk
            chunk = []
        while len(group):
            if not chunk:
                room = _rows(group.vectors, d_vocab, most_bytes)
            chunk.append(group[:room])
            group = group[len(chunk[-1]) :]
            room -= len(chunk[-1])
            if not room:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _mixes_layers(projection: Projection) -> bool:
    """Whether a projection reads vectors of several layers in one product."""
    return isinstance(projection, CarriedLens) or reads_layers_alike(projection)


def _rows(vectors: Float[Tensor, "n d_model"], d_vocab: int, most_bytes: int | None) -> int:
    usual = _CPU_CHUNK if vectors.device.type == "cpu" else _DEVICE_CHUNK
    chunk = usual if most_bytes is None else min(usual, most_bytes)
    return max(1, chunk // (d_vocab * vectors.element_size()))


def _read_chunk(
    chunk: Sequence[VectorGroup],
    projections: Sequence[Projection],
    k: int,
    d_vocab: int,
    entropy: bool,
) -> list[Readout]:
    ranked = torch.cat([group.ranked for group in chunk])
    found: dict[int, Readout] = {}
    for lenses, vectors in _carried(chunk, projections):
        places, faint = list(lenses), [_is_faint(vectors, lens) for lens in lenses.values()]
        for own, scored in scores_by_each(list(lenses.values()), vectors, chunk[0].layer):
            scores = _checked(scored, len(vectors), d_vocab)
            # On a CPU comparisons in half precision are several times slower; the result is the
            # same.
            wide, to_rank = at_least_float32(scores), ranked.to(scores.device)
            read = _read_scores(wide, to_rank, faint[own], k, entropy)
            # The unembedding may be on another device than the first layers.
            found[places[own]] = join_readouts([read], lambda values: values[0].to(ranked.device))
            del scored, scores, wide  # before the next scores are allocated
    return [found[index] for index in range(len(projections))]


def _carried(
    chunk: Sequence[VectorGroup], projections: Sequence[Projection]
) -> Iterator[tuple[dict[int, Projection], Float[Tensor, "n d_model"]]]:
    """Projections that read the same vectors, by their index, and these vectors."""
    carriers = [lens if isinstance(lens, CarriedLens) else None for lens in projections]
    of_each = [None if lens is None else lens.jacobians for lens in carriers]
    for jacobians in dict.fromkeys(of_each):
        own = [index for index, other in enumerate(of_each) if other is jacobians]
        carrier = carriers[own[0]]
        carry = _as_it_is if carrier is None else carrier.carried
        vectors = torch.cat([carry(group.vectors, group.block) for group in chunk])
        yield {index: _reader(projections[index]) for index in own}, vectors


def _reader(projection: Projection) -> Projection:
    """What reads the vectors of a projection once they are carried."""
    return projection.lens if isinstance(projection, CarriedLens) else projection


def _as_it_is(vectors: Float[Tensor, "n d_model"], block: int) -> Float[Tensor, "n d_model"]:
    return vectors


def _is_faint(vectors: Float[Tensor, "n d_model"], lens: Projection) -> Bool[Tensor, "n"]:
    """Whether the `eps` of the final norm outweighs each vector."""
    shortest = lens.faint_norm if isinstance(lens, LogitLens) else 0.0
    is_faint: Tensor = torch.linalg.vector_norm(at_least_float32(vectors), dim=-1) < shortest
    return is_faint


def _read_scores(
    scores: Float[Tensor, "n d_vocab"],
    ranked: Int[Tensor, "n 2"],
    is_faint: Bool[Tensor, "n"],
    k: int,
    entropy: bool,
) -> Readout:
    top, bottom = extremes(scores, k, largest=True), extremes(scores, k, largest=False)
    # A NaN sorts above all other scores.
    if bool(top.scores[:, 0].isnan().any()):
        raise InputError("the projection returned NaN among its scores; they must be real numbers")
    target_rank, answer_rank = (_ranks(scores, tokens) for tokens in ranked.unbind(1))
    return Readout(
        top_ids=top.ids,
        top_scores=top.scores,
        bottom_ids=bottom.ids,
        bottom_scores=bottom.scores,
        target_rank=target_rank,
        answer_rank=answer_rank,
        entropy=_entropy(scores) if entropy else scores.new_full((len(scores),), float("nan")),
        is_faint=is_faint,
    )


def _ranks(scores: Float[Tensor, "n d_vocab"], tokens: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Number of tokens that score higher than the given one; -1 where none is given."""
    given = tokens >= 0
    if not bool(given.any()):
        return torch.full_like(tokens, -1)
    bounds = scores.gather(1, tokens.clamp_min(0)[:, None])
    return count_beyond(scores, bounds, largest=True).masked_fill(~given, -1)


def _entropy(scores: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """`-sum_t p_t log p_t` of each softmax, a few rows at a time to save memory."""
    pieces = scores.split(_ENTROPY_ROWS)
    return torch.cat([torch.special.entr(rows.softmax(1)).sum(1) for rows in pieces])


def _checked(scores: object, n: int, d_vocab: int) -> Float[Tensor, "n d_vocab"]:
    if not isinstance(scores, Tensor) or scores.shape != (n, d_vocab):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"the projection returned {shape} for {n} vectors; it must return one score per token, "
            f"a tensor of shape ({n}, {d_vocab})"
        )
    is_plain = scores.dtype in _SCORE_DTYPES and scores.layout == torch.strided
    if not is_plain or scores.is_meta:
        raise InputError(
            f"the projection returned {scores.layout} scores of dtype {scores.dtype} on "
            f"{scores.device}; they must be real numbers"
        )
    return scores
