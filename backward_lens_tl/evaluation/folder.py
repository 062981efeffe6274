"""The folder of an evaluation: what it is of, its tables, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.columns import TABLES
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.summary import shown_table, summarize, to_markdown
from backward_lens_tl.files.shards import PartsFolder

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
"""Raised when a folder that was begun before cannot be gone on with."""


@dataclass(frozen=True, repr=False)
class Evaluation(PartsFolder):
    """An evaluation's folder, complete or not.

    Attributes:
        folder: Where it is.
        run: What `run.json` holds: settings, methods, versions, command, the texts of perplexity,
            fingerprints of model and data.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> evaluation = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> blt.Evaluation.load(out).is_complete  # later, without model or data
        True
    """

    KIND = "evaluation"
    TABLES = TABLES
    MUST_MATCH = (
        "format", "config", "methods", "model", "data", "texts", "tokens", "versions", "n_parts"
    )  # fmt: skip
    ERROR = EvaluationError

    @property
    def config(self) -> EvaluationConfig:
        """The settings."""
        return EvaluationConfig.from_json(self.run["config"])

    def edits(self) -> pd.DataFrame:
        """One row per method and record, with all metrics, and `seconds` and `memory` per edit.

        Returns:
            The rows of all finished parts: the unedited model (`"none"`), then method by method.

        Examples:
            >>> evaluation.edits()[["method", "record", "efficacy"]].values.tolist()
            [['none', 0, 0.0], ['none', 1, 0.0], ['shift', 0, 1.0], ['shift', 1, 1.0]]
        """
        return self._table("edits").merge(
            self._table("costs"), on=["method", "block"], how="left", validate="many_to_one"
        )

    def prompts(self) -> pd.DataFrame:
        """One row per method, record and prompt, with the scores of both answers.

        Returns:
            The rows of all finished parts.

        Examples:
            >>> asked = evaluation.prompts().query("record == 0 and kind == 'rewrite'")
            >>> asked[["method", "answer"]].values.tolist()
            [['none', ' Germany'], ['shift', ' Spain']]
        """
        return self._table("prompts")

    def generations(self) -> pd.DataFrame:
        """One row per method, record and generation prompt, with the text.

        Returns:
            The rows of all finished parts.

        Examples:
            >>> list(evaluation.generations().columns)
            ['method', 'record', 'index', 'prompt', 'text', 'ngram_entropy']
        """
        return self._table("generations")

    def rejects(self) -> pd.DataFrame:
        """One row per row of the data that was not evaluated, with the reason.

        Returns:
            The rows of all finished parts.

        Examples:
            >>> len(evaluation.rejects())
            0
        """
        return self._table("rejects")

    def summary(self) -> pd.DataFrame:
        """One row per method: means, standard deviations and intervals of all metrics.

        Returns:
            `method`, `records`, `failed` (edits that a method refused, which count as not edited),
            and for each metric its mean under its name, the population standard deviation over
            records (`_std`), and a 95 % bootstrap interval (`_low`, `_high`). Rates, magnitudes and
            n-gram entropy are times 100, memory is in MiB. `score` is the harmonic mean of the
            three success rates.

        Examples:
            >>> evaluation.summary()[["method", "records", "efficacy"]].values.tolist()
            [['none', 2, 0.0], ['shift', 2, 100.0]]
        """
        config = self.config
        return summarize(self.edits(), seed=config.seed, resamples=config.resamples)

    def to_markdown(self) -> str:
        """The summary as a table in Markdown, standard deviations in brackets.

        Returns:
            The table.

        Examples:
            >>> [line.split("|")[1].strip() for line in evaluation.to_markdown().splitlines()]
            ['Method', '------', 'none', 'shift']
        """
        return to_markdown(shown_table(self.summary()))

    def _repr_html_(self) -> str:
        table: str = shown_table(self.summary()).to_html(index=False, border=0)
        return f"{table}\n<p>{self._caption()}</p>"

    def _caption(self) -> str:
        import html

        of = f"{self.run['model']['name']} on {self.run['data']['name']}"
        done = "" if self.is_complete else f", {len(self.finished)} of {self.n_parts} parts"
        return html.escape(f"{of}; perplexity of {self.run['texts']['name']}{done}")

    def __repr__(self) -> str:
        return self._repr(("summary", "edits", "prompts", "generations", "rejects"))
