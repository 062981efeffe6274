"""The folder of a sweep: what it is of, and the parts of its tables as they are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backward_lens_tl.errors import SweepError
from backward_lens_tl.storage import replacing
from backward_lens_tl.sweep.columns import TABLES, arrow_schema
from backward_lens_tl.sweep.config import SweepConfig

if TYPE_CHECKING:
    import pandas as pd

_RUN = "run.json"
_PART = "part-{}.parquet"
_LAST_WRITTEN = tuple(TABLES)[-1]
_MUST_MATCH = ("format", "config", "model", "data", "tokens", "versions", "n_parts")

FORMAT_VERSION = 1
"""Raised when a folder that was begun before cannot be gone on with."""


@dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep's folder, complete or not.

    Attributes:
        folder: Where it is.
        run: What `run.json` holds: settings, versions, command, fingerprints of model and data.

    Example:
        >>> sweep = Sweep.load("facts-sweep")  # doctest: +SKIP
        >>> sweep.positions(["norm"]).groupby("layer").norm.mean()  # doctest: +SKIP
    """

    folder: Path
    run: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Open the folder of a sweep.

        Args:
            folder: Where it is.

        Returns:
            The sweep.

        Raises:
            SweepError: If there is none.
        """
        path = Path(folder) / _RUN
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SweepError(
                f"{os.fspath(folder)!r} is not the folder of a sweep: {path} cannot be read "
                f"({error})"
            ) from error
        return cls(Path(folder), run)

    @property
    def config(self) -> SweepConfig:
        """The settings."""
        return SweepConfig.from_json(self.run["config"])

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
        """Whether a part is written, with all of its tables."""
        return self._file(_LAST_WRITTEN, part).exists()

    # --- tables --------------------------------------------------------------------------------

    def prompts(self) -> pd.DataFrame:
        """One row per prompt that was analysed, in the order of the data."""
        return self._table("prompts")

    def rejects(self) -> pd.DataFrame:
        """One row per row of the data that was not analysed, with the reason."""
        return self._table("rejects")

    def gradients(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per prompt, matrix and layer.

        Args:
            columns: Columns to read beside the keys; `None` for all.

        Returns:
            The rows of all finished parts, in the order of the data.

        Raises:
            SweepError: If the sweep has no such table or column.
        """
        return self._table("gradients", columns)

    def positions(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per prompt, matrix, layer, position and projection.

        Args:
            columns: Columns to read beside the keys; `None` for all.

        Returns:
            The rows of all finished parts, in the order of the data.

        Raises:
            SweepError: If the sweep has no such table or column.
        """
        return self._table("positions", columns)

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        import pyarrow as pa
        import pyarrow.parquet as pq

        there = self.config.columns(name)
        if not there:
            raise SweepError(
                f"this sweep has no table of {name}: its settings leave all columns of it out"
            )
        keys = [column.name for column in TABLES[name] if column.is_key]
        for column in columns or ():
            if column not in there:
                raise SweepError(
                    f"this sweep's table of {name} has no column {column!r}; it has "
                    f"{', '.join(there)}"
                )
        wanted = [each for each in there if columns is None or each in (*keys, *columns)]
        files = [self._file(name, part) for part in self.finished]
        try:
            parts = [pq.read_table(file, columns=wanted) for file in files]
        except (OSError, pa.ArrowException) as error:
            raise SweepError(
                f"a part of {os.fspath(self.folder / name)!r} is damaged: {error}. Delete the "
                f"part's files in {', '.join(TABLES)}, and run the sweep again: it goes on"
            ) from error
        empty = arrow_schema(name, tuple(wanted)).empty_table()
        joined: pd.DataFrame = pa.concat_tables([empty, *parts]).to_pandas()
        dtypes = {
            column.name: column.pandas_dtype
            for column in TABLES[name]
            if column.pandas_dtype and column.name in wanted
        }
        return joined.astype(dtypes).sort_values("prompt", kind="stable", ignore_index=True)

    # --- parts ---------------------------------------------------------------------------------

    def write_part(self, part: int, tables: Mapping[str, pd.DataFrame]) -> None:
        """Write the tables of one part, each file at once and as a whole.

        Args:
            part: Which one.
            tables: Its rows.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        config = self.config
        for name in TABLES:
            columns = config.columns(name)
            if not columns:
                continue
            file = self._file(name, part)
            for left in file.parent.glob(f".*.partial.{file.name}"):
                # Of a process that was killed as it wrote this part.
                with suppress(OSError):
                    left.unlink()
            table = pa.Table.from_pandas(
                tables[name][list(columns)],
                schema=arrow_schema(name, columns),
                preserve_index=False,
            ).replace_schema_metadata()  # pandas' own types, which differ from part to part
            with replacing(file) as partial:
                pq.write_table(table, partial)

    def _file(self, table: str, part: int) -> Path:
        return self.folder / table / _PART.format(f"{part:06d}")

    def __repr__(self) -> str:
        done, of = len(self.finished), self.n_parts
        return (
            f"Sweep({os.fspath(self.folder)!r}, {self.run['model']['name']} on "
            f"{self.run['data']['name']}, {done} of {of} parts; look at it with .prompts(), "
            ".gradients(), .positions(), .rejects())"
        )


def open_folder(folder: Path, run: Mapping[str, Any]) -> Sweep:
    """Begin a sweep's folder, or go on with one that was begun for the same.

    Args:
        folder: Where it is.
        run: What the sweep is of.

    Returns:
        The sweep, with what is written already.

    Raises:
        SweepError: If the folder was begun for something else, or cannot be written.
    """
    if (folder / _RUN).exists():
        sweep = Sweep.load(folder)
        _check_same(sweep, run)
        return sweep
    if any(folder.glob(f"*/{_PART.format('*')}")):
        raise SweepError(
            f"{os.fspath(folder)!r} has parts of a sweep and no {_RUN} that says which; choose "
            "another folder"
        )
    try:
        for table in TABLES:
            (folder / table).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"folder {os.fspath(folder)!r} cannot be made: {error}") from error
    with replacing(folder / _RUN) as partial:
        partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return Sweep.load(folder)


def _check_same(sweep: Sweep, run: Mapping[str, Any]) -> None:
    # Through JSON, which makes lists of tuples.
    now = json.loads(json.dumps(run))
    for name in _MUST_MATCH:
        if _nameless(sweep.run.get(name)) != _nameless(now[name]):
            raise SweepError(
                f"{os.fspath(sweep.folder)!r} holds a sweep with another {name}: "
                f"{_difference(sweep.run.get(name), now[name])}. Go on with what it was begun "
                "with, or choose another folder"
            )


def _nameless(entry: Any) -> Any:
    """What an entry says beside where its model or data lie, which may have moved."""
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if key != "name"}


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
    return f"was {before!r}, is {now!r}"
