"""`backward-lens sweep`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backward_lens_tl.cli.options import DataCommand
from backward_lens_tl.errors import SweepError
from backward_lens_tl.sweeps.config import SweepConfig

if TYPE_CHECKING:
    from backward_lens_tl.sweeps.run import Sweep


@dataclass(frozen=True, kw_only=True)
class SweepCommand(DataCommand):
    """The lens over a data set, as Parquet.

    Attributes:
        config: A JSON file of settings, or another sweep's run.json; options override it.
        field: Columns with other names, as NAME=COLUMN, such as prompt=question target=new.
        n_devices: GPUs that TransformerLens spreads the layers of a large model over.
        budget: Bytes that a shard may take in addition to the model; no limit by default.
    """

    SETTINGS = SweepConfig
    NO_OPTIONS = ("memory",)

    config: str | None = None
    field: Sequence[str] = ()
    n_devices: int = 1
    budget: int | None = None

    def run(self) -> None:
        """Run the sweep and print how many prompts were analysed."""
        from backward_lens_tl.capture.memory import Memory
        from backward_lens_tl.data.readers import read_records
        from backward_lens_tl.models.loading import load_model, without_progress_bars
        from backward_lens_tl.runs.distributed import own_device, this_process
        from backward_lens_tl.sweeps.run import sweep

        base = SweepConfig() if self.config is None else SweepConfig.load(self.config)
        config = replace(base, **self.settings)
        if self.budget is not None:
            memory = replace(base.memory or Memory(), budget=self.budget)
            config = replace(config, memory=memory)
        records = read_records(self.data, fields=_fields(self.field), split=self.split)
        state = this_process()
        device = self.device or own_device(state)
        with without_progress_bars() if self.quiet else nullcontext():
            model = load_model(self.model, self.kind, device=device, n_devices=self.n_devices)
        found = sweep(model, records, self.out, config, progress=not self.quiet)
        if state.is_main_process:
            sys.stdout.write(f"{_summary(found)}\n")


def _summary(found: Sweep) -> str:
    """How many prompts were analysed, and why others were not."""
    prompts, rejects = found.prompts(), found.rejects()
    lines = [f"{len(prompts)} prompts analysed, {len(rejects)} rejected: {found.folder}"]
    for reason, count in rejects["reason"].value_counts().items():
        first = rejects[rejects["reason"] == reason].iloc[0]
        lines.append(
            f"  {count} rejected for their {reason}, such as row {first['prompt']}: "
            f"{first['problem']}"
        )
    return "\n".join(lines)


def _fields(pairs: Iterable[str]) -> dict[str, str] | None:
    named = [pair.partition("=") for pair in pairs]
    for name, sign, column in named:
        if not (name and sign and column):
            raise SweepError(f"--field {name}{sign}{column} names no column; write prompt=question")
    return {name: column for name, _, column in named} or None
