"""Draw charts with plotly."""

from __future__ import annotations

import math
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from backward_lens_tl.views.colors import Colors
from backward_lens_tl.views.figures.charts import (
    ACCENT,
    BAND_OPACITY,
    BOUNDARY_WIDTH,
    FRAME,
    GRID,
    INK,
    MOST_SEAMS,
    Axis,
    Grid,
    Heatmap,
    Line,
    Lines,
    wrapped,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LEFT, _GAP, _TOP, _BOTTOM, _BAR, _LEGEND = 80, 90, 48, 60, 110, 190
_NO_TITLE, _PANEL_TITLE, _LINE = 12, 40, 22
_FONT, _SMALL_FONT = 12, 10
_SYMBOLS = {"triangle": "triangle-up"}

# plotly interprets some HTML in every text, and TeX between dollar signs if MathJax is loaded.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\n": "<br>"})


def draw(grid: Grid) -> go.Figure:
    """Draw charts as a plotly figure, without showing it."""
    import plotly.graph_objects as go

    above = _PANEL_TITLE * any(chart.title for chart in grid.charts)
    # Where each column starts, from the left, and each row, from the top.
    lefts, inner = _starts(grid.widths, _GAP)
    labels = max(
        chart.x.depth(size[0]) for chart, size in zip(grid.charts, grid.sizes, strict=True)
    )
    tops, height = _starts(grid.heights, _BOTTOM + labels + above)
    right = _BAR * grid.bar_columns + _LEGEND * grid.has_legend or 30
    full = _LEFT + inner + right
    title, subtitle = wrapped(grid.title, full // 9), wrapped(grid.subtitle, full // 7)
    lines = title.count("\n") + (1 + subtitle.count("\n") if subtitle else 0)
    top = (_TOP if title else _NO_TITLE) + _LINE * lines + above
    figure, ups = go.Figure(), []
    figure.update_layout(
        template="plotly_white",
        width=full,
        height=top + height + _BOTTOM,
        margin={"l": _LEFT, "r": right, "t": top, "b": _BOTTOM},
        title={"text": _text(title), "x": 0.01, "y": 1, "pad": {"t": 14}},
        title_yref="container",
        title_yanchor="top",
        title_subtitle_text=_text(subtitle),
        font={"color": INK, "size": _FONT},
        hoverlabel_align="left",
        legend={"x": 1, "xanchor": "left", "y": 1, "bgcolor": "rgba(0,0,0,0)"},
    )
    for index, (chart, (width, chart_height), (row, column)) in enumerate(
        zip(grid.charts, grid.sizes, grid.places, strict=True), start=1
    ):
        suffix, left = "" if index == 1 else str(index), lefts[column]
        across = left / inner, (left + width) / inner
        up = max(0.0, 1 - (tops[row] + chart_height) / height), 1 - tops[row] / height
        ups.append(up)
        figure.update_layout({f"xaxis{suffix}": _axis(chart.x, width, across, f"y{suffix}")})
        figure.update_layout({f"yaxis{suffix}": _axis(chart.y, chart_height, up, f"x{suffix}")})
        _add(figure, chart, grid, suffix)
        if chart.title:
            figure.add_annotation(
                text=_text(wrapped(chart.title, width // 6)),
                showarrow=False, font={"size": 12}, align="left",
                x=across[0], y=up[1], xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            )  # fmt: skip
    for index, colors in enumerate(grid.colors, start=1):
        own = [up for up, chart in zip(ups, grid.charts, strict=True) if chart.colors == colors]
        # The bar of stacked charts spans those that share it.
        span = (own[-1][0], own[0][1]) if grid.is_stacked else None
        figure.update_layout({_bar_name(index): _bar(colors, index, span)})
    return figure


def _starts(sizes: tuple[int, ...], gap: int) -> tuple[list[int], int]:
    """Start of each of several adjacent things, and their total size."""
    ends = list(accumulate(size + gap for size in sizes))
    return [end - gap - size for end, size in zip(ends, sizes, strict=True)], ends[-1] - gap


def _add(figure: go.Figure, chart: Heatmap | Lines, grid: Grid, suffix: str) -> None:
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    bar = _bar_name(grid.colors.index(chart.colors) + 1) if chart.colors else None
    if isinstance(chart, Heatmap):
        figure.add_heatmap(**_heatmap(chart), coloraxis=bar, **axes)
        _add_boundaries(figure, chart, suffix)
        return
    named = {trace.name for trace in figure.data}
    for line in chart.lines:
        known = _text(line.name) in named
        if line.band:
            figure.add_scatter(**_band(line), **axes)
        figure.add_scatter(**_line(line), showlegend=bar is None and not known, **axes)
        named.add(_text(line.name))
    if bar:  # a colour bar needs its own trace, since lines have none
        figure.add_scatter(
            x=[None], y=[None], marker={"color": [0], "coloraxis": bar},
            showlegend=False, hoverinfo="skip", **axes,
        )  # fmt: skip


def _add_boundaries(figure: go.Figure, chart: Heatmap, suffix: str) -> None:
    line = {"color": ACCENT, "width": BOUNDARY_WIDTH}
    if chart.x.boundary is not None:
        x, over = chart.x.boundary - 0.5, f"y{suffix} domain"
        figure.add_shape(
            type="line", x0=x, x1=x, y0=0, y1=1, xref=f"x{suffix}", yref=over, line=line
        )
    if chart.y.boundary is not None:
        y, over = chart.y.boundary - 0.5, f"x{suffix} domain"
        figure.add_shape(
            type="line", x0=0, x1=1, y0=y, y1=y, xref=over, yref=f"y{suffix}", line=line
        )


def _heatmap(chart: Heatmap) -> dict[str, Any]:
    is_log = chart.colors.is_log
    return {
        "z": [[_height(value, is_log) for value in values] for values in chart.values],
        "hovertext": [[_text(text) for text in texts] for texts in chart.hover],
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": _seam(len(chart.values[0])),
        "ygap": _seam(len(chart.values)),
    }


def _line(line: Line) -> dict[str, Any]:
    modes = ["lines"] * (line.dash is not None) + ["markers"] * (line.marker is not None)
    symbol = _SYMBOLS.get(line.marker or "", line.marker)
    return {
        "name": _text(line.name),
        "legendgroup": _text(line.name),
        "x": line.x,
        "y": line.y,
        "mode": "+".join(modes),
        "line": {"color": line.color, "dash": line.dash, "width": line.width},
        "marker": {"color": line.color, "symbol": symbol, "size": 6},
        "hovertext": [_text(text) for text in line.hover],
        "hoverinfo": "text" if line.hover else "skip",
    }


def _band(line: Line) -> dict[str, Any]:
    """A closed outline for each run of points without a gap; its line's legend entry toggles it."""
    points = list(zip(line.x, *(line.band or ()), strict=True))
    runs = [
        list(run)
        for has_gap, run in groupby(points, lambda point: any(map(math.isnan, point)))
        if not has_gap
    ]
    x: list[float | None] = []
    y: list[float | None] = []
    for run in runs:
        back = run[::-1]
        x += [place for place, _, _ in run + back] + [None]
        y += [low for _, low, _ in run] + [high for _, _, high in back] + [None]
    red, green, blue = bytes.fromhex(line.color[1:])
    return {
        "x": x,
        "y": y,
        "mode": "lines",
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},{BAND_OPACITY})",
        "line": {"width": 0},
        "legendgroup": _text(line.name),
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _axis(axis: Axis, room: int, domain: tuple[float, float], anchor: str) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "title": {"text": _text(axis.full_title(room))},
        "domain": domain,
        "anchor": anchor,
        "type": "log" if axis.is_log else "linear",
        "autorange": "reversed" if axis.is_reversed else True,
        "showline": True,
        "linecolor": FRAME,
        "mirror": True,
        "zeroline": False,
        "showgrid": not axis.labels,
        "gridcolor": GRID,
        "automargin": True,
    }
    if axis.is_log:
        drawn["tickformat"] = "~g"
    if axis.step:
        drawn |= {"tick0": 0, "dtick": axis.step}
    if axis.labels:
        ticks = axis.ticks(room)
        drawn |= {
            "tickmode": "array",
            "tickvals": [place for place, _ in ticks],
            "ticktext": [_text(label) for _, label in ticks],
            "tickangle": -axis.angle(room) if anchor.startswith("y") else 0,
            "tickfont_size": _SMALL_FONT if axis.is_dense(room) else _FONT,
        }
    return drawn


def _bar_name(index: int) -> str:
    return "coloraxis" if index == 1 else f"coloraxis{index}"


def _bar(colors: Colors, index: int, span: tuple[float, float] | None) -> dict[str, Any]:
    last = len(colors.stops) - 1
    bar: dict[str, Any] = {
        "title": {"text": _text(colors.title), "side": "right"},
        "thickness": 14,
        "outlinewidth": 0,
        "x": 1 if span else 1 + 0.12 * (index - 1),
        "xpad": 16,
    }
    if span:
        low, high = span
        bar |= {"y": (low + high) / 2, "len": high - low, "yanchor": "middle", "ypad": 0}
    if colors.ticks:
        bar |= {
            "tickvals": [_height(value, colors.is_log) for value in colors.ticks],
            "ticktext": [f"{value:g}" for value in colors.ticks],
        }
    return {
        "cmin": _height(colors.low, colors.is_log),
        "cmax": _height(colors.high, colors.is_log),
        "colorscale": [(place / last, color) for place, color in enumerate(colors.stops)],
        "colorbar": bar,
    }


def _height(value: float, is_log: bool) -> float:
    """A value on the colour scale: plotly has no logarithmic colours."""
    return math.log10(value) if is_log and value > 0 else math.nan if is_log else value


def _seam(cells: int) -> int:
    """Width of the line between cells; it would hide cells of one pixel."""
    return 1 if cells <= MOST_SEAMS else 0


def _text(text: str) -> str:
    return text.translate(_ESCAPES)
