"""The table of one watched step: for a notebook, for a terminal, and as one line of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from backward_lens_tl.views.colors import DARK_SHADES, LIGHT_SHADES, NormScale
from backward_lens_tl.views.table import stylesheet
from backward_lens_tl.views.table.markup import isolated
from backward_lens_tl.views.text import counted, display_order, visible
from backward_lens_tl.views.training.columns import MISSING, Column, recorded_columns
from backward_lens_tl.views.training.recorded import Recorded, checked_record

if TYPE_CHECKING:
    import pandas as pd

_SURROUNDINGS = 6
"""Lines of a terminal that are not rows: title, two lines of header, a note, and room below."""

_TOKENS, _GAP = 13, 2
"""The least width of tokens in a terminal, and the width between two columns."""

_LEAST_NEEDED = ("bottom", "change_outside", "change_tokens")
"""Columns that a narrow terminal leaves out, in this order."""


@dataclass(frozen=True, repr=False)
class StepTable:
    """The matrices of one watched step, with the largest norms if there are too many.

    A notebook and a console of rich can show it; `repr` is one line.

    Attributes:
        step: The optimizer step.
        positions: Number of positions with a gradient.
        rows: All matrices.
        limit: How many are shown at most.
    """

    step: int
    positions: int
    rows: tuple[Recorded, ...]
    limit: int

    @classmethod
    def of(cls, table: pd.DataFrame, limit: int) -> StepTable:
        """The table of a step.

        Args:
            table: The rows of the step in a training record.
            limit: How many are shown at most.

        Returns:
            The table.

        Raises:
            InputError: If it is not such a table, or has no rows.
        """
        records = checked_record(table).to_dict("records")
        step, positions = int(records[0]["step"]), int(records[0]["positions"])
        return cls(step, positions, tuple(map(Recorded.of, records)), limit)

    def __repr__(self) -> str:
        """Return the matrix with the largest norm, in one line without control characters."""
        (row,) = self._shown(1)
        cells = (
            f"{'change ' * (column.group == 'change')}{column.head} {_plain(column, row)}"
            for column in self._columns
        )
        many = f" (largest of {len(self.rows)})" if len(self.rows) > 1 else ""
        return f"step {self.step}: {row.matrix} of layer {row.layer}{many}: {', '.join(cells)}"

    def _repr_html_(self) -> str:
        shown = self._shown(self.limit)
        scale = NormScale.spanning(row.norm for row in self.rows)
        groups = "".join(
            f'<th colspan="{len(list(own))}" scope="colgroup">{_GROUPS[group]}</th>'
            for group, own in groupby(self._columns, lambda column: column.group)
        )
        heads = "".join(
            f'<th scope="col" class="{_kind(column)}" title="{escape(column.meaning)}">'
            f"{column.head}</th>"
            for column in self._columns
        )
        body = "\n".join(
            f'<tr><th scope="row">{row.layer}</th><td>{row.matrix}</td>'
            f"{''.join(_html_cell(column, row, scale) for column in self._columns)}</tr>"
            for row in shown
        )
        return (
            f'<div class="blt"><style>{stylesheet()}{_STYLE}</style>'
            f"<p><strong>Step {self.step}</strong>: {self._about(len(shown))}</p>"
            f'<div class="wide"><table class="watched"><thead><tr><th colspan="2"></th>{groups}'
            f'</tr><tr><th scope="col">layer</th><th scope="col">matrix</th>{heads}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div></div>"
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Render for a console; rich calls this."""
        shown = self._shown(max(1, options.size.height - _SURROUNDINGS))
        columns = _fitting(self._columns, shown, options.max_width)
        scale = NormScale.spanning(row.norm for row in self.rows)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column("\nlayer", justify="right", style="bold", no_wrap=True)
        table.add_column("\nmatrix", no_wrap=True)
        for index, column in enumerate(columns):
            is_first = index == 0 or columns[index - 1].group != column.group
            table.add_column(
                Text(f"{column.group if is_first else ''}\n{column.head}", no_wrap=True),
                justify="left" if column.write is None else "right",
                # Tokens give way where there is no room, and are cut rather than wrapped.
                no_wrap=column.write is not None,
            )
        for row in shown:
            cells = (_rich_cell(column, row, scale) for column in columns)
            table.add_row(str(row.layer), row.matrix, *cells)
        yield _line((f"Step {self.step}", "bold"), f": {self._about(len(shown))}")
        yield table
        left_out = [column for column in self._columns if column not in columns]
        if left_out:
            names = ", ".join(f"{column.head} ({column.group})" for column in left_out)
            yield _line((f"No room for {names}", "dim"))

    @cached_property
    def _columns(self) -> list[Column]:
        return recorded_columns(self.rows)

    def _shown(self, limit: int) -> list[Recorded]:
        """The largest gradients, in the order of the other views: the last layer on top."""
        order = display_order({row.matrix for row in self.rows})
        largest = sorted(self.rows, key=_size, reverse=True)[: min(limit, self.limit)]
        return sorted(largest, key=lambda row: (order.index(row.matrix), -row.layer))

    def _about(self, n_shown: int) -> str:
        about = counted(self.positions, "position")
        if n_shown < len(self.rows):
            about += f"; {n_shown} of {len(self.rows)} matrices, with the largest norms"
        return about


