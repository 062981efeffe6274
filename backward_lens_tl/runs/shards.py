"""Shards: the rows of some records, one Parquet file per table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backward_lens_tl.files.storage import remove_partials, replacing
from backward_lens_tl.runs.columns import Column

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Rows = Mapping[str, "pd.DataFrame | Sequence[Any]"]
"""The rows of each table: a DataFrame, mappings by column, or tuples in the order of columns."""

ANY_SHARD = "shard-*.parquet"


def shard_file(folder: Path, table: str, shard: int) -> Path:
    """The file of one table of one shard."""
    return folder / table / f"shard-{shard:06d}.parquet"


def write_shard(
    folder: Path, shard: int, columns: Mapping[str, Sequence[Column]], rows: Rows
) -> None:
    """Write the tables of a shard, each file atomically.

    Args:
        folder: The run's folder.
        shard: The shard's number.
        columns: Columns of each table, in the order of writing; a table without columns is left
            out.
        rows: The rows of each table.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, own in columns.items():
        if not own:
            continue
        file = shard_file(folder, name, shard)
        remove_partials(file)
        found, names = rows[name], [column.name for column in own]
        frame = (
            found[names] if isinstance(found, pd.DataFrame) else pd.DataFrame(found, columns=names)
        )
        table = pa.Table.from_pandas(frame, schema=_schema(own), preserve_index=False)
        with replacing(file) as partial:
            # Without pandas' own types, which differ between shards.
            pq.write_table(table.replace_schema_metadata(), partial)


def read_table(files: Sequence[Path], columns: Sequence[Column]) -> pd.DataFrame:
    """Read columns of one table from several shards.

    Args:
        files: The table's files.
        columns: What is read.

    Returns:
        The rows in the order of the files, with the same types whatever the files hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [column.name for column in columns]
    shards = [pq.read_table(file, columns=names) for file in files]
    joined: pd.DataFrame = pa.concat_tables([_schema(columns).empty_table(), *shards]).to_pandas()
    nullable = {each.name: each.pandas_dtype for each in columns if each.pandas_dtype}
    return joined.astype(nullable)


def _schema(columns: Sequence[Column]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(column.name, _arrow_type(column.dtype)) for column in columns])


def _arrow_type(dtype: str) -> pa.DataType:
    import pyarrow as pa

    if dtype.startswith("list<"):
        return pa.list_(_arrow_type(dtype.removeprefix("list<").removesuffix(">")))
    return pa.type_for_alias(dtype)
