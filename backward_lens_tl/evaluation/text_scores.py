"""What an edit does to ordinary text: perplexity, and divergence from the unedited model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.choices import Denominator
from backward_lens_tl.evaluation.divergence import kl_divergence
from backward_lens_tl.evaluation.perplexity import (
    Perplexity,
    Rows,
    TextPass,
    perplexity_of,
    text_passes,
)
from backward_lens_tl.models import Host

_MOST_POSITIONS = 512
"""The largest number of positions whose unedited logits are kept, each for the whole vocabulary."""

_AT_ONCE = 32
"""Positions that are compared at once, in float64."""


@dataclass(frozen=True)
class TextScores:
    """What is measured on texts.

    Attributes:
        perplexity: The perplexity.
        kl: The mean KL divergence from the unedited model, in nats; NaN without texts.
    """

    perplexity: Perplexity
    kl: float


class TextScorer:
    """Texts, and what the unedited model predicts there.

    Divergences are measured at every position of the texts, or at every k-th for the least k that
    leaves at most 512.

    Args:
        host: The unedited model.
        rows: The token ids of each text, at least two.
        denominator: As for `perplexity`.

    Attributes:
        unedited: The scores of the unedited model.
    """

    def __init__(self, host: Host, rows: Rows, denominator: Denominator) -> None:
        self._host, self._rows, self._denominator = host, rows, denominator
        n_predicted = sum(len(row) - 1 for row in rows)
        self._step = max(1, math.ceil(n_predicted / _MOST_POSITIONS))
        self._unedited: list[Tensor] = []
        # On the CPU, because next to a large model a GPU may have no memory left for them.
        read = perplexity_of(
            self._passes(lambda own: self._unedited.append(own.cpu())), denominator
        )
        self.unedited = TextScores(read, 0.0 if rows else math.nan)

    def edited(self) -> TextScores:
        """Measure the model as it is now.

        Returns:
            The scores.
        """
        unedited, found = iter(self._unedited), []

        def compare(own: Float[Tensor, "n d_vocab"]) -> None:
            before = next(unedited).to(own.device)
            for pair in zip(before.split(_AT_ONCE), own.split(_AT_ONCE), strict=True):
                found.extend(kl_divergence(*pair).tolist())

        read = perplexity_of(self._passes(compare), self._denominator)
        return TextScores(read, math.fsum(found) / len(found) if found else math.nan)

    @torch.no_grad()
    def _passes(self, see: Callable[[Float[Tensor, "n d_vocab"]], None]) -> Iterator[TextPass]:
        """The forward passes over the texts; `see` gets the logits at the compared positions."""
        n_before = 0
        for each in text_passes(self._host, self._rows):
            places = each.pairs.mask.nonzero()
            rows, positions = places[-n_before % self._step :: self._step].T
            n_before += len(places)
            see(each.logits[rows, positions])
            yield each
