"""Tables of a training record with known numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd


def training_frame(
    steps: Sequence[int] = (1, 11, 21),
    layers: int = 4,
    matrices: Sequence[str] = ("W_in", "W_out"),
    *,
    tokens: Sequence[str] = (" Paris", " Rome", "on"),
    process: int = 0,
    has_change: bool = True,
    has_reference: bool = True,
) -> pd.DataFrame:
    """A record with different numbers in each row; later layers have larger norms."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        for matrix in matrices:
            for layer in range(layers):
                at = len(rows)
                norm = (1 + layer) * (2.0 if matrix == "W_out" else 1.0) / math.sqrt(step)
                top = [tokens[(at + k) % len(tokens)] for k in range(2)]
                rows.append(
                    {
                        "step": step,
                        "process": process,
                        "matrix": matrix,
                        "layer": layer,
                        "positions": 10,
                        "norm": norm,
                        "effective_rank": 2.0,
                        "energy": [0.5 + layer / 100, 0.25],
                        "top_tokens": [top, top[::-1]],
                        "bottom_tokens": [top[::-1], top],
                        "reference_cosine": math.cos(at) if has_reference else math.nan,
                        "change_norm": norm / 100 if has_change else math.nan,
                        "change_cosine": math.sin(at) if has_change else math.nan,
                        "change_outside": 1 / (1 + at) if has_change else math.nan,
                        "change_tokens": [tokens[at % len(tokens)]] if has_change else [],
                    }
                )
    return pd.DataFrame(rows)
