"""The figure of a watched training run: what each layer's gradient and change are, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from backward_lens_tl._checks import check_choice, listed, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.views.colors import DIVERGING, SEQUENTIAL, Colors
from backward_lens_tl.views.figures.charts import Axis, Heatmap
from backward_lens_tl.views.figures.drawing import (
    Backend,
    Scale,
    check_matrix,
    draw,
    is_log,
    token_label,
    token_text,
)
from backward_lens_tl.views.text import counted
from backward_lens_tl.views.training.columns import MISSING, Column, recorded_columns
from backward_lens_tl.views.training.recorded import Recorded, checked_record

if TYPE_CHECKING:
    import pandas as pd

RunQuantity = Literal[
    "norm", "share", "reference_cosine", "change_norm", "change_cosine", "change_outside"
]
"""A number of each layer and watched step."""

_MOST_STEPS = 200
"""More steps would be narrower than four pixels, and make a page of several MB."""

_SHOWN_TOKENS = 2


class _Panel(NamedTuple):
    """A chart.

    Attributes:
        title: Its title.
        unit: Title of its colour bar.
        colors: From the numbers and the unit to colours; `None` for norms.
    """

    title: str
    unit: str
    colors: Callable[[str], Colors] | None = None


def _cosines(unit: str) -> Colors:
    return Colors(-1.0, 1.0, DIVERGING, unit)


def _shares(unit: str) -> Colors:
    return Colors(0.0, 1.0, SEQUENTIAL, unit)


_PANELS: dict[RunQuantity, _Panel] = {
    "norm": _Panel("Norm of the gradient", "norm of the gradient"),
    "share": _Panel("Share of the gradient's main direction", "share of squared norm", _shares),
    "reference_cosine": _Panel(
        "Cosine of the gradient and that of the reference prompt",
        "cosine to the reference",
        _cosines,
    ),
    "change_norm": _Panel("Norm of the optimizer's change", "norm of the change"),
    "change_cosine": _Panel(
        "Cosine of the optimizer's change and minus the gradient", "cosine to −gradient", _cosines
    ),
    "change_outside": _Panel(
        "Share of the change outside of the gradient", "share outside", _shares
    ),
}


def training_run(
    table: pd.DataFrame,
    matrix: str = "W_out",
    quantities: RunQuantity | Sequence[RunQuantity] | None = None,
    *,
    process: int = 0,
    scale: Scale = "log",
    backend: Backend = "plotly",
) -> Any:
    """A watched training run by layer and step: gradients, and the optimizer's changes.

    Args:
        table: What `TrainingRecord.to_dataframe` returned, or some of its rows; also of a run that
            is not finished.
        matrix: Name of the matrix.
        quantities: What is shown, in this order; by default all that was recorded of: `"norm"` of
            the gradient; `"share"` of its main direction in its squared norm;
            `"reference_cosine"`, its cosine to the gradient of the reference prompt;
            `"change_norm"` of the optimizer's change; `"change_cosine"`, the cosine of the change
            and minus the gradient; `"change_outside"`, the share of the squared norm of the change
            outside of the gradient's rows and columns.
        process: Which process of the run.
        scale: Of norms: `"log"` for at most three decades, or `"linear"`.
        backend: `"plotly"` or `"matplotlib"`.

    Returns:
        A heatmap per quantity, with the last layer on top and a column per watched step, of at
        most 200 that are spread evenly; blank where nothing was recorded. Layers are labelled with
        the top tokens of their gradient's main direction in the last step. The hover text has all
        numbers and tokens.

    Raises:
        InputError: If it is not such a table or has no rows, the matrix, process, quantity, scale
            or backend does not exist, or a quantity was not recorded.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> record = blt.training.TrainingRecord(tempfile.mkdtemp())
        >>> with blt.training.watch(model, "W_out") as watched:
        ...     model(model.to_tokens("Lionel Messi plays for"), return_type="loss").backward()
        ...     rows = record.add(watched.step())
        >>> figure = blt.figures.training_run(record.to_dataframe())
        >>> [note.text for note in figure.layout.annotations]
        ['Norm of the gradient', "Share of the gradient's main direction"]
    """
    checked_record(table)
    check_matrix(matrix, table)
    run = _Run.of(_of_process(table[table["matrix"] == matrix], process))
    charts = [run.chart(quantity, is_log(scale)) for quantity in _chosen(quantities, run)]
    title = f"{matrix}: {counted(run.n_steps, 'watched step')}"
    if len(run.steps) < run.n_steps:
        title += f", {len(run.steps)} of them shown"
    return draw(backend, title, *charts, is_stacked=True)


@dataclass(frozen=True)
class _Run:
    """One matrix in one process.

    Attributes:
        cells: By layer and step.
        n_steps: Number of watched steps.
    """

    cells: Mapping[tuple[int, int], Recorded]
    n_steps: int

    @classmethod
    def of(cls, table: pd.DataFrame) -> _Run:
        rows = map(Recorded.of, table.to_dict("records"))
        return cls({(row.layer, row.step): row for row in rows}, table["step"].nunique())

    @cached_property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.cells})

    @cached_property
    def steps(self) -> list[int]:
        return _thinned(sorted({step for _, step in self.cells}))

    @cached_property
    def columns(self) -> list[Column]:
        return recorded_columns(list(self.cells.values()))

    @property
    def quantities(self) -> list[RunQuantity]:
        """What was recorded."""
        names = {column.name for column in self.columns}
        return [quantity for quantity in _PANELS if quantity in names]

    def chart(self, quantity: RunQuantity, is_log: bool) -> Heatmap:
        panel = _PANELS[quantity]
        values = tuple(
            tuple(
                getattr(self.cells[layer, step], quantity)
                if (layer, step) in self.cells
                else math.nan
                for step in self.steps
            )
            for layer in self.layers
        )
        colors = (
            Colors.of_norms(chain.from_iterable(values), panel.unit, is_log)
            if panel.colors is None
            else panel.colors(panel.unit)
        )
        across = Axis("optimizer step", tuple(map(str, self.steps)))
        return Heatmap(values, self._hover, across, self._down, colors, panel.title)

    @cached_property
    def _hover(self) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(self._described(layer, step) for step in self.steps) for layer in self.layers
        )

    @cached_property
    def _down(self) -> Axis:
        """The layers, and what their main directions are about in the last step."""
        last = (self.cells.get((layer, self.steps[-1])) for layer in self.layers)
        tokens = [row.top[:_SHOWN_TOKENS] if row else () for row in last]
        labels = (
            " ".join([str(layer), *map(token_label, own)])
            for layer, own in zip(self.layers, tokens, strict=True)
        )
        title = "layer: tokens of the last step" if any(tokens) else "layer"
        return Axis(title, tuple(labels))

    def _described(self, layer: int, step: int) -> str:
        row = self.cells.get((layer, step))
        if row is None:
            return ""
        lines = [f"step {step}, {row.matrix} of layer {layer}"]
        for column in self.columns:
            text = column.number(row) or " ".join(map(token_text, column.tokens(row)))
            lines.append(f"{column.group}, {column.head}: {text or MISSING}")
        return "\n".join(lines)


def _chosen(
    quantities: RunQuantity | Sequence[RunQuantity] | None, run: _Run
) -> Sequence[RunQuantity]:
    if quantities is None:
        return run.quantities
    chosen = listed(quantities)
    if not chosen:
        raise InputError("quantities is empty; omit it to show all of them")
    for quantity in chosen:
        check_choice("quantities", quantity, get_args(RunQuantity))
        if quantity not in run.quantities:
            there = ", ".join(map(repr, run.quantities))
            raise InputError(f"{quantity!r} was not recorded; this record has {there}")
    return chosen


def _of_process(table: pd.DataFrame, process: int) -> pd.DataFrame:
    own = table[table["process"] == process]
    if own.empty:
        there = ", ".join(map(str, sorted(table["process"].unique().tolist())))
        raise InputError(f"process {shown(process)} has no rows; this table has {there}")
    return own


def _thinned(steps: Sequence[int]) -> list[int]:
    """At most this many steps, evenly spread, with the first and the last one."""
    if len(steps) <= _MOST_STEPS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(last * place / (_MOST_STEPS - 1))] for place in range(_MOST_STEPS)]
