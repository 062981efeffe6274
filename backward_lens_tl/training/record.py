"""The record of a watched training run: a folder with one shard per watched step and process.

    StepGradient ── rows ──▶ process-0/rows/shard-000001.parquet, shard-000011.parquet, ...

Nothing is buffered. A step that was added is on disk, whatever happens to the process. A run that
resumes from a checkpoint replaces the shards of the steps after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backward_lens_tl._checks import check_kind, checked_count
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.readout.vectors import read_vectors
from backward_lens_tl.runs.config import Config
from backward_lens_tl.runs.run import Run, check_out
from backward_lens_tl.runs.shards import ANY_SHARD, shard_file
from backward_lens_tl.training.record_columns import TABLES
from backward_lens_tl.training.step_gradient import StepGradient
from backward_lens_tl.training.step_rows import Read, step_rows

if TYPE_CHECKING:
    import pandas as pd

_LISTS = ("energy", "top_tokens", "bottom_tokens", "change_tokens")


@dataclass(frozen=True)
class RecordConfig(Config):
    """The settings of a record, which stay the same when it is resumed.

    Attributes:
        k: Number of directions, and of tokens at either end of each.
        reader: The model that reads the tokens.
    """

    k: int
    reader: str


class ProcessRun(Run):
    """The shards of one process. A shard's number is that of its step."""

    NOUN = "training record"
    UNIT = "step"
    TABLES = TABLES
    READ_BY = ("to_dataframe",)
    CONFIG = RecordConfig

    @property
    def finished(self) -> tuple[int, ...]:
        """The steps that are written."""
        numbers = (re.findall(r"\d+", file.name) for file in self.folder.glob(f"rows/{ANY_SHARD}"))
        return tuple(sorted(int(number) for (number,) in numbers))

    @classmethod
    def begin(cls, folder: Path, run: dict[str, Any]) -> ProcessRun:
        """Create a folder, or resume the same run."""
        return cls._begin(folder, run)

    def write(self, step: int, rows: pd.DataFrame) -> None:
        """Write a shard, or replace it, after those of later steps are deleted."""
        for later in (each for each in self.finished if each > step):
            shard_file(self.folder, "rows", later).unlink(missing_ok=True)
        self._write(step, {"rows": rows})

    def rows(self, columns: Sequence[str] | None) -> pd.DataFrame:
        """Read all shards."""
        return self._table("rows", columns)


