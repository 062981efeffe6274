"""`backward-lens show`."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backward_lens_tl.choices import JACOBIAN_LENS, Lens, Size
from backward_lens_tl.cli.options import Command
from backward_lens_tl.errors import BackwardLensWarning, InputError
from backward_lens_tl.sweeps.config import SweepConfig

if TYPE_CHECKING:
    from backward_lens_tl.result import BackwardLensResult

_LENSES: tuple[Lens, ...] = ("logit_lens", "normalized")


@dataclass(frozen=True, kw_only=True)
class ShowCommand(Command):
    """The layers x tokens table of one prompt.

    Attributes:
        prompt: The text, such as "Lionel Messi plays for".
        chat: Instead of a prompt: a JSON file with a list of chat messages, each with role and
            content.
        target: What the model should predict next, such as " Paris"; by default its own answer.
        html: A file to write the table to as a page; it has the default lenses too.
        positions: Tokens of the prompt, negative ones from the end; all by default.
        shade_by: What colours in the terminal show: the norm of delta_i, or write_norm, that of
            x_i times that of delta_i; a page has both.
    """

    SETTINGS = SweepConfig
    NO_OPTIONS = (
        "position_columns", "gradient_columns", "keep_factors",
        "prompts", "seed", "shard_size", "memory",
    )  # fmt: skip

    prompt: str | None = None
    chat: str | None = None
    target: str | None = None
    html: str | None = None
    positions: Sequence[int] | None = None
    shade_by: Size = "norm"

    def run(self) -> None:
        """Print the table."""
        with quiet():
            result = self._result(SweepConfig(**self.settings))
        if self.html is not None:
            result.save_html(self.html)  # first: a reader such as `head` may close the pipe below
        from rich.console import Console

        from backward_lens_tl.views.terminal import TerminalTable

        console = Console()
        console.print(_heading(result), markup=False, highlight=False)
        console.print(TerminalTable(result, shade_by=self.shade_by))
        console.print(_explanation(result, self.shade_by), markup=False, highlight=False)
        if self.html is not None:
            console.print(f"page: {self.html}", markup=False, highlight=False, soft_wrap=True)

    def _result(self, config: SweepConfig) -> BackwardLensResult:
        from backward_lens_tl.lens import backward_lens
        from backward_lens_tl.models.loading import load_model

        return backward_lens(
            load_model(self.model, self.kind),
            self._prompts(),
            self.target,
            positions=self.positions,
            multi_token=config.multi_token,
            **config.for_lens() | {"projection": _lenses(config)},
        )

    def _prompts(self) -> Any:
        """The text, or the messages of a chat."""
        if (self.prompt is None) == (self.chat is None):
            raise InputError("pass either a prompt, as in --prompt 'Messi plays for', or a --chat")
        if self.chat is None:
            return self.prompt
        try:
            messages = json.loads(Path(self.chat).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"chat is {self.chat!r}, which cannot be read: {error}") from error
        if not isinstance(messages, list) or not messages:
            raise InputError(
                f"{self.chat!r} holds {type(messages).__name__}; write a list of messages such as "
                '[{"role": "user", "content": "Hello"}]'
            )
        return messages


def _lenses(config: SweepConfig) -> tuple[Any, ...]:
    """The lenses of the page. The terminal has the first, a Jacobian Lens if there is one."""
    asked = sorted(config.for_lens()["projection"], key=lambda lens: isinstance(lens, str))
    return tuple(dict.fromkeys((*asked, *_LENSES)))


def _heading(result: BackwardLensResult) -> str:
    """The question, the model's own answer, and what is differentiated."""
    from backward_lens_tl.views.text import asked, number, prediction_text

    target = result.target()
    arrow = "" if target is None else f" → {target!r}"
    said = prediction_text(result.prediction(), has_position_targets=False, quoted=repr)
    loss = number(float(result.capture.loss[0]))
    return (
        f"{asked(result.capture, 0, repr)}{arrow}\n{said}\n"
        f"{result.capture.objective}: loss {loss} "
        f"({result.projection}, {result.direction}, {result.capture.model_name})\n"
    )


_SHADES = {
    "norm": "the norm of delta_i, how strongly the loss acts there (--shade-by write_norm: the "
    "size of what is written there)",
    "write_norm": "||x_i|| ||delta_i||, the size of the term that is written there",
}


def _explanation(result: BackwardLensResult, shade_by: Size) -> str:
    """How to read the table, and where the target leads."""
    from backward_lens_tl.views.text import leading_layers, lens_name

    read = (
        "A cell holds the token with the highest score at one layer and token of the prompt; its "
        f"colour is {_SHADES[shade_by]}. ★: the target leads. ·: adds nothing."
    )
    if "W_out" not in result.matrices:
        return read
    final = int(result.positions.max())
    leading = {
        lens: leading_layers(
            [result.under(lens).cell("W_out", layer, final) for layer in result.layers]
        )
        for lens in result.projections
    }
    first = result.cell("W_out", result.layers[0], final)
    where = f"W_out at {first.token!r} (position {first.position})"
    if result.direction == "gradient":
        return f"{read}\n{where} is the raw gradient, which gradient descent subtracts."
    carried = "".join(
        f"; under the {lens_name(lens)}, in {layers}"
        for lens, layers in leading.items()
        if lens.startswith(JACOBIAN_LENS)
    )
    return (
        f"{read}\n{where}, what the update adds: the target {first.target!r} leads in "
        f"{leading['logit_lens']}, and under the normalized lens in {leading['normalized']}"
        f"{carried}."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, warnings and prints off the command's output."""
    from backward_lens_tl.models.loading import without_progress_bars

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as found, redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", BackwardLensWarning)
            with without_progress_bars():
                yield
        for each in found:
            print(f"backward-lens: warning: {each.message}", file=sys.stderr)
    finally:
        logging.disable(disabled)
