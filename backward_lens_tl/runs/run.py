"""A run over a data set: its folder, the shards that are written, and what is left to do.

    model + data + settings ── plan ──▶ shards of records ── measure ──▶ rows ──▶ Parquet files

Shards are independent, and a shard is finished once the last of its tables is written. A run that
was stopped, even by `kill -9`, resumes with the shards that are missing.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_path
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.files.storage import write_text
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.runs.columns import Column, Tables
from backward_lens_tl.runs.config import Config
from backward_lens_tl.runs.distributed import in_turn, own_device, this_process
from backward_lens_tl.runs.rejects import Reject
from backward_lens_tl.runs.shards import (
    ANY_SHARD,
    Rows,
    read_table,
    shard_file,
    write_shard,
)

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import PartialState

_FORMAT_VERSION = 5
"""Raised when folders of earlier versions can no longer be resumed."""

_RUN = "run.json"
_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch", "transformers", "pyarrow")

_Own = TypeVar("_Own", bound="Run")  # Python 3.10 has no Self
_Config = TypeVar("_Config", bound=Config)
_Shard = TypeVar("_Shard", bound=Sized)


@dataclass(frozen=True)
class Job(Generic[_Config]):
    """The inputs of a run: the model, the data and the settings.

    Attributes:
        model: The model.
        host: The same model as a `Host`.
        records: The data.
        config: The settings.
        folder: Where tables are written.
        progress: Whether this process shows progress bars.
    """

    model: nn.Module
    host: Host
    records: Records
    config: _Config
    folder: Path
    progress: bool


@dataclass(frozen=True)
class Plan(Generic[_Shard]):
    """The plan of a run, which is the same in every process and when the run is resumed.

    Attributes:
        shards: What is measured together; a shard's length is its number of records.
        measure: Function from a shard to the rows of its tables.
        entries: The tokenized records, as they are measured, for a checksum.
        about: Further entries of `run.json`.
    """

    shards: Sequence[_Shard]
    measure: Callable[[_Shard], Rows]
    entries: Sequence[object]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Run:
    """The folder of a run, complete or not. Subclasses say what it holds.

    Attributes:
        folder: Where it is.
        about: The contents of `run.json`: settings, versions, command, checksums of model and data.
        NOUN: What it is, for messages.
        UNIT: What the progress bar counts.
        TABLES: Its tables.
        READ_BY: The methods that read them.
        CONFIG: The class of its settings.
        ORDER: The column that rows are sorted by when they are read; `None` keeps the order of the
            shards.
    """

    folder: Path
    about: Mapping[str, Any]

    NOUN: ClassVar[str]
    UNIT: ClassVar[str]
    TABLES: ClassVar[Tables]
    READ_BY: ClassVar[tuple[str, ...]]
    CONFIG: ClassVar[type[Config]]
    ORDER: ClassVar[str | None] = None

    @classmethod
    def load(cls: type[_Own], folder: str | Path) -> _Own:
        """Open a folder, without model or data.

        Args:
            folder: Where it is.

        Returns:
            The shards that are written so far.

        Raises:
            InputError: If there is no such run; a `SweepError` or `EvaluationError`.

        Examples:
            >>> blt.Sweep.load(sweep.folder).is_complete
            True
        """
        path = Path(folder) / _RUN
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            found = run["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise cls.CONFIG.ERROR(
                f"{os.fspath(folder)!r} is not the folder of {_a(cls.NOUN)}: {path} cannot be "
                f"read ({error!r})"
            ) from error
        if found != _FORMAT_VERSION:
            raise cls.CONFIG.ERROR(
                f"{os.fspath(folder)!r} has format {found}, but this version reads "
                f"{_FORMAT_VERSION}; install backward-lens-tl "
                f"{run.get('versions', {}).get('backward-lens-tl', '')}, which wrote it, or choose "
                "another folder"
            )
        return cls(Path(folder), run)

    @property
    def n_shards(self) -> int:
        """The number of shards of the complete run."""
        return int(self.about["n_shards"])

    @property
    def finished(self) -> tuple[int, ...]:
        """The shards that are written."""
        last = tuple(self.TABLES)[-1]
        shards = range(self.n_shards)
        return tuple(each for each in shards if shard_file(self.folder, last, each).exists())

    @property
    def is_complete(self) -> bool:
        """Whether all shards are written."""
        return len(self.finished) == self.n_shards

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({os.fspath(self.folder)!r}, {self.about['model']['name']} on "
            f"{self.about['data']['name']}, {len(self.finished)} of {self.n_shards} shards; read "
            f"it with {', '.join(f'.{method}()' for method in self.READ_BY)})"
        )

    # --- reading -------------------------------------------------------------------------------

    def _columns(self, table: str) -> tuple[Column, ...]:
        """The columns that a table has here; none if it is left out."""
        return self.TABLES[table]

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of all finished shards."""
        import pyarrow as pa

        there = self._columns(name)
        if not there:
            raise self.CONFIG.ERROR(
                f"this {self.NOUN} has no table of {name}: its settings leave all columns out"
            )
        names = [column.name for column in there]
        for column in columns or ():
            if column not in names:
                raise self.CONFIG.ERROR(
                    f"this {self.NOUN}'s table of {name} has no column {column!r}; it has "
                    f"{', '.join(names)}"
                )
        wanted = [each for each in there if columns is None or each.is_key or each.name in columns]
        files = [shard_file(self.folder, name, shard) for shard in self.finished]
        try:
            table = read_table(files, wanted)
        except (OSError, pa.ArrowException) as error:
            raise self.CONFIG.ERROR(
                f"a shard of {os.fspath(self.folder / name)!r} is damaged: {error}. Delete the "
                f"shard's files in {', '.join(self.TABLES)}, and run the {self.NOUN} again: it "
                "resumes"
            ) from error
        if self.ORDER is None:
            return table
        return table.sort_values(self.ORDER, kind="stable", ignore_index=True)

    # --- writing -------------------------------------------------------------------------------

    @classmethod
    def _perform(
        cls: type[_Own],
        model: nn.Module | str,
        data: Any,
        out: str | Path,
        config: Any,
        prepare: Callable[[Job[Any]], Plan[Any]],
        *,
        progress: bool,
    ) -> _Own:
        """Measure and write this process's share of the shards that are not written yet.

        Returns:
            The run; all processes of a launch return together.
        """
        check_out(cls, out)
        if not isinstance(config, cls.CONFIG | None):
            name = cls.CONFIG.__name__
            raise cls.CONFIG.ERROR(
                f"config is a {type(config).__name__}; pass {_a(name)}, such as {name}(seed=1)"
            )
        state = this_process()
        records = data if isinstance(data, Records) else read_records(data)
        if isinstance(model, str):
            model = load_model(model, device=own_device(state))
        is_shown = progress and state.is_main_process
        job = Job(model, host_of(model), records, config or cls.CONFIG(), Path(out), is_shown)
        plan = prepare(job)
        begin = partial(cls._begin, job.folder, _about(job, plan))
        found = in_turn(begin, cls.CONFIG.ERROR)
        found._write_missing(plan, state, is_shown)
        return found

    @classmethod
    def _begin(cls: type[_Own], folder: Path, run: Mapping[str, Any]) -> _Own:
        """Create the folder, or resume one of the same run.

        Args:
            folder: The folder.
            run: The contents of `run.json`, without those that describe this process.

        Returns:
            The run.
        """
        run = {**run, **_environment()}
        if (folder / _RUN).exists():
            begun = cls.load(folder)
            begun._check_same(run)
            return begun
        if any(folder.glob(f"*/{ANY_SHARD}")):
            raise cls.CONFIG.ERROR(
                f"{os.fspath(folder)!r} has shards of {_a(cls.NOUN)} but no {_RUN} to "
                "identify it; choose another folder"
            )
        try:
            for table in cls.TABLES:
                (folder / table).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cls.CONFIG.ERROR(
                f"folder {os.fspath(folder)!r} cannot be created: {error}"
            ) from error
        write_text(folder / _RUN, json.dumps(run, indent=2) + "\n")
        return cls.load(folder)

    def _write_missing(self, plan: Plan[Any], state: PartialState, progress: bool) -> None:
        sizes = [len(shard) for shard in plan.shards]
        missing = sorted({*range(self.n_shards)} - {*self.finished})
        state.wait_for_everyone()  # before any process writes, so that all have the same list
        own = missing[state.process_index :: state.num_processes]
        n_own, n_missing = (sum(sizes[each] for each in some) for some in (own, missing))
        n_written = sum(sizes) - n_missing
        with (
            open(self.folder / f"log-{state.process_index}.txt", "a", encoding="utf-8") as log,
            tqdm(
                total=n_written + n_own, initial=n_written, unit=self.UNIT, disable=not progress
            ) as bar,
        ):

            def say(message: str) -> None:
                log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")
                log.flush()

            say(
                f"process {state.process_index} of {state.num_processes}: {len(own)} of the "
                f"{len(missing)} shards that are left"
            )
            for shard in own:
                began = time.perf_counter()
                rows = plan.measure(plan.shards[shard])
                self._write(shard, rows)
                bar.update(sizes[shard])
                seconds = time.perf_counter() - began
                say(f"shard {shard}: {self._described(rows)} in {seconds:.1f} s")
        state.wait_for_everyone()

    def _write(self, shard: int, rows: Rows) -> None:
        """Write the tables of a shard, the last step of which makes it finished."""
        columns = {name: self._columns(name) for name in self.TABLES}
        write_shard(self.folder, shard, columns, rows)

    def _described(self, rows: Rows) -> str:
        """The log entry for the rows of a shard."""
        return ", ".join(f"{len(own)} {name}" for name, own in rows.items())

    def _check_same(self, run: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(run))  # with lists instead of tuples
        for name, entry in now.items():
            changes = _changes(name, self.about.get(name), entry)
            if changes and name not in ("command", "python"):
                raise self.CONFIG.ERROR(
                    f"{os.fspath(self.folder)!r} holds {_a(self.NOUN)} of other settings ({name}): "
                    f"{changes}. Resume it with the original values, or choose another folder"
                )


