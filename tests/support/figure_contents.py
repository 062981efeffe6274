"""Lines, bands, heatmaps and labels of a figure of either library."""

from __future__ import annotations

import html
from typing import Any

import numpy as np


def lines(figure: Any, panel: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The points of each line of one panel, of a figure of either library."""
    if hasattr(figure, "data"):
        axis = "x" if panel == 0 else f"x{panel + 1}"
        found = {t.name: (t.x, t.y) for t in figure.data if t.name and t.xaxis == axis}
    else:
        found = {line.get_label(): line.get_data() for line in figure.axes[panel].lines}
    return {name: tuple(np.array(p, float) for p in points) for name, points in found.items()}


def bands(figure: Any) -> list[np.ndarray]:
    """The corners of each shaded area of a figure of either library, unordered."""
    if hasattr(figure, "data"):
        outlines = [
            [(x, y) for x, y in zip(trace.x, trace.y, strict=True) if x is not None]
            for trace in figure.data
            if trace.fill == "toself"
        ]
    else:
        outlines = [
            [point for path in area.get_paths() for point in path.vertices.tolist()]
            for axes in figure.axes
            for area in axes.collections
        ]
    return [np.unique(np.array(outline), axis=0) for outline in outlines]


def heatmaps(figure: Any) -> list[np.ndarray]:
    """The values of each heatmap, of a figure of either library."""
    if hasattr(figure, "data"):
        return [np.array(trace.z, float) for trace in figure.data if trace.type == "heatmap"]
    meshes = [
        mesh
        for axes in figure.axes
        for mesh in axes.collections
        if axes.get_label() != "<colorbar>" and mesh.get_array() is not None
    ]
    return [np.ma.filled(mesh.get_array().astype(float), np.nan) for mesh in meshes]


def axis_labels(figure: Any) -> tuple[list[str], list[str]]:
    """The labels of the first chart's columns and rows, of a figure of either library."""
    if hasattr(figure, "data"):
        axes = figure.layout.xaxis, figure.layout.yaxis
        return tuple([html.unescape(text) for text in axis.ticktext] for axis in axes)
    axes = figure.axes[0]
    ticks = axes.get_xticklabels(), axes.get_yticklabels()
    return tuple([tick.get_text() for tick in each] for each in ticks)
