"""The cells of the layers x tokens table: one matrix, layer and prompt position each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.readout import Reading


@dataclass(frozen=True)
class TokenScore:
    """A token of the vocabulary and the score that a projection gave it."""

    token: str
    token_id: int
    score: float


@dataclass(frozen=True)
class Cell:
    """One matrix, layer and prompt position, as tokens.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        position: Index in the prompt, from 0.
        token: The prompt's token at this position.
        top: Most promoted tokens, best first.
        bottom: Least promoted tokens, smallest score first.
        norm: `||delta_i||_2`.
        input_norm: `||x_i||_2`.
        write_norm: `||x_i|| ||delta_i||`, the norm of the term that the position writes.
        target: The token that the position should say; `None` without a target.
        target_rank: Number of tokens that score higher than the target; `None` without a target.
        is_zero: Whether the position adds nothing to this gradient. It then has no tokens and no
            rank, which would be those of the final norm's bias.
        is_faint: Whether the projected vector is so short that the `eps` of the final norm
            outweighs it. Its tokens are then close to those of the norm's bias.
    """

    matrix: MatrixName
    layer: int
    position: int
    token: str
    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    norm: float
    input_norm: float
    write_norm: float
    target: str | None
    target_rank: int | None
    is_zero: bool
    is_faint: bool

    @property
    def target_leads(self) -> bool:
        """Whether the target is the most promoted token."""
        return self.target_rank == 0


def projected_vectors(gradient: MatrixGradient, vjps_at: str) -> Float[Tensor, "batch pos d_model"]:
    """The vectors of a gradient that are projected, with the sign of the gradient.

    Args:
        gradient: The gradient of one matrix.
        vjps_at: `"matrix"` for its spanning set; `"residual"` for the VJPs where the output of a
            writing matrix is added to the residual stream.

    Returns:
        The vectors.
    """
    is_joined = vjps_at == "residual" and not gradient.reads_residual
    return gradient.resid_vjps if is_joined else gradient.spanning_set


@dataclass(frozen=True)
class CellReader:
    """Reads cells from tensors, as columns of Python values.

    Attributes:
        capture: The gradients.
        reading: Their readouts under one projection.
        positions: Index of each projected position in its prompt, -1 where there is none.
        token_texts: Text of every token in the readouts.
        vjps_at: Which VJPs were projected.
    """

    capture: GradientCapture
    reading: Reading
    positions: Int[Tensor, "batch pos"]
    token_texts: Mapping[int, str]
    vjps_at: str

    def columns(self, matrix: str, layer: int, prompts: Sequence[int]) -> dict[str, list[Any]]:
        """The cells of one matrix and layer, in the order of prompts and positions.

        Args:
            matrix: The matrix.
            layer: The layer, from 0.
            prompts: The prompts.

        Returns:
            The columns of `BackwardLensResult.to_df`, and `top_ids` and `bottom_ids`.
        """
        gradient, read = self.capture[matrix, layer], self.reading.readouts[matrix]
        chosen = torch.tensor(prompts, dtype=torch.long, device=self.positions.device)
        at, column = (self.positions[chosen] >= 0).nonzero(as_tuple=True)
        prompt = chosen[at]
        position = self.positions[prompt, column]
        here = self.capture.layers.index(layer), prompt, column
        vectors = at_least_float32(projected_vectors(gradient, self.vjps_at)[prompt, position])
        zero = gradient.is_zero[prompt, position]
        faint = read.is_faint[here]
        owners, places, str_tokens = prompt.tolist(), position.tolist(), self.capture.str_tokens
        columns: dict[str, list[Any]] = {
            "prompt": owners,
            "matrix": [matrix] * len(owners),
            "layer": [layer] * len(owners),
            "position": places,
            "token": [str_tokens[owner][at] for owner, at in zip(owners, places, strict=True)],
            "norm": gradient.norms[prompt, position].tolist(),
            "input_norm": gradient.input_norms[prompt, position].tolist(),
            "write_norm": gradient.write_norms[prompt, position].tolist(),
            "top_vjp_cosine": _top_vjp_cosines(vectors, self.capture.top_vjps, prompt),
            "is_zero": zero.tolist(),
            "projection": [self.reading.projection] * len(owners),
            "is_faint": (faint & ~zero).tolist(),
            "target": self._targets(prompt, position),
            "target_rank": _ranks(read.target_rank[here], zero),
            "answer": [self.token_texts[token] for token in self.capture.answers[prompt].tolist()],
            "answer_rank": _ranks(read.answer_rank[here], zero),
            "entropy": read.entropy[here].masked_fill(zero, math.nan).tolist(),
        }
        for end in ("top", "bottom"):
            ids = _lists(getattr(read, f"{end}_ids")[here], zero)
            columns[f"{end}_tokens"] = [[self.token_texts[token] for token in row] for row in ids]
            columns[f"{end}_scores"] = _lists(getattr(read, f"{end}_scores")[here], zero)
            columns[f"{end}_ids"] = ids
        return columns

    def _targets(self, prompt: Int[Tensor, "n"], position: Int[Tensor, "n"]) -> list[str | None]:
        """Text of each position's target."""
        targets = self.capture.targets
        if targets is None:
            return [None] * len(prompt)
        return [self.token_texts.get(token) for token in targets[prompt, position].tolist()]


