"""Gradients as tidy tables: one row per matrix, one row per neuron.

The table of prompts and positions is the result's own, `BackwardLensResult.to_df`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from backward_lens_tl.captured import GradientCapture
from backward_lens_tl.gradients import MatrixGradient

if TYPE_CHECKING:
    import pandas as pd


def gradient_table(capture: GradientCapture) -> pd.DataFrame:
    """The gradient of each matrix as a whole, one row per prompt, matrix and layer.

    Args:
        capture: The gradients.

    Returns:
        Columns `prompt`, `matrix`, `layer`, `n_tokens` (of the prompt), `loss`, `rank` (paper,
        figure 4), `norm` (Frobenius norm), `singular_values` (a list, largest first). Where heads
        or experts have factors of their own there is no rank of all together: `rank` and `norm`
        are missing and the list is empty.
    """
    import pandas as pd

    lengths, losses = capture.mask.sum(1).tolist(), capture.loss.tolist()
    rows = [
        {
            "prompt": prompt,
            "matrix": gradient.matrix,
            "layer": gradient.layer,
            "n_tokens": lengths[prompt],
            "loss": losses[prompt],
            **_spectrum(gradient, prompt),
        }
        for prompt in range(len(lengths))
        for gradient in capture
    ]
    return pd.DataFrame(rows).astype({"rank": "Int64", "norm": "float64"})


def _spectrum(gradient: MatrixGradient, prompt: int) -> dict[str, Any]:
    if not gradient.has_joint_factors:
        return {"rank": None, "norm": None, "singular_values": []}
    values = gradient.singular_values(prompt)
    return {
        "rank": gradient.rank(prompt),
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
