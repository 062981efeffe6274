"""Weight matrices, changed for a while and then put back to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError
from backward_lens_tl.models.sites import MatrixSite

Change = tuple[Tensor, Float[Tensor, "..."]]
"""A parameter, and what is added to it, laid out like it."""


@contextmanager
def stepped(
    sites: MatrixSite | Sequence[MatrixSite],
    changes: Float[Tensor, "..."] | Sequence[Float[Tensor, "..."]],
) -> Iterator[None]:
    """Add something to weight matrices, and put them back afterwards, whatever happens.

    The weights change in place, under frozen parameters and under `torch.no_grad()` as well, and
    autograd takes no note of it: a graph that a caller made before can still be used afterwards,
    when every bit is as it was. Inside the context it may not be differentiated.

    Takes a copy of each weight, and a change is as large as the weight.

    Args:
        sites: One matrix, or several.
        changes: What is added, in TransformerLens's orientation, `[d_in, d_out]` or `[head, d_in,
            d_out]`: one tensor per matrix. It is added in its own precision and then rounded to
            the weight's.

    Yields:
        Nothing; the weights are so inside the context.

    Raises:
        InputError: If there is not one change per matrix, or one has another shape; then nothing
            has changed.
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
    """Add to parameters, and put them back afterwards, whatever happens.

    Args:
        changes: What is added to each, one after the other: of several to one parameter the later
            sees the earlier.

    Yields:
        Nothing; the parameters are so inside the context.
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
    """Add to a parameter, so that autograd takes no note of it.

    Args:
        change: The parameter and what is added.

    Returns:
        The parameter, and a copy of what it was.
    """
    parameter, added = change
    weight = parameter.data  # which has a version counter of its own
    before = weight.clone()
    weight.add_(added.detach().to(weight.device))
    return parameter, before


def put_back(parameter: Tensor, before: Tensor) -> None:
    """Give a parameter the values that it had, so that autograd takes no note of it.

    Args:
        parameter: The parameter.
        before: Its values.
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
