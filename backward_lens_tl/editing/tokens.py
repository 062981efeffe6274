"""What an edit writes, in words, and what an optimizer makes of a gradient's words.

An edit of a matrix is a sum of outer products, `left_i right_i`. One of both vectors has the width
of the residual stream, and so it can be read over the vocabulary like a gradient's spanning set:
what a matrix that writes to the stream (`W_O`, `W_out`) will write, or what one that reads it
listens for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, is_integer, shown
from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta, edited_site
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import READING_MATRICES
from backward_lens_tl.models.vocabulary import MultiToken
from backward_lens_tl.readout.projections import Projection, as_projection
from backward_lens_tl.readout.readout import Readout, VectorGroup, checked_k, read_vectors

if TYPE_CHECKING:
    import pandas as pd

_Name = TypeVar("_Name", bound=str)

Components = Literal["made", "singular"]


def delta_tokens(
    model: nn.Module,
    delta: WeightDelta,
    k: int = 10,
    projection: str | Projection = "logit_lens",
    *,
    target: str | int | None = None,
    multi_token: MultiToken | None = None,
    components: Components = "made",
    most: int | None = 10,
) -> pd.DataFrame:
    """What an edit writes and listens for, in words: one row per outer product.

    The outer products of an edit that adds many are not its only ones: `components="singular"` asks
    for those of the singular value decomposition, which are orthogonal and of which no other few
    come nearer to the whole. A change that is held as a matrix (Adam's) has no others.

    The Logit Lens reads a short vector as the final norm's bias; of an edit with a small learning
    rate, `projection="normalized"` reads the directions.

    Args:
        model: The model that the edit is of.
        delta: The edit.
        k: Tokens to show at either end.
        projection: As in `backward_lens`, but one alone.
        target: A text or token id whose rank is told.
        multi_token: Which token of a text of several stands for it, `"first"` or `"last"`.
        components: `"made"` for the outer products that the method made, one per position or
            request; `"singular"` for the singular vectors. Each pair of these is so signed that
            the entry of the left one that is largest in size is positive: for `W_out` it tells
            what is written where the hidden unit that counts most is active.
        most: Outer products of each matrix, at most, the longest; `None` for all.

    Returns:
        Columns `matrix`, `layer`, `component` (index of the outer product as it was made, or of
        the singular value), `role` (`"writes"` or `"reads"`), `norm` (Frobenius norm of the outer
        product), `vector_norm` (of the vector that is read over the vocabulary: of a matrix that
        writes, `right_i` times the length of `left_i`, which is `norm` again; of one that reads,
        `left_i`), `top_tokens`, `top_scores`, `bottom_tokens`, `bottom_scores` (lists, best and
        smallest first), and with a target `target_rank`, 0 for the top. Matrices come in the order
        of a forward pass; of each the longest outer product comes first.

    Raises:
        EditError: If the edit is of another model, or `components` or `most` is not usable.
        InputError: If another argument is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> method = blt.editing.GradientStep("sgd", lr=1.0, matrices="W_out", layers=5)
        >>> step = method(model, request)
        >>> words = blt.editing.delta_tokens(model, step, k=1, target=" Paris", most=1)
        >>> words[["component", "role", "top_tokens", "target_rank"]].values.tolist()
        [[5, 'writes', [' Paris'], 0]]
    """
    import pandas as pd

    host = host_of(model)
    reader = _Reader(host, as_projection(projection, host), checked_k(k, host.d_vocab_out))
    check_choice("components", components, get_args(Components), EditError)
    if most is not None and (not is_integer(most) or int(most) < 1):
        raise EditError(f"most is {shown(most)}; pass a number of rows, or None for all")
    wanted = -1 if target is None else host.vocabulary.token_id(target, multi_token)
    rows = [row for each in delta for row in _rows(reader, each, wanted, components, _whole(most))]
    columns = [*_COLUMNS, *([] if target is None else ["target_rank"])]
    return pd.DataFrame(rows, columns=columns)


def compare_tokens(
    model: nn.Module,
    deltas: Mapping[_Name, WeightDelta],
    target: str | int | None = None,
    *,
    k: int = 10,
    projection: str | Projection = "normalized",
    multi_token: MultiToken | None = None,
) -> pd.DataFrame:
    """Rank and readable tokens of several edits of the same matrices, side by side.

    For the steps of several optimizers it answers what they make of a gradient's low rank.

    Args:
        model: The model that the edits are of.
        deltas: The edits by name; all others are compared with the first.
        target: A text or token id whose rank is told.
        k: Top tokens that are compared.
        projection: As in `backward_lens`, but one alone. Edits differ in length, so by default it
            is the direction that is read.
        multi_token: Which token of a text of several stands for it, `"first"` or `"last"`.

    Returns:
        One row per matrix and edit:

        - `matrix`, `layer`, `edit`, `rank`, `norm`;
        - `top_energy`: the part of the squared norm that is in the largest singular value;
          `stable_rank` is its inverse;
        - `alignment`: cosine of the edit and the first one, as vectors of all entries;
        - `top_tokens` of the edit's first singular component, `overlap`, the part of them that is
          among the first edit's, and with a target `target_rank`. A singular component has no sign
          of its own: what it listens to is turned towards what the first edit listens to, the sum
          of its `left_i` by the length of their `right_i`. Where singular values are equal, as all
          of a Muon step's are, none is the first, and what it says is arbitrary;
        - `answer_tokens`, `answer_overlap`, `answer_target_rank`: the same of the whole edit's
          answer to what the first edit listens to, that sum times the edit. Of a matrix that reads
          the stream it is the edit times the sum of the first edit's `right_i` by the length of
          their `left_i`.

        Missing where an edit is zero.

    Raises:
        EditError: If there is no edit, one is of another model, or they change different matrices.
        InputError: If another argument is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> steps = {
        ...     name: blt.editing.GradientStep(name, lr=1e-2, layers=6)(model, request)
        ...     for name in ("sgd", "adam", "muon")
        ... }
        >>> words = blt.editing.compare_tokens(model, steps, target=" Paris", k=1)
        >>> words[["edit", "rank", "answer_target_rank"]].values.tolist()
        [['sgd', 6, 0], ['adam', 128, 0], ['muon', 6, 0]]
    """
    import pandas as pd

    host = host_of(model)
    reader = _Reader(host, as_projection(projection, host), checked_k(k, host.d_vocab_out))
    wanted = -1 if target is None else host.vocabulary.token_id(target, multi_token)
    if not deltas:
        raise EditError("there is no edit to compare; pass several by name")
    first, *others = deltas.values()
    keys = {(each.matrix, each.layer) for each in first}
    if any({(each.matrix, each.layer) for each in other} != keys for other in others):
        raise EditError("the edits change different matrices; compare those of the same ones")
    rows: list[dict[str, Any]] = []
    for own in first:
        leading: _Compared | None = None
        for name, delta in deltas.items():
            found = _Compared.of(reader, delta[own.matrix, own.layer], own, wanted)
            leading = leading or found
            rows.append(
                {"matrix": own.matrix, "layer": own.layer, "edit": name} | found.row(leading)
            )
    ranks = ["target_rank", "answer_target_rank"]
    table = pd.DataFrame(rows).astype(dict.fromkeys(ranks, "Int64"))
    return table.drop(columns=ranks) if target is None else table


_COLUMNS = (
    "matrix",
    "layer",
    "component",
    "role",
    "norm",
    "vector_norm",
    "top_tokens",
    "top_scores",
    "bottom_tokens",
    "bottom_scores",
)


def _whole(most: Any) -> int | None:
    return None if most is None else int(most)


@dataclass(frozen=True)
class _Reader:
    """How vectors are read.

    Attributes:
        host: The model.
        projection: How vectors are scored.
        k: Tokens to keep at either end.
    """

    host: Host
    projection: Projection
    k: int

    def read(self, layer: int, vectors: Float[Tensor, "n d_model"], target: int) -> Readout:
        """Score every token for every vector, and keep the best and the smallest."""
        ranked = torch.tensor([[target, -1]] * len(vectors), device=vectors.device)
        group = VectorGroup(layer, at_least_float32(vectors), ranked)
        return read_vectors([group], [self.projection], self.k, self.host.d_vocab_out)[0][0]

    def texts(self, ids: list[int]) -> list[str]:
        """Texts of tokens."""
        return list(self.host.vocabulary.texts(ids))


@dataclass(frozen=True)
class _Parts:
    """Outer products of an edit.

    Attributes:
        is_reading: Whether the matrix reads the residual stream.
        left: What they listen to, as columns.
        right: What they write, as rows.
    """

    is_reading: bool
    left: Float[Tensor, "d_in n"]
    right: Float[Tensor, "n d_out"]

    @classmethod
    def of(cls, delta: MatrixDelta, components: Components) -> _Parts:
        """Take an edit apart."""
        if components == "made" and delta.is_low_rank:
            left, right = delta.factors
        else:
            u, s, vh = delta.svd()
            left, right = u, s[:, None] * vh
        return cls(delta.matrix in READING_MATRICES, left, right)

    @property
    def norms(self) -> Float[Tensor, "n"]:
        """Frobenius norm of each."""
        norms: Tensor = self.left.double().norm(dim=0) * self.right.double().norm(dim=1)
        return norms

    def vectors(self, index: list[int]) -> Float[Tensor, "n d_model"]:
        """What is read over the vocabulary of some of them."""
        left, right = self.left[:, index].T, self.right[index]
        return left if self.is_reading else right * left.norm(dim=1, keepdim=True)


def _rows(
    reader: _Reader,
    delta: MatrixDelta,
    target: int,
    components: Components,
    most: int | None,
) -> list[dict[str, Any]]:
    """The rows of one matrix."""
    edited_site(reader.host, delta)  # refuses an edit of another model
    parts = _Parts.of(delta, components)
    norms = parts.norms
    order: list[int] = norms.argsort(descending=True, stable=True)[:most].tolist()
    if not order:
        return []
    vectors = parts.vectors(order)
    read = reader.read(delta.layer, vectors, target)
    lengths = vectors.double().norm(dim=1).tolist()
    return [
        {
            "matrix": delta.matrix,
            "layer": delta.layer,
            "component": component,
            "role": "reads" if parts.is_reading else "writes",
            "norm": float(norms[component]),
            "vector_norm": lengths[row],
            "top_tokens": reader.texts(read.top_ids[row].tolist()),
            "top_scores": read.top_scores[row].tolist(),
            "bottom_tokens": reader.texts(read.bottom_ids[row].tolist()),
            "bottom_scores": read.bottom_scores[row].tolist(),
            "target_rank": int(read.target_rank[row]),
        }
        for row, component in enumerate(order)
    ]


@dataclass(frozen=True)
class _Said:
    """What a vector says.

    Attributes:
        ids: Its top tokens.
        tokens: Their texts.
        target_rank: Rank of the target among all tokens.
    """

    ids: frozenset[int] = frozenset()
    tokens: tuple[str, ...] = ()
    target_rank: int | None = None

    def overlap(self, first: _Said) -> float | None:
        """The part of its tokens that another has as well."""
        return len(self.ids & first.ids) / len(self.ids) if self.ids else None


@dataclass(frozen=True)
class _Compared:
    """What is compared of one matrix's edits.

    Attributes:
        singular_values: Its singular values.
        alignment: Cosine with the edit that it is compared with.
        top: What its first singular component says.
        answer: What it answers to what the other listens to.
    """

    singular_values: Float[Tensor, "rank"]
    alignment: float | None = None
    top: _Said = _Said()
    answer: _Said = _Said()

    @classmethod
    def of(cls, reader: _Reader, delta: MatrixDelta, first: MatrixDelta, target: int) -> _Compared:
        """Take an edit apart, without making a matrix of factors, and read it."""
        edited_site(reader.host, delta)  # refuses an edit of another model
        u, s, vh = delta.svd()
        if not len(s):
            return cls(s)
        left, right = (each.double() for each in first.factors)
        listens, writes = left @ right.norm(dim=1), left.norm(dim=0) @ right
        side = -1.0 if float(u[:, 0] @ listens) < 0 else 1.0
        if delta.matrix in READING_MATRICES:
            vectors = torch.stack([side * u[:, 0], u @ (s * (vh @ writes))])
        else:
            vectors = torch.stack([side * s[0] * vh[0], (listens @ u * s) @ vh])
        read = reader.read(delta.layer, vectors, target)
        top, answer = (
            _Said(
                frozenset(ids),
                tuple(reader.texts(ids)),
                int(read.target_rank[row]) if target >= 0 else None,
            )
            for row, ids in enumerate(read.top_ids.tolist())
        )
        product = float((s * ((u.T @ left) * (vh @ right.T)).sum(1)).sum())
        lengths = float(s.norm()) * first.norm
        return cls(s, product / lengths if lengths else None, top, answer)

    def row(self, first: _Compared) -> dict[str, Any]:
        """What the table says of it."""
        energy = float(self.singular_values.square().sum())
        largest = float(self.singular_values[:1].square().sum())
        return {
            "rank": len(self.singular_values),
            "norm": energy**0.5,
            "top_energy": largest / energy if energy else None,
            "stable_rank": energy / largest if largest else None,
            "alignment": self.alignment,
            "top_tokens": list(self.top.tokens),
            "overlap": self.top.overlap(first.top),
            "target_rank": self.top.target_rank,
            "answer_tokens": list(self.answer.tokens),
            "answer_overlap": self.answer.overlap(first.answer),
            "answer_target_rank": self.answer.target_rank,
        }
