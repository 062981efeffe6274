"""Gradients as tidy tables: one row per matrix, one row per neuron.

The table of prompts and positions is the result's own, `BackwardLensResult.to_df`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from backward_lens_tl.arguments import check_index
from backward_lens_tl.captured import GradientCapture
from backward_lens_tl.errors import InputError
from backward_lens_tl.gradients import MatrixGradient, numerical_rank

if TYPE_CHECKING:
    import pandas as pd


def gradient_table(
    capture: GradientCapture, matrix: str | None = None, batch: int | None = None
) -> pd.DataFrame:
    """The gradient of each matrix as a whole, one row per prompt, matrix and layer.

    Each row takes a singular value decomposition of a matrix of at most `n x n`.

    Args:
        capture: The gradients.
        matrix: The one matrix to have rows of; `None` for all.
        batch: The one prompt to have rows of; `None` for all.

    Returns:
        Columns `prompt`, `matrix`, `layer`, `n_tokens` (of the prompt), `loss`, `rank` (paper,
        figure 4), `norm` (Frobenius norm), `singular_values` (a list, largest first). Where heads
        or experts have factors of their own there is no rank of all together: `rank` and `norm`
        are missing and the list is empty.

    Raises:
        InputError: If the matrix was not captured, or there is no such prompt.
    """
    import pandas as pd

    if matrix is not None and matrix not in capture.matrices:
        raise InputError(
            f"{matrix!r} was not captured; name one of {', '.join(capture.matrices)}, or ask for "
            "it with capture_gradients(..., matrices=...)"
        )
    lengths, losses = capture.mask.sum(1).tolist(), capture.loss.tolist()
    if batch is not None:
        check_index("prompt", batch, len(lengths))
    prompts = range(len(lengths)) if batch is None else [int(batch)]
    rows = [
        {
            "prompt": prompt,
            "matrix": gradient.matrix,
            "layer": gradient.layer,
            "n_tokens": lengths[prompt],
            "loss": losses[prompt],
            **_spectrum(gradient, prompt),
        }
        for prompt in prompts
        for gradient in capture
        if matrix in (None, gradient.matrix)
    ]
    return pd.DataFrame(rows).astype({"rank": "Int64", "norm": "float64"})


def _spectrum(gradient: MatrixGradient, prompt: int) -> dict[str, Any]:
    if not gradient.has_joint_factors:
        return {"rank": None, "norm": None, "singular_values": []}
    values = gradient.singular_values(prompt)
    return {
        "rank": numerical_rank(values, gradient.rounding(prompt)),
        "norm": float(torch.linalg.vector_norm(values)),
        "singular_values": values.tolist(),
    }


def neuron_table(capture: GradientCapture, matrix: str, layer: int, batch: int = 0) -> pd.DataFrame:
    """The neurons of one gradient beside its spanning vectors, one row per neuron and position.

    Args:
        capture: The gradients.
        matrix: Name of the matrix.
        layer: The layer, from 0.
        batch: Which prompt.

    Returns:
        Columns `neuron`, `neuron_norm`, `norm_rank` (0 for the longest neuron; equal ones in the
        order of their index), `position`, `token`, `similarity` (the cosine of the neuron and the
        position's spanning vector, missing where one of them is zero), in the order of neurons and
        positions (paper, figures 8 to 10).

    Raises:
        InputError: If the matrix was not captured, or its heads or experts have factors of their
            own.
    """
    import pandas as pd

    gradient = capture[matrix, layer]
    similarity = gradient.neuron_similarity(batch).cpu()
    norms = gradient.neuron_norms(batch).cpu()
    # The order by rank, sorted, is the rank by neuron.
    ranks = norms.argsort(descending=True, stable=True).argsort()
    neurons, positions = similarity.shape
    return pd.DataFrame(
        {
            "neuron": torch.arange(neurons).repeat_interleave(positions).numpy(),
            "neuron_norm": norms.repeat_interleave(positions).numpy(),
            "norm_rank": ranks.repeat_interleave(positions).numpy(),
            "position": torch.arange(positions).repeat(neurons).numpy(),
            "token": list(capture.str_tokens[batch]) * neurons,
            "similarity": similarity.flatten().numpy(),
        }
    )
