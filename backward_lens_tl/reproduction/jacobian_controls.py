"""Vectors and matrices that lack one property of what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.weight_patching import stepped


def turned(
    matrices: Float[Tensor, "layer d_model d_model"], generator: torch.Generator
) -> Float[Tensor, "layer d_model d_model"]:
    """Random matrices with the singular values of others, and so with their Frobenius norms.

    Args:
        matrices: The matrices.
        generator: Chooses two rotations per matrix.

    Returns:
        `Q M R` with random orthogonal `Q` and `R`.
    """
    found = []
    for matrix in matrices:
        left, right = (_rotation(len(matrix), generator).to(matrix) for _ in range(2))
        found.append(left @ matrix @ right)
    return torch.stack(found)


def combinations(
    streams: Float[Tensor, "prompt layer d_model"],
    norms: Float[Tensor, "prompt layer"],
    generator: torch.Generator,
) -> Float[Tensor, "prompt layer d_model"]:
    """Random vectors in the span of each layer's activations.

    Args:
        streams: Residual streams.
        norms: The norms that the vectors get.
        generator: Chooses the coefficients.

    Returns:
        Sums of all prompts' streams with normally distributed coefficients, other ones in each row.
    """
    n_prompts = len(streams)
    coefficients = torch.randn(n_prompts, n_prompts, generator=generator).to(streams)
    found = torch.einsum("ij,jld->ild", coefficients, streams)
    combined: Tensor = found * (norms / found.norm(dim=-1))[..., None]
    return combined


def targets_of_others(targets: Sequence[int]) -> list[int]:
    """For each prompt, the target of the next one that has another.

    Args:
        targets: Each prompt's target.

    Returns:
        As many targets.

    Raises:
        InputError: If all targets are the same.
    """
    if len(set(targets)) < 2:
        raise InputError("all prompts have the same target; pass prompts with different targets")
    rotated = [(*targets[at + 1 :], *targets[:at]) for at in range(len(targets))]
    return [
        next(other for other in later if other != target)
        for target, later in zip(targets, rotated, strict=True)
    ]


@contextmanager
def shuffled_weights(host: Host, generator: torch.Generator) -> Iterator[None]:
    """Permute the entries of every weight matrix of the blocks inside the context.

    Embeddings, the unembedding, norms and biases stay as they are. Weights are restored to the last
    bit.

    Args:
        host: The model.
        generator: Chooses a permutation per matrix.

    Yields:
        Nothing.
    """
    sites = find_editable(host, "all", None)
    changes = []
    for site in sites:
        weight = site.weight.in_out(site.weight.parameter.detach())
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        changes.append(weight.flatten()[order].view(weight.shape) - weight)
    with stepped(sites, changes):
        yield


def _rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix; all are equally likely, because signs of columns are fixed."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns, triangle = torch.linalg.qr(gaussian)
    rotation: Tensor = columns * triangle.diagonal().sign()
    return rotation
