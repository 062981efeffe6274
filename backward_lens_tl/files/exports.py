"""Tables as files that other programs read."""

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
    """Write a table as CSV in UTF-8; lists in its cells become JSON.

    JSON has no infinite numbers: such a score is a text there, as `"-inf"`.

    Args:
        table: The table.
        path: The file; one that exists is replaced, at once and as a whole. An ending such as
            `.csv.gz` compresses it.

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
    """Write a table as Parquet; lists in its cells stay lists.

    Args:
        table: The table.
        path: The file; one that exists is replaced, at once and as a whole.

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
