"""Temporary changes of weight matrices, restored to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models.sites import MatrixSite

Change = tuple[Tensor, Float[Tensor, "..."]]
"""A parameter, and a tensor of the same layout to add to it."""


@contextmanager
def stepped(
    sites: MatrixSite | Sequence[MatrixSite],
    changes: Float[Tensor, "..."] | Sequence[Float[Tensor, "..."]],
) -> Iterator[None]:
    """Add to weight matrices inside the context, and restore them afterwards.

    Weights change in place, even if they are frozen or under `torch.no_grad()`, and autograd does
    not notice. A graph that a caller built before must not be differentiated inside the context; it
    is valid again afterwards.

    This copies each weight, and a change is as large as its weight.

    Args:
        sites: One matrix, or several.
        changes: One tensor per matrix in TransformerLens's orientation, `[d_in, d_out]` or
            `[head, d_in, d_out]`. It is added in its own precision and then rounded to the
            weight's.

    Yields:
        Nothing.

    Raises:
        InputError: If there is not one change per matrix, or one has another shape; then nothing
            changes.
    """
    wanted = [sites] if isinstance(sites, MatrixSite) else list(sites)
    added = [changes] if isinstance(changes, Tensor) else list(changes)
    if len(wanted) != len(added):
        raise InputError(
            f"there are {len(added)} changes for {len(wanted)} matrices; pass one for each"
        )
    for site, change in zip(wanted, added, strict=True):
        _check_change(site, change)
    with changed(
        (site.weight.parameter, site.weight.as_stored(change))
        for site, change in zip(wanted, added, strict=True)
    ):
        yield


@contextmanager
def changed(changes: Iterable[Change]) -> Iterator[None]:
    """Add to parameters inside the context, and restore them afterwards.

    Args:
        changes: The changes, applied in this order; one parameter may have several.

    Yields:
        Nothing.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for change in changes:
            kept.append(add_in_place(change))
        yield
    finally:
        for parameter, before in reversed(kept):
            put_back(parameter, before)


def add_in_place(change: Change) -> tuple[Tensor, Tensor]:
    """Add to a parameter without autograd noticing.

    Args:
        change: The parameter and what to add.

    Returns:
        The parameter, and a copy of its old values.
    """
    parameter, added = change
    weight = parameter.data  # which has its own version counter
    before = weight.clone()
    weight.add_(added.detach().to(weight.device))
    return parameter, before


def put_back(parameter: Tensor, before: Tensor) -> None:
    """Restore a parameter without autograd noticing.

    Args:
        parameter: The parameter.
        before: Its old values.
    """
    parameter.data.copy_(before)


def _check_change(site: MatrixSite, change: Tensor) -> None:
    shape = site.weight.in_out(site.weight.parameter.detach()).shape
    if change.shape != shape or not change.is_floating_point():
        raise InputError(
            f"the change of {site.matrix} in layer {site.layer} has shape {tuple(change.shape)} "
            f"and dtype {change.dtype}; it must be real numbers of shape {tuple(shape)}, "
            "TransformerLens's orientation"
        )