class TrainingRecord:
    """A table of a watched training run, on disk.

    Each step that is added is a shard of its own, written atomically, so a process that is killed
    loses none of them. If a run resumes from a checkpoint, create the record again with the same
    folder; the first step that is added deletes the rows of later ones. Each of several processes
    writes its own shards into the same folder.

    Args:
        out: The folder; it is created if needed.
        reader: A TransformerLens model that reads directions as tokens. By default the trained
            model itself reads them, with its weights after the step, if it is one of
            TransformerLens, or `watch` has its tokenizer. Otherwise there are no tokens.
        k: Number of main directions of each gradient, and of tokens at either end of each.

    Attributes:
        folder: The folder.

    Raises:
        InputError: If an argument is invalid, or pyarrow is not installed.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> record = blt.training.TrainingRecord(tempfile.mkdtemp())
        >>> with blt.training.watch(model, "W_out", layers=6) as watched:
        ...     model(model.to_tokens("Lionel Messi plays for"), return_type="loss").backward()
        ...     rows = record.add(watched.step())
        >>> rows[["step", "matrix", "layer", "positions"]].values.tolist()
        [[1, 'W_out', 6, 5]]
        >>> again = blt.training.TrainingRecord.load(record.folder)  # later, without the model
        >>> again.to_dataframe().norm.tolist() == rows.norm.tolist()
        True
    """

    def __init__(self, out: str | Path, reader: nn.Module | None = None, *, k: int = 3) -> None:
        check_out(ProcessRun, out)
        self.folder = Path(out)
        self._k = checked_count("k", k)
        self._reader = None if reader is None else host_of(reader)
        self._own: ProcessRun | None = None

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRecord:
        """Open the record of a run, finished or not, to read it.

        Args:
            folder: The folder.

        Returns:
            The record of all processes.

        Raises:
            InputError: If there is no record in the folder.

        Examples:
            >>> with blt.training.watch(model, "W_out", layers=[5, 6]) as watched:
            ...     model(model.to_tokens("Paris is in"), return_type="loss").backward()
            ...     rows = blt.training.TrainingRecord(folder / "run").add(watched.step())
            >>> model.zero_grad()
            >>> len(blt.training.TrainingRecord.load(folder / "run").to_dataframe())
            2
        """
        record = cls(folder)
        if not record._processes:
            raise InputError(
                f"{os.fspath(folder)!r} is not the folder of a training record: there is no "
                "process-0/run.json in it; pass the folder that TrainingRecord was created with"
            )
        return record

    def add(self, step: StepGradient) -> pd.DataFrame:
        """Measure the gradients of a step and write them, as the shard of this process.

        Call it before the next step, so that tokens are read with the weights of this one.

        Args:
            step: What `step()` of the watch returned, or the callback gets.

        Returns:
            The rows that were written, as in `to_dataframe`.

        Raises:
            InputError: If the folder holds the record of another run.
            UnsupportedModelError: If tokens are to be read with a model whose final norm and
                unembedding are not recognised.

        Examples:
            >>> record = blt.training.TrainingRecord(folder / "run", k=1)
            >>> with blt.training.watch(model, "W_out", layers=6) as watched:
            ...     loss = model(model.to_tokens("Lionel Messi plays for"), return_type="loss")
            ...     loss.backward()
            ...     rows = record.add(watched.step())
            >>> len(rows.top_tokens[0])
            1
            >>> model.zero_grad()
        """
        check_kind("step", step, StepGradient, "step() of the watch in a watched step")
        if self._own is None:
            self._own = self._begin(step)
        rows = step_rows(
            step, process_index(), self._k, self._read(step), is_whole=n_processes() == 1
        )
        self._own.write(step.step, rows)
        return rows

    def to_dataframe(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read one row per watched step, process, matrix and layer.

        Args:
            columns: Columns to read in addition to `step`, `process`, `matrix` and `layer`; `None`
                for all.

        Returns:
            The rows that are written so far, of all processes, in the order of steps.

        Raises:
            InputError: If nothing is written yet, there is no such column, or a shard is damaged.

        Examples:
            >>> record = blt.training.TrainingRecord(folder / "run")
            >>> with blt.training.watch(model, "W_out", layers=[5, 6]) as watched:
            ...     model(model.to_tokens("Paris is in"), return_type="loss").backward()
            ...     rows = record.add(watched.step())
            >>> model.zero_grad()
            >>> record.to_dataframe(["norm"]).columns.tolist()
            ['step', 'process', 'matrix', 'layer', 'norm']
        """
        import pandas as pd

        runs = self._processes
        if not runs:
            raise InputError(
                f"nothing is written to {os.fspath(self.folder)!r} yet; add a watched step first"
            )
        rows = pd.concat([run.rows(columns) for run in runs], ignore_index=True)
        for name in _LISTS:
            if name in rows:
                rows[name] = rows[name].map(_as_lists)
        return rows.sort_values(["step", "process"], kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        runs = self._processes
        steps = {step for run in runs for step in run.finished}
        return (
            f"TrainingRecord({os.fspath(self.folder)!r}, {len(steps)} watched steps of "
            f"{len(runs)} processes; read it with .to_dataframe())"
        )

    @property
    def _processes(self) -> list[ProcessRun]:
        """The runs of all processes, in their order."""
        found = [ProcessRun.load(file.parent) for file in self.folder.glob("process-*/run.json")]
        return sorted(found, key=lambda run: int(run.folder.name.removeprefix("process-")))

    def _begin(self, step: StepGradient) -> ProcessRun:
        config = RecordConfig(self._k, self._reader_name(step))
        run = {"config": config.to_json(), **step.about, "processes": n_processes()}
        return ProcessRun.begin(self.folder / f"process-{process_index()}", run)

    def _reader_name(self, step: StepGradient) -> str:
        if self._reader is not None:
            return self._reader.name
        return "the trained model" if step.readout is not None else "none"

    def _read(self, step: StepGradient) -> Read | None:
        if self._reader is not None:
            return partial(read_vectors, self._reader.model, k=self._k)
        return None if step.readout is None else partial(step.readout.read, k=self._k)


def process_index() -> int:
    """Number of this process among those that train together."""
    return torch.distributed.get_rank() if _are_many() else 0


def n_processes() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if _are_many() else 1


def _are_many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _as_lists(values: Any) -> Any:
    """Arrays in arrays, as pyarrow returns them, as lists in lists."""
    return (
        [_as_lists(each) for each in values]
        if isinstance(values, Iterable) and not isinstance(values, str)
        else values
    )
