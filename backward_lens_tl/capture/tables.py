"""Tables of a capture: one row per gradient, one row per neuron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl._checks import check_index, listed
from backward_lens_tl.capture.directions import numerical_rank
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_MOST_ENERGY = 0.99
_SPECTRUM = (
    "rank",
    "largest_rank",
    "input_rank",
    "vjp_rank",
    "norm",
    "top_energy",
    "rank_99",
)


def gradient_table(
    capture: GradientCapture,
    matrix: str | Sequence[str] | None = None,
    batch: int | None = None,
) -> pd.DataFrame:
    """`GradientCapture.gradient_df`."""
    import pandas as pd

    matrices = capture.matrices if matrix is None else listed(matrix)
    for name in matrices:
        if name not in capture.matrices:
            raise InputError(
                f"{name!r} was not captured; pass one of {', '.join(capture.matrices)}, or "
                "capture it with capture_gradients(..., matrices=...)"
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
            "is_last_layer": gradient.layer == capture.n_layers - 1,
            "n_tokens": lengths[prompt],
            "n_writing": n_writing,
            "loss": losses[prompt],
            **_spectrum(gradient, prompt, n_writing),
        }
        for prompt in prompts
        for gradient in capture
        if gradient.matrix in matrices
        for n_writing in [int((~gradient.is_zero[prompt]).sum())]
    ]
    counts = ("rank", "largest_rank", "input_rank", "vjp_rank", "rank_99")
    numbers = ("norm", "top_energy")
    return pd.DataFrame(rows).astype(
        {**dict.fromkeys(counts, "Int64"), **dict.fromkeys(numbers, "float64")}
    )


def _spectrum(gradient: MatrixGradient, prompt: int, n_writing: int) -> dict[str, Any]:
    if not gradient.has_joint_factors:
        return {**dict.fromkeys(_SPECTRUM), "singular_values": []}
    values, *of_factors = gradient.spectra(prompt)
    rounding = gradient.rounding(prompt)
    input_rank, vjp_rank = (numerical_rank(own, rounding) for own in of_factors)
    energy = values.square()
    held = energy.cumsum(0) / energy.sum()  # NaN where the gradient is zero
    found = (
        numerical_rank(values, rounding),
        min(n_writing, *map(len, of_factors)),
        input_rank,
        vjp_rank,
        float(torch.linalg.vector_norm(values)),
        float(held[0]),
        int((held < _MOST_ENERGY).sum()) + int(bool(energy.any())),
    )
    return {**dict(zip(_SPECTRUM, found, strict=True)), "singular_values": values.tolist()}


def norm_order(norms: Float[Tensor, "d_hidden"]) -> Int[Tensor, "d_hidden"]:
    """Rank of each neuron by its norm: 0 for the longest; ties in the order of their index."""
    # Sorting the permutation inverts it.
    return norms.argsort(descending=True, stable=True).argsort()


def neuron_table(capture: GradientCapture, matrix: str, layer: int, batch: int = 0) -> pd.DataFrame:
    """`GradientCapture.neuron_df`."""
    import pandas as pd

    gradient = capture[matrix, layer]
    similarity = gradient.neuron_similarity(batch).cpu()
    norms = gradient.neuron_norms(batch).cpu()
    ranks = norm_order(norms)
    neurons, positions = similarity.shape
    return pd.DataFrame(
        {
            "neuron": torch.arange(neurons).repeat_interleave(positions).numpy(),
            "neuron_norm": norms.repeat_interleave(positions).numpy(),
            "norm_order": ranks.repeat_interleave(positions).numpy(),
            "position": torch.arange(positions).repeat(neurons).numpy(),
            "token": list(capture.str_tokens[batch]) * neurons,
            "similarity": similarity.flatten().numpy(),
        }
    )
