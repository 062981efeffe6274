"""What an evaluation measures: its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from backward_lens_tl._checks import (
    check_choice,
    check_settings,
    is_integer,
    listed,
    plain,
    shown,
)
from backward_lens_tl.errors import EvaluationError

Denominator = Literal["n", "n-1"]

_COUNTS = {
    "records": (1, True),
    "edits_at_once": (1, False),
    "neighbors": (0, True),
    "generation_length": (0, False),
    "top_k": (1, False),
    "n_texts": (0, False),
    "min_characters": (0, False),
    "max_tokens": (2, False),
    "batch_size": (1, False),
    "resamples": (1, False),
}
"""The smallest value of each integer, and whether it may be left out."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation.

    Attributes:
        records: How many records are taken, the first of the data; `None` for all.
        rows: Rows of the data to take instead, from 0, such as `range(100, 200)`.
        edits_at_once: How many records are taught with one edit. Each of them is then scored under
            the edit of all.
        prepend_bos: Whether prompts and texts get a BOS token; the paper's had none, `None` is the
            model's own default.
        neighbors: Neighborhood prompts of each record, the first ones; `None` for all.
        attributes: Whether attribute prompts are scored, too; no metric is made of them.
        generation_length: Tokens of each generation, prompt included; 0 for no generations.
        top_k: Tokens that each of a generation is drawn among.
        seed: Of generations and bootstrap.
        texts: What perplexity is measured on: `"facts"` for the facts model's ordinary sentences,
            `"Salesforce/wikitext"` for the hub's WikiText-2 (raw, test), or a file with one entry
            per line, such as `wiki.test.raw`. `None` is the first for the facts model and the
            second for others.
        n_texts: How many entries are taken, the first that are long enough; 0 for no perplexity.
        min_characters: Length of the shortest entry that is taken.
        max_tokens: Entries are cut behind so many.
        denominator: What an entry's summed nll is divided by: `"n"`, its tokens, as the authors'
            code does, or `"n-1"`, those that are predicted.
        batch_size: Most prompts of one forward pass.
        resamples: Of the bootstrap.

    Raises:
        EvaluationError: If a value is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.EvaluationConfig(rows=range(3)).rows
        (0, 1, 2)
    """

    records: int | None = None
    rows: Sequence[int] | None = None
    edits_at_once: int = 1
    prepend_bos: bool | None = False
    neighbors: int | None = None
    attributes: bool = False
    generation_length: int = 100
    top_k: int = 5
    seed: int = 0
    texts: str | None = None
    n_texts: int = 100
    min_characters: int = 30
    max_tokens: int = 256
    denominator: Denominator = "n"
    batch_size: int = 64
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.rows is not None:
            # Equal settings are to compare equal, and JSON holds no ranges.
            object.__setattr__(self, "rows", tuple(plain(each) for each in listed(self.rows)))
            _check_rows(self.rows, self.records)
        for name, (least, or_none) in _COUNTS.items():
            value = getattr(self, name)
            if value is None and or_none:
                continue
            if not is_integer(value) or int(value) < least:
                raise EvaluationError(f"{name} is {shown(value)}; pass an integer from {least} on")
            object.__setattr__(self, name, plain(value))
        if not is_integer(self.seed):
            raise EvaluationError(f"seed is {shown(self.seed)}; pass an integer, such as 0")
        object.__setattr__(self, "seed", plain(self.seed))
        check_choice("prepend_bos", self.prepend_bos, (True, False, None), EvaluationError)
        check_choice("attributes", self.attributes, (True, False), EvaluationError)
        check_choice("denominator", self.denominator, get_args(Denominator), EvaluationError)
        if self.texts is not None and not (isinstance(self.texts, str) and self.texts):
            raise EvaluationError(
                f"texts is {shown(self.texts)}; pass 'facts', 'Salesforce/wikitext' or a file"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them.

        Returns:
            Every attribute by name.

        Examples:
            >>> blt.EvaluationConfig(records=10).to_json()["records"]
            10
        """
        return asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> EvaluationConfig:
        """Settings out of JSON.

        Args:
            settings: Some of the attributes by name; the others have their defaults.

        Returns:
            The settings.

        Raises:
            EvaluationError: If there is no such setting.

        Examples:
            >>> blt.EvaluationConfig.from_json({"records": 10, "denominator": "n-1"}).denominator
            'n-1'
        """
        check_settings(settings, [field.name for field in fields(cls)], EvaluationError)
        return cls(**settings)


def _check_rows(rows: Sequence[int], records: int | None) -> None:
    if records is not None:
        raise EvaluationError("records and rows are both given; one says which records are taken")
    for row in rows:
        if not is_integer(row) or row < 0:
            raise EvaluationError(
                f"rows holds {shown(row)}; pass places in the data, from 0, such as range(100, 200)"
            )
    if not rows or len(set(rows)) < len(rows):
        raise EvaluationError("rows is empty or names a row twice; pass each row once")
