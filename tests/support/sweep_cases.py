"""Rows of a small sweep, and how to compare sweeps."""

from __future__ import annotations

import numpy as np
import pandas as pd

ROWS = [
    {"prompt": "The capital of France is", "target": " Paris", "subject": "France", "id": "f"},
    {"prompt": "Rome is in Italy and Paris is", "target": " the", "subject": "Paris", "id": "r"},
    {"prompt": "Messi plays", "target": " in", "subject": "Messi", "answer": " the", "id": "m"},
    {"prompt": "A river runs through", "target": " Rome", "id": "a"},
    {"prompt": "The dog of the king runs to", "target": 40, "answer": " Paris is", "id": "d"},
]
"""Prompts of several lengths, with and without a subject and an original answer."""


def assert_close(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Compare tables up to float32 rounding."""
    assert list(left) == list(right)
    assert len(left) == len(right)
    for name in left:
        one, other = left[name], right[name]
        if pd.api.types.is_float_dtype(one.dtype):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)
        elif name.endswith(("_scores", "singular_values")):
            for mine, theirs in zip(one, other, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            plain = [
                [list(v) if isinstance(v, np.ndarray) else None if pd.isna(v) else v for v in each]
                for each in (one, other)
            ]
            assert plain[0] == plain[1], name
