"""Draw charts with matplotlib, for a paper.

`pyplot` is not used: it would keep every figure, and change which of the caller's figures is
current.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from backward_lens_tl.errors import InputError
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
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

_PIXELS_PER_INCH = 100
_CHARACTERS_PER_INCH = 13  # of a title
_GAP, _BAR, _LEGEND, _AROUND = 0.9, 0.9, 1.9, 1.1
_FONT, _SMALL_FONT = 9, 7
_MANY_DECADES, _MANY_DECADES_ACROSS = 1e7, 1e3  # labels are wider than they are high
_DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "cross": "P", "x": "X"}


def draw(grid: Grid) -> Figure:
    """Draw charts as a matplotlib figure that pyplot does not manage.

    Args:
        grid: The charts.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as cause:
        raise InputError(
            "backend 'matplotlib' needs matplotlib, which is not installed: "
            '`pip install "backward-lens-tl[matplotlib]"`, or leave backend out for plotly'
        ) from cause
    # With TeX, a token such as `_` or `#` would raise an error.
    with matplotlib.rc_context({"text.usetex": False, "text.color": INK, "font.size": _FONT}):
        figure = _figure(grid)
    _choose_fonts(figure)
    return figure


def _figure(grid: Grid) -> Figure:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    widths = [width / _PIXELS_PER_INCH for width in grid.widths]
    heights = [height / _PIXELS_PER_INCH for height in grid.heights]
    right = _BAR * grid.bar_columns + _LEGEND * grid.has_legend
    figure = _figure_class()(
        figsize=(
            sum(widths) + _GAP * len(widths) + right,
            sum(heights) + _AROUND * len(heights),
        ),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    room = round(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    title = [wrapped(text, room) for text in (grid.title, grid.subtitle) if text]
    figure.suptitle(_text("\n".join(title)), x=0.01, ha="left", fontsize=11)
    cells = figure.add_gridspec(
        len(heights), len(widths), width_ratios=widths, height_ratios=heights
    )
    panels = [figure.add_subplot(cells[place]) for place in grid.places]
    for axes, chart, (width, height) in zip(panels, grid.charts, grid.sizes, strict=True):
        _set_axes(axes, chart, width, height)
        if isinstance(chart, Heatmap):
            _add_heatmap(axes, chart)
            _add_boundaries(axes, chart)
        else:
            for line in chart.lines:
                _add_line(axes, line)
        _set_log_ticks(axes.xaxis, chart.x, _MANY_DECADES_ACROSS)
        _set_log_ticks(axes.yaxis, chart.y, _MANY_DECADES)
    for colors in grid.colors:
        owners = [
            axes for axes, chart in zip(panels, grid.charts, strict=True) if chart.colors == colors
        ]
        _add_bar(figure, colors, owners)
    if grid.has_legend:
        _add_legend(panels, owner=panels[grid.columns - 1])
    return figure


@cache
def _figure_class() -> type[Figure]:
    """`Figure` as a notebook shows it; without pyplot, a notebook would only print its name."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return ShownFigure


def _set_axes(axes: Axes, chart: Heatmap | Lines, width: int, height: int) -> None:
    axes.set_title(_text(wrapped(chart.title, width // 6)), loc="left", fontsize=9)
    axes.tick_params(color=FRAME, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(FRAME)
    axes.set_axisbelow(True)
    axes.set_xscale("log" if chart.x.is_log else "linear")
    axes.set_yscale("log" if chart.y.is_log else "linear")
    _set_axis(axes.xaxis, chart.x, width, turns=True)
    _set_axis(axes.yaxis, chart.y, height, turns=False)


def _set_axis(drawn: XAxis | YAxis, axis: Axis, room: int, *, turns: bool) -> None:
    from matplotlib.ticker import MultipleLocator

    drawn.set_label_text(_text(axis.full_title(room)))
    drawn.set_inverted(axis.is_reversed)
    if axis.step:
        drawn.set_major_locator(MultipleLocator(axis.step))
    if not axis.labels:
        drawn.grid(True, color=GRID, linewidth=0.8)
        return
    ticks = axis.ticks(room)
    labels = [_text(label) for _, label in ticks]
    angle = axis.angle(room) if turns else 0
    size = _SMALL_FONT if axis.is_dense(room) else _FONT
    # A slanted label ends at its tick.
    ends: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if angle == 45 else {}
    drawn.set_ticks(
        [place for place, _ in ticks], labels=labels, rotation=angle, fontsize=size, **ends
    )


def _set_log_ticks(drawn: XAxis | YAxis, axis: Axis, many: float) -> None:
    """Ticks as plotly's: 1, 2 and 5 of each decade, or powers of ten if there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not axis.is_log:
        return
    low, high = sorted(drawn.get_view_interval())
    leads = (1, 2, 5) if high / low < many else (1,)
    drawn.set_major_locator(LogLocator(subs=leads))
    drawn.set_minor_locator(NullLocator())
    drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _add_heatmap(axes: Axes, chart: Heatmap) -> None:
    import numpy as np

    cmap, norm = _color_map(chart.colors)
    rows, columns = len(chart.values), len(chart.values[0])
    axes.pcolormesh(
        [place - 0.5 for place in range(columns + 1)],
        [place - 0.5 for place in range(rows + 1)],
        np.array(chart.values),
        cmap=cmap,
        norm=norm,
        edgecolors="white" if columns <= MOST_SEAMS else "none",
        linewidth=0.4 if columns <= MOST_SEAMS else 0,
        rasterized=columns > MOST_SEAMS,
    )


def _add_boundaries(axes: Axes, chart: Heatmap) -> None:
    if chart.x.boundary is not None:
        axes.axvline(chart.x.boundary - 0.5, color=ACCENT, linewidth=BOUNDARY_WIDTH)
    if chart.y.boundary is not None:
        axes.axhline(chart.y.boundary - 0.5, color=ACCENT, linewidth=BOUNDARY_WIDTH)


def _add_line(axes: Axes, line: Line) -> None:
    if line.band:
        axes.fill_between(line.x, *line.band, color=line.color, alpha=BAND_OPACITY, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        label=_text(line.name),
        color=line.color,
        linestyle=_DASHES.get(line.dash or "", "none"),
        marker=_MARKERS.get(line.marker or "", "none"),
        linewidth=line.width,
        markersize=4,
    )


def _add_bar(figure: Figure, colors: Colors, owners: list[Axes]) -> None:
    from matplotlib.cm import ScalarMappable

    cmap, norm = _color_map(colors)
    shades = ScalarMappable(norm, cmap)
    bar = figure.colorbar(shades, ax=owners, label=_text(colors.title), pad=0.02)
    bar.outline.set_visible(False)
    if colors.ticks:
        bar.set_ticks(colors.ticks, labels=[f"{value:g}" for value in colors.ticks])
        bar.minorticks_off()


def _color_map(colors: Colors) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    scale = LogNorm if colors.is_log else Normalize
    return (
        LinearSegmentedColormap.from_list("lens", colors.stops),
        scale(colors.low, colors.high),
    )


def _add_legend(panels: Sequence[Axes], owner: Axes) -> None:
    named = {str(line.get_label()): line for axes in panels for line in axes.lines}
    owner.legend(
        list(named.values()), list(named), loc="upper left", bbox_to_anchor=(1.01, 1),
        frameon=False, borderaxespad=0, handlelength=3,
    )  # fmt: skip


# --- text ---------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """A text with escaped dollar signs: a pair of them would be mathematics."""
    return text.replace("$", r"\$")


def _choose_fonts(figure: Figure) -> None:
    """Draw every character: in another installed font, or as its number if no font has it."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.text import Text

    texts: list[Text] = figure.findobj(Text)
    chars = frozenset("".join(text.get_text() for text in texts))
    families, covered = _fonts(findfont(FontProperties()), chars)
    for text in texts:
        if families:
            text.set_fontfamily([*rcParams["font.family"], *families])
        text.set_text("".join(_drawable(char, covered) for char in text.get_text()))


def _drawable(char: str, covered: frozenset[str]) -> str:
    return char if char in covered or char == "\n" else char.encode("unicode_escape").decode()


@lru_cache
def _fonts(usual: str, chars: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families needed in addition to the usual font, and the characters that they cover."""
    from matplotlib.font_manager import fontManager, get_font

    covered = chars & _characters(usual)
    families: list[str] = []
    for entry in fontManager.ttflist:
        if covered == chars:
            break
        # The last resort font draws a box for every character; bitmap fonts have one size.
        if entry.name.startswith("Last Resort") or not get_font(entry.fname).scalable:
            continue
        found = (chars - covered) & _characters(entry.fname)
        if found:
            families.append(entry.name)
            covered |= found
    return tuple(families), covered


def _characters(path: str) -> frozenset[str]:
    """Characters for which a font has a glyph."""
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(path).get_charmap()))