_GROUPS = {"gradient": "gradient", "change": "the optimizer's change"}

_STYLE = """
.blt .wide { overflow-x: auto; }
.blt .wide .watched { border: 0; border-collapse: collapse; color: inherit; font-size: 13px;
  margin: .3rem 0; table-layout: auto; width: auto; }
.blt .wide .watched tr, .blt .wide .watched tr:hover { background: none; }
.blt .wide .watched th, .blt .wide .watched td { border: 0; border-top: 1px solid var(--line);
  font-weight: 400; line-height: 1.45; max-width: none; padding: .15rem .9rem .15rem 0;
  text-align: left; vertical-align: baseline; white-space: nowrap; }
.blt .wide .watched thead th { border: 0; color: var(--quiet); font-size: 12px; }
.blt .wide .watched thead th[scope=colgroup] { color: inherit; }
.blt .wide .watched tbody th, .blt .wide .watched .number {
  font-variant-numeric: tabular-nums; text-align: right; }
.blt .wide .watched .number { padding: .15rem .5rem; }
.blt .wide .watched .tokens { padding-left: .5rem; }
.blt .watched bdi { background: var(--raised); border-radius: 3px; display: inline-block;
  margin: 0 .3rem 0 0; padding: 0 .25rem; white-space: pre; }
"""


def _size(row: Recorded) -> float:
    """Norms that are not finite come first, because they need attention."""
    return row.norm if math.isfinite(row.norm) else math.inf


def _plain(column: Column, row: Recorded) -> str:
    return column.number(row) or " ".join(map(visible, column.tokens(row))) or MISSING


def _html_cell(column: Column, row: Recorded, scale: NormScale) -> str:
    if column.write is None:
        text = "".join(map(isolated, column.tokens(row))) or MISSING
    else:
        text = _plain(column, row)
    shade = f' style="{_shade(scale.step(row.norm))}"' if column.name == "norm" else ""
    return f'<td class="{_kind(column)}"{shade}>{text}</td>'


def _kind(column: Column) -> str:
    return "tokens" if column.write is None else "number"


def _shade(step: int) -> str:
    light, dark = LIGHT_SHADES[step], DARK_SHADES[step]
    # Browsers without light-dark() use the light shades.
    return (
        f"background:{light.background};color:{light.text};"
        f"background:light-dark({light.background},{dark.background});"
        f"color:light-dark({light.text},{dark.text})"
    )


def _rich_cell(column: Column, row: Recorded, scale: NormScale) -> Text:
    """A cell as literal text, in which rich finds no markup."""
    style = ""
    if column.name == "norm":
        shade = DARK_SHADES[scale.step(row.norm)]
        style = f"{shade.text} on {shade.background}"
    return Text(_plain(column, row), style=style, no_wrap=True, overflow="ellipsis")


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _fitting(columns: Sequence[Column], rows: Sequence[Recorded], width: int) -> list[Column]:
    """The columns that a terminal of this width has room for."""
    kept = list(columns)
    widths = {column: _width(column, rows) + _GAP for column in columns}
    room = width - len("layer") - len("matrix") - 2 * _GAP
    for name in _LEAST_NEEDED:
        if sum(widths[each] for each in kept) > room:
            kept = [each for each in kept if each.name != name]
    return kept


def _width(column: Column, rows: Sequence[Recorded]) -> int:
    if column.write is None:
        return _TOKENS
    return max(len(column.head), *(len(column.number(row)) for row in rows))
