"""Where in the residual stream the weight matrices read and write."""

from __future__ import annotations

from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import ATTENTION_MATRICES, READING_MATRICES


def block_of(host: Host, matrix: str, layer: int) -> int:
    """The block whose Jacobian carries a matrix's inputs or outputs to the last layer.

    Args:
        host: The model.
        matrix: The matrix: its inputs if it reads the residual stream, else its outputs.
        layer: Its layer.

    Returns:
        The first block whose output the residual stream passes at that point or later; -1 for the
        embedding.
    """
    is_read = matrix in READING_MATRICES
    reads_before = matrix in ATTENTION_MATRICES or is_parallel(host)
    return layer - 1 if is_read and reads_before else layer


def is_parallel(host: Host) -> bool:
    """Whether attention and MLP read the same point of the residual stream."""
    return bool(getattr(host.model.cfg, "parallel_attn_mlp", False))