def cells_of(columns: Mapping[str, list[Any]]) -> list[Cell]:
    """Cells from the columns of `CellReader`."""
    rows = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    return [
        Cell(
            matrix=row["matrix"],
            layer=row["layer"],
            position=row["position"],
            token=row["token"],
            top=_token_scores(row, "top"),
            bottom=_token_scores(row, "bottom"),
            norm=row["norm"],
            input_norm=row["input_norm"],
            write_norm=row["write_norm"],
            target=row["target"],
            target_rank=row["target_rank"],
            is_zero=row["is_zero"],
            is_faint=row["is_faint"],
        )
        for row in rows
    ]


def _token_scores(row: Mapping[str, Any], end: str) -> tuple[TokenScore, ...]:
    tokens, ids, scores = (row[f"{end}_{kind}"] for kind in ("tokens", "ids", "scores"))
    return tuple(map(TokenScore, tokens, ids, scores))


def cosines(vectors: Float[Tensor, "*n d"], others: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Cosine of each vector and its counterpart, in float64; NaN if either is zero."""
    ours, theirs = (
        each.double() / torch.linalg.vector_norm(each.double(), dim=-1, keepdim=True)
        for each in (vectors, others)
    )
    found: Tensor = (ours * theirs).sum(-1).clamp(-1, 1)
    return found


def _top_vjp_cosines(
    vectors: Float[Tensor, "n d_model"],
    top_vjps: Float[Tensor, "batch d_model"] | None,
    prompt: Int[Tensor, "n"],
) -> list[float]:
    """Cosine of each vector and its prompt's top VJP; NaN without one, or if either is zero."""
    if top_vjps is None:
        return [math.nan] * len(vectors)
    found: list[float] = cosines(vectors, top_vjps[prompt].to(vectors.device)).tolist()
    return found


def _ranks(ranks: Int[Tensor, "n"], is_zero: Bool[Tensor, "n"]) -> list[int | None]:
    """Ranks; `None` where there is none, or where the vector is zero."""
    return [None if rank < 0 else rank for rank in ranks.masked_fill(is_zero, -1).tolist()]


def _lists(values: Shaped[Tensor, "n k"], is_zero: Bool[Tensor, "n"]) -> list[list[Any]]:
    """Rows as lists; empty where the vector is zero."""
    rows = zip(values.tolist(), is_zero.tolist(), strict=True)
    return [[] if nothing else row for row, nothing in rows]
