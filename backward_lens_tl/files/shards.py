"""A folder of tables that are written part by part, by one process or several.

Parts are independent. Each file appears at once and as a whole, and a part is finished when the
last of its tables is there: whoever was stopped, also by `kill -9`, goes on with the parts that are
missing.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tqdm.auto import tqdm

from backward_lens_tl.data.records import Records
from backward_lens_tl.errors import InputError
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.models import Host

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from accelerate import PartialState

_RUN = "run.json"
_PART = "part-{}.parquet"
_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch", "transformers", "pyarrow")
_NULLABLE = {"int32": "Int64", "bool": "boolean"}
_log = logging.getLogger(__name__)

Tables = Mapping[str, "pd.DataFrame"]
_Own = TypeVar("_Own", bound="PartsFolder")  # Python 3.10 has no Self


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its name.
        dtype: Its type, as Arrow calls it.
        meaning: What it holds.
        is_key: Whether rows are told apart by it; such a column is never left out.
        is_default: Whether it is there unless columns are chosen.
        may_miss: Whether a number or truth value may be missing.
    """

    name: str
    dtype: str
    meaning: str
    is_key: bool = False
    is_default: bool = True
    may_miss: bool = False

    @property
    def pandas_dtype(self) -> str | None:
        """What pandas holds it in if values may be missing; else it is pandas' own choice."""
        return _NULLABLE[self.dtype] if self.may_miss else None


def key_column(name: str, dtype: str, meaning: str, *, may_miss: bool = False) -> Column:
    """A column that is never left out.

    Args:
        name: Its name.
        dtype: Its type, as Arrow calls it.
        meaning: What it holds.
        may_miss: Whether a number or truth value may be missing.

    Returns:
        The column.
    """
    return Column(name, dtype, meaning, is_key=True, may_miss=may_miss)


@dataclass(frozen=True)
class Reject:
    """A row of the data that is left out.

    Attributes:
        index: Its place in the data.
        id: The data's own name for it.
        reason: In a word, as the schema lists them.
        problem: In a sentence.
    """

    index: int
    id: str
    reason: str
    problem: str


def reject_rows(index_column: str, rejects: Sequence[Reject]) -> pd.DataFrame:
    """What a table of rejects holds.

    Args:
        index_column: Name of the column of rows of the data.
        rejects: The rows that are left out.

    Returns:
        One row each.
    """
    import pandas as pd

    rows = [(each.index, each.id, each.reason, each.problem) for each in rejects]
    return pd.DataFrame(rows, columns=[index_column, "id", "reason", "problem"])


