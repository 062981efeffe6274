"""The pairs `(x_i, delta_i)` that span the gradients of requests; editors compute edits from them.

The gradient of a request's loss is `dL/dW = sum_i outer(x_i, delta_i)` over the positions that the
model reads (paper, equation 8). Editors that transform gradients transform these vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backward_lens_tl.capture.bound_objectives import SequenceNLL
from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.forward_backward import record
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import check_sharing
from backward_lens_tl.models.sites import MatrixName, MatrixSite

Positions = Literal["all", "answer"]
"""All positions that the model reads, or those at which a token of the target is predicted."""

_BATCH = 16


@dataclass(frozen=True, repr=False)
class SpanningPairs:
    """The pairs that span the gradient of one matrix, for several requests.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        inputs: `x_i`, what the matrix reads.
        vjps: `delta_i`, the gradient of the request's loss at what it writes. The loss is the mean
            over the target's tokens, in nats.
        mask: False at padding, where `x_i` or `delta_i` is zero, and at positions that were not
            requested.
    """

    matrix: MatrixName
    layer: int
    inputs: Float[Tensor, "request pos d_in"]
    vjps: Float[Tensor, "request pos d_out"]
    mask: Bool[Tensor, "request pos"]

    @property
    def rows(self) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """All `x_i` and all `delta_i` without those that the mask hides."""
        return self.inputs[self.mask], self.vjps[self.mask]

    def __repr__(self) -> str:
        pairs = f"{int(self.mask.sum())} pairs of {len(self.mask)} requests"
        return f"SpanningPairs({self.matrix} of layer {self.layer}, {pairs})"


def spanning_pairs(
    host: Host,
    requests: Sequence[TokenizedRequest],
    sites: Sequence[MatrixSite],
    positions: Positions = "all",
) -> list[SpanningPairs]:
    """Capture the pairs of requests in one forward and one backward pass.

    Args:
        host: The model.
        requests: The requests; the model reads their targets as well (teacher forcing).
        sites: The matrices.
        positions: Which positions to return pairs for.

    Returns:
        The pairs of each matrix, in float32, or in float64 if the model computes in it.
    """
    check_sharing(host, sites)
    targets = [each.target for each in requests]
    prompts = Continuations.of(host, [each.prompt for each in requests], targets)
    objective = SequenceNLL(targets, is_mean=True)
    gradients = record(host, prompts.batch, objective, sites).gradients
    wanted = prompts.batch.mask
    if positions == "answer":
        device = wanted.device
        first = torch.tensor([len(each.prompt) - 1 for each in requests], device=device)
        wanted = wanted & (torch.arange(wanted.shape[1], device=device) >= first[:, None])
    found = []
    for site in sites:
        own = gradients[site.matrix, site.layer]
        mask = wanted.to(own.inputs.device) & ~own.is_zero
        found.append(SpanningPairs(site.matrix, site.layer, own.inputs, own.vjps, mask))
    return found


def pair_batches(
    host: Host,
    requests: Sequence[TokenizedRequest],
    sites: Sequence[MatrixSite],
    positions: Positions = "all",
    size: int = _BATCH,
) -> Iterator[list[SpanningPairs]]:
    """Capture the pairs of requests in batches of a size, with those of each matrix in a list."""
    for start in range(0, len(requests), size):
        yield spanning_pairs(host, requests[start : start + size], sites, positions)


def joined_pairs(
    host: Host,
    requests: Sequence[TokenizedRequest],
    sites: Sequence[MatrixSite],
    positions: Positions = "all",
) -> list[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]]:
    """Capture the pairs of any number of requests, in as many passes as they need.

    Args:
        host: The model.
        requests: The requests.
        sites: The matrices.
        positions: Which positions to return pairs for.

    Returns:
        All `x_i` and all `delta_i` of each matrix, without those that a mask hides.
    """
    # A caller's hooks, such as an activation patch, may expect all prompts in one pass.
    size = len(requests) if host.hooked_modules else _BATCH
    batches = pair_batches(host, requests, sites, positions, size)
    return [
        (torch.cat(inputs), torch.cat(vjps))
        for own in zip(*batches, strict=True)
        for inputs, vjps in [zip(*(pairs.rows for pairs in own), strict=True)]
    ]
