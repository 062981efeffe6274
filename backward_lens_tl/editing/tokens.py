"""Edits as tokens: what an edit writes and reads, and how the edits of several methods compare.

An edit of a matrix is a sum of outer products `left_i right_i`. One of the two vectors has the
width of the residual stream, so it can be read over the vocabulary like the spanning set of a
gradient: it is what a matrix that writes to the stream (`W_O`, `W_out`) will write, or what a
matrix that reads the stream responds to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, checked_count, plain
from backward_lens_tl.capture.objectives import check_multi_token
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.editing.edited_sites import check_weights, edited_site
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.sites import READING_MATRICES
from backward_lens_tl.readout.requested import ProjectionLike, as_projection
from backward_lens_tl.readout.topk import checked_k
from backward_lens_tl.readout.vectors import VectorReadout, read_vectors

if TYPE_CHECKING:
    import pandas as pd

_Name = TypeVar("_Name", bound=str)

Components = Literal["made", "singular"]

_Reader = Callable[..., VectorReadout]
"""`read_vectors` with all arguments except the vectors and their layer."""


def delta_tokens(
    model: nn.Module,
    delta: WeightDelta,
    k: int = 10,
    projection: ProjectionLike = "logit_lens",
    *,
    target: str | int | None = None,
    multi_token: MultiToken | None = None,
    components: Components = "made",
    most: int | None = 10,
) -> pd.DataFrame:
    """Read an edit as tokens, one row per outer product.

    The outer products that a method computed are not the only ones that add up to its edit.
    `components="singular"` uses those of the singular value decomposition, which are orthogonal and
    give the best approximation of any given rank. A change that is stored as a dense
    matrix, such as Adam's, has no others.

    The Logit Lens reads a short vector as the final norm's bias. For an edit with a small learning
    rate, `projection="normalized"` reads the directions.

    Args:
        model: The model that the edit is for.
        delta: The edit.
        k: Number of tokens to show at either end.
        projection: One projection, as in `backward_lens`.
        target: A text or token id to rank.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.
        components: `"made"` for the outer products that the method made, one per position or
            request; `"singular"` for the singular vectors. The sign of each pair of singular
            vectors makes the largest entry of the left one positive: for `W_out` the tokens are
            those written where the most important hidden unit is active.
        most: Largest number of outer products per matrix, the longest ones; `None` for all.

    Returns:
        Columns `matrix`, `layer`, `component` (index of the outer product as it was made, or of
        the singular value), `role` (`"writes"` or `"reads"`), `norm` (Frobenius norm of the outer
        product), `vector_norm` (norm of the vector that is read: for a matrix that writes,
        `right_i` times the length of `left_i`, which equals `norm`; for one that reads, `left_i`),
        `top_tokens`, `top_scores`, `bottom_tokens`, `bottom_scores` (lists, best and smallest
        first) and, with a target, `target_rank`, 0 for the top. Matrices are in the order of a
        forward pass; within each, the longest outer product comes first.

    Raises:
        EditError: If the edit is of another model, or `components` or `most` is not usable.
        InputError: If another argument is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> method = blt.editing.GradientStep("sgd", lr=1.0, matrices="W_out", layers=5)
        >>> step = method(model, request)
        >>> tokens = blt.editing.delta_tokens(model, step, k=1, target=" Paris", most=1)
        >>> tokens[["component", "role", "top_tokens", "target_rank"]].values.tolist()
        [[5, 'writes', [' Paris'], 0]]
    """
    import pandas as pd

    host = host_of(model)
    check_weights(host, delta, delta.about)
    check_choice("components", components, get_args(Components), EditError)
    n_rows = None if most is None else checked_count("most", most, EditError)
    read = _reader(host, target, projection, k, multi_token)
    tables = [_rows(host, read, each, components, n_rows) for each in delta]
    columns = [*_COLUMNS, *([] if target is None else ["target_rank"])]
    return pd.DataFrame([row for rows in tables for row in rows], columns=columns)


def compare_tokens(
    model: nn.Module,
    deltas: Mapping[_Name, WeightDelta],
    target: str | int | None = None,
    *,
    k: int = 10,
    projection: ProjectionLike = "normalized",
    multi_token: MultiToken | None = None,
) -> pd.DataFrame:
    """Compare the rank and the tokens of several edits of the same matrices.

    For steps of several optimizers, it shows what each of them does to a low-rank gradient.

    Args:
        model: The model that the edits are for.
        deltas: The edits by name; each is compared with the first.
        target: A text or token id to rank.
        k: Number of top tokens to compare.
        projection: One projection, as in `backward_lens`. Edits differ in length, so by default
            only their directions are read.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.

    Returns:
        One row per matrix and edit:

        - `matrix`, `layer`, `edit`, `rank`, `norm`;
        - `top_energy`: fraction of the squared norm in the largest singular value; `stable_rank` is
          its inverse;
        - `alignment`: cosine of the edit and the first one, as vectors of all entries;
        - `top_tokens` of the edit's first singular component, `overlap`, the fraction of them that
          the first edit has too, and with a target `target_rank`. The sign of a singular component
          is arbitrary; it is chosen so that the component responds to what the first edit responds
          to, the sum of its `left_i` weighted by the length of their `right_i`. Where all singular
          values are equal, as in a Muon step, the first component is arbitrary too;
        - `answer_tokens`, `answer_overlap`, `answer_target_rank`: the same for the response of the
          whole edit to that weighted sum. For a matrix that reads the stream, it is the edit
          applied to the sum of the first edit's `right_i`, weighted by the length of their
          `left_i`.

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
        >>> tokens = blt.editing.compare_tokens(model, steps, target=" Paris", k=1)
        >>> tokens[["edit", "rank", "answer_target_rank"]].values.tolist()
        [['sgd', 6, 0], ['adam', 128, 0], ['muon', 6, 0]]
    """
    import pandas as pd

    host = host_of(model)
    read = _reader(host, target, projection, k, multi_token)
    if not deltas:
        raise EditError("deltas is empty; pass several edits by name")
    first, *others = deltas.values()
    keys = {(each.matrix, each.layer) for each in first}
    if any({(each.matrix, each.layer) for each in other} != keys for other in others):
        raise EditError("the edits change different matrices; compare those of the same ones")
    rows: list[dict[str, Any]] = []
    for reference in first:
        leading: _Compared | None = None
        for name, delta in deltas.items():
            found = _Compared.of(host, read, delta[reference.matrix, reference.layer], reference)
            leading = leading or found
            about = {"matrix": reference.matrix, "layer": reference.layer, "edit": name}
            rows.append(about | found.row(leading))
    ranks = ["target_rank", "answer_target_rank"]
    table = pd.DataFrame(rows).astype(dict.fromkeys(ranks, "Int64"))
    return table.drop(columns=ranks) if target is None else table


def _reader(
    host: Host,
    target: str | int | None,
    projection: ProjectionLike,
    k: int,
    multi_token: MultiToken | None,
) -> _Reader:
    """Check the arguments of a readout here, because an edit may have no vector to read."""
    check_multi_token(multi_token)
    token = None if target is None else host.vocabulary.token_id(plain(target), multi_token)
    k = checked_k(k, host.d_vocab_out)
    lens = as_projection(projection, host)
    return partial(read_vectors, host.model, target=token, projection=lens, k=k)


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


def _rows(
    host: Host, read: _Reader, delta: MatrixDelta, components: Components, most: int | None
) -> list[dict[Hashable, Any]]:
    """The rows of one matrix."""
    edited_site(host, delta)  # raises if the edit is of another model
    left, right = _outer_products(delta, components)
    norms = left.double().norm(dim=0) * right.double().norm(dim=1)
    order: list[int] = norms.argsort(descending=True, stable=True)[:most].tolist()
    if not order:
        return []
    reads_stream = delta.matrix in READING_MATRICES
    vectors = left[:, order].T
    if not reads_stream:
        vectors = right[order] * vectors.norm(dim=1, keepdim=True)
    found = read(vectors, layer=delta.layer, matrix=delta.matrix).to_df()
    rows = found.assign(
        matrix=delta.matrix,
        layer=delta.layer,
        component=order,
        role="reads" if reads_stream else "writes",
        norm=norms[order].tolist(),
        vector_norm=vectors.double().norm(dim=1).tolist(),
    )
    return rows.to_dict("records")


def _outer_products(
    delta: MatrixDelta, components: Components
) -> tuple[Float[Tensor, "d_in n"], Float[Tensor, "n d_out"]]:
    """What each outer product responds to, as columns, and what it writes, as rows."""
    if components == "made" and delta.is_low_rank:
        return delta.factors
    u, s, vh = delta.svd()
    return u, s[:, None] * vh


@dataclass(frozen=True)
class _Compared:
    """One edit of one matrix.

    Attributes:
        singular_values: Its singular values.
        alignment: Its cosine with the edit that it is compared with.
        read: Readouts of its first singular component and of its response; `None` if it is zero.
    """

    singular_values: Float[Tensor, "rank"]
    alignment: float | None = None
    read: VectorReadout | None = None

    @classmethod
    def of(cls, host: Host, read: _Reader, delta: MatrixDelta, first: MatrixDelta) -> _Compared:
        """Decompose an edit, without building the matrix of a low-rank one, and read it."""
        edited_site(host, delta)  # raises if the edit is of another model
        u, s, vh = delta.svd()
        if not len(s):
            return cls(s)
        left, right = (each.double() for each in first.factors)
        responds_to, writes = left @ right.norm(dim=1), left.norm(dim=0) @ right
        sign = -1.0 if float(u[:, 0] @ responds_to) < 0 else 1.0
        if delta.matrix in READING_MATRICES:
            vectors = torch.stack([sign * u[:, 0], u @ (s * (vh @ writes))])
        else:
            vectors = torch.stack([sign * s[0] * vh[0], (responds_to @ u * s) @ vh])
        product = float((s * ((u.T @ left) * (vh @ right.T)).sum(1)).sum())
        lengths = float(s.norm()) * first.norm
        alignment = product / lengths if lengths else None
        return cls(s, alignment, read(vectors, layer=delta.layer, matrix=delta.matrix))

    def row(self, first: _Compared) -> dict[str, Any]:
        """The columns of `compare_tokens` after `edit`."""
        energy = float(self.singular_values.square().sum())
        largest = float(self.singular_values[:1].square().sum())
        return {
            "rank": len(self.singular_values),
            "norm": energy**0.5,
            "top_energy": largest / energy if energy else None,
            "stable_rank": energy / largest if largest else None,
            "alignment": self.alignment,
            **self._tokens(first, 0, ("top_tokens", "overlap", "target_rank")),
            **self._tokens(first, 1, ("answer_tokens", "answer_overlap", "answer_target_rank")),
        }

    def _tokens(self, first: _Compared, at: int, names: tuple[str, str, str]) -> dict[str, Any]:
        if self.read is None:
            return dict(zip(names, ([], None, None), strict=True))
        ids = self.read.top_ids[at].tolist()
        shared = set() if first.read is None else set(ids) & set(first.read.top_ids[at].tolist())
        ranks = self.read.target_rank
        rank = None if ranks is None else int(ranks[at])
        found = (self.read.top_tokens[at], len(shared) / len(ids), rank)
        return dict(zip(names, found, strict=True))
