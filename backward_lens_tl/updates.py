"""Weight matrices, changed for a while and then put back to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.sites import MatrixSite, Site


def single_weight(site: Site) -> MatrixSite:
    """A matrix that is one weight, used at every position.

    Args:
        site: Where a matrix is.

    Returns:
        The same.

    Raises:
        UnsupportedModelError: If it is the matrix of a mixture of experts.
    """
    if isinstance(site, MatrixSite):
        return site
    raise UnsupportedModelError(
        f"{site.matrix} of layer {site.layer} is {site.n_experts} experts, each with a weight of "
        "its own and the tokens that are routed to it; a step is taken on matrices that are one "
        "weight, such as those of attention (matrices='attn')"
    )


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
    # The data of a parameter has a version counter of its own.
    weights = [site.weight.parameter.data for site in wanted]
    before = [weight.clone() for weight in weights]
    try:
        for site, weight, change in zip(wanted, weights, added, strict=True):
            weight.add_(site.weight.as_stored(change.detach()).to(weight.device))
        yield
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)


def _check_change(site: MatrixSite, change: Tensor) -> None:
    shape = site.weight.in_out(site.weight.parameter.detach()).shape
    if change.shape != shape or not change.is_floating_point():
        raise InputError(
            f"the change of {site.matrix} in layer {site.layer} has shape {tuple(change.shape)} "
            f"and dtype {change.dtype}; it must be real numbers of shape {tuple(shape)}, "
            "TransformerLens's orientation"
        )
