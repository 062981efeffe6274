"""Single neurons of a gradient compared with the vectors that span it (paper, appendix B).

The paper reads a gradient through its spanning set, a few vectors, instead of its thousands of
neurons. These tables show for one gradient that nothing is lost: every neuron reads like one or two
of the spanning vectors. Signs are those of the raw gradient, as in the paper.

Neurons are computed and read in blocks: together they are the `d_in x d_out` matrix, and their
scores over the vocabulary are even larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl._checks import check_index, checked_count
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.tables import norm_order
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.readout.requested import ProjectionLike
from backward_lens_tl.readout.vectors import read_vectors
from backward_lens_tl.result import BackwardLensResult

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 512
"""Neurons computed at a time: 3 MB for GPT-2 XL, whose matrix takes 41 MB."""

_ZERO_VECTOR = "zero vector"
"""The paper's name for the reading of the zero vector, which is the final norm's bias."""


def neuron_tokens(
    model: nn.Module,
    capture: GradientCapture | BackwardLensResult,
    matrix: str,
    layer: int,
    batch: int = 0,
    *,
    per_group: int = 3,
    k: int = 10,
    projection: ProjectionLike = "logit_lens",
) -> pd.DataFrame:
    """Tokens of neurons of one gradient, grouped by norm (paper, tables 2 and 4).

    Only nonzero neurons are grouped; a zero neuron reads like the zero vector. If there are too few
    for three groups, the largest are taken first and then the smallest. No neuron is in two groups.

    Args:
        model: The model that the gradients belong to.
        capture: The gradients, or a result of `backward_lens`.
        matrix: Name of the matrix.
        layer: The layer, from 0.
        batch: Which prompt.
        per_group: Number of neurons in each group.
        k: Number of tokens to show at either end.
        projection: One projection, as in `backward_lens`.

    Returns:
        Columns `group` (`"largest"`, `"middle"` around the median, `"smallest"`, or `"zero
        vector"`), `neuron`, `norm`, `norm_order` (0 for the longest; ties in the order of their
        index), `top_tokens` and `bottom_tokens` (lists of texts, best and smallest first). Longer
        neurons come first. The last row is that of the zero vector, without `neuron` and
        `norm_order`.

    Raises:
        InputError: If an argument is not usable, the gradients come from a model of another width,
            or heads or experts have separate factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> tokens = blt.analysis.neuron_tokens(model, result, "W_out", layer=6, per_group=1, k=1)
        >>> tokens.loc[
        ...     tokens["group"] == "largest", ["top_tokens", "bottom_tokens"]
        ... ].values.tolist()
        [[[' Belgrade'], [' Paris']]]
    """
    import pandas as pd

    gradient = capture_of(capture, model)[matrix, layer]
    per_group = checked_count("per_group", per_group)
    norms = gradient.neuron_norms(batch).cpu()
    groups = _by_length(norms, per_group)
    neurons = [neuron for _, _, neuron in groups]
    nothing = torch.zeros_like(gradient.neuron(0, batch))
    vectors = torch.stack([*(gradient.neuron(neuron, batch) for neuron in neurons), nothing])
    read = read_vectors(model, vectors, projection=projection, layer=layer, matrix=matrix, k=k)
    return pd.DataFrame(
        {
            "group": [*(group for group, _, _ in groups), _ZERO_VECTOR],
            "neuron": pd.array([*neurons, None], dtype="Int64"),
            "norm": [*norms[neurons].tolist(), 0.0],
            "norm_order": pd.array([*(rank for _, rank, _ in groups), None], dtype="Int64"),
            "top_tokens": read.top_tokens,
            "bottom_tokens": read.bottom_tokens,
        }
    )


def spanning_tokens(
    model: nn.Module,
    capture: GradientCapture | BackwardLensResult,
    matrix: str,
    layer: int,
    batch: int = 0,
    *,
    k: int = 10,
    projection: ProjectionLike = "logit_lens",
) -> pd.DataFrame:
    """Tokens of the vectors that span one gradient (paper, tables 3 and 5).

    Args:
        model: The model that the gradients belong to.
        capture: The gradients, or a result of `backward_lens`.
        matrix: Name of the matrix.
        layer: The layer, from 0.
        batch: Which prompt.
        k: Number of tokens to show at either end.
        projection: One projection, as in `backward_lens`.

    Returns:
        Columns `position`, `token`, `norm` (of the spanning vector: `x_i` if the matrix reads the
        residual stream, else `delta_i`), `top_tokens` and `bottom_tokens` (lists of texts, best and
        smallest first), one row per position. A vector of norm 0 reads like the zero vector, as in
        the paper.

    Raises:
        InputError: If an argument is not usable, the gradients come from a model of another width,
            or heads or experts differ at the residual stream.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> tokens = blt.analysis.spanning_tokens(model, result, "W_out", layer=6, k=1)
        >>> tokens[["token", "top_tokens", "bottom_tokens"]].tail(1).values.tolist()
        [[' for', [' Belgrade'], [' Paris']]]
    """
    import pandas as pd

    found = capture_of(capture, model)
    vectors = _spanning(found[matrix, layer], batch)
    read = read_vectors(model, vectors, projection=projection, layer=layer, matrix=matrix, k=k)
    return pd.DataFrame(
        {
            "position": range(len(vectors)),
            "token": list(found.str_tokens[batch]),
            "norm": torch.linalg.vector_norm(vectors.double(), dim=-1).tolist(),
            "top_tokens": read.top_tokens,
            "bottom_tokens": read.bottom_tokens,
        }
    )


def neuron_overlap(
    model: nn.Module,
    capture: GradientCapture | BackwardLensResult,
    matrix: str,
    layer: int,
    batch: int = 0,
    *,
    k: int = 10,
    projection: ProjectionLike = "logit_lens",
) -> pd.DataFrame:
    """Overlap of the top tokens of neurons and spanning vectors (paper, figures 8 to 10).

    Args:
        model: The model that the gradients belong to.
        capture: The gradients, or a result of `backward_lens`.
        matrix: Name of the matrix.
        layer: The layer, from 0.
        batch: Which prompt.
        k: Number of top tokens to compare.
        projection: One projection, as in `backward_lens`.

    Returns:
        Columns `neuron`, `neuron_norm`, `norm_order` (0 for the longest neuron; ties in the order
        of their index), `position`, `token`, `similarity` (cosine of the neuron and the position's
        spanning vector, NaN where one of them is zero) and `overlap` (fraction of the `k` top
        tokens that both share). Each neuron has a row per position, followed by one for the zero
        vector, with a missing `position` and the `token` `"zero vector"`.

    Raises:
        InputError: If an argument is not usable, the gradients come from a model of another width,
            or heads or experts have separate factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> overlap = blt.analysis.neuron_overlap(model, result, "W_out", layer=6, k=10)
        >>> longest = overlap[overlap["norm_order"] == 0].set_index("token")
        >>> longest["overlap"].idxmax()
        ' for'
    """
    import pandas as pd

    found = capture_of(capture, model)
    gradient = found[matrix, layer]
    read = partial(read_vectors, model, projection=projection, layer=layer, matrix=matrix, k=k)
    similarity = gradient.neuron_similarity(batch).cpu()
    norms = gradient.neuron_norms(batch).cpu()
    ranks = norm_order(norms)
    spanning = _spanning(gradient, batch)
    compared = read(torch.cat([spanning, torch.zeros_like(spanning[:1])])).top_ids
    tops = torch.cat([read(block).top_ids for block in _blocks(gradient, batch)])
    overlap = _overlaps(tops, compared).cpu()
    neurons, columns = overlap.shape
    places = [*range(columns - 1), None]
    no_angle = similarity.new_full((neurons, 1), float("nan"))
    return pd.DataFrame(
        {
            "neuron": torch.arange(neurons).repeat_interleave(columns).numpy(),
            "neuron_norm": norms.repeat_interleave(columns).numpy(),
            "norm_order": ranks.repeat_interleave(columns).numpy(),
            "position": pd.array(places * neurons, dtype="Int64"),
            "token": [*found.str_tokens[batch], _ZERO_VECTOR] * neurons,
            "similarity": torch.cat([similarity, no_angle], dim=1).flatten().numpy(),
            "overlap": overlap.flatten().numpy(),
        }
    )


def capture_of(capture: object, model: nn.Module) -> GradientCapture:
    """The gradients of a capture or a result, if they fit the model.

    Args:
        capture: What was passed.
        model: The model.

    Returns:
        The gradients.

    Raises:
        InputError: If it is something else, or of a model of another width.
    """
    found = capture.capture if isinstance(capture, BackwardLensResult) else capture
    if not isinstance(found, GradientCapture):
        raise InputError(
            f"capture is a {type(capture).__name__}; pass what capture_gradients or backward_lens "
            "returned"
        )
    gradient = next(iter(found))
    factor = gradient.inputs if gradient.reads_residual else gradient.vjps
    host = host_of(model)
    if factor.shape[-1] != host.d_model:
        raise InputError(
            f"the gradients are of a model of width {factor.shape[-1]}, but this one, "
            f"{host.name!r}, is {host.d_model} wide; pass the model that they were captured on"
        )
    return found


def _spanning(gradient: MatrixGradient, batch: int) -> Float[Tensor, "n d_model"]:
    """The vectors that span one prompt's gradient, without padding."""
    check_index("prompt", batch, len(gradient.mask))
    return at_least_float32(gradient.spanning_set[batch, gradient.mask[batch]])


