"""Ranks of the target in the updates at the last token, read in several ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.models import host_of
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.readout.jacobian_projection import CarriedLens
from backward_lens_tl.readout.projections import LogitLens, NormalizedLogitLens
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.jacobian_controls import (
    combinations,
    shuffled_weights,
    targets_of_others,
    turned,
)
from backward_lens_tl.reproduction.vectors import PromptVjps, carried, ranks_by_layer

DIRECT, NORMALIZED = "read directly", "read directly, normalized"
THROUGH, EXACT = "through J", "carried by its own prompt"
EARLIER, LATER = "through the J of an earlier layer", "through the J of a later layer"
ANOTHER = "another prompt's target, through J"
TURNED = "through a random matrix R"
SPAN = "random activations, through J"
SHUFFLED, SHUFFLED_DIRECT = "shuffled weights, through J", "shuffled weights, read directly"
LAST = "last layer's update, through J"
CIRCULAR = "last layer's update, through J J^T"
TURNED_CIRCULAR = "last layer's update, through R R^T"

_MOST_EXACT = 20

_Vectors = Float[Tensor, "prompt layer d_model"]
_Matrices = Float[Tensor, "layer d_model d_model"]


def ranks_by_reading(
    evidence: Evidence, lens: CarriedLens
) -> dict[str, Int[Tensor, "prompt layer"]]:
    """Rank the target in the update of `W_out` at the last token.

    Args:
        evidence: The prompts and the model.
        lens: The Jacobian Lens.

    Returns:
        The ranks by reading; those of `EXACT` are of fewer prompts.
    """
    host, every = host_of(evidence.model), evidence.vjps
    read = partial(ranks_by_layer, LogitLens(host))
    updates = stacked_updates(every)
    matrices = matrices_of(lens, evidence.n_layers).to(updates)
    through = _times(matrices, updates)
    others = targets_of_others([each.target for each in every])
    with_others = [replace(each, target=other) for each, other in zip(every, others, strict=True)]
    chosen = [every[row] for row in exact_rows(len(every))]
    found = {
        DIRECT: read(updates, every),
        NORMALIZED: ranks_by_layer(NormalizedLogitLens(host), updates, every),
        THROUGH: read(through, every),
        EXACT: read(torch.stack([carried(host, each, each.updates) for each in chosen]), chosen),
        ANOTHER: read(through, with_others),
    }
    for reading, vectors in _controls(evidence, matrices, updates):
        found[reading] = read(vectors, every)
    return found


def ranks_through(evidence: Evidence, lens: CarriedLens) -> Int[Tensor, "prompt layer"]:
    """Rank the target in the same updates, read through another fit of the Jacobian Lens."""
    updates = stacked_updates(evidence.vjps)
    matrices = matrices_of(lens, evidence.n_layers).to(updates)
    vectors = _times(matrices, updates)
    return ranks_by_layer(LogitLens(host_of(evidence.model)), vectors, evidence.vjps)


def stacked_updates(prompts: Sequence[PromptVjps]) -> Float[Tensor, "prompt layer d_model"]:
    """What an update adds at the last token of every prompt, at least in float32."""
    return at_least_float32(torch.stack([each.updates for each in prompts]))


def exact_rows(n_prompts: int) -> list[int]:
    """The prompts that carry their own updates, spread over all."""
    return list(range(n_prompts))[:: max(1, n_prompts // _MOST_EXACT)][:_MOST_EXACT]


def matrices_of(lens: CarriedLens, n_layers: int) -> Float[Tensor, "layer d_model d_model"]:
    """The Jacobian of every layer; that of the last one is the identity.

    Args:
        lens: The Jacobian Lens.
        n_layers: Number of layers of the model.

    Returns:
        The matrices, on the CPU.

    Raises:
        JacobianLensError: If the lens lacks a layer.
    """
    lens.check_blocks(range(n_layers))
    matrices = lens.jacobians.matrices
    identity = torch.eye(lens.jacobians.d_model)
    return torch.stack([*(matrices[layer] for layer in range(n_layers - 1)), identity])


def _controls(
    evidence: Evidence, matrices: _Matrices, updates: _Vectors
) -> Iterator[tuple[str, _Vectors]]:
    """What the Logit Lens reads, by reading; one is in memory at a time."""
    generator = torch.Generator().manual_seed(evidence.seed)
    for reading, step in ((EARLIER, -1), (LATER, 1)):
        yield reading, _times(matrices[_a_quarter_away(len(matrices), step)], updates)
    random = turned(matrices, generator)
    yield TURNED, _times(random, updates)
    streams = torch.stack([each.stream for each in evidence.vjps])
    yield SPAN, _times(matrices, combinations(streams.to(updates), updates.norm(dim=-1), generator))
    with shuffled_weights(host_of(evidence.model), generator):
        shuffled = stacked_updates(evidence.capture_vjps())
    yield SHUFFLED_DIRECT, shuffled
    yield SHUFFLED, _times(matrices, shuffled)
    last = updates[:, -1:].expand_as(updates)
    yield LAST, _times(matrices, last)
    for reading, own in ((CIRCULAR, matrices), (TURNED_CIRCULAR, random)):
        yield reading, _times(own, _times(own.mT, last))


def _times(matrices: _Matrices, vectors: _Vectors) -> _Vectors:
    return torch.einsum("lij,plj->pli", matrices, vectors)


def _a_quarter_away(n_layers: int, step: int) -> list[int]:
    """For each layer, the one a quarter of the depth away: in one direction, or else the other."""
    distance = step * max(1, round(n_layers / 4))
    return [
        layer + distance if 0 <= layer + distance < n_layers else layer - distance
        for layer in range(n_layers)
    ]
