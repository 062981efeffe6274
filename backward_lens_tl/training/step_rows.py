"""From the gradients of a step to the rows of a training record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.readout.vectors import VectorReadout
from backward_lens_tl.training.step_gradient import StepGradient, WatchedGradient

if TYPE_CHECKING:
    import pandas as pd

Read = Callable[[Float[Tensor, "n d_model"]], VectorReadout]
"""Reads vectors as tokens."""


@dataclass(frozen=True)
class _Row:
    """The numbers of one gradient, and the vectors whose tokens are read.

    Attributes:
        numbers: Values by column.
        written: What gradient descent writes in each direction, on the side of width `d_model`.
    """

    numbers: dict[str, Any]
    written: Float[Tensor, "k d_model"]


def step_rows(step: StepGradient, process: int, k: int, read: Read | None) -> pd.DataFrame:
    """One row per matrix and layer.

    Args:
        step: The gradients.
        process: The process that they are of.
        k: Number of directions.
        read: Reads vectors as tokens; `None` leaves the tokens out.

    Returns:
        The rows.
    """
    import pandas as pd

    from backward_lens_tl.training.record_columns import ROWS

    rows = [_row(gradient, k) for gradient in step]
    tokens = _tokens([row.written for row in rows], read)
    same = {"step": step.step, "process": process, "positions": len(step.positions)}
    return pd.DataFrame(
        [
            {**same, **row.numbers, "top_tokens": top, "bottom_tokens": bottom}
            for row, (top, bottom) in zip(rows, tokens, strict=True)
        ],
        columns=[column.name for column in ROWS],
    )


def _row(gradient: WatchedGradient, k: int) -> _Row:
    place = {"matrix": gradient.matrix, "layer": gradient.layer}
    missing = {
        "change_tokens": [],
        "reference_cosine": math.nan,
        **dict.fromkeys(("change_norm", "change_cosine", "change_outside"), math.nan),
    }
    width = gradient.spanning_set.shape[-1]
    if not _is_finite(gradient):
        nothing = {"norm": math.nan, "effective_rank": math.nan, "energy": []}
        return _Row(place | missing | nothing, torch.zeros(0, width))
    main = gradient.principal_directions(k)
    squares = gradient.singular_values().square()
    total = float(squares.sum())
    numbers = {
        "norm": math.sqrt(total),
        "effective_rank": total**2 / float(squares.square().sum()) if total else 0.0,
        "energy": main.energy.tolist(),
    }
    return _Row(place | missing | numbers, -main.resid)


def _is_finite(gradient: WatchedGradient) -> bool:
    return bool(gradient.inputs.isfinite().all() and gradient.vjps.isfinite().all())


def _tokens(
    vectors: Sequence[Float[Tensor, "k d_model"]], read: Read | None
) -> Iterator[tuple[list[list[str]], list[list[str]]]]:
    """Top and bottom tokens of groups of vectors, which are read together."""
    if read is None or not any(map(len, vectors)):
        yield from [([], [])] * len(vectors)
        return
    device = vectors[0].device
    found = read(torch.cat([each.to(device) for each in vectors]))
    top, bottom = iter(found.top_tokens), iter(found.bottom_tokens)
    for each in vectors:
        yield [next(top) for _ in each], [next(bottom) for _ in each]
