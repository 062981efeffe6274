"""Sizes of the outer products of an edit: one each, found together and checked together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backward_lens_tl.editing.shift.cells import Cells, Standing
from backward_lens_tl.editing.shift.search import SizeSearch
from backward_lens_tl.editing.shift.trials import Trials
from backward_lens_tl.models import Host

_SMALL = 0.05
"""Length of the step from which the first size is guessed, in lengths of the residual stream."""

_UNKNOWN = 0.25
"""The first size if that step does not help, in lengths of the residual stream."""


@dataclass(frozen=True)
class Sized:
    """Sizes, and how the targets stand with them.

    Attributes:
        sizes: The size of each cell's outer product; 0 where nothing is written.
        standing: How each cell's token stands with them; `None` if that was not computed.
    """

    sizes: Float[Tensor, "n"]
    standing: Standing | None = None

    @property
    def leads(self) -> Bool[Tensor, "n"]:
        """Whether each token leads; false if that was not computed."""
        if self.standing is None:
            return torch.zeros_like(self.sizes, dtype=torch.bool)
        return self.standing.leads

    def surplus(self, probability: float | None) -> Float[Tensor, "n"]:
        """As in `Standing`; NaN if it was not computed."""
        if self.standing is None:
            return torch.full_like(self.sizes, torch.nan)
        return self.standing.surplus(probability)


@dataclass(frozen=True)
class Products:
    """Outer products whose sizes are to be found, on the model that they are added to.

    Attributes:
        trials: Runs the model.
        cells: What each of them is for.
        left: The input direction of each.
        values: The output direction of each, at size 1.
        effects: What each adds to the last residual stream, by an estimate.
    """

    trials: Trials
    cells: Cells
    left: Float[Tensor, "d_in n"]
    values: Float[Tensor, "n d_out"]
    effects: Float[Tensor, "n d_model"]

    def without(self) -> Sized:
        """The targets without an edit."""
        standing = self._standing(self.trials.logits)
        return Sized(torch.zeros_like(standing.margins, dtype=torch.float64), standing)

    def at(self, sizes: Float[Tensor, "n"]) -> Sized:
        """The targets with some sizes: one forward pass."""
        right = sizes[:, None].to(self.values) * self.values
        return Sized(sizes, self._standing(self.trials.logits_with(self.left, right)))

    def _standing(self, logits: Float[Tensor, "n d_vocab"]) -> Standing:
        return Standing.of(logits, self.cells.tokens)


def stepped_sizes(
    products: Products, step: float, *, n_steps: int, skip_if_answered: bool
) -> list[Sized]:
    """Add a step to each size until its token leads, a number of times at most.

    Args:
        products: The outer products.
        step: The step, which is also the first size.
        n_steps: Largest number of steps. With one, nothing is checked.
        skip_if_answered: Whether tokens that lead without an edit get no step at all.

    Returns:
        What was tried, the unedited model first.
    """
    tried = [products.without()]
    leads = tried[0].leads
    is_open = ~leads if skip_if_answered else torch.ones_like(leads)
    asked, sizes = is_open, torch.zeros_like(tried[0].sizes)
    for _ in range(n_steps):
        if not bool(is_open.any()):
            break
        sizes = sizes + step * is_open.to(sizes)
        tried.append(products.at(sizes) if n_steps > 1 else Sized(sizes))
        # A token that leads now may no longer do so when others have written more.
        is_open = asked & ~tried[-1].leads
    return tried


def least_sizes(
    host: Host,
    products: Products,
    *,
    factor: float,
    probability: float | None,
    n_passes: int,
    n_most: int,
) -> list[Sized]:
    """Search for the least size of each outer product with which all targets are reached.

    All are searched for in the same forward passes, because each also changes the others' targets.

    Args:
        host: The model.
        products: The outer products.
        factor: Multiple of the least size that is wanted.
        probability: The probability that every token of a target has to reach; `None` if it only
            has to lead.
        n_passes: Number of forward passes after which sizes that suffice are good enough.
        n_most: Largest number of forward passes.

    Returns:
        What was tried, the unedited model first.
    """
    tried = [products.without()]
    start = tried[0].surplus(probability)
    guesses = _guesses(host, products, probability) if bool((start <= 0).any()) else start
    searches: dict[int, SizeSearch] = {}
    for n_left in reversed(range(n_passes - n_most, n_passes)):
        for cell, surplus in enumerate(tried[-1].surplus(probability).tolist()):
            if cell in searches:
                searches[cell].add(float(tried[-1].sizes[cell]), surplus)
            elif surplus <= 0:  # from the start, or because of what is written for others
                searches[cell] = SizeSearch(surplus, float(guesses[cell]), factor)
        if all(search.is_settled for search in searches.values()):
            break
        sizes = torch.zeros_like(tried[0].sizes)
        for cell, search in searches.items():
            sizes[cell] = search.propose(is_last=n_left <= 0)
        tried.append(products.at(sizes))
    return tried


def best(tried: list[Sized], cells: Cells, probability: float | None) -> Sized:
    """Choose among what was tried.

    Args:
        tried: Sizes and the targets with them, in order.
        cells: What they are for.
        probability: What the targets have to reach.

    Returns:
        The last sizes that reach all targets; otherwise those that reach most of them, or come
        nearest.
    """

    def merit(sized: Sized) -> tuple[int, float]:
        worst = [min(own) for own in cells.by_request(sized.surplus(probability))]
        return sum(surplus > 0 for surplus in worst), min(worst)

    if bool((tried[-1].surplus(probability) > 0).all()):
        return tried[-1]
    return max(reversed(tried), key=merit)


def _guesses(host: Host, products: Products, probability: float | None) -> Float[Tensor, "n"]:
    """Where the surplus would be 0 if effects were as estimated and the readout were linear."""
    stream, cells = products.trials.stream, products.cells
    responses = (products.trials.reads * products.left.T).sum(-1, keepdim=True)
    effects = (responses * products.effects).to(stream)
    most = stream.norm(dim=-1) / effects.norm(dim=-1)
    step = _SMALL * most

    def surplus(vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
        logits = host.unembedding.logits(vectors)
        return Standing.of(logits, cells.tokens).surplus(probability)

    before = surplus(stream)
    slope = (surplus(stream + step[:, None] * effects) - before) / step
    found = -before / slope
    return torch.where((slope > 0) & (found > 0), found, _UNKNOWN * most).minimum(most)
