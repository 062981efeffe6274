"""What vectors say in words: their top and bottom tokens and a target's rank.

Scores are made in chunks and thrown away; `[layer, pos, d_vocab]` is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl._checks import shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.readout.projections import Projection, reads_layers_alike, scores_by_each
from backward_lens_tl.readout.topk import count_beyond, extremes

_SCORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PIECE = 32

_CPU_CHUNK = 60 * 2**20
_DEVICE_CHUNK = 256 * 2**20
"""Memory for the scores of one chunk of vectors. On a CPU the product is slower with fewer vectors,
and all that follows is with more; an accelerator needs more to be busy."""


@dataclass(frozen=True)
class Readout:
    """Vectors, read over the vocabulary.

    Attributes:
        top_ids: The largest scores' tokens, best first.
        top_scores: Their scores.
        bottom_ids: The smallest scores' tokens, smallest first.
        bottom_scores: Their scores.
        target_rank: Number of tokens with a strictly larger score than the target; 0 is the top.
        answer_rank: The same for the model's own answer; -1 where it was not asked for.
        entropy: Of the softmax of the scores, in nats; NaN where it was not asked for.
    """

    top_ids: Int[Tensor, "*lead k"]
    top_scores: Float[Tensor, "*lead k"]
    bottom_ids: Int[Tensor, "*lead k"]
    bottom_scores: Float[Tensor, "*lead k"]
    target_rank: Int[Tensor, "*lead"]
    answer_rank: Int[Tensor, "*lead"]
    entropy: Float[Tensor, "*lead"]


@dataclass(frozen=True)
class Reading:
    """What one projection reads in the spanning sets of all matrices.

    Attributes:
        projection: Name of the projection.
        readouts: The readout of each matrix, `[layer, batch, pos]`.
        faint_norm: Length below which a projected vector is faint; 0 if the projection has none.
    """

    projection: str
    readouts: Mapping[str, Readout]
    faint_norm: float = 0.0


class ReadoutGrid:
    """What a batch's vectors say, cell by cell; empty at first.

    Where nothing was read, ids and ranks are -1 and scores NaN.

    Args:
        layers: The layers, ascending.
        places: Positions in each prompt that are read, -1 for none.
        device: Where readouts are kept.

    Attributes:
        places: As given.
        by_matrix: The readout of each matrix, `[layer, batch, pos]`.
    """

    def __init__(
        self, layers: Sequence[int], places: Int[Tensor, "batch pos"], device: torch.device
    ) -> None:
        self.places = places
        self.by_matrix: dict[str, Readout] = {}
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._device = device

    def write(
        self,
        matrix: str,
        layer: int,
        cells: tuple[Int[Tensor, "n"], Int[Tensor, "n"]],
        read: Readout,
    ) -> None:
        """Put vectors of one matrix and layer where they belong.

        Args:
            matrix: The matrix.
            layer: The layer.
            cells: Prompt and column of each vector.
            read: Its readout.
        """
        if matrix not in self.by_matrix:
            self.by_matrix[matrix] = join_readouts([read], lambda values: self._empty(values[0]))
        rows, columns = (index.to(self._device) for index in cells)
        for field in fields(Readout):
            whole = getattr(self.by_matrix[matrix], field.name)
            whole[self._index[layer], rows, columns] = getattr(read, field.name).to(self._device)

    def _empty(self, values: Tensor) -> Tensor:
        shape = (len(self._index), *self.places.shape, *values.shape[1:])
        empty = float("nan") if values.is_floating_point() else -1
        return values.new_full(shape, empty, device=self._device)


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


@dataclass(frozen=True)
class VectorGroup:
    """Vectors of one layer that are to be read.

    Attributes:
        layer: The layer that they come from.
        vectors: Vectors of the residual stream's width.
        ranked: Tokens to rank for each vector, the target and the model's own answer; -1 for none.
    """

    layer: int
    vectors: Float[Tensor, "n d_model"]
    ranked: Int[Tensor, "n 2"]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, part: slice) -> VectorGroup:
        return VectorGroup(self.layer, self.vectors[part], self.ranked[part])


@torch.no_grad()
def read_vectors(
    groups: Iterable[VectorGroup],
    projections: Sequence[Projection],
    k: int,
    d_vocab: int,
    *,
    entropy: bool = False,
    most_bytes: int | None = None,
) -> list[list[Readout]]:
    """Read vectors over the vocabulary, many layers in one product.

    Args:
        groups: What is read, at least one vector in all; each is made when its turn comes.
        projections: Each scores all vectors.
        k: How many tokens to keep at either end.
        d_vocab: Number of tokens.
        entropy: Whether the entropy of each readout is taken.
        most_bytes: Memory that the scores of one product may take; a single vector's always may.

    Returns:
        For each projection the readout of each group; a rank is -1 where there is no token.
    """
    sizes: list[int] = []

    def counted() -> Iterator[VectorGroup]:
        for group in groups:
            sizes.append(len(group))
            yield group

    chunks = _chunks(counted(), d_vocab, most_bytes, all(map(reads_layers_alike, projections)))
    read = [_read_chunk(chunk, projections, k, d_vocab, entropy) for chunk in chunks]
    return [_split(join_readouts(parts, torch.cat), sizes) for parts in zip(*read, strict=True)]


def _split(whole: Readout, sizes: Sequence[int]) -> list[Readout]:
    columns = (getattr(whole, field.name).split(sizes) for field in fields(Readout))
    return [Readout(*values) for values in zip(*columns, strict=True)]


def _chunks(
    groups: Iterable[VectorGroup], d_vocab: int, most_bytes: int | None, mixes_layers: bool
) -> Iterator[list[VectorGroup]]:
    """Cut groups, and put small ones together, so that each product is about equally large."""
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
    vectors = torch.cat([group.vectors for group in chunk])
    ranked = torch.cat([group.ranked for group in chunk])
    found: dict[int, Readout] = {}
    for index, scored in scores_by_each(projections, vectors, chunk[0].layer):
        scores = _checked(scored, len(vectors), d_vocab)
        # Comparing half precision is several times slower on a CPU, and changes nothing.
        read = _read_scores(at_least_float32(scores), ranked.to(scores.device), k, entropy)
        # The unembedding may lie on another device than the first layers.
        found[index] = join_readouts([read], lambda values: values[0].to(vectors.device))
        del scored, scores  # before the next are made, which may need as much memory
    return [found[index] for index in range(len(projections))]


def checked_k(k: int, d_vocab: int) -> int:
    """How many tokens to keep at either end.

    Args:
        k: How many were asked for.
        d_vocab: Number of tokens.

    Returns:
        As many, or all tokens if there are fewer.

    Raises:
        InputError: If `k` is no integer from 1 on.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k is {shown(k)}; pass an integer from 1 on")
    return min(k, d_vocab)


def _read_scores(
    scores: Float[Tensor, "n d_vocab"], ranked: Int[Tensor, "n 2"], k: int, entropy: bool
) -> Readout:
    top, bottom = extremes(scores, k, largest=True), extremes(scores, k, largest=False)
    # Where there is a NaN it is on top.
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
    )


def _ranks(scores: Float[Tensor, "n d_vocab"], tokens: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """How many tokens have a larger score than the given one; -1 where none is given."""
    given = tokens >= 0
    if not bool(given.any()):
        return torch.full_like(tokens, -1)
    bounds = scores.gather(1, tokens.clamp_min(0)[:, None])
    return count_beyond(scores, bounds, largest=True).masked_fill(~given, -1)


def _entropy(scores: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """`-sum_t p_t log p_t` of each softmax, a few vectors at a time to need little memory."""
    return torch.cat([torch.special.entr(part.softmax(1)).sum(1) for part in scores.split(_PIECE)])


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
