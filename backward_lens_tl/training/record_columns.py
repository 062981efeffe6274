"""The table of a training record, column by column. Names, types and order are stable."""

from __future__ import annotations

from backward_lens_tl.runs.columns import Column
from backward_lens_tl.runs.columns import key_column as _key

ROWS = (
    _key("step", "int64", "the optimizer step, from 1"),
    _key("process", "int32", "the process, from 0"),
    _key("matrix", "string", "TransformerLens's name of the matrix"),
    _key("layer", "int32", "the layer, from 0"),
    Column("positions", "int32", "positions of the step's backward passes that have a gradient"),
    Column("norm", "float64", "Frobenius norm of the gradient"),
    Column("effective_rank", "float64", "(sum of s^2)^2 / (sum of s^4) of the singular values s"),
    Column("energy", "list<float64>", "share of each main direction in the squared norm"),
    Column("top_tokens", "list<list<string>>", "tokens that gradient descent raises"),
    Column("bottom_tokens", "list<list<string>>", "tokens that it lowers"),
    Column("reference_cosine", "float64", "cosine to the gradient of the reference prompt"),
    Column("change_norm", "float64", "Frobenius norm of the optimizer's change of the matrix"),
    Column("change_cosine", "float64", "cosine between the change and minus the gradient"),
    Column(
        "change_outside",
        "float64",
        "share of the change's squared norm outside the gradient's column and row spaces",
    ),
    Column("change_tokens", "list<string>", "tokens of the change's first singular direction"),
)
"""One row per watched step, matrix and layer. Numbers that were not measured are NaN."""

TABLES = {"rows": ROWS}