def check_out(kind: type[Run], out: object) -> None:
    """Raise if no run can be written.

    Args:
        kind: The kind of run.
        out: The folder.

    Raises:
        InputError: If pyarrow is not installed, or `out` is not a path; of the run's own kind.
    """
    if find_spec("pyarrow") is None:
        raise kind.CONFIG.ERROR(
            f'{_a(kind.NOUN)} needs pyarrow: pip install "backward-lens-tl[parquet]"'
        )
    check_path(out, kind.CONFIG.ERROR)


def _about(job: Job[Any], plan: Plan[Any]) -> dict[str, Any]:
    """The contents of `run.json`."""
    host, records = job.host, job.records
    entries = "\n".join(
        f"{each.row} {each.reason}" if isinstance(each, Reject) else repr(each)
        for each in plan.entries
    )
    return {
        "config": job.config.to_json(),
        **plan.about,
        "model": {
            "name": host.name,
            **({"stored_as": host.stored_as} if host.stored_as else {}),
            "class": type(host.model).__name__,
            "n_layers": host.n_layers,
            "d_model": host.d_model,
            "d_vocab": host.d_vocab_out,
            "sha256": host.fingerprint(),
        },
        "data": {"name": records.name, "rows": len(records), "sha256": records.fingerprint},
        "tokens": {"sha256": sha256(entries.encode(errors="backslashreplace")).hexdigest()},
        "n_shards": len(plan.shards),
    }


def _environment() -> dict[str, Any]:
    """The entries of `run.json` on this process."""
    return {
        "format": _FORMAT_VERSION,
        "command": shlex.join(sys.argv),
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
        "python": platform.python_version(),
    }


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouE' else 'a'} {noun}"


def _changes(name: str, before: Any, now: Any) -> str:
    """What differs between two entries, apart from names of files, which may have moved."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "" if before == now else f"was {before!r}, is {now!r}"
    may_move = name in ("model", "data", "texts")
    keys = [key for key in {**before, **now} if not (may_move and key == "name")]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
