"""Short prompts by which a model is known again, from what its matrices read there."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.editing.statistics.activations import activations
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import MatrixSite

PROBE_TOKENS = 16
"""Tokens of such a prompt, at most."""

_LIKE = 0.1
"""Part of its length by which what is read there may differ: other models differ by all of it."""


def last_reads(
    host: Host, sites: Sequence[MatrixSite], probe: Sequence[int]
) -> tuple[Float[Tensor, "d_in"], ...]:
    """What each matrix reads at the last position of a prompt.

    Args:
        host: The model.
        sites: The matrices.
        probe: Token ids of the prompt.

    Returns:
        In float32, on the CPU.
    """
    inputs = activations(host, [probe], sites).inputs
    return tuple(inputs[site.matrix, site.layer][0, -1].float().cpu() for site in sites)


def is_alike(own: Float[Tensor, "d_in"], now: Float[Tensor, "_"]) -> bool:
    """Whether a matrix reads what it read before, but for what a few edits change."""
    return own.shape == now.shape and float((own - now).norm()) <= _LIKE * float(own.norm())
