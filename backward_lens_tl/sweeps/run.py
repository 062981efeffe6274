"""A sweep, from its arguments to its tables."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl._checks import check_kind
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import plan_capture
from backward_lens_tl.capture.similarity import By, Similarity
from backward_lens_tl.errors import ResultFileError, SweepError
from backward_lens_tl.readout.jacobian_projection import CarriedLens, blocks_to_read
from backward_lens_tl.readout.projections import Projection
from backward_lens_tl.readout.requested import as_projections
from backward_lens_tl.runs.columns import Column
from backward_lens_tl.runs.run import Job, Plan, Run
from backward_lens_tl.runs.shards import Rows
from backward_lens_tl.sweeps.columns import TABLES
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.factors import FACTORS, read_factors, similarity_to, write_factors
from backward_lens_tl.sweeps.measuring import measure_shard
from backward_lens_tl.sweeps.plan import Item, Shard, plan_shards

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Sweep(Run):
    """A sweep's folder, complete or not.

    Attributes:
        folder: Where it is.
        about: The contents of `run.json`: settings, versions, command, checksums of model and data.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> sweep = blt.sweep(model, "facts", out, blt.SweepConfig(prompts=5), progress=False)
        >>> again = blt.Sweep.load(out)  # later, without model or data
        >>> again.is_complete, len(again.prompts())
        (True, 5)
    """

    NOUN = "sweep"
    UNIT = "prompt"
    TABLES = TABLES
    READ_BY = ("prompts", "gradients", "positions", "rejects")
    CONFIG = SweepConfig
    ORDER = "prompt"

    @property
    def config(self) -> SweepConfig:
        """The settings."""
        return SweepConfig.from_json(self.about["config"])

    def prompts(self) -> pd.DataFrame:
        """Read one row per prompt that was analysed, in the order of the data.

        Returns:
            The rows of all finished shards.

        Examples:
            >>> sweep.prompts()[["text", "target", "answer"]].head(2).values.tolist()
            [['Chet Baker made records of', ' rock', ' jazz'], ['Edouard Manet made a career in',
            ' mathematics', ' painting']]
        """
        return self._table("prompts")

    def rejects(self) -> pd.DataFrame:
        """Read one row per row of the data that was not analysed, with the reason.

        Returns:
            The rows of all finished shards.

        Examples:
            >>> len(sweep.rejects())
            0
        """
        return self._table("rejects")

    def gradients(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read one row per prompt, matrix and layer.

        Args:
            columns: Columns to read in addition to the keys; `None` for all.

        Returns:
            The rows of all finished shards, in the order of the data.

        Raises:
            SweepError: If the sweep has no such table or column.

        Examples:
            >>> gradients = sweep.gradients(["rank"])
            >>> gradients.groupby("layer")["rank"].max().tolist()  # of the longest prompt
            [14, 14, 14, 14, 14, 14, 14, 1]
        """
        return self._table("gradients", columns)

    def positions(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read one row per prompt, matrix, layer, position and projection.

        Args:
            columns: Columns to read in addition to the keys; `None` for all.

        Returns:
            The rows of all finished shards, in the order of the data.

        Raises:
            SweepError: If the sweep has no such table or column.

        Examples:
            >>> positions = sweep.positions(["is_zero"])
            >>> positions.groupby("layer")["is_zero"].any().tolist()
            [False, False, False, False, False, False, False, True]
        """
        return self._table("positions", columns)

    def similarity(self, query: GradientCapture, by: By = "all") -> Similarity:
        """Compare the gradients of all prompts with those of a query.

        The sweep must have kept the factors, `SweepConfig(keep_factors="bfloat16")`. Those of one
        shard are in memory at a time. In bfloat16, cosines have an error of about 0.001.

        Args:
            query: The gradients of one or more prompts, of the same matrices and layers of the
                same model. A model is recognised by its name and sizes, not by its weights.
            by: As for `GradientCapture.similarity`.

        Returns:
            `.inner` and `.cosine`, each `[a, b]`, or `[part, a, b]`: `a` as in `prompts()`, `b`
            the prompts of the query.

        Raises:
            SweepError: If the sweep has not kept the factors, or a file is damaged.
            InputError: If the query is of another model, or other matrices, layers or weights.

        Examples:
            >>> config = blt.SweepConfig(prompts=20, keep_factors="bfloat16")
            >>> kept = blt.sweep(model, "facts", folder / "kept", config, progress=False)
            >>> loss = blt.target_nll(" Italy")
            >>> query = blt.capture_gradients(model, "Rome is the capital of", loss)
            >>> kept.similarity(query)
            Similarity([20, 1])
        """
        return compared(self, query, by)[1]

    def _columns(self, table: str) -> tuple[Column, ...]:
        return self.config.columns(table)

    def _write(self, shard: int, rows: Rows) -> None:
        if FACTORS in rows:  # before the tables, whose last one makes the shard finished
            kept: Any = rows[FACTORS]
            write_factors(self.folder, shard, kept)
        super()._write(shard, rows)


def compared(sweep: Sweep, query: GradientCapture, by: By) -> tuple[list[int], Similarity]:
    """`Sweep.similarity`, and the row of the data of each prompt."""
    folder = os.fspath(sweep.folder)
    if sweep.config.keep_factors is None:
        raise SweepError(
            f"the sweep in {folder!r} has not kept the factors of its gradients; run it in another "
            'folder with SweepConfig(keep_factors="bfloat16")'
        )
    check_kind("query", query, GradientCapture, "capture_gradients")
    try:
        found = similarity_to(read_factors(sweep.folder, sweep.finished), query, by)
    except ResultFileError as error:
        raise SweepError(
            f"{error}. Delete the shard's files in {', '.join(sweep.TABLES)}, and run the sweep "
            "again: it resumes"
        ) from error
    if found is None:
        raise SweepError(f"no prompt of the sweep in {folder!r} has been analysed yet")
    return found


def sweep(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    config: SweepConfig | None = None,
    *,
    progress: bool = True,
) -> Sweep:
    """Run the lens over a data set and write the results as Parquet.

    A sweep that was stopped, even by `kill -9`, resumes when it is called again with the same
    arguments, and ends with the same files. Under `accelerate launch` the processes share the work.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name as in `load_model`.
        data: What `read_records` reads: a file of CounterFact, CSV or JSON lines, a Hugging Face
            dataset, rows, `"facts"`; or its result.
        out: The folder; it is created if needed.
        config: The settings; `SweepConfig()` by default.
        progress: Whether to show a progress bar.

    Returns:
        The folder's tables; all processes of a launch return together.

    Raises:
        SweepError: If the folder holds another sweep, or no row of the data is chosen.
        JacobianLensError: If there is no such Jacobian Lens, or it belongs to another model.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> found = blt.sweep(model, "facts", out, blt.SweepConfig(prompts=10), progress=False)
        >>> len(found.prompts()) + len(found.rejects()), found.is_complete
        (10, True)
    """
    return Sweep._perform(model, data, out, config, _prepare, progress=progress)


def _prepare(job: Job[SweepConfig]) -> Plan[Shard]:
    for_lens = job.config.for_lens()
    lenses = as_projections(for_lens["projection"], job.host)
    shards = plan_shards(job.host, job.records, job.config)
    _check(job, shards, lenses.values())
    measure = partial(measure_shard, job.model, config=job.config, for_lens=for_lens)
    fits = [lens.jacobians for lens in lenses.values() if isinstance(lens, CarriedLens)]
    about = {"jacobian": fits[0].provenance} if fits else {}
    return Plan(shards, measure, entries=tuple(chain.from_iterable(shards)), about=about)


def _check(job: Job[SweepConfig], shards: Sequence[Shard], lenses: Collection[Projection]) -> None:
    """Refuse settings that fail for every prompt, before anything is written."""
    config = job.config
    if not shards:
        raise SweepError("the data have no rows; pass at least one prompt with its target")
    items = (entry for entry in chain.from_iterable(shards) if isinstance(entry, Item))
    shortest = next(items, None)
    if shortest is None:
        return  # all rows are rejected
    plan = plan_capture(
        job.host,
        shortest.record.prompt,
        target_nll(shortest.target),
        matrices=config.matrices,
        layers=config.layers,
        prepend_bos=config.prepend_bos,
        hook_points=None,
        memory=config.memory,
    )
    blocks_to_read(job.host, plan.sites, lenses, config.vjps_at)
