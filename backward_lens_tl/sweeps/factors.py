"""The factors that a sweep keeps, a file per shard, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backward_lens_tl.capture.coverage import Coverage
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.capture.similarity import By, Similarity, stacked
from backward_lens_tl.choices import FactorDtype
from backward_lens_tl.errors import InputError
from backward_lens_tl.files.storage import Saved, remove_partials

FACTORS = "factors"
"""The folder of the files, and the entry of a shard's rows that holds their contents."""


@dataclass(frozen=True)
class KeptFactors:
    """The gradients of some prompts of a shard.

    Attributes:
        rows: The row of the data of each prompt.
        capture: The gradients, without those of hook points and attention patterns.
    """

    rows: tuple[int, ...]
    capture: GradientCapture

    @classmethod
    def of(cls, capture: GradientCapture, rows: Sequence[int], dtype: FactorDtype) -> KeptFactors:
        """Round the factors to a dtype.

        Args:
            capture: The gradients.
            rows: The row of the data of each prompt.
            dtype: Name of the dtype.

        Returns:
            The rounded gradients.
        """
        rounded: dict[int, Tensor] = {}  # several matrices may share their inputs

        def kept(factor: Tensor) -> Tensor:
            return rounded.setdefault(id(factor), factor.to(getattr(torch, dtype)))

        gradients = {
            key: replace(
                gradient,
                inputs=kept(gradient.inputs),
                vjps=kept(gradient.vjps),
                joined_vjps=None if gradient.joined_vjps is None else kept(gradient.joined_vjps),
            )
            for key, gradient in capture.gradients.items()
        }
        lean = replace(capture, gradients=gradients, hook_gradients={}, attention={})
        return cls(tuple(rows), lean)


@dataclass(frozen=True)
class ShardFactors(Saved):
    """The gradients of all prompts of a shard.

    Attributes:
        parts: Usually one; one per prompt if the prompts could not be analysed together.
    """

    WHAT = "factors of one shard of a sweep"
    PARTS = (KeptFactors, GradientCapture, MatrixGradient, Predictions, Coverage)

    parts: tuple[KeptFactors, ...]


def factors_file(folder: Path, shard: int) -> Path:
    """The file of one shard's factors."""
    return folder / FACTORS / f"shard-{shard:06d}.safetensors"


def write_factors(folder: Path, shard: int, parts: Sequence[KeptFactors]) -> None:
    """Write the factors of a shard atomically.

    Args:
        folder: The sweep's folder.
        shard: The shard's number.
        parts: The factors.
    """
    file = factors_file(folder, shard)
    file.parent.mkdir(exist_ok=True)
    remove_partials(file)
    ShardFactors(tuple(parts)).save(file)


def read_factors(folder: Path, shards: Sequence[int]) -> Iterator[KeptFactors]:
    """Read the factors of several shards, one shard at a time.

    Args:
        folder: The sweep's folder.
        shards: Numbers of the shards.

    Yields:
        The factors.
    """
    for shard in shards:
        yield from ShardFactors.load(factors_file(folder, shard)).parts


def similarity_to(
    kept: Iterator[KeptFactors], query: GradientCapture, by: By
) -> tuple[list[int], Similarity] | None:
    """Compare kept gradients with those of a query.

    Args:
        kept: The kept gradients; those of one shard are in memory at a time.
        query: The gradients of the prompts `b`.
        by: As for `GradientCapture.similarity`.

    Returns:
        The rows of the data, ascending, and the similarities of their gradients in this order;
        `None` if there are no gradients.

    Raises:
        InputError: If the query is of another model, or other matrices, layers or weights.
    """
    rows: list[int] = []
    found = []
    for each in kept:
        if each.capture.model_name != query.model_name:
            raise InputError(
                f"the sweep is of model {each.capture.model_name!r}, and the query of "
                f"{query.model_name!r}; capture the query with the sweep's model"
            )
        rows += each.rows
        found.append(each.capture.similarity(query, by))
        del each  # before the next shard is read
    if not rows:
        return None
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [rows[place] for place in order], stacked(found, order)
