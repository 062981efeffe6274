"""Low-rank and dense edits, and a check that a model is unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def low_rank(
    matrix: str = "W_out",
    layer: int = 1,
    shape: tuple[int, int] = (52, 24),
    rank: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
) -> MatrixDelta:
    d_in, d_out = shape
    return MatrixDelta(
        matrix,
        layer,
        left=random(d_in, rank, seed=seed, dtype=dtype),
        right=random(rank, d_out, seed=seed + 100, dtype=dtype),
        bias=random(d_out, seed=seed + 200, dtype=dtype) if bias else None,
    )


def edit(*matrices: MatrixDelta) -> WeightDelta:
    return WeightDelta(tuple(matrices), {"method": "test"})


def of_model(
    model: object, matrix: str, layer: int, *, rank: int = 2, seed: int = 0
) -> MatrixDelta:
    """A random edit of a matrix of a model, in its dtype, with its bias if it has one."""
    [site] = find_editable(host_of(model), matrix, layer)
    dtype = site.weight.parameter.dtype
    made = low_rank(matrix, layer, site.shape, rank, seed, dtype)
    return (
        made
        if site.bias is None
        else replace(made, bias=random(site.shape[1], seed=seed + 5, dtype=dtype))
    )


def everything(model: object, n_layers: int = 3) -> WeightDelta:
    """An edit of all matrices of all layers, with biases."""
    host = host_of(model)
    names = (*host.matrices("attn"), *host.matrices("mlp"))
    return edit(
        *(
            of_model(model, name, layer, seed=13 * layer + place)
            for layer in range(n_layers)
            for place, name in enumerate(names)
        )
    )


@contextmanager
def unchanged(model: object) -> Iterator[None]:
    """Check that a block leaves every bit of a model, its gradients and flags unchanged."""
    host = host_of(model)
    named = host.parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    flags = {name: parameter.requires_grad for name, parameter in named.items()}
    versions = {name: parameter._version for name, parameter in named.items()}
    fingerprint = host.fingerprint()
    yield
    after = host_of(model).parameters()
    assert after.keys() == named.keys()
    for name, parameter in after.items():
        assert parameter is named[name]
        assert torch.equal(parameter.detach(), before[name]), name
        assert parameter.requires_grad == flags[name]
        assert parameter._version == versions[name]
        assert parameter.grad is None
    assert host_of(model).fingerprint() == fingerprint
