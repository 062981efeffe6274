"""From the gradients of a step to the rows of a training record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.similarity import USUAL_BUDGET, inner_products, squared_norms
from backward_lens_tl.readout.vectors import VectorReadout
from backward_lens_tl.training.change_numbers import compare_change, cosine
from backward_lens_tl.training.record_columns import ROWS
from backward_lens_tl.training.spectrum import leading_spectrum, spectrum_of
from backward_lens_tl.training.step_gradient import StepGradient, WatchedGradient

if TYPE_CHECKING:
    import pandas as pd

Read = Callable[[Float[Tensor, "n d_model"]], VectorReadout]
"""Reads vectors as tokens."""

_NOTHING: dict[str, Any] = {
    "norm": math.nan,
    "effective_rank": math.nan,
    "energy": [],
    "reference_cosine": math.nan,
    "change_norm": math.nan,
    "change_cosine": math.nan,
    "change_outside": math.nan,
}
"""Numbers that are not measured, or not finite."""


@dataclass(frozen=True)
class _Row:
    """The numbers of one gradient, and the vectors whose tokens are read.

    Attributes:
        numbers: Values by column.
        written: What gradient descent writes in each direction, on the side of width `d_model`.
        changed: What the optimizer's change writes in its first direction, if it is measured.
    """

    numbers: dict[str, Any]
    written: Float[Tensor, "k d_model"]
    changed: Float[Tensor, "n d_model"]


def step_rows(
    step: StepGradient, process: int, k: int, read: Read | None, *, is_whole: bool = True
) -> pd.DataFrame:
    """One row per matrix and layer with a gradient or a measured change.

    Args:
        step: The gradients.
        process: The process that they are of.
        k: Number of directions.
        read: Reads vectors as tokens; `None` leaves the tokens out.
        is_whole: Whether the optimizer's change follows from these gradients, and not from those of
            other processes too.

    Returns:
        The rows.
    """
    import pandas as pd

    rows = [_row(step, gradient, k, is_whole) for gradient in step]
    none = rows[0].written[:0]
    rows += [
        _Row(
            {"matrix": key[0], "layer": key[1], **_NOTHING, **_change_alone(step, key)}, none, none
        )
        for key in step.changes
        if key not in step.gradients  # it has none, but its weight may have changed
    ]
    groups = [row.written for row in rows] + [row.changed for row in rows]
    tokens = _tokens(groups, read)
    same = {"step": step.step, "process": process, "positions": len(step.positions)}
    of_gradients, of_changes = tokens[: len(rows)], tokens[len(rows) :]
    filled = [
        {
            **same,
            **row.numbers,
            "top_tokens": top,
            "bottom_tokens": bottom,
            "change_tokens": changed[0] if changed else [],
        }
        for row, (top, bottom), (changed, _) in zip(rows, of_gradients, of_changes, strict=True)
    ]
    return pd.DataFrame(filled, columns=[column.name for column in ROWS])


def _row(step: StepGradient, gradient: WatchedGradient, k: int, is_whole: bool) -> _Row:
    key = gradient.matrix, gradient.layer
    numbers: dict[str, Any] = {"matrix": gradient.matrix, "layer": gradient.layer, **_NOTHING}
    none = (gradient.inputs if gradient.reads_residual else gradient.vjps)[0, :0].flatten(1)
    if not gradient.has_joint_factors or not _is_finite(gradient):
        return _Row(numbers | _change_alone(step, key), none, none)
    if not len(step.positions):
        zero = {"norm": 0.0, "effective_rank": 0.0}
        return _Row(numbers | zero | _change_alone(step, key), none, none)
    changed = none
    if key in step.changes:
        main = gradient.principal_directions(len(step.positions))
        spectrum = spectrum_of(main, k)
        found = compare_change(step.changes[key], gradient, main)
        numbers["change_norm"] = found.norm
        if is_whole:
            numbers["change_cosine"], numbers["change_outside"] = found.cosine, found.outside
        changed = found.written
    else:
        spectrum = leading_spectrum(gradient, k)
    numbers["norm"], numbers["effective_rank"] = spectrum.norm, spectrum.effective_rank
    numbers["energy"] = spectrum.energy
    if key in step.references:
        numbers["reference_cosine"] = _reference_cosine(gradient, step.references[key])
    return _Row(numbers, -spectrum.resid, changed)


def _change_alone(step: StepGradient, key: tuple[str, int]) -> dict[str, float]:
    """The size of a change that is not compared with a gradient."""
    return {"change_norm": float(step.changes[key].dense().norm())} if key in step.changes else {}


def _reference_cosine(gradient: WatchedGradient, reference: WatchedGradient) -> float:
    if not reference.vjps.shape[1]:  # of a target that is certain
        return math.nan
    device = gradient.vjps.device
    other = replace(
        reference,
        inputs=reference.inputs.to(device),
        vjps=reference.vjps.to(device),
        mask=reference.mask.to(device),
    )
    inner = float(inner_products(gradient, other, USUAL_BUDGET))
    squares = [float(squared_norms(each, USUAL_BUDGET)) for each in (gradient, other)]
    return cosine(inner, math.prod(math.sqrt(max(0.0, each)) for each in squares))


def _is_finite(gradient: WatchedGradient) -> bool:
    return bool(gradient.inputs.isfinite().all() and gradient.vjps.isfinite().all())


def _tokens(
    groups: Sequence[Float[Tensor, "n d_model"]], read: Read | None
) -> list[tuple[list[list[str]], list[list[str]]]]:
    """Top and bottom tokens of groups of vectors, which are read together."""
    if read is None or not any(map(len, groups)):
        return [([], []) for _ in groups]
    device = groups[0].device
    found = read(torch.cat([each.double().to(device) for each in groups]))
    top, bottom = iter(found.top_tokens), iter(found.bottom_tokens)
    return [([next(top) for _ in each], [next(bottom) for _ in each]) for each in groups]
