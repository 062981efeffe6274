"""`backward-lens evaluate`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backward_lens_tl.cli.options import DataCommand
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from backward_lens_tl.evaluation.run import Evaluation

_RECORDS = 100


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(DataCommand):
    """Methods of editing on CounterFact, as Parquet.

    Attributes:
        methods: Presets, such as shift rome; all by default.
        records: Number of records to use, counted from the first; 100 by default.
        rows: Rows to use instead, as FIRST:END, such as 100:200.
        statistics: A file with one text per line, for the second moments of rome, memit and the
            whitened shift; by default WikiText-103 on the hub.
        jacobian: A Jacobian Lens of the model for shift_auto: its .pt file, such as fit-jacobian
            writes.
    """

    SETTINGS = EvaluationConfig

    methods: Sequence[str] = ("all",)
    records: int | None = None
    rows: str | None = None
    statistics: str | None = None
    jacobian: str | None = None

    def run(self) -> None:
        """Run the evaluation, and print its table."""
        from backward_lens_tl.data.readers import read_records
        from backward_lens_tl.evaluation.run import evaluate
        from backward_lens_tl.models.loading import load_model, without_progress_bars
        from backward_lens_tl.runs.distributed import own_device, this_process

        rows = None if self.rows is None else _rows(self.rows)
        records = self.records
        if rows is None and records is None:
            records = _RECORDS  # not all, so that methods have records left to learn from
        config = EvaluationConfig(records=records, rows=rows, **self.settings)
        data = read_records(self.data, split=self.split)
        state = this_process()
        with without_progress_bars() if self.quiet else nullcontext():
            model = load_model(self.model, self.kind, device=self.device or own_device(state))
        found = evaluate(
            model,
            data,
            self.out,
            self.methods,
            config,
            statistics=self.statistics,
            jacobian=self.jacobian,
            progress=not self.quiet,
        )
        if state.is_main_process:
            sys.stdout.write(f"{found.to_markdown()}\n\n{_said(found)}\n")


def _rows(text: str) -> range:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise EvaluationError(f"--rows {text} is not FIRST:END; write 100:200 for rows 100 to 199")
    return range(int(match[1]), int(match[2]))


def _said(found: Evaluation) -> str:
    rejects, edits = found.rejects(), found.edits()
    lines = [f"perplexity of {found.about['texts']['name']}; tables: {found.folder}"]
    lines += [
        f"  row {each.record} left out: {each.problem}" for each in rejects.head(3).itertuples()
    ]
    lines += [f"  ... and {len(rejects) - 3} more rows"] if len(rejects) > 3 else []
    failed = edits[edits["error"].notna()].drop_duplicates("method")
    lines += [
        f"  {each.method} failed, first at row {each.record}: {each.error}"
        for each in failed.itertuples()
    ]
    return "\n".join(lines)