@dataclass(frozen=True, repr=False)
class PartsFolder:
    """A folder of tables in parts, complete or not.

    Subclasses say what it is of.

    Attributes:
        folder: Where it is.
        run: What `run.json` holds: settings, versions, command, fingerprints of model and data.
        KIND: What it is the folder of, for messages.
        TABLES: The tables' columns, in the order in which a part writes them: one whose last table
            is written is finished.
        MUST_MATCH: What of `run.json` must be the same for it to be gone on with.
        ERROR: What is raised.
        ORDER: The column that rows are sorted by as they are read; `None` leaves them in the order
            of the parts.
    """

    folder: Path
    run: Mapping[str, Any]

    KIND: ClassVar[str]
    TABLES: ClassVar[Mapping[str, tuple[Column, ...]]]
    MUST_MATCH: ClassVar[tuple[str, ...]]
    ERROR: ClassVar[type[InputError]]
    ORDER: ClassVar[str | None] = None

    @classmethod
    def load(cls: type[_Own], folder: str | Path) -> _Own:
        """Open a folder, without model or data.

        Args:
            folder: Where it is.

        Returns:
            What is in it so far.

        Raises:
            InputError: If there is none; the error of its kind.

        Examples:
            >>> blt.Sweep.load(sweep.folder).is_complete
            True
        """
        path = Path(folder) / _RUN
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise cls.ERROR(
                f"{os.fspath(folder)!r} is not the folder of {_a(cls.KIND)}: {path} cannot be "
                f"read ({error})"
            ) from error
        return cls(Path(folder), run)

    @classmethod
    def begin(cls: type[_Own], folder: Path, run: Mapping[str, Any]) -> _Own:
        """Begin a folder, or go on with one that was begun for the same.

        Args:
            folder: Where it is.
            run: What it is of.

        Returns:
            The folder, with what is written already.

        Raises:
            InputError: If the folder was begun for something else, or cannot be written; the error
                of its kind.

        Examples:
            >>> begun = blt.Sweep.begin(folder / "sweep", sweep.run)
            >>> begun.finished, begun.is_complete
            ((), False)
        """
        if (folder / _RUN).exists():
            begun = cls.load(folder)
            begun._check_same(run)
            return begun
        if any(folder.glob(f"*/{_PART.format('*')}")):
            raise cls.ERROR(
                f"{os.fspath(folder)!r} has parts of {_a(cls.KIND)} and no {_RUN} that says which; "
                "choose another folder"
            )
        try:
            for table in cls.TABLES:
                (folder / table).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cls.ERROR(f"folder {os.fspath(folder)!r} cannot be made: {error}") from error
        with replacing(folder / _RUN) as partial:
            partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        return cls.load(folder)

    @property
    def n_parts(self) -> int:
        """How many parts it has when it is complete."""
        return int(self.run["n_parts"])

    @property
    def finished(self) -> tuple[int, ...]:
        """The parts that are written."""
        return tuple(part for part in range(self.n_parts) if self.has_part(part))

    @property
    def is_complete(self) -> bool:
        """Whether all parts are written."""
        return len(self.finished) == self.n_parts

    def has_part(self, part: int) -> bool:
        """Whether a part is written, with all of its tables.

        Args:
            part: Its number, from 0.

        Returns:
            Whether it is.

        Examples:
            >>> sweep.n_parts, sweep.has_part(0)
            (1, True)
        """
        return self._file(tuple(self.TABLES)[-1], part).exists()

    def columns(self, table: str) -> tuple[str, ...]:
        """Names of the columns that a table has here.

        Args:
            table: Its name.

        Returns:
            The names, in the order of the schema; none if the table is left out.

        Examples:
            >>> evaluation.columns("rejects")
            ('record', 'id', 'reason', 'problem')
        """
        return tuple(column.name for column in self.TABLES[table])

    # --- reading -------------------------------------------------------------------------------

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of all finished parts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        there = self.columns(name)
        if not there:
            raise self.ERROR(
                f"this {self.KIND} has no table of {name}: its settings leave all columns of it out"
            )
        keys = [column.name for column in self.TABLES[name] if column.is_key]
        for column in columns or ():
            if column not in there:
                raise self.ERROR(
                    f"this {self.KIND}'s table of {name} has no column {column!r}; it has "
                    f"{', '.join(there)}"
                )
        wanted = [each for each in there if columns is None or each in (*keys, *columns)]
        files = [self._file(name, part) for part in self.finished]
        try:
            parts = [pq.read_table(file, columns=wanted) for file in files]
        except (OSError, pa.ArrowException) as error:
            raise self.ERROR(
                f"a part of {os.fspath(self.folder / name)!r} is damaged: {error}. Delete the "
                f"part's files in {', '.join(self.TABLES)}, and run the {self.KIND} again: it "
                "goes on"
            ) from error
        empty = self._schema(name, wanted).empty_table()
        joined: pd.DataFrame = pa.concat_tables([empty, *parts]).to_pandas()
        dtypes = {
            column.name: column.pandas_dtype
            for column in self.TABLES[name]
            if column.pandas_dtype and column.name in wanted
        }
        typed = joined.astype(dtypes)
        if self.ORDER is None:
            return typed
        return typed.sort_values(self.ORDER, kind="stable", ignore_index=True)

    # --- writing -------------------------------------------------------------------------------

    def write_part(self, part: int, tables: Tables) -> None:
        """Write the tables of one part, each file at once and as a whole.

        Args:
            part: Which one.
            tables: Its rows.

        Examples:
            >>> copy = blt.Sweep.begin(folder / "copy", sweep.run)
            >>> copy.write_part(0, {name: getattr(sweep, name)() for name in sweep.TABLES})
            >>> copy.finished
            (0,)
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name in self.TABLES:
            columns = self.columns(name)
            if not columns:
                continue
            file = self._file(name, part)
            for left in file.parent.glob(f".*.partial.{file.name}"):
                # Of a process that was killed as it wrote this part.
                with suppress(OSError):
                    left.unlink()
            table = pa.Table.from_pandas(
                tables[name][list(columns)],
                schema=self._schema(name, columns),
                preserve_index=False,
            ).replace_schema_metadata()  # pandas' own types, which differ from part to part
            with replacing(file) as partial:
                pq.write_table(table, partial)

    def write_missing(
        self,
        sizes: Sequence[int],
        measure: Callable[[int], Tables],
        describe: Callable[[Tables], str],
        state: PartialState,
        *,
        unit: str,
        progress: bool,
    ) -> None:
        """Measure and write this process's share of the parts that are not written yet.

        Processes of one launch return together. Each has a log of its own in the folder.

        Args:
            sizes: How much each part is, for the bar.
            measure: From a part to the rows of its tables.
            describe: What the log says of these rows.
            state: This process among those that it was launched with.
            unit: What the bar counts.
            progress: Whether there is one.

        Examples:
            >>> from accelerate import PartialState
            >>> copy, state = blt.Sweep.begin(folder / "copy", sweep.run), PartialState()
            >>> tables = {name: getattr(sweep, name)() for name in sweep.TABLES}
            >>> copy.write_missing(
            ...     [20], lambda part: tables, str, state, unit="prompt", progress=False
            ... )
            >>> copy.is_complete
            True
        """
        missing = [part for part in range(len(sizes)) if not self.has_part(part)]
        state.wait_for_everyone()  # before anybody writes, so that all have the same list
        own = missing[state.process_index :: state.num_processes]
        n_own, n_missing = (sum(sizes[part] for part in some) for some in (own, missing))
        n_written = sum(sizes) - n_missing
        with (
            _logged_to(self.folder / f"log-{state.process_index}.txt"),
            tqdm(
                total=n_written + n_own,
                initial=n_written,
                unit=unit,
                disable=not (progress and state.is_main_process),
            ) as bar,
        ):
            _log.info(
                "process %d of %d: %d of the %d parts that are left",
                state.process_index,
                state.num_processes,
                len(own),
                len(missing),
            )
            for part in own:
                began = time.perf_counter()
                tables = measure(part)
                self.write_part(part, tables)
                bar.update(sizes[part])
                seconds = time.perf_counter() - began
                _log.info("part %d: %s in %.1f s", part, describe(tables), seconds)
        state.wait_for_everyone()

    # --- parts ---------------------------------------------------------------------------------

    def _file(self, table: str, part: int) -> Path:
        return self.folder / table / _PART.format(f"{part:06d}")

    def _schema(self, table: str, names: Sequence[str]) -> pa.Schema:
        """The schema of a table's file that has these columns."""
        import pyarrow as pa

        types = {column.name: column.dtype for column in self.TABLES[table]}
        return pa.schema([(name, _arrow_type(types[name])) for name in names])

    def _check_same(self, run: Mapping[str, Any]) -> None:
        # Through JSON, which makes lists of tuples.
        now = json.loads(json.dumps(run))
        for name in self.MUST_MATCH:
            if _lasting(name, self.run.get(name)) != _lasting(name, now[name]):
                raise self.ERROR(
                    f"{os.fspath(self.folder)!r} holds {_a(self.KIND)} with another {name}: "
                    f"{_difference(self.run.get(name), now[name])}. Go on with what it was begun "
                    "with, or choose another folder"
                )

    def _repr(self, tables: Sequence[str]) -> str:
        done, of = len(self.finished), self.n_parts
        return (
            f"{type(self).__name__}({os.fspath(self.folder)!r}, {self.run['model']['name']} on "
            f"{self.run['data']['name']}, {done} of {of} parts; look at it with "
            f"{', '.join(f'.{table}()' for table in tables)})"
        )


