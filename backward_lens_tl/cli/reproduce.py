"""`backward-lens reproduce`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from backward_lens_tl.cli.options import DataCommand


@dataclass(frozen=True, kw_only=True)
class ReproduceCommand(DataCommand):
    """The paper's experiments, with a report.

    Attributes:
        names: Experiments: fig1, fig3 ... fig24, table1 ... table7, or a group: gradients,
            explanations, editing, all.
        data: As in `backward-lens sweep`; by default the facts model's own records for that model,
            and CounterFact on the hub for others.
        out: The folder to write.
        device: Such as cuda; by default as load_model chooses.
        prompts: Number of prompts to draw from the data.
        seed: Seed for drawing them.
        prepend_bos: Whether prompts get a BOS token; by default they do not, as in the paper.
        jacobian: Files of Jacobian Lenses of the model, for early_layers and edits; the one fitted
            on most prompts is used, the others are compared with it. By default that of the facts
            model for that model.
        statistics: A file with one text per line, for the second moments that edits need; by
            default WikiText-103 on the hub.
        texts: A file with one text per line, for the perplexity of edited models; by default
            WikiText-2 on the hub.
    """

    names: Sequence[str]
    data: str | None = None
    out: str = "reproduced"
    prompts: int = 100
    seed: int = 0
    prepend_bos: bool | None = False
    jacobian: Sequence[str] = ()
    statistics: str | None = None
    texts: str | None = None

    def run(self) -> None:
        """Run the experiments, and print what they found."""
        from backward_lens_tl.data.readers import read_records
        from backward_lens_tl.models.loading import load_model, without_progress_bars
        from backward_lens_tl.reproduction import default_data, reproduce
        from backward_lens_tl.reproduction.experiments import select_experiments

        experiments = select_experiments(self.names)  # before a large model is loaded
        data = self.data or default_data(self.model, experiments)
        with without_progress_bars() if self.quiet else nullcontext():
            model = load_model(self.model, self.kind, device=self.device)
        found = reproduce(
            model,
            read_records(data, split=self.split),
            self.out,
            self.names,
            prompts=self.prompts,
            seed=self.seed,
            prepend_bos=self.prepend_bos,
            jacobian=self.jacobian,
            statistics=self.statistics,
            texts=self.texts,
            progress=not self.quiet,
        )
        for name, finding in found.items():
            sys.stdout.write(f"{name}: {finding.verdict}\n")
            for check in finding.checks:
                mark = "+" if check.holds else "-"
                exceptions = f" (but {check.exceptions})" if check.exceptions else ""
                sys.stdout.write(f"  {mark} {check.claim}: {check.found}{exceptions}\n")
            for note in () if finding.checks else finding.notes:
                sys.stdout.write(f"  {note}\n")
        sys.stdout.write(f"report: {Path(self.out) / 'report.html'}\n")
