"""Gradients as tidy tables: one row per cell, one row per matrix, one row per neuron."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from backward_lens_tl._checks import check_index
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient, numerical_rank
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.readout.readout import Reading

if TYPE_CHECKING:
    import pandas as pd

_MOST_ENERGY = 0.99
_SPECTRUM = (
    "rank",
    "largest_rank",
    "input_rank",
    "vjp_rank",
    "norm",
    "top_energy",
    "rank_99",
)


@dataclass(frozen=True)
class PositionTable:
    """What is needed for the rows of cells, one per prompt, matrix, layer and position.

    Attributes:
        capture: The gradients.
        reading: What one projection reads in them.
        positions: Index of each projected position in its prompt, -1 where there is none.
        token_texts: Text of every token that is shown.
        reads_joins: Whether the VJPs that were projected are those at the residual stream.
    """

    capture: GradientCapture
    reading: Reading
    positions: Int[Tensor, "batch pos"]
    token_texts: Mapping[int, str]
    reads_joins: bool

    def rows(
        self,
        matrices: Iterable[str],
        prompts: Sequence[int],
        segments: Sequence[Sequence[str | None]] | None = None,
    ) -> pd.DataFrame:
        """Rows in the order of prompts, matrices, layers and positions.

        Args:
            matrices: Matrices to have rows of.
            prompts: Prompts to have rows of.
            segments: The segment of each token of each prompt, for a column of it.

        Returns:
            The columns that `BackwardLensResult.to_df` explains.
        """
        import pandas as pd

        chosen = torch.tensor(prompts, dtype=torch.long, device=self.positions.device)
        layers = [
            self._layer(self.capture[name, layer], chosen)
            for name in matrices
            for layer in self.capture.layers
        ]
        table = pd.concat(layers).sort_values("prompt", kind="stable", ignore_index=True)
        if segments is not None:
            places = zip(table["prompt"], table["position"], strict=True)
            after = 1 + list(table.columns).index("token")
            table.insert(after, "segment", [segments[prompt][place] for prompt, place in places])
        return table

    def _layer(self, gradient: MatrixGradient, prompts: Int[Tensor, "chosen"]) -> pd.DataFrame:
        """The cells of one matrix and layer, prompt by prompt."""
        import pandas as pd

        chosen, column = (self.positions[prompts] >= 0).nonzero(as_tuple=True)
        prompt = prompts[chosen]
        position = self.positions[prompt, column]
        vectors = at_least_float32(self.projected(gradient)[prompt, position])
        zero = gradient.is_zero[prompt, position]
        read = self.reading.readouts[gradient.matrix]
        here = self.capture.layers.index(gradient.layer), prompt, column
        owners, places, is_zero = prompt.tolist(), position.tolist(), zero.tolist()
        tokens = self.capture.str_tokens
        faint = torch.linalg.vector_norm(vectors, dim=-1) < self.reading.faint_norm
        return pd.DataFrame(
            {
                "prompt": owners,
                "matrix": gradient.matrix,
                "layer": gradient.layer,
                "position": places,
                "token": [
                    tokens[owner][place] for owner, place in zip(owners, places, strict=True)
                ],
                "norm": gradient.norms[prompt, position].tolist(),
                "input_norm": gradient.input_norms[prompt, position].tolist(),
                "top_vjp_cosine": self._top_vjp_cosines(vectors, prompt),
                "is_zero": is_zero,
                "projection": self.reading.projection,
                "is_faint": (faint & ~zero).tolist(),
                "target": self._words(self.capture.targets, owners),
                "target_rank": _ranks(read.target_rank[here], zero),
                "answer": self._words(self.capture.answers, owners),
                "answer_rank": _ranks(read.answer_rank[here], zero),
                "entropy": read.entropy[here].masked_fill(zero, math.nan).tolist(),
                "top_tokens": self._texts(_lists(read.top_ids[here], is_zero)),
                "top_scores": _lists(read.top_scores[here], is_zero),
                "bottom_tokens": self._texts(_lists(read.bottom_ids[here], is_zero)),
                "bottom_scores": _lists(read.bottom_scores[here], is_zero),
            }
        )

    def projected(self, gradient: MatrixGradient) -> Float[Tensor, "batch pos d_model"]:
        """The vectors that were projected, up to their sign.

        Args:
            gradient: One of the capture's.

        Returns:
            Its spanning set, or its VJPs at the residual stream.
        """
        at_residual = self.reads_joins and not gradient.reads_residual
        return gradient.resid_vjps if at_residual else gradient.spanning_set

    def _top_vjp_cosines(
        self, vectors: Float[Tensor, "n d_model"], prompt: Int[Tensor, "n"]
    ) -> list[float]:
        """The cosine of each vector and the top VJP; NaN where there is none, or one is zero."""
        top = self.capture.top_vjps
        if top is None:
            return [math.nan] * len(vectors)
        ours, theirs = (
            each.double() / torch.linalg.vector_norm(each.double(), dim=-1, keepdim=True)
            for each in (vectors, top[prompt].to(vectors.device))
        )
        cosines: list[float] = (ours * theirs).sum(-1).clamp(-1, 1).tolist()
        return cosines

    def _words(self, ids: Int[Tensor, "batch"] | None, owners: list[int]) -> list[str | None]:
        """The text of each row's prompt's token, if it has one."""
        if ids is None:
            return [None] * len(owners)
        texts = [self.token_texts[token] for token in ids.tolist()]
        return [texts[owner] for owner in owners]

    def _texts(self, ids: list[list[int]]) -> list[list[str]]:
        return [[self.token_texts[token] for token in row] for row in ids]


def _ranks(ranks: Int[Tensor, "n"], is_zero: Bool[Tensor, "n"]) -> pd.Series[Any]:
    """Ranks as a column, missing where there is none or it means nothing."""
    import pandas as pd

    column = pd.Series(ranks.masked_fill(is_zero, -1).tolist(), dtype="Int64")
    return column.mask(column < 0)


def _lists(values: Shaped[Tensor, "n k"], is_zero: list[bool]) -> list[list[Any]]:
    """Rows as lists, empty where they mean nothing."""
    rows: list[list[Any]] = values.tolist()
    return [[] if nothing else row for row, nothing in zip(rows, is_zero, strict=True)]


def gradient_table(
    capture: GradientCapture, matrix: str | None = None, batch: int | None = None
) -> pd.DataFrame:
    """The gradient of each matrix as a whole, one row per prompt, matrix and layer.

    Each row takes singular value decompositions of matrices of at most `n x n`.

    Args:
        capture: The gradients.
        matrix: The one matrix to have rows of; `None` for all.
        batch: The one prompt to have rows of; `None` for all.

    Returns:
        Columns `prompt`, `matrix`, `layer`, `is_last_layer` (of the model), `n_tokens` (of the
        prompt), `n_writing` (positions that add something), `loss`, `rank` (paper, figure 4),
        `largest_rank` (`min(n_writing, d_in, d_out)`, lemma 4.1), `input_rank` and `vjp_rank` (of
        each factor by itself), `norm` (Frobenius norm), `top_energy` (the largest singular value's
        part of the sum of their squares), `rank_99` (how many hold 99 % of it) and
        `singular_values` (a list, largest first). Where heads or experts have factors of their own
        there is no rank of all together: what follows from it is missing and the list is empty.

    Raises:
        InputError: If the matrix was not captured, or there is no such prompt.
    """
    import pandas as pd

    if matrix is not None and matrix not in capture.matrices:
        raise InputError(
            f"{matrix!r} was not captured; name one of {', '.join(capture.matrices)}, or ask for "
            "it with capture_gradients(..., matrices=...)"
        )
    lengths, losses = capture.mask.sum(1).tolist(), capture.loss.tolist()
    if batch is not None:
        check_index("prompt", batch, len(lengths))
    prompts = range(len(lengths)) if batch is None else [int(batch)]
    rows = [
        {
            "prompt": prompt,
            "matrix": gradient.matrix,
            "layer": gradient.layer,
            "is_last_layer": gradient.layer == capture.n_layers - 1,
            "n_tokens": lengths[prompt],
            "n_writing": n_writing,
            "loss": losses[prompt],
            **_spectrum(gradient, prompt, n_writing),
        }
        for prompt in prompts
        for gradient in capture
        if matrix in (None, gradient.matrix)
        for n_writing in [int((~gradient.is_zero[prompt]).sum())]
    ]
    counts = ("rank", "largest_rank", "input_rank", "vjp_rank", "rank_99")
    numbers = ("norm", "top_energy")
    return pd.DataFrame(rows).astype(
        {**dict.fromkeys(counts, "Int64"), **dict.fromkeys(numbers, "float64")}
    )


def _spectrum(gradient: MatrixGradient, prompt: int, n_writing: int) -> dict[str, Any]:
    if not gradient.has_joint_factors:
        return {**dict.fromkeys(_SPECTRUM), "singular_values": []}
    values, *of_factors = gradient.spectra(prompt)
    rounding = gradient.rounding(prompt)
    input_rank, vjp_rank = (numerical_rank(own, rounding) for own in of_factors)
    energy = values.square()
    held = energy.cumsum(0) / energy.sum()  # NaN, and none of it below, where there is no gradient
    found = (
        numerical_rank(values, rounding),
        min(n_writing, *map(len, of_factors)),
        input_rank,
        vjp_rank,
        float(torch.linalg.vector_norm(values)),
        float(held[0]),
        int((held < _MOST_ENERGY).sum()) + int(bool(energy.any())),
    )
    return {**dict(zip(_SPECTRUM, found, strict=True)), "singular_values": values.tolist()}


def norm_order(norms: Float[Tensor, "d_hidden"]) -> Int[Tensor, "d_hidden"]:
    """The rank of each neuron by its norm: 0 for the longest; equal ones in the order of index."""
    # The order by rank, sorted, is the rank by neuron.
    return norms.argsort(descending=True, stable=True).argsort()


def neuron_table(capture: GradientCapture, matrix: str, layer: int, batch: int = 0) -> pd.DataFrame:
    """The neurons of one gradient beside its spanning vectors, one row per neuron and position.

    Args:
        capture: The gradients.
        matrix: Name of the matrix.
        layer: The layer, from 0.
        batch: Which prompt.

    Returns:
        Columns `neuron`, `neuron_norm`, `norm_order` (0 for the longest neuron; equal ones in the
        order of their index), `position`, `token`, `similarity` (the cosine of the neuron and the
        position's spanning vector, missing where one of them is zero), in the order of neurons and
        positions (paper, figures 8 to 10).

    Raises:
        InputError: If the matrix was not captured, or its heads or experts have factors of their
            own.
    """
    import pandas as pd

    gradient = capture[matrix, layer]
    similarity = gradient.neuron_similarity(batch).cpu()
    norms = gradient.neuron_norms(batch).cpu()
    ranks = norm_order(norms)
    neurons, positions = similarity.shape
    return pd.DataFrame(
        {
            "neuron": torch.arange(neurons).repeat_interleave(positions).numpy(),
            "neuron_norm": norms.repeat_interleave(positions).numpy(),
            "norm_order": ranks.repeat_interleave(positions).numpy(),
            "position": torch.arange(positions).repeat(neurons).numpy(),
            "token": list(capture.str_tokens[batch]) * neurons,
            "similarity": similarity.flatten().numpy(),
        }
    )
