"""The folder of a sweep: what it is of, and the parts of its tables as they are finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backward_lens_tl.errors import SweepError
from backward_lens_tl.files.shards import PartsFolder
from backward_lens_tl.sweeps.columns import TABLES
from backward_lens_tl.sweeps.config import SweepConfig

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
"""Raised when a folder that was begun before cannot be gone on with."""


@dataclass(frozen=True, repr=False)
class Sweep(PartsFolder):
    """A sweep's folder, complete or not.

    Attributes:
        folder: Where it is.
        run: What `run.json` holds: settings, versions, command, fingerprints of model and data.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> sweep = blt.sweep(model, "facts", out, blt.SweepConfig(prompts=5), progress=False)
        >>> again = blt.Sweep.load(out)  # later, without model or data
        >>> again.is_complete, len(again.prompts())
        (True, 5)
    """

    KIND = "sweep"
    TABLES = TABLES
    MUST_MATCH = ("format", "config", "model", "data", "tokens", "versions", "n_parts")
    ERROR = SweepError
    ORDER = "prompt"

    @property
    def config(self) -> SweepConfig:
        """The settings."""
        return SweepConfig.from_json(self.run["config"])

    def columns(self, table: str) -> tuple[str, ...]:
        """Names of a table's columns, as `SweepConfig.columns` gives them."""
        return self.config.columns(table)

    def prompts(self) -> pd.DataFrame:
        """One row per prompt that was analysed, in the order of the data.

        Returns:
            The rows of all finished parts.

        Examples:
            >>> sweep.prompts()[["text", "target", "answer"]].head(2).values.tolist()
            [['Chet Baker made records of', ' rock', ' jazz'], ['Edouard Manet made a career in',
            ' mathematics', ' painting']]
        """
        return self._table("prompts")

    def rejects(self) -> pd.DataFrame:
        """One row per row of the data that was not analysed, with the reason.

        Returns:
            The rows of all finished parts.

        Examples:
            >>> len(sweep.rejects())
            0
        """
        return self._table("rejects")

    def gradients(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per prompt, matrix and layer.

        Args:
            columns: Columns to read beside the keys; `None` for all.

        Returns:
            The rows of all finished parts, in the order of the data.

        Raises:
            SweepError: If the sweep has no such table or column.

        Examples:
            >>> gradients = sweep.gradients(["rank"])
            >>> gradients.groupby("layer")["rank"].max().tolist()  # of the longest prompt
            [14, 14, 14, 14, 14, 14, 14, 1]
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

        Examples:
            >>> positions = sweep.positions(["is_zero"])
            >>> positions.groupby("layer")["is_zero"].any().tolist()
            [False, False, False, False, False, False, False, True]
        """
        return self._table("positions", columns)

    def __repr__(self) -> str:
        return self._repr(("prompts", "gradients", "positions", "rejects"))
