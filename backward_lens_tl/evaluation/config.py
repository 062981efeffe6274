"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from backward_lens_tl.choices import Denominator
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.runs.config import Config
from backward_lens_tl.settings import Count, CountOrZero


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """The settings of an evaluation.

    Attributes:
        records: Number of records to use, counted from the first; all by default.
        rows: Rows of the data to use instead, from 0, such as `range(100, 200)`; with `shuffle`,
            places in its order.
        shuffle: Seed of an order of the rows, in which `records` and `rows` count them: a split
            that others can repeat. By default they count in the order of the data.
        edits_at_once: Number of records that one edit teaches. Each of them is then scored under
            the joint edit.
        prepend_bos: Whether prompts and texts get a BOS token; the paper's had none, `None` is the
            model's own default.
        neighbors: Number of neighborhood prompts of each record to use, counted from the first; all
            by default.
        attributes: Whether to score attribute prompts as well; no metric uses them.
        continuations: Whether to continue the record's prompt greedily, for `free_efficacy`.
        generation_length: Tokens of each generation, prompt included; 0 for no generations.
        top_k: Number of most probable tokens that each token of a generation is sampled from.
        seed: Seed of generations and bootstrap.
        texts: What perplexity is measured on: `"facts"` for the facts model's ordinary sentences,
            `"Salesforce/wikitext"` for WikiText-2 on the hub (raw, test), or a file with one entry
            per line, such as `wiki.test.raw`. By default the first for the facts model and the
            second for others.
        n_texts: Number of entries to use, the first that are long enough; 0 for no perplexity.
        min_characters: Minimum length of an entry to use.
        max_tokens: Entries are truncated to this many tokens.
        denominator: What an entry's summed nll is divided by: `"n"`, its tokens, as in the authors'
            code, or `"n-1"`, those that are predicted.
        batch_size: Maximum number of prompts in one forward pass.
        resamples: Number of bootstrap resamples.

    Raises:
        EvaluationError: If a value is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.EvaluationConfig(rows=range(3)).rows
        (0, 1, 2)
    """

    ERROR = EvaluationError

    records: Count | None = None
    rows: Sequence[CountOrZero] | None = None
    shuffle: str | None = None
    edits_at_once: Count = 1
    prepend_bos: bool | None = False
    neighbors: CountOrZero | None = None
    attributes: bool = False
    continuations: bool = True
    generation_length: CountOrZero = 100
    top_k: Count = 5
    seed: int = 0
    texts: Annotated[str, Field(min_length=1)] | None = None
    n_texts: CountOrZero = 100
    min_characters: CountOrZero = 30
    max_tokens: Annotated[int, Field(ge=2)] = 256
    denominator: Denominator = "n"
    batch_size: Count = 64
    resamples: Count = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is None:
            return
        if self.records is not None:
            raise EvaluationError(
                "records and rows are both given; pass one of them to choose records"
            )
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise EvaluationError("rows is empty or names a row twice; pass each row once")