def about_run(host: Host, records: Records) -> dict[str, Any]:
    """What every `run.json` says of model, data, versions and command.

    Args:
        host: The model.
        records: The data.

    Returns:
        The entries.
    """
    return {
        "command": shlex.join(sys.argv),
        "model": {
            "name": host.name,
            "class": type(host.model).__name__,
            "n_layers": host.n_layers,
            "d_model": host.d_model,
            "d_vocab": host.d_vocab_out,
            "sha256": host.fingerprint(),
        },
        "data": {"name": records.name, "rows": len(records), "sha256": records.fingerprint},
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
        "python": platform.python_version(),
    }


def check_pyarrow(folder: type[PartsFolder]) -> None:
    """Refuse to begin without what writes Parquet.

    Args:
        folder: What is to be written.

    Raises:
        InputError: If pyarrow is not installed; the error of its kind.
    """
    if find_spec("pyarrow") is None:
        raise folder.ERROR(
            f'{_a(folder.KIND)} needs pyarrow: pip install "backward-lens-tl[parquet]"'
        )


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Write this module's messages to a file as well."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False  # TransformerLens 2 prints what reaches the root
    try:
        yield
    finally:
        _log.setLevel(before[0])
        _log.propagate = before[1]
        _log.removeHandler(handler)
        handler.close()


def _arrow_type(dtype: str) -> pa.DataType:
    import pyarrow as pa

    if dtype.startswith("list<"):
        return pa.list_(_arrow_type(dtype.removeprefix("list<").removesuffix(">")))
    # Arrow calls 64 bits of floating point a double in its factory, and double in its aliases.
    return pa.type_for_alias(dtype)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _lasting(name: str, entry: Any) -> Any:
    """What an entry says beside where its model, data or texts lie, which may have moved."""
    if name not in ("model", "data", "texts") or not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if key != "name"}


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
    return f"was {before!r}, is {now!r}"
