"""Read any vectors of the residual stream's width as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, plain
from backward_lens_tl.capture.objectives import check_multi_token
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import InputError, TargetError
from backward_lens_tl.jacobians.stream import block_of
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import resolve_layer
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MATRIX_NAMES
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.readout.jacobian_projection import CarriedLens
from backward_lens_tl.readout.projections import reads_layers_alike
from backward_lens_tl.readout.readout import join_readouts
from backward_lens_tl.readout.requested import ProjectionLike, as_projection, name_of
from backward_lens_tl.readout.streaming import VectorGroup, read_groups
from backward_lens_tl.readout.topk import checked_k

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_VECTORS = 8
_SHOWN_TOKENS = 5


@dataclass(frozen=True, repr=False)
class VectorReadout:
    """Top tokens, bottom tokens and target ranks of vectors.

    Leading axes `*lead` are those of the vectors that were read.

    Attributes:
        top_ids: Ids of the tokens with the largest scores, best first.
        top_scores: Their scores.
        bottom_ids: Ids of the tokens with the smallest scores, smallest first.
        bottom_scores: Their scores.
        targets: Id of each vector's target; `None` without a target.
        target_rank: Number of tokens with a strictly larger score than the target, 0 for the top;
            `None` without a target.
        token_texts: Text of every token among these.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> blt.read_vectors(model, model.W_U.T[:2], k=2)  # an unembedding row reads as its token
        VectorReadout of [2] vectors, k=2
        [0] '<|endoftext|>' ' The'
        [1] '!' '.'
    """

    top_ids: Int[Tensor, "*lead k"]
    top_scores: Float[Tensor, "*lead k"]
    bottom_ids: Int[Tensor, "*lead k"]
    bottom_scores: Float[Tensor, "*lead k"]
    targets: Int[Tensor, "*lead"] | None
    target_rank: Int[Tensor, "*lead"] | None
    token_texts: Mapping[int, str]

    @property
    def top_tokens(self) -> list[Any]:
        """Texts of `top_ids`, as lists nested like the leading axes."""
        return self._texts(self.top_ids)

    @property
    def bottom_tokens(self) -> list[Any]:
        """Texts of `bottom_ids`, as lists nested like the leading axes."""
        return self._texts(self.bottom_ids)

    def to_df(self) -> pd.DataFrame:
        """One row per vector.

        Returns:
            Columns `top_tokens`, `top_scores`, `bottom_tokens`, `bottom_scores` (lists) and, with a
            target, `target` and `target_rank`. The index holds each vector's indices along the
            leading axes.

        Examples:
            >>> read = blt.read_vectors(model, model.W_out[6, :3], " Paris", k=1)
            >>> read.to_df().columns.tolist()
            ['top_tokens', 'top_scores', 'bottom_tokens', 'bottom_scores', 'target', 'target_rank']
        """
        import pandas as pd

        *lead, k = self.top_ids.shape
        is_grid = len(lead) > 1
        columns: dict[str, Any] = {
            "top_tokens": self._texts(self.top_ids.reshape(-1, k)),
            "top_scores": self.top_scores.reshape(-1, k).tolist(),
            "bottom_tokens": self._texts(self.bottom_ids.reshape(-1, k)),
            "bottom_scores": self.bottom_scores.reshape(-1, k).tolist(),
        }
        if self.targets is not None and self.target_rank is not None:
            columns["target"] = self._texts(self.targets.reshape(-1))
            columns["target_rank"] = self.target_rank.reshape(-1).tolist()
        index = pd.MultiIndex.from_product([range(size) for size in lead]) if is_grid else None
        return pd.DataFrame(columns, index=index)

    def _texts(self, ids: Int[Tensor, "*shape"]) -> list[Any]:
        def as_texts(value: Any) -> Any:
            if isinstance(value, list):
                return [as_texts(each) for each in value]
            return self.token_texts[value]

        nested: list[Any] = as_texts(ids.tolist())
        return nested

    def __repr__(self) -> str:
        lead, k = self.top_ids.shape[:-1], self.top_ids.shape[-1]
        lines = [f"VectorReadout of {list(lead)} vectors, k={k}"]
        indices = list(product(*map(range, lead)))
        for index in indices[:_SHOWN_VECTORS]:
            tokens = self._texts(self.top_ids[index][:_SHOWN_TOKENS])
            lines.append(f"{list(index) or ''} {' '.join(map(repr, tokens))}".strip())
        if len(indices) > _SHOWN_VECTORS:
            lines.append(f"... {len(indices) - _SHOWN_VECTORS} more")
        return "\n".join(lines)


def read_vectors(
    model: nn.Module,
    vectors: Float[Tensor, "*lead d_model"],
    target: str | int | Sequence[Any] | Tensor | None = None,
    *,
    projection: ProjectionLike = "logit_lens",
    layer: int | None = None,
    matrix: str | None = None,
    k: int = 10,
    multi_token: MultiToken | None = None,
) -> VectorReadout:
    """Read vectors of the residual stream's width over the vocabulary.

    Any vectors of width `d_model` can be read: VJPs, neurons, rows and columns of weights,
    activations, steering vectors. Scores are computed in chunks, so the memory does not grow with
    `n * d_vocab`.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        vectors: Floating-point vectors on any device.
        target: Token to rank: a text of one token, a token id, or one of these per vector. A text
            is read as a continuation, so words need their leading space.
        projection: `"logit_lens"`, `"normalized"`, `"cosine"`, a Jacobian Lens as in
            `backward_lens`, or an object with `project(vectors, layer) -> logits`.
        layer: The layer that the vectors come from, negative from the end. A Jacobian Lens and
            a projection object need it; the other projections are the same in all layers.
        matrix: The matrix of that layer that reads or writes the vectors, for a Jacobian Lens. By
            default they are at the output of the layer's block.
        k: Number of tokens to keep at either end; all of them if the vocabulary has fewer.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.

    Returns:
        The readout, on the device of the vectors.

    Raises:
        InputError: If an argument is not usable.
        TargetError: If a target is not one token.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(
        ...     model, "Lionel Messi plays for", blt.target_nll(" Paris")
        ... )
        >>> read = blt.read_vectors(model, -capture["W_out", 6].vjps[0], " Paris", k=2)
        >>> read.top_tokens[-1], int(read.target_rank[-1])
        ([' Paris', ' France'], 0)
    """
    host = host_of(model)
    if matrix is not None:
        check_choice("matrix", matrix, MATRIX_NAMES)
    lens = as_projection(projection, host)
    k = checked_k(k, host.d_vocab_out)
    if layer is None and not reads_layers_alike(lens):
        raise InputError(
            f"projection {name_of(lens)} may depend on the layer; pass layer=..., the layer that "
            "the vectors come from"
        )
    index = 0 if layer is None else resolve_layer(layer, host.n_layers)
    block = index
    if matrix is not None:
        block = block_of(host, matrix, index)
        if isinstance(lens, CarriedLens):
            lens.check_matrices([matrix], "matrix")
    rows = _checked_rows(vectors, host.d_model)
    lead = vectors.shape[:-1]
    targets = _target_ids(target, multi_token, lead, host.vocabulary)
    ranked = torch.full((len(rows), 2), -1, device=rows.device)
    if targets is not None:
        ranked[:, 0] = targets.flatten()
    group = VectorGroup(index, block, rows, ranked)
    [[flat]] = read_groups([group], [lens], k, host.d_vocab_out)
    read = join_readouts([flat], lambda fields: _unflattened(fields[0], lead))
    used = [read.top_ids, read.bottom_ids, *([] if targets is None else [targets])]
    ids = torch.cat([each.flatten().cpu() for each in used]).unique().tolist()
    return VectorReadout(
        top_ids=read.top_ids,
        top_scores=read.top_scores,
        bottom_ids=read.bottom_ids,
        bottom_scores=read.bottom_scores,
        targets=None if targets is None else targets.to(rows.device),
        target_rank=None if targets is None else read.target_rank,
        token_texts={token: host.vocabulary.text(token) for token in ids},
    )


def _unflattened(rows: Tensor, lead: torch.Size) -> Tensor:
    return rows.reshape((*lead, *rows.shape[1:]))


def _checked_rows(vectors: object, d_model: int) -> Float[Tensor, "n d_model"]:
    if not isinstance(vectors, Tensor):
        raise InputError(
            f"vectors is a {type(vectors).__name__}; pass a tensor of shape [..., {d_model}]"
        )
    if not vectors.is_floating_point() or vectors.layout != torch.strided or vectors.is_meta:
        raise InputError(
            f"vectors is a {vectors.layout} tensor of dtype {vectors.dtype} on {vectors.device}; "
            "pass a dense floating-point tensor that holds values"
        )
    if not vectors.ndim or vectors.shape[-1] != d_model:
        raise InputError(
            f"vectors has shape {tuple(vectors.shape)}; the model's residual stream has width "
            f"{d_model}, so pass a tensor of shape [..., {d_model}]"
        )
    if not vectors.numel():
        raise InputError(f"vectors has shape {tuple(vectors.shape)}; pass at least one vector")
    rows = at_least_float32(vectors.detach())
    is_bad = ~rows.isfinite().all(-1)
    if bool(is_bad.any()):
        where = is_bad.nonzero()[0].tolist()
        raise InputError(
            f"vectors{where or ''} contains NaN or infinity; read the finite ones only"
        )
    return rows.reshape(-1, d_model)


def _target_ids(
    target: object, multi_token: MultiToken | None, lead: torch.Size, vocabulary: Vocabulary
) -> Int[Tensor, "*lead"] | None:
    check_multi_token(multi_token)
    if target is None:
        return None
    wanted = plain(target)
    if not isinstance(wanted, list | tuple):
        return torch.tensor(vocabulary.token_id(wanted, multi_token)).expand(lead)
    ids = [vocabulary.token_id(each, multi_token) for each in _flat(wanted, lead)]
    return torch.tensor(ids).reshape(lead)


def _flat(targets: object, lead: Sequence[int]) -> list[Any]:
    """Targets nested like the vectors, in the order of the vectors."""
    if not lead:
        return [targets]
    if not isinstance(targets, list | tuple) or len(targets) != lead[0]:
        raise TargetError(
            f"target is {targets!r} where the vectors have an axis of {lead[0]}; pass one target, "
            "or one per vector"
        )
    return [token for each in targets for token in _flat(each, lead[1:])]