def _by_length(norms: Float[Tensor, "d_hidden"], per_group: int) -> list[tuple[str, int, int]]:
    """Group, order by norm and index of some nonzero neurons, longer ones first."""
    order: list[int] = norms.argsort(descending=True, stable=True).tolist()
    ranks = range(int((norms > 0).sum()))
    largest, rest = ranks[:per_group], ranks[per_group:]
    first_smallest = max(0, len(rest) - per_group)
    between, smallest = rest[:first_smallest], rest[first_smallest:]
    # The same number is cut off at either end, so the median stays the same.
    first_middle = max(0, len(between) - per_group) // 2
    middle = between[first_middle : first_middle + per_group]
    groups = {"largest": largest, "middle": middle, "smallest": smallest}
    return [(group, rank, order[rank]) for group, chosen in groups.items() for rank in chosen]


def _blocks(gradient: MatrixGradient, batch: int) -> Iterator[Float[Tensor, "block d_model"]]:
    """All neurons, in blocks."""
    hidden = gradient.vjps if gradient.reads_residual else gradient.inputs
    n_neurons = hidden.shape[2:].numel()
    for start in range(0, n_neurons, _BLOCK):
        yield gradient.neurons(start, min(start + _BLOCK, n_neurons), batch)


def _overlaps(
    tops: Int[Tensor, "d_hidden k"], compared: Int[Tensor, "columns k"]
) -> Float[Tensor, "d_hidden columns"]:
    """The fraction of each row's tokens that are among each of the compared sets."""
    return torch.stack([torch.isin(tops, ids).double().mean(1) for ids in compared], dim=1)
