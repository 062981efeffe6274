"""Tables as CSV and Parquet, written atomically."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from backward_lens_tl.errors import ResultFileError
from backward_lens_tl.files.storage import replacing

if TYPE_CHECKING:
    import pandas as pd


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV in UTF-8, with lists in its cells as JSON.

    JSON has no infinite numbers: in a list they become strings, such as `"-inf"`.

    Args:
        table: The table.
        path: The file. An existing file is replaced atomically. A suffix such as `.csv.gz`
            compresses it.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    lists = [name for name in table if table[name].map(lambda cell: isinstance(cell, list)).any()]
    as_text = table.assign(**{str(name): table[name].map(_json) for name in lists})
    with replacing(path) as partial:
        as_text.to_csv(partial, index=False, encoding="utf-8")


def _json(values: list[object]) -> str:
    return json.dumps(
        [str(each) if isinstance(each, float) and math.isinf(each) else each for each in values]
    )


def write_parquet(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as Parquet. Lists in its cells stay lists.

    Args:
        table: The table.
        path: The file. An existing file is replaced atomically.

    Raises:
        ResultFileError: If the file cannot be written, or pyarrow is not installed.
    """
    with replacing(path) as partial:
        try:
            table.to_parquet(partial, index=False)
        except ImportError as error:
            raise ResultFileError(
                'Parquet needs pyarrow: pip install "backward-lens-tl[parquet]"'
            ) from error
