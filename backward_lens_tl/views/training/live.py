"""A table that follows a training run in a notebook, in a terminal, or as lines of a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from tqdm import tqdm

from backward_lens_tl._checks import check_kind, checked_count
from backward_lens_tl.errors import first_line, warn
from backward_lens_tl.training import StepGradient, TrainingRecord
from backward_lens_tl.views.training.step_table import StepTable


class _Display(Protocol):
    def show(self, table: StepTable) -> None: ...

    def close(self) -> None: ...


class LiveTable:
    """Records the watched steps of a training run and shows each of them; see `live_table`.

    Args:
        record: The record.
        display: Where tables are shown.
        rows: How many matrices a table has at most.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> record = blt.training.TrainingRecord(tempfile.mkdtemp())
        >>> with blt.live_table(record) as table:
        ...     table
        LiveTable(12 rows)
    """

    def __init__(self, record: TrainingRecord, display: _Display, rows: int) -> None:
        self._record, self._rows = record, rows
        self._display: _Display | None = display

    def add(self, step: StepGradient) -> None:
        """Record a step, then show it.

        If it cannot be shown, there is a warning, and later steps are only recorded. With several
        processes, only the first one shows its steps.

        Args:
            step: What `TrainingWatch.step` returned.

        Raises:
            InputError: If the record cannot take it.

        Examples:
            >>> record = blt.training.TrainingRecord(folder / "run")
            >>> with (  # doctest: +ELLIPSIS
            ...     blt.training.watch(model, "W_out", layers=6) as watched,
            ...     blt.live_table(record) as table,
            ... ):
            ...     model(model.to_tokens("Messi plays for"), return_type="loss").backward()
            ...     table.add(watched.step())
            step 1: W_out of layer 6: norm ..., share ... %, top tokens ..., bottom tokens ...
            >>> model.zero_grad()
        """
        rows = self._record.add(step)
        if self._display is not None and (rows["process"] == 0).all():
            self._try(lambda display: display.show(StepTable.of(rows, self._rows)))

    def _close(self) -> None:
        self._try(lambda display: display.close())

    def _try(self, action: Callable[[_Display], None]) -> None:
        """Act on the display; training must not end because it cannot be seen."""
        if self._display is None:
            return
        try:
            action(self._display)
        except Exception as error:  # whatever a terminal, a pipe or a notebook may raise
            with suppress(Exception):
                self._display.close()
            self._display = None
            warn(
                f"the live table stopped ({first_line(error)}); training continues and is recorded"
            )

    def __repr__(self) -> str:
        return f"LiveTable({self._rows} rows)"


@contextmanager
def live_table(record: TrainingRecord, *, rows: int = 12) -> Iterator[LiveTable]:
    """Record a training run, and show each watched step in a table that is updated in place.

    In a notebook, it is an output of the cell; in a terminal, it stays below what the training loop
    prints. If the standard output is not a terminal, such as in a log file, there is one line per
    watched step instead, with the largest gradient, and without escape codes.

    Args:
        record: Where the steps are recorded. A step is recorded before it is shown.
        rows: How many matrices are shown, those with the largest norms; in a terminal, as many of
            them as fit.

    Yields:
        The table, whose `add` replaces that of the record, also as the function of a
        `BackwardLensCallback`.

    Raises:
        InputError: If `record` is not a record, or `rows` is not positive.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> tokens = model.to_tokens("Lionel Messi plays for Paris")
        >>> record = blt.training.TrainingRecord(tempfile.mkdtemp())
        >>> with (  # doctest: +ELLIPSIS
        ...     blt.training.watch(model, "W_out", every=10) as watched,
        ...     blt.live_table(record) as table,
        ... ):
        ...     for _ in range(11):
        ...         model(tokens, return_type="loss").backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         if (step := watched.step()) is not None:
        ...             table.add(step)
        step 1: W_out of layer ... (largest of 8): norm ..., share ... %, top tokens ...
        step 11: W_out of layer ... (largest of 8): norm ..., share ... %, top tokens ...
    """
    check_kind("record", record, TrainingRecord, "blt.training.TrainingRecord(folder)")
    table = LiveTable(record, _display(), checked_count("rows", rows))
    try:
        yield table
    finally:
        table._close()


class _Notebook:
    """An output of a notebook's cell."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, table: StepTable) -> None:
        if self._handle is None:
            from IPython.display import display

            self._handle = display(table, display_id=True)
        else:
            self._handle.update(table)

    def close(self) -> None:
        """The last table stays."""


class _Console(Console):
    """A console whose broken pipe does not end the process."""

    def on_broken_pipe(self) -> None:
        raise


class _Live(Live):
    """A live display that is not drawn once more when it stops.

    The line of a progress bar that ended may be below it, and then it would be drawn a line too
    low.
    """

    def refresh(self) -> None:
        if self.is_started:
            super().refresh()


class _Terminal:
    """The last lines of a terminal."""

    def __init__(self, console: Console) -> None:
        # Progress bars write to the standard error, in place, so that is not redirected: they use
        # the empty line below the table.
        self._live = _Live(
            console=console, auto_refresh=False, redirect_stderr=False, vertical_overflow="crop"
        )

    def show(self, table: StepTable) -> None:
        with tqdm.external_write_mode():  # clears progress bars, and draws them again
            self._live.start()  # only now, because it hides the cursor
            self._live.update(Group(table, Text()), refresh=True)

    def close(self) -> None:
        """The last table stays, and the cursor is back."""
        self._live.stop()


class _Lines:
    """Lines of a log."""

    def show(self, table: StepTable) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = repr(table).encode(encoding, "backslashreplace").decode(encoding)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing is open."""


def _display() -> _Display:
    console = _Console()
    if console.is_jupyter:
        return _Notebook()
    # Not `console.is_terminal`, which environment variables can override.
    is_terminal = getattr(sys.stdout, "isatty", lambda: False)() and console.is_interactive
    if is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf"):
        return _Terminal(console)
    return _Lines()
