"""`backward-lens show`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backward_lens_tl.choices import Lens
from backward_lens_tl.cli.options import Command
from backward_lens_tl.sweeps.config import SweepConfig

if TYPE_CHECKING:
    from backward_lens_tl.readout.cells import Cell
    from backward_lens_tl.result import BackwardLensResult

_LENSES: tuple[Lens, ...] = ("logit_lens", "normalized")


@dataclass(frozen=True, kw_only=True)
class ShowCommand(Command):
    """The layers x tokens table of one prompt.

    Attributes:
        prompt: The text, such as "Lionel Messi plays for".
        target: What the model should predict next, such as " Paris"; by default its own answer.
        html: A file to write the table to as a page; it shows both projections.
        positions: Tokens of the prompt, negative ones from the end; all by default.
    """

    SETTINGS = SweepConfig
    NO_OPTIONS = (
        "position_columns", "gradient_columns", "prompts", "seed", "shard_size", "memory"
    )  # fmt: skip

    prompt: str
    target: str | None = None
    html: str | None = None
    positions: Sequence[int] | None = None

    def run(self) -> None:
        """Print the table."""
        with _quiet():
            config = SweepConfig(**self.settings)
            both = tuple(dict.fromkeys((*config.projection, *_LENSES)))
            result = self._result(replace(config, projection=both))
        if self.html is not None:
            result.save_html(self.html)  # first: a reader such as `head` may close the pipe below
        from rich.console import Console

        from backward_lens_tl.views.terminal import TerminalTable

        console = Console()
        console.print(_heading(result), markup=False, highlight=False)
        console.print(TerminalTable(result))
        console.print(_explanation(result), markup=False, highlight=False)
        if self.html is not None:
            console.print(f"page: {self.html}", markup=False, highlight=False, soft_wrap=True)

    def _result(self, config: SweepConfig) -> BackwardLensResult:
        from backward_lens_tl.lens import backward_lens
        from backward_lens_tl.models.loading import load_model

        return backward_lens(
            load_model(self.model, self.kind),
            self.prompt,
            self.target,
            positions=self.positions,
            multi_token=config.multi_token,
            **config.for_lens(),
        )


def _heading(result: BackwardLensResult) -> str:
    from backward_lens_tl.views.text import number

    prompt = result.capture.prompt(0)
    loss = number(float(result.capture.loss[0]))
    return (
        f"{prompt!r}, target {result.target()!r}: loss {loss} "
        f"({result.projection}, {result.direction}, {result.capture.model_name})\n"
    )


def _explanation(result: BackwardLensResult) -> str:
    """How to read the table, and where the target leads."""
    read = (
        "A cell holds the token with the highest score at one layer and token of the prompt; its "
        "colour is the norm of delta_i, how strongly it writes. ★: the target leads. "
        "·: adds nothing."
    )
    if "W_out" not in result.matrices:
        return read
    final = int(result.positions.max())
    raw, direction = (
        [result.under(lens).cell("W_out", layer, final) for layer in result.layers]
        for lens in _LENSES
    )
    first = raw[0]
    where = f"W_out at {first.token!r} (position {first.position})"
    if result.direction == "gradient":
        return f"{read}\n{where} is the raw gradient, which gradient descent subtracts."
    return (
        f"{read}\n{where}, what the update adds: the target {result.target()!r} leads in "
        f"{_leads(raw)} of {len(raw)} layers, and under the normalized lens in "
        f"{_leads(direction)}."
    )


def _leads(cells: Sequence[Cell]) -> int:
    return sum(cell.target_leads for cell in cells)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, warnings and prints off the command's output."""
    from backward_lens_tl.models.loading import without_progress_bars

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with without_progress_bars():
                yield
    finally:
        logging.disable(disabled)
